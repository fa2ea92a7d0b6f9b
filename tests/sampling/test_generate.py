"""Prompts to completions: stop strings, streaming, seeds, what is refused, and the command."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import train_step
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build
from llm_jax.sampling import decode
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from tests import helpers

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
    scanner = generate.StopScanner(stops)
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
    scanner = generate.StopScanner(stops)
    fed = passed = ""
    for piece in pieces:
        fed, passed = fed + piece, passed + scanner.feed(piece)
        if not scanner.is_stopped:
            held = fed[len(passed) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)


# --- a model that spells ------------------------------------------------------------------------

# Each byte has one successor, so greedy text is known: it goes round until something ends it.
# The characters take 1, 2, 3 and 4 bytes, and no byte comes up twice.
CIRCLE = "né日🎉x "
LETTERS = CIRCLE.encode()
ENDING = "qu"  # after u comes the end of the text


def _spelling_config(**changes):
    sizes = {"num_layers": 1, "embed_dim": 256, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 1}
    parts = {"positions": "none", "tie_embeddings": False, "vocab_size": 256, "max_length": 128}
    return helpers.tiny_model_config(**(sizes | parts | changes))


def _spelling_model(config, mesh, rules):
    """A decoder whose blocks add nothing and whose head looks the last byte's successor up."""
    successor = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1]))
    successor |= {ord("q"): ord("u"), ord("u"): 0, 0: LETTERS[0]}
    head_DV = np.zeros((256, 256), np.float32)
    for byte, following in successor.items():
        head_DV[byte, following] = 1.0

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        array = np.ones(leaf.shape) if "scale" in name else np.zeros(leaf.shape)
        if "table_VD" in name:
            array = np.eye(256)
        if "head_DV" in name:
            array = head_DV
        target = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.device_put(array.astype(np.float32), target)

    return jax.tree_util.tree_map_with_path(value, build.abstract_model(config, rules))


@pytest.fixture(scope="module")
def spelling():
    mesh, rules = helpers.make_mesh(rules="tp")
    with jax.set_mesh(mesh):
        model = decode.prepare_model(_spelling_model(_spelling_config(), mesh, rules))
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


def test_text_is_continued_until_the_tokens_are_used_up(spelling):
    (one,) = _complete(spelling, "n", max_tokens=24)
    circle = LETTERS[1:] + LETTERS * 3
    assert one.completion == circle[:24].decode()
    assert (one.prompt, one.finish_reason, one.num_tokens) == ("n", "length", 24)


def test_the_end_of_the_text_ends_it(spelling):
    one, other = _complete(spelling, "q", "n", max_tokens=12)
    assert (one.completion, one.finish_reason, one.num_tokens) == ("u", "eos", 2)
    assert (other.finish_reason, other.num_tokens) == ("length", 12)


@pytest.mark.parametrize(
    ("stops", "completion"),
    [(["x"], "é日🎉"), (["日🎉"], "é"), (["🎉x ", "x"], "é日🎉"), (["é"], ""), (["", "zzz"], None)],
)
def test_a_stop_string_ends_it_and_is_cut_off(spelling, stops, completion):
    (one,) = _complete(spelling, "n", stops=stops)
    if completion is None:
        assert one.finish_reason == "length"
    else:
        assert (one.completion, one.finish_reason) == (completion, "stop")
        pieces = []
        _complete(spelling, "n", stops=stops, on_text=pieces.append)
        assert "".join(pieces) == completion


def test_a_stop_string_does_not_look_back_into_the_prompt(spelling):
    (one,) = _complete(spelling, "né", stops=["né日", "é"], max_tokens=10)
    assert one.completion.startswith("日🎉x")


def test_rows_that_stop_early_leave_the_others_as_they_are(spelling):
    texts = ["n", "q", "x", "日"]
    together = _complete(spelling, *texts, stops=["日"], max_tokens=40)
    assert [one.prompt for one in together] == texts
    assert together == [_complete(spelling, t, stops=["日"], max_tokens=40)[0] for t in texts]
    assert [one.finish_reason for one in together] == ["stop", "eos", "stop", "stop"]


def test_an_empty_prompt_begins_a_text(spelling):
    (one,) = _complete(spelling, "", max_tokens=11)
    assert one.completion == "né日🎉x"
    assert one.prompt == ""


# --- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 24])
def test_streamed_text_is_the_completion(spelling, max_tokens):
    pieces = []
    (one,) = _complete(spelling, "n", max_tokens=max_tokens, on_text=pieces.append)
    assert "".join(pieces) == one.completion
    (whole,) = _complete(spelling, "n", max_tokens=max_tokens)
    assert whole == one
    # A character comes once its last byte has, not in halves.
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert one.completion == (LETTERS[1:] + LETTERS * 2)[:max_tokens].decode("utf-8", "replace")


def test_text_is_streamed_while_it_is_made(spelling):
    pieces = []
    _complete(spelling, "n", max_tokens=48, on_text=pieces.append)
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


