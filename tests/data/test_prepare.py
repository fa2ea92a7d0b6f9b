"""Preparing data: reused, rebuilt when its inputs change, safe against death and company."""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from llm_jax import config
from llm_jax import errors
from llm_jax.data import prepare
from llm_jax.data import sources
from llm_jax.data import token_cache

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"Document {i} has the text number {i * i}.\n" * (i + 1) for i in range(30)]


@pytest.fixture
def run(tmp_path):
    """A config over 30 text files."""
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:02}.txt").write_text(text)
    data = config.DataConfig(
        source=f"text:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"), eval_fraction=0.1
    )
    return config.RunConfig(data=data, model=config.ModelConfig(vocab_size=512))


def _with(run, **changes):
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **changes))


def _caches(run):
    tokens = pathlib.Path(run.data.cache_dir) / "tokens"
    return {path for path in tokens.glob("*") if path.is_dir()}


@pytest.mark.parametrize("spec", ["bytes", "train_bpe:300"])
def test_caches_hold_the_documents(run, spec):
    run = _with(run, tokenizer=spec)
    prepared = prepare.prepare(run)
    for split, cache in (("train", prepared.train), ("validation", prepared.eval)):
        texts = list(sources.documents(run.data, split))
        decoded = [prepared.tokenizer.decode(cache.document(d)[:-1]) for d in range(len(texts))]
        assert decoded == texts
        assert cache.num_documents == len(texts)
        assert cache.num_bytes == sum(len(text.encode()) for text in texts)
        assert cache.manifest.split == split and cache.manifest.tokenizer == spec
        token_cache.TokenCache.open(cache.path, verify=True)
    assert prepared.train.num_documents + prepared.eval.num_documents == len(TEXTS)


def test_chunks_change_nothing(run, monkeypatch):
    whole = prepare.prepare(run)
    monkeypatch.setattr(prepare, "_CHUNK_CHARS", 100)
    other = prepare.prepare(_with(run, cache_dir=run.data.cache_dir + "2"))
    np.testing.assert_array_equal(whole.train.tokens, other.train.tokens)
    np.testing.assert_array_equal(whole.train.offsets, other.train.offsets)


@pytest.mark.parametrize("spec", ["bytes", "train_bpe:300"])
def test_finished_caches_are_reused(run, spec, monkeypatch):
    run = _with(run, tokenizer=spec)
    first = prepare.prepare(run)

    def fail(*args):
        raise AssertionError("documents were read again")

    monkeypatch.setattr(sources, "documents", fail)
    # What is not about tokens does not matter.
    again = prepare.prepare(_with(run, batch_size=2, sequence_length=16, packing="concat"))
    assert again.train.path == first.train.path and again.eval.path == first.eval.path
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()


def test_a_change_makes_a_new_cache(run, tmp_path):
    paths = [prepare.prepare(run).train.path]
    for changes in ({"tokenizer": "train_bpe:300"}, {"eval_fraction": 0.2}):
        paths.append(prepare.prepare(_with(run, **changes)).train.path)
    (tmp_path / "05.txt").write_text("something else")
    changed = prepare.prepare(run).train
    paths.append(changed.path)
    assert len(set(paths)) == len(paths)
    documents = [bytes(changed.document(d)[:-1].tolist()) for d in range(changed.num_documents)]
    assert b"something else" in documents


def test_an_objective_adds_tokens_and_no_cache(run):
    def of(architecture, objective):
        model = dataclasses.replace(run.model, architecture=architecture)
        return dataclasses.replace(
            run, model=model, objective=config.ObjectiveConfig(name=objective)
        )

    causal = prepare.prepare(run)
    masked = prepare.prepare(of("encoder", "mlm"))
    assert masked.train.path == causal.train.path and masked.eval.path == causal.eval.path
    assert masked.tokenizer.special_tokens == {"<eos>": 0, "<cls>": 256, "<mask>": 257}
    spans = prepare.prepare(of("encoder_decoder", "span_corruption")).tokenizer
    assert spans.vocab_size == 356 and spans.sentinel_ids == [*range(355, 255, -1)]
    modes = prepare.prepare(of("encoder_decoder", "ul2")).tokenizer
    assert modes.vocab_size == 359 and modes.sentinel_ids[0] == 358
    small = dataclasses.replace(of("encoder", "mlm").model, vocab_size=256)
    with pytest.raises(errors.UserError, match="258 tokens with the 2 that its objective adds"):
        prepare.prepare(dataclasses.replace(of("encoder", "mlm"), model=small))
    with pytest.raises(errors.UserError, match="config.objective.name = 'causal' will not do"):
        prepare.prepare(of("encoder", "causal"))


