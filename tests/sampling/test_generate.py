"""Prompts to completions: stop strings, streaming, seeds, what is refused, and the command."""

import collections
import dataclasses
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import jax
import pytest
import tokenizers

from llm_jax import errors
from llm_jax.data import token_ids
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.sampling import beams
from llm_jax.sampling import decode
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from llm_jax.sampling import stops as stops_lib
from tests import helpers
from tests.sampling import spelling

ROOT = pathlib.Path(__file__).parents[2]
GREEDY = samplers.SamplingParams(temperature=0.0)

# --- stop strings -------------------------------------------------------------------------------

# Few letters: stop strings overlap, repeat and contain each other.
short_texts = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", max_size=4), max_size=3)


def _before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Returns the text before the stop string that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@st.composite
def _pieces(draw):
    text = draw(short_texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(_pieces(), stop_lists)
def test_text_passes_up_to_the_first_stop_string_however_it_is_cut(pieces, stops):
    expected, is_stopped = _before_first_stop("".join(pieces), stops)
    scanner = stops_lib.StopScanner(stops)
    passed = ""
    for piece in pieces:
        passed += scanner.feed(piece)
        # What is out stays out: it must never be more than the end result.
        assert expected.startswith(passed)
    assert scanner.is_stopped == is_stopped
    assert passed + scanner.flush() == expected
    assert scanner.feed("more") == ("" if is_stopped else scanner.feed("") + "more")


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(_pieces(), stop_lists)
def test_no_more_is_held_back_than_might_begin_a_stop_string(pieces, stops):
    scanner = stops_lib.StopScanner(stops)
    fed = passed = ""
    for piece in pieces:
        fed, passed = fed + piece, passed + scanner.feed(piece)
        if not scanner.is_stopped:
            held = fed[len(passed) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)


# --- a model that spells ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spelled():
    mesh, rules = helpers.make_mesh(rules="tp")
    with jax.set_mesh(mesh):
        model = decode.prepare_model(
            spelling.spelling_model(spelling.spelling_config(), mesh, rules)
        )
    return load.Loaded(model, tokenizer_lib.load("bytes"), mesh, 0)


@pytest.fixture(scope="module")
def babbling():
    """A random byte model."""
    mesh, rules = helpers.make_mesh(rules="tp")
    config = helpers.tiny_model_config(vocab_size=256, max_length=64)
    with jax.set_mesh(mesh):
        model = decode.prepare_model(helpers.random_model(config, mesh, rules))
    return load.Loaded(model, tokenizer_lib.load("bytes"), mesh, 0)


def _complete(loaded, *texts, max_tokens=24, params=GREEDY, **kwargs):
    prompts = [generate.Prompt(text) for text in texts]
    return list(generate.generate(loaded, prompts, params, max_tokens=max_tokens, **kwargs))


def test_text_is_continued_until_the_tokens_are_used_up(spelled):
    (one,) = _complete(spelled, "n", max_tokens=24)
    circle = spelling.LETTERS[1:] + spelling.LETTERS * 3
    assert one.completion == circle[:24].decode()
    assert (one.prompt, one.finish_reason, one.num_tokens) == ("n", "length", 24)


def test_the_end_of_the_text_ends_it(spelled):
    one, other = _complete(spelled, "q", "n", max_tokens=12)
    assert (one.completion, one.finish_reason, one.num_tokens) == ("u", "eos", 2)
    assert (other.finish_reason, other.num_tokens) == ("length", 12)


@pytest.mark.parametrize(
    ("stops", "completion"),
    [(["x"], "é日🎉"), (["日🎉"], "é"), (["🎉x ", "x"], "é日🎉"), (["é"], ""), (["", "zzz"], None)],
)
def test_a_stop_string_ends_it_and_is_cut_off(spelled, stops, completion):
    (one,) = _complete(spelled, "n", stops=stops)
    if completion is None:
        assert one.finish_reason == "length"
    else:
        assert (one.completion, one.finish_reason) == (completion, "stop")
        pieces = []
        _complete(spelled, "n", stops=stops, on_text=pieces.append)
        assert "".join(pieces) == completion


def test_a_stop_string_does_not_look_back_into_the_prompt(spelled):
    (one,) = _complete(spelled, "né", stops=["né日", "é"], max_tokens=10)
    assert one.completion.startswith("日🎉x")


def test_rows_that_stop_early_leave_the_others_as_they_are(spelled):
    texts = ["n", "q", "x", "日"]
    together = _complete(spelled, *texts, stops=["日"], max_tokens=40)
    assert [one.prompt for one in together] == texts
    assert together == [_complete(spelled, t, stops=["日"], max_tokens=40)[0] for t in texts]
    assert [one.finish_reason for one in together] == ["stop", "eos", "stop", "stop"]


def test_an_empty_prompt_begins_a_text(spelled):
    (one,) = _complete(spelled, "", max_tokens=11)
    assert one.completion == "né日🎉x"
    assert one.prompt == ""


# --- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 24])
def test_streamed_text_is_the_completion(spelled, max_tokens):
    pieces = []
    (one,) = _complete(spelled, "n", max_tokens=max_tokens, on_text=pieces.append)
    assert "".join(pieces) == one.completion
    (whole,) = _complete(spelled, "n", max_tokens=max_tokens)
    assert whole == one
    # A character comes once its last byte has, not in halves.
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert one.completion == (spelling.LETTERS[1:] + spelling.LETTERS * 2)[:max_tokens].decode(
        "utf-8", "replace"
    )


def test_text_is_streamed_while_it_is_made(spelled):
    pieces = []
    _complete(spelled, "n", max_tokens=48, on_text=pieces.append)
    assert len(pieces) > 12


def test_random_bytes_stream_as_they_decode(babbling):
    params = samplers.SamplingParams(temperature=3.0)
    pieces = []
    (one,) = _complete(babbling, "ab", params=params, on_text=pieces.append)
    assert "".join(pieces) == one.completion
    assert one == _complete(babbling, "ab", params=params)[0]


def _wordpiece() -> tokenizer_lib.Tokenizer:
    """A tokenizer whose text is known only at the end: its decoder cleans up across tokens."""
    words = ["[UNK]", "[END]", "hello", "world", "##ly", "!"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    definition = json.loads(inner.to_str())
    raw = {"kind": "huggingface", "tokenizer": definition, "eos_id": 1, "pad_id": 1}
    return tokenizer_lib.from_dict(raw)


def _byte_fallback() -> tokenizer_lib.Tokenizer:
    """A tokenizer that spells unknown characters in bytes, as Llama's does."""
    words = ["<unk>", "</s>", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.models.BPE(
        {w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    definition = json.loads(inner.to_str())
    raw = {"kind": "huggingface", "tokenizer": definition, "eos_id": 1, "pad_id": 1}
    return tokenizer_lib.from_dict(raw)


@pytest.mark.parametrize(
    ("make", "prompt", "continuation"),
    [
        (_wordpiece, "hello", " worldly!"),
        (_byte_fallback, "aé", "aéa"),
        (_byte_fallback, "é", "éé"),
    ],
    ids=["wordpiece", "fallback_then_text", "fallback_only"],
)
def test_text_of_the_prompt_that_the_decoder_holds_back_is_not_repeated(make, prompt, continuation):
    tokenizer = make()
    ids = tokenizer.encode(prompt + continuation)[len(tokenizer.encode(prompt)) :]
    pieces = []
    row = generate._Row(generate.Prompt(prompt), 0, tokenizer, [], pieces.append)
    for token in [*ids, tokenizer.eos_id]:
        row.feed(int(token))
    assert row.completion().completion == continuation
    assert "".join(pieces) == continuation


# --- samples and seeds --------------------------------------------------------------------------


def test_samples_differ_and_come_again(babbling):
    params = samplers.SamplingParams()
    first = _complete(babbling, "ab", "c", params=params, num_samples=3)
    assert [(one.prompt, one.sample) for one in first] == [
        (text, sample) for text in ("ab", "c") for sample in range(3)
    ]
    assert len({one.completion for one in first}) == 6
    assert _complete(babbling, "ab", "c", params=params, num_samples=3, batch_size=4) == first
    # Sample 0 does not depend on how many there are.
    assert _complete(babbling, "ab", params=params)[0] == first[0]


def test_every_token_is_drawn_anew(spelled):
    # So hot that all bytes are as good as equally likely: a key used twice would draw one twice.
    (one,) = _complete(
        spelled, "n", params=samplers.SamplingParams(temperature=1e6), max_tokens=100
    )
    counts = collections.Counter(one.completion)
    assert one.num_tokens > 20 and counts.most_common(1)[0][1] < 0.7 * one.num_tokens
    assert len(counts) > 10


def test_a_prompts_own_seed_is_used(babbling):
    prompts = [generate.Prompt("ab", seed) for seed in (1, 2, 1)]
    texts = [
        one.completion
        for one in generate.generate(babbling, prompts, samplers.SamplingParams(), max_tokens=16)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_the_callers_mesh_is_left_alone(babbling):
    before = jax.sharding.get_abstract_mesh()
    completions = generate.generate(
        babbling, [generate.Prompt("a")] * 2, GREEDY, max_tokens=2, batch_size=1
    )
    next(completions)
    assert jax.sharding.get_abstract_mesh() == before
    assert next(completions).finish_reason == "length"


# --- what is refused ----------------------------------------------------------------------------


def test_a_prompt_needs_room_for_its_completion(babbling):
    (fits,) = _complete(babbling, "x" * 60, max_tokens=4, params=samplers.SamplingParams())
    assert fits.num_tokens <= 4
    with pytest.raises(errors.UserError, match=r"61 tokens.*max_tokens=4.*max_length = 64"):
        _complete(babbling, "short", "x" * 61, max_tokens=4)


@pytest.mark.parametrize("name", ["max_tokens", "num_samples", "batch_size"])
def test_counts_below_one_are_refused(babbling, name):
    with pytest.raises(errors.UserError, match=f"--{name}=0 must be at least 1"):
        _complete(babbling, "a", **{name: 0})


def test_streaming_takes_one_completion(babbling):
    with pytest.raises(errors.UserError, match="one prompt and one sample"):
        _complete(babbling, "a", "b", on_text=print)


def test_beams_are_not_streamed(babbling):
    search = beams.BeamParams(num_beams=2)
    with pytest.raises(errors.UserError, match="--num_beams=2 searches: the best text is known at"):
        _complete(babbling, "a", on_text=print, beams=search)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_be_cut_is_refused(babbling, seed):
    with pytest.raises(errors.UserError, match=f"seed {seed} "):
        list(generate.generate(babbling, [generate.Prompt("a", seed)], GREEDY, max_tokens=1))


def test_a_tokenizer_with_more_ids_than_the_model_is_told(babbling):
    vocab_size = babbling.model.config.vocab_size
    larger = dataclasses.replace(babbling, tokenizer=token_ids.TokenIds(vocab_size + 1, -1, 0))
    prompts = [generate.Prompt(f"1 {vocab_size}")]
    with pytest.raises(errors.UserError, match=f"has token {vocab_size}, .* is not the model's"):
        generate.generate(larger, prompts, samplers.SamplingParams(), max_tokens=2)
