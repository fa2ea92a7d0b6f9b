"""Tokenizers: round trips, GPT-2's golden cases, rebuilding from a dict, incremental decoding."""

import io
import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers

from llm_jax import errors
from llm_jax.data import bpe
from llm_jax.data import tokenizer
from llm_jax.data import tokenizer_kinds
from tests import assets

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

# Every character of UTF-8 (no surrogates) but NUL, which the bytes tokenizer refuses.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
CORPUS = [
    "The state of the union is strong, and it's getting stronger: 1,234 reasons — naïve or not.",
    "Fellow-citizens of the Senate and House of Representatives,\n\n  it is 1790. 日本語 🦙!",
] * 20


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_bpe(CORPUS, 300)


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def llama_like(trained, tmp_path_factory):
    """A tokenizer.json with byte fallback and ▁ for spaces, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "ab", "▁ab", "é"]
    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("a", "b"), ("▁", "ab")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    built = tokenizers.Tokenizer(model)
    built.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    built.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    built.save(str(path))
    return tokenizer.load(f"bpe:{path}")


@pytest.fixture(params=["bytes", "trained", "sentencepiece", "llama_like"])
def any_tokenizer(request, trained, sentencepiece_path, llama_like):
    return {
        "bytes": tokenizer.load("bytes"),
        "trained": trained,
        "sentencepiece": tokenizer.load(f"sentencepiece:{sentencepiece_path}"),
        "llama_like": llama_like,
    }[request.param]


@hypothesis.given(text=TEXT)
def test_byte_level_round_trip(trained, text):
    for one in (tokenizer.load("bytes"), trained):
        ids = one.encode(text)
        assert ids.dtype == np.int32
        assert one.decode(ids) == text


def test_bytes_are_utf8():
    one = tokenizer.load("bytes")
    assert one.encode("aé").tolist() == [0x61, 0xC3, 0xA9]
    assert (one.vocab_size, one.eos_id) == (256, 0)


def test_sentencepiece_round_trip(sentencepiece_path):
    one = tokenizer.load(f"sentencepiece:{sentencepiece_path}")
    for text in [*CORPUS[:2], "Ελληνικά and 🦙🦙", "</s> is text"]:
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert one.eos_id not in ids


@hypothesis.given(text=TEXT)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_encode_never_gives_eos(any_tokenizer, text):
    eos = any_tokenizer.decode([any_tokenizer.eos_id]).replace("\0", "")
    for candidate in (text, f"{text}<|endoftext|>{eos}</s>"):
        ids = any_tokenizer.encode(candidate)
        assert any_tokenizer.eos_id not in ids
        assert np.all((ids >= 0) & (ids < any_tokenizer.vocab_size))


def test_spelled_out_special_token_is_text(trained):
    text = "before<|endoftext|>after"
    ids = trained.encode(text)
    assert trained.eos_id not in ids
    assert trained.decode(ids) == text
    assert trained.decode([trained.eos_id]) == "<|endoftext|>"


def test_encode_batch_is_encode_of_each(any_tokenizer):
    texts = [*CORPUS[:2], "", "a b"]
    for ids, text in zip(any_tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, any_tokenizer.encode(text))


def test_rebuilt_from_json(any_tokenizer):
    raw = json.loads(json.dumps(any_tokenizer.to_dict()))
    rebuilt = tokenizer.from_dict(raw)
    assert type(rebuilt) is type(any_tokenizer)
    assert rebuilt.fingerprint() == any_tokenizer.fingerprint()
    for name in ("vocab_size", "eos_id", "pad_id"):
        assert getattr(rebuilt, name) == getattr(any_tokenizer, name)
    np.testing.assert_array_equal(rebuilt.encode(CORPUS[1]), any_tokenizer.encode(CORPUS[1]))


def test_fingerprints_differ(trained, llama_like):
    others = [tokenizer.load("bytes"), trained, llama_like, tokenizer.train_bpe(CORPUS, 290)]
    assert len({one.fingerprint() for one in others}) == len(others)


def test_training_is_deterministic(trained):
    again = tokenizer.make("train_bpe:300", lambda: iter(CORPUS))
    assert again.to_dict() == trained.to_dict()
    assert again.vocab_size == 300
    assert len(again.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 1.5


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_stream_is_decode(any_tokenizer, data):
    """Of any ids: broken UTF-8, runs of byte pieces, control tokens, leading spaces."""
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=40))
    _check_stream(any_tokenizer, ids)


@hypothesis.given(text=TEXT)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_stream_of_text_is_decode(any_tokenizer, text):
    _check_stream(any_tokenizer, any_tokenizer.encode(text).tolist())


def _check_stream(one, ids):
    stream = tokenizer.StreamDecoder(one)
    so_far = ""
    for count, token_id in enumerate(ids, start=1):
        so_far += stream.feed(token_id)
        assert one.decode(ids[:count]).startswith(so_far)
    assert so_far + stream.flush() == one.decode(ids)
    # A flushed decoder is as new.
    assert "".join(map(stream.feed, ids)) + stream.flush() == one.decode(ids)


def test_stream_is_prompt(any_tokenizer):
    """All that a character lacks is held back, and no more."""
    ids = any_tokenizer.encode("ab ab a").tolist()
    stream = tokenizer.StreamDecoder(any_tokenizer)
    fed = [stream.feed(token_id) for token_id in ids]
    assert "".join(fed) == any_tokenizer.decode(ids)


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer with tokens for runs of white space."""
    one = tokenizer.train_bpe(["a  b   a    b \n\n b \t\t a,  1"] * 20, 290)
    assert len(one.encode("a    b")) == 3
    return one