def test_two_at_once_make_it_once(run, monkeypatch):
    real, calls = token_cache.write, []

    def slow(path, *args, **kwargs):
        calls.append(path)
        time.sleep(0.3)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(token_cache, "write", slow)
    results, start = [], threading.Barrier(3)

    def work():
        start.wait()
        results.append(prepare.prepare(_with(run, tokenizer="train_bpe:300")))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len({r.train.path for r in results}) == 1
    assert len(calls) == len(set(calls)) == 2, "one write for each split"


_KILLED = """
import sys, time
from llm_jax import config
from llm_jax.data import cache_folder, prepare, sources

def hang(*args, **kwargs):
    print("ready", flush=True)
    time.sleep(600)

real = sources.documents
def endless(data, split):
    yield from real(data, split)
    hang()

if sys.argv[3] == "documents":
    prepare._CHUNK_CHARS = 10
    sources.documents = endless
else:
    cache_folder._rename = hang
data = config.DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], eval_fraction=0.1)
prepare.prepare(config.RunConfig(data=data))
"""


@pytest.mark.parametrize("where", ["documents", "rename"])
def test_killed_prepare_leaves_nothing_that_opens(run, where):
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, run.data.source, run.data.cache_dir, where],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    (left,) = _caches(run)  # what it was working on
    assert left.name.startswith(".") and (left / "tokens.bin").exists()
    assert (left / "manifest.json").exists() == (where == "rename")
    path = prepare.cache_path(run.data, "train", prepare.make_tokenizer(run.data))
    with pytest.raises(errors.UserError, match="not a finished token cache"):
        token_cache.TokenCache.open(path)

    prepared = prepare.prepare(run)
    assert _caches(run) == {prepared.train.path, prepared.eval.path}
    token_cache.TokenCache.open(prepared.train.path, verify=True)
    assert prepared.train.path == path


def test_errors(run, tmp_path, monkeypatch):
    small = dataclasses.replace(run, model=config.ModelConfig(vocab_size=255))
    with pytest.raises(
        errors.UserError, match="256 tokens.*vocab_size = 255: set --config.model.v"
    ):
        prepare.prepare(small)
    with pytest.raises(errors.UserError, match="is remote"):
        prepare.prepare(_with(run, cache_dir="gs://bucket/x"))
    (tmp_path / "07.txt").write_text("a\0b")
    for chunk in (1 << 20, 100):
        monkeypatch.setattr(prepare, "_CHUNK_CHARS", chunk)
        with pytest.raises(errors.UserError, match="document 7 of the split: text holds the NUL"):
            prepare.prepare(run)
    assert _caches(run) == set()


def test_damaged_cache_is_told(run):
    prepared = prepare.prepare(run)
    (prepared.train.path / "tokens.bin").write_bytes(b"")
    with pytest.raises(errors.UserError, match="tokens.bin: it has 0 bytes"):
        prepare.prepare(run)


def test_the_command(run, tmp_path):
    command = [sys.executable, "-m", "llm_jax.prepare"]
    file = tmp_path / "c.py"
    file.write_text("from llm_jax import config\ndef get_config():\n    return config.new()\n")
    flags = [f"--config={file}", f"--config.data.source={run.data.source}"]
    flags += [f"--config.data.cache_dir={run.data.cache_dir}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepared = prepare.prepare(_with(run, eval_fraction=0.05))
    assert f"train: {prepared.train.num_documents} documents" in done.stdout
    assert str(prepared.eval.path) in done.stdout
    bad = subprocess.run(
        [*command, *flags, "--config.data.train_split=x", "--config.data.eval_split=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2
    assert bad.stderr.strip().splitlines()[-1].startswith("error: data.train_split")