def test_every_token_is_drawn_anew(spelling):
    # So hot that all bytes are as good as equally likely: a key used twice would draw one twice.
    (one,) = _complete(
        spelling, "n", params=samplers.SamplingParams(temperature=1e6), max_tokens=100
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


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_be_cut_is_refused(babbling, seed):
    with pytest.raises(errors.UserError, match=f"seed {seed} "):
        list(generate.generate(babbling, [generate.Prompt("a", seed)], GREEDY, max_tokens=1))


# --- the command --------------------------------------------------------------------------------

# Forks a child for each command line: real processes, of which only the first imports everything.
_RUN_COMMANDS = """
import json, os, sys
from llm_jax import command
import llm_jax.sampling.__main__ as sampling

results = []
for index, argv in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        for name, fd in (("out", 1), ("err", 2)):
            file = os.open(f"{index}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, fd)
        sys.argv = ["sampling", *argv]
        command.run(sampling.main, sampling.define_flags)
    results.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(results))
"""


def _child_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _run_commands(folder, argvs) -> list[tuple[int, str, str]]:
    """Returns the exit code, stdout and stderr of each command line, run in `folder`."""
    ran = subprocess.run(
        [sys.executable, "-c", _RUN_COMMANDS, json.dumps(argvs)],
        cwd=folder,
        env=_child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    codes = json.loads(ran.stdout.splitlines()[-1])
    return [
        (code, (folder / f"{i}.out").read_text(), (folder / f"{i}.err").read_text())
        for i, code in enumerate(codes)
    ]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder whose only checkpoint, of step 7, is the spelling model."""
    folder = tmp_path_factory.mktemp("run")
    config = helpers.tiny_run_config(
        {field: getattr(_spelling_config(), field) for field in _spelling_config().__dict__}
    )
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        zero = jnp.zeros((), jnp.int32)
        state = train_step.TrainState(
            zero + 7, zero, _spelling_model(config.model, mesh, rules), {"count": zero}
        )
        manager = checkpoint.Checkpoints(str(folder), config, {"kind": "bytes"})
        manager.save(state)
        manager.close()
    return folder


@pytest.mark.slow
def test_the_command_writes_completions(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text("n\n\nq\n", encoding="utf-8")
    rows = [{"prompt": "n", "seed": 5}, {"prompt": "日\u2028n"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = [f"--workdir={workdir}", "--temperature=0", "--max_tokens=12"]
    streamed, many, listed, from_rows = _run_commands(
        tmp_path,
        [
            [*base, "--prompt=n", "--stop=x"],
            [*base, "--prompt=n", "--num_samples=2"],
            [*base, "--prompts=prompts.txt", "--output=new/samples.jsonl", "--seed=3"],
            [*base, "--prompts=prompts.jsonl", "--output=rows.jsonl", "--step=7"],
        ],
    )
    assert streamed[:2] == (0, "né日🎉\n")
    assert many[0] == 0
    assert many[1].splitlines() == [
        "--- 'n', sample 0",
        "né日🎉x n",
        "--- 'n', sample 1",
        "né日🎉x n",
    ]
    assert (listed[0], from_rows[0]) == (0, 0), listed[2] + from_rows[2]
    written = (tmp_path / "new/samples.jsonl").read_text(encoding="utf-8").strip().split("\n")
    common = {"step": 7, "seed": 3, "sample": 0}
    circle = (LETTERS[1:] + LETTERS)[:12].decode("utf-8", "replace")
    assert [json.loads(line) for line in written] == [
        common | {"prompt": "n", "completion": circle, "finish_reason": "length", "num_tokens": 12},
        common | {"prompt": "q", "completion": "u", "finish_reason": "eos", "num_tokens": 2},
    ]
    again = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert [(json.loads(x)["prompt"], json.loads(x)["seed"]) for x in again] == [
        ("n", 5),
        ("日\u2028n", 0),
    ]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_errors_are_one_line_with_exit_code_two(workdir, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "no_field.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad_seed.jsonl").write_text('{"prompt": "a", "seed": "x"}\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    run = f"--workdir={workdir}"
    cases = {
        "either --prompt=TEXT or --prompts=FILE": [
            [run],
            [run, "--prompt=a", "--prompts=bad.jsonl"],
        ],
        "--workdir is missing": [["--prompt=a"]],
        "no checkpoints": [["--workdir=nowhere", "--prompt=a"]],
        "--step=9": [[run, "--step=9", "--prompt=a"]],
        "bad.jsonl line 2 is not JSON": [[run, "--prompts=bad.jsonl"]],
        "line 1 has no text in field 'prompt'": [[run, "--prompts=no_field.jsonl"]],
        "seed 'x'": [[run, "--prompts=bad_seed.jsonl"]],
        "no prompt in it": [[run, "--prompts=empty.txt"]],
        "--prompts=none.txt cannot be read": [[run, "--prompts=none.txt"]],
        "--top_p=0.0": [[run, "--prompt=a", "--top_p=0"]],
        "Unknown command line flag": [[run, "--prompt=a", "--top=3"]],
        "more than the model's max_length": [
            [run, "--prompt=a", "--max_tokens=200"],
            [run, "--prompt=a", "--max_tokens=200", "--output=out.jsonl"],
        ],
        "must be at least 1": [[run, "--prompt=a", "--num_samples=0"]],
    }
    flat = [(message, argv) for message, argvs in cases.items() for argv in argvs]
    results = _run_commands(tmp_path, [argv for _, argv in flat])
    for (message, argv), (code, out, err) in zip(flat, results, strict=True):
        assert code == 2, (argv, err)
        last = err.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: ") and message in last, (argv, err)
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, (argv, err)
        assert out == "", argv
    assert not list(tmp_path.rglob("out.jsonl*"))  # nothing half made is left behind


def test_sampling_imports_no_part_of_the_trainer():
    code = """
import importlib, json, pkgutil, sys
import llm_jax.sampling
names = [m.name for m in pkgutil.iter_modules(llm_jax.sampling.__path__, "llm_jax.sampling.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=_child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    names, modules = json.loads(ran.stdout)
    assert {"llm_jax.sampling.__main__", "llm_jax.sampling.generate"} <= set(names)
    forbidden = {
        "llm_jax.train",
        "llm_jax.train_step",
        "llm_jax.optim",
        "llm_jax.evaluate",
        "llm_jax.data.pipeline",
        "llm_jax.data.prepare",
        "tensorflow",
    }
    assert forbidden.isdisjoint(modules)