@hypothesis.given(
    text=st.text(st.sampled_from("ab1.,'    \n\t\u00a0\u2003é\x1c日"), min_size=1, max_size=200)
)
@hypothesis.example("aaaaa    b")
def test_long_texts_are_cut_without_a_trace(spaced, text):
    with pytest.MonkeyPatch.context() as patch:
        whole = spaced.encode(text)
        patch.setattr(tokenizer_kinds, "_PIECE_CHARS", 6)
        assert len(spaced._pieces("ab, cd " * 5)) > 3
        np.testing.assert_array_equal(spaced.encode(text), whole)


def _golden_cases():
    texts = (GOLDEN / "gpt2_tokenizer.inp").read_text(encoding="utf-8")
    lines = (GOLDEN / "gpt2_tokenizer.out").read_text(encoding="utf-8")
    texts = texts.split("\n__ggml_vocab_test__\n")
    # Both files end with one line break more than there are cases.
    ids = [[int(i) for i in line.split()] for line in lines.split("\n")]
    return texts, ids


def test_gpt2_golden_cases(tmp_path):
    texts, expected = _golden_cases()
    directory = assets.gpt2_vocabulary()
    gpt2 = tokenizer.load(f"bpe:{directory}")
    assert (gpt2.vocab_size, gpt2.eos_id) == (50_257, 50_256)
    cases = [(t, e) for t, e in zip(texts, expected, strict=True)]
    assert len(cases) == 47
    for text, ids in cases:
        assert gpt2.encode(text).tolist() == ids, repr(text)
        assert gpt2.decode(ids) == text
        _check_stream(gpt2, ids)

    # The same vocabulary under the file names of the other convention, and as one file.
    for name, other in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / other).write_bytes((directory / name).read_bytes())
    assert tokenizer.load(f"bpe:{tmp_path}").fingerprint() == gpt2.fingerprint()
    single = tmp_path / "tokenizer.json"
    single.write_text(json.dumps(gpt2.to_dict()["tokenizer"]))
    assert tokenizer.load(f"bpe:{single}").fingerprint() == gpt2.fingerprint()
    assert tokenizer.load(f"bpe:{tmp_path}").fingerprint() == gpt2.fingerprint()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("byte", "did you mean 'bytes'"),
        ("bpe", "bpe:PATH"),
        ("bpe:/no/such/place", "/no/such/place"),
        ("train_bpe:many", "'train_bpe:many'"),
        ("train_bpe:256", "at least 257"),
        ("train_bpe:512", "llm_jax.prepare"),
        ("sentencepiece:/no/such.model", "/no/such.model"),
    ],
)
def test_bad_specs(spec, named):
    with pytest.raises(errors.UserError, match=named):
        tokenizer.load(spec)


