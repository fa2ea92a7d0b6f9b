"""The cache on disk: what is written is read, damage is told, nothing unfinished opens."""

import json
import pathlib

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from llm_jax import errors
from llm_jax.data import cache_folder
from llm_jax.data import token_cache

EOS = 3


def _write(path, documents, vocab_size=256):
    return token_cache.write(
        path,
        [(np.array(ids, np.int32), 7) for ids in documents],
        source="text:*.txt",
        split="train",
        tokenizer="bytes",
        tokenizer_fingerprint="f" * 64,
        vocab_size=vocab_size,
        eos_id=EOS,
        pad_id=EOS,
    )


@hypothesis.given(
    data=st.data(),
    vocab_size=st.sampled_from([4, 256, 257, 65_536, 65_537, 1 << 31]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_documents_round_trip(tmp_path_factory, data, vocab_size):
    ids = st.integers(0, vocab_size - 1).filter(lambda i: i != EOS)
    documents = data.draw(st.lists(st.lists(ids, max_size=20), min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("cache") / "c"
    _write(path, documents, vocab_size)
    cache = token_cache.TokenCache.open(path, verify=True)
    assert cache.num_documents == len(documents)
    assert cache.num_tokens == sum(len(d) + 1 for d in documents) == len(cache.tokens)
    assert cache.num_bytes == 7 * len(documents)
    assert [cache.document(d).tolist() for d in range(len(documents))] == [
        [*ids, EOS] for ids in documents
    ]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_smallest_dtype(tmp_path, vocab_size, dtype):
    cache = _write(tmp_path / "c", [[vocab_size - 1]], vocab_size)
    assert cache.tokens.dtype == dtype == cache.manifest.dtype
    assert cache.tokens.tolist() == [vocab_size - 1, EOS]


@pytest.mark.parametrize("name", [token_cache.TOKENS_FILE, token_cache.OFFSETS_FILE])
@hypothesis.given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@hypothesis.settings(max_examples=20, deadline=None)
def test_any_flipped_bit_is_found(tmp_path_factory, name, where, bit):
    path = tmp_path_factory.mktemp("cache") / "c"
    _write(path, [[10, 11, 12], [13]])
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=f"{name}.*checksum.*prepare"):
        token_cache.TokenCache.open(path, verify=True)


@pytest.mark.parametrize("name", [token_cache.TOKENS_FILE, token_cache.OFFSETS_FILE])
def test_wrong_size_is_found_without_verify(tmp_path, name):
    _write(tmp_path / "c", [[10, 11, 12], [13]])
    file = tmp_path / "c" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(errors.UserError, match=f"{name}: it has .* bytes.*prepare"):
        token_cache.TokenCache.open(tmp_path / "c")
    file.unlink()
    with pytest.raises(errors.UserError, match=f"{name}: the file is missing.*prepare"):
        token_cache.TokenCache.open(tmp_path / "c")


def test_bad_manifests(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(errors.UserError, match="manifest.json is missing.*llm_jax.prepare"):
        token_cache.TokenCache.open(path)
    _write(path, [[10]])
    manifest = json.loads((path / "manifest.json").read_text())
    for change, named in (
        ({"format_version": 99}, "format version 99"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"more": 1}, r"unknown: \['more'\]"),
    ):
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(errors.UserError, match=f"manifest.json: .*{named}"):
            token_cache.TokenCache.open(path)
    (path / "manifest.json").write_text(json.dumps(manifest)[:-2])
    with pytest.raises(errors.UserError, match="not JSON"):
        token_cache.TokenCache.open(path)


def test_failure_leaves_nothing(tmp_path):
    for documents, kind in (
        ([], errors.UserError),
        ([[1], [EOS]], ValueError),
        ([[300]], ValueError),
    ):
        with pytest.raises(kind):
            _write(tmp_path / "c", documents)
        assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_uses_the_winners(tmp_path):
    """Where locks do not work, two writers finish with the same name."""
    winner = _write(tmp_path / "c", [[10, 11]])
    inode = (winner.path / "manifest.json").stat().st_ino
    loser = _write(tmp_path / "c", [[10, 11]])
    assert loser.tokens.tolist() == [10, 11, EOS]
    assert (loser.path / "manifest.json").stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot write"):
        _write(tmp_path / "file" / "c", [[1]])
    with pytest.raises(errors.UserError, match="cannot write"):
        with cache_folder.lock(tmp_path / "file" / "c"):
            pass


def test_lock_removes_only_its_own_leftovers(tmp_path):
    for name in (".c.tmp-1-aa", ".d.tmp-1-aa", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_bytes(b"1")
    with cache_folder.lock(tmp_path / "c"):
        pass
    left = {path.name for path in pathlib.Path(tmp_path).iterdir() if path.is_dir()}
    assert left == {".d.tmp-1-aa", "d"}