def test_bad_files(tmp_path, trained):
    with pytest.raises(errors.UserError, match="has no tokenizer.json"):
        tokenizer.load(f"bpe:{tmp_path}")
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(errors.UserError, match="tokenizer.json is not JSON"):
        tokenizer.load(f"bpe:{tmp_path}")
    file.write_text("{}")
    with pytest.raises(errors.UserError, match="not a tokenizer.json"):
        tokenizer.load(f"bpe:{tmp_path}")
    definition = trained.to_dict()["tokenizer"]
    file.write_text(json.dumps(definition | {"added_tokens": []}))
    with pytest.raises(errors.UserError, match="no end-of-text token"):
        tokenizer.load(f"bpe:{tmp_path}")
    with pytest.raises(errors.UserError, match="cannot load"):
        tokenizer.load(f"sentencepiece:{file}")
    with pytest.raises(errors.UserError, match="'huggingface_2' is not known"):
        tokenizer.from_dict({"kind": "huggingface_2"})


def test_bad_merges(tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, bpe.END_OF_TEXT: 2}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    with pytest.raises(errors.UserError, match="vocab.bpe:2: 'a b' is not a merge"):
        tokenizer.load(f"bpe:{tmp_path}")


def test_eos_named_by_tokenizer_config(tmp_path, trained):
    definition = json.loads(json.dumps(trained.to_dict()["tokenizer"]))
    extra = dict(definition["added_tokens"][0], id=300, content="<|done|>")
    definition["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|done|>"}}')
    assert tokenizer.load(f"bpe:{tmp_path}").eos_id == 300


def test_refused_text_and_ids(any_tokenizer, trained):
    with pytest.raises(errors.UserError, match="surrogate pair at character 2"):
        any_tokenizer.encode("ab\ud800")
    for token_id in (-1, any_tokenizer.vocab_size):
        with pytest.raises(errors.UserError, match=f"token id {token_id}"):
            any_tokenizer.decode([token_id])
        with pytest.raises(errors.UserError, match=f"token id {token_id}"):
            tokenizer.StreamDecoder(any_tokenizer).feed(token_id)
    with pytest.raises(errors.UserError, match="NUL character at character 1"):
        tokenizer.load("bytes").encode("a\0b")
    assert trained.decode(trained.encode("a\0b")) == "a\0b"


# --- special tokens ---------------------------------------------------------------------------

ADDED = ["<mask>", "<extra_id_1>", "<extra_id_0>"]


def test_added_tokens_leave_text_as_it_was(any_tokenizer):
    more = any_tokenizer.extended(ADDED)
    assert more.vocab_size == any_tokenizer.vocab_size + 3
    assert (more.eos_id, more.pad_id) == (any_tokenizer.eos_id, any_tokenizer.pad_id)
    for text in [*CORPUS[:2], "a<mask>b <extra_id_0>"]:
        ids = any_tokenizer.encode(text)
        np.testing.assert_array_equal(more.encode(text), ids)
        assert more.decode(ids) == any_tokenizer.decode(ids)
    assert more.fingerprint() != any_tokenizer.fingerprint()
    assert any_tokenizer.extended([]).to_dict() == any_tokenizer.to_dict()
    assert any_tokenizer.extended(ADDED[:1]).extended(ADDED[1:]).to_dict() == more.to_dict()


def test_added_tokens_are_found_and_survive_json(any_tokenizer):
    size = any_tokenizer.vocab_size
    assert any_tokenizer.mask_id is None and any_tokenizer.sentinel_ids == []
    more = tokenizer.from_dict(json.loads(json.dumps(any_tokenizer.extended(ADDED).to_dict())))
    assert more.mask_id == size and more.sentinel_ids == [size + 2, size + 1]
    assert more.is_special_V.sum() == any_tokenizer.is_special_V.sum() + 3
    assert not more.is_special_V[more.encode(CORPUS[0])].any()
    assert more.is_special_V[[more.eos_id, more.pad_id]].all()


def test_added_tokens_decode_to_their_names(any_tokenizer):
    more = any_tokenizer.extended(ADDED)
    hello, world = (more.encode(text).tolist() for text in ("hello", "world"))
    ids = [*hello, more.mask_id, *world, more.sentinel_ids[0], more.sentinel_ids[1]]
    text = more.decode(ids)
    assert "<mask>" in text and text.replace(" ", "").endswith("world<extra_id_0><extra_id_1>")
    stream = tokenizer.StreamDecoder(more)
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_saved_runs_have_the_dicts_that_they_had(trained):
    assert tokenizer.load("bytes").to_dict() == {"kind": "bytes"}
    assert tokenizer.from_dict({"kind": "bytes"}).vocab_size == 256
    assert set(trained.to_dict()) == {"kind", "tokenizer", "eos_id", "pad_id"}


def _words(one, text):
    ids = one.encode(text)
    starts = np.flatnonzero(one.word_starts(ids)).tolist()
    return [one.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_words_of_bytes_and_bpe(trained):
    text = "It is naïve, or\nnot:  1,234 日本!"
    parts = ["It", " is", " naïve", ",", " or", "\n", "not", ":", " ", " 1", ",", "234"]
    for one in (tokenizer.load("bytes"), trained):
        assert _words(one, text) == [*parts, " 日本", "!"]
    rows = np.stack([trained.encode("ab cd ab cd ab")] * 2)
    np.testing.assert_array_equal(*trained.word_starts(rows))


def test_words_of_sentencepiece(sentencepiece_path):
    one = tokenizer.load(f"sentencepiece:{sentencepiece_path}")
    ids = one.encode("The state: strong🦙 it")
    starts = one.word_starts(ids)
    pieces = [one._processor.id_to_piece(int(i)) for i in ids]
    words = [[]]
    for piece, is_start in zip(pieces, starts, strict=True):
        words = [*words, [piece]] if is_start else [*words[:-1], [*words[-1], piece]]
    llama = "".join(f"<0x{byte:02X}>" for byte in "🦙".encode())
    assert ["".join(w) for w in words[1:]] == ["▁The", "▁state", ":", "▁strong" + llama, "▁it"]


def test_words_of_wordpiece(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##ion", "##s", "state", ","]
    model = tokenizers.models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"
    )
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.add_special_tokens(pieces[:5])
    built.save(str(tmp_path / "tokenizer.json"))
    one = tokenizer.load(f"bpe:{tmp_path}")
    assert (one.cls_id, one.sep_id, one.mask_id, one.eos_id) == (2, 3, 4, 3)
    ids = one.encode("unions,states xyz")
    assert ids.tolist() == [5, 6, 7, 9, 8, 7, 1]
    assert one.word_starts(ids).tolist() == [True, False, False, True, True, False, True]


@hypothesis.given(text=TEXT)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_places_of_tokens_cover_the_text(any_tokenizer, text):
    ids, places = any_tokenizer.encode_with_places(text)
    np.testing.assert_array_equal(ids, any_tokenizer.encode(text))
    assert places.shape == (len(ids), 2)
    assert np.all(places[:, 0] <= places[:, 1]) and np.all(np.diff(places[:, 0]) >= 0)
    covered = {i for start, end in places.tolist() for i in range(start, end)}
    assert covered <= set(range(len(text)))
    assert all(char.isspace() for i, char in enumerate(text) if i not in covered)


def test_places_are_characters_not_bytes(any_tokenizer):
    text = "naïve 🦙 ab é"
    ids, places = any_tokenizer.encode_with_places(text)
    assert places[-1].tolist()[1] == len(text)
    (of_a,) = {int(i) for i in np.flatnonzero((places[:, 0] <= 8) & (places[:, 1] > 8))}
    assert "a" in any_tokenizer.decode(ids[of_a : of_a + 1])
