"""Longest matches are those of trying all, and a model that knows its data by heart is found out."""

import json

from etils import epath
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import train
from llm_jax.data import prepare
from llm_jax.data import token_cache
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from llm_jax.understanding import memorisation
from llm_jax.understanding import suffixes
from tests import helpers


def _by_trying_all(query, tokens, longest):
    text, found = bytes(tokens), []
    for start in range(len(query)):
        length = 0
        while length < min(longest, len(query) - start):
            if bytes(query[start : start + length + 1]) not in text:
                break
            length += 1
        found.append(length)
    return found


def test_longest_matches_are_those_of_trying_all(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(150):
        # Pieces shorter than the text: matches lie across their edges.
        monkeypatch.setattr(suffixes, "PIECE", int(rng.choice([7, 20, 1 << 20])))
        monkeypatch.setattr(suffixes, "_BLOCK", int(rng.choice([5, 4096])))
        tokens = rng.integers(0, rng.integers(1, 5), rng.integers(1, 60)).astype(np.uint8)
        sizes = rng.integers(0, 30, 3)
        queries = [rng.integers(0, 4, size).astype(np.uint8) for size in sizes]
        longest = int(rng.integers(1, 40))
        found = suffixes.longest_matches(queries, tokens, longest)
        for query, lengths in zip(queries, found, strict=True):
            assert lengths.tolist() == _by_trying_all(query, tokens, longest)


def test_suffixes_are_sorted():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 3, 300).astype(np.uint8)
    wanted = sorted(range(300), key=lambda place: bytes(tokens[place:]))
    assert suffixes.suffix_array(tokens, 300).tolist() == wanted


def _cache(folder, documents):
    return token_cache.write(
        folder,
        [(np.asarray(document), len(document)) for document in documents],
        source="s",
        split="train",
        tokenizer="bytes",
        tokenizer_fingerprint="",
        vocab_size=100,
        eos_id=99,
        pad_id=99,
    )


def test_stretches_lie_inside_documents(tmp_path):
    documents = [np.arange(10) + 10 * d for d in range(4)] + [np.arange(7) + 50]
    drawn = memorisation.draw(_cache(tmp_path / "c", documents), 100, 5, 3)
    both = np.concatenate([drawn.prompts_NT, drawn.targets_NT], axis=1)
    # Of each document of ten tokens three places, of seven none; each once.
    wanted = sorted([10 * d + at for d in range(4) for at in range(3)])
    assert sorted(both[:, 0].tolist()) == wanted
    assert (np.diff(both, axis=1) == 1).all()
    few = memorisation.draw(_cache(tmp_path / "d", documents), 4, 5, 3)
    assert few.prompts_NT.shape == (4, 5) and few.targets_NT.shape == (4, 3)
    with pytest.raises(errors.UserError, match="no document of 11 tokens, the longest has 10"):
        memorisation.draw(_cache(tmp_path / "e", documents), 4, 8, 3)


def test_agreement_ends_with_the_first_difference():
    wanted = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    found = np.array([[1, 2, 3], [1, 0, 3], [0, 2, 3], [1, 2, 0]])
    assert memorisation.agreement(wanted, found).tolist() == [3, 1, 0, 2]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """A run of a model that has learned one secret by heart, and sees noise held out."""
    folder = tmp_path_factory.mktemp("memorised")
    rng = np.random.default_rng(0)
    # Each character once, so that the one before it tells it.
    letters = [chr(code) for code in range(33, 123)]
    secret, *others = ("".join(rng.permutation(letters)) for _ in range(5))
    with (folder / "data.jsonl").open("w") as file:
        for text in [secret] * 8:
            file.write(json.dumps({"text": text}) + "\n")
    with (folder / "other.jsonl").open("w") as file:
        for text in others:
            file.write(json.dumps({"text": text}) + "\n")
    config = config_lib.RunConfig(
        # It sees few tokens: a prompt from within a document is as good as its start.
        model=config_lib.ModelConfig(
            num_layers=1,
            embed_dim=64,
            num_heads=2,
            vocab_size=264,
            dtype="float32",
            max_length=100,
            window=3,
        ),
        data=config_lib.DataConfig(
            source=f"jsonl:{folder}/data.jsonl:text",
            eval_source=f"jsonl:{folder}/other.jsonl:text",
            cache_dir=str(folder / "cache"),
            batch_size=8,
            sequence_length=91,
        ),
        optim=config_lib.OptimConfig(warmup_steps=1, learning_rate=3e-2),
        train=config_lib.TrainConfig(num_steps=40, eval_every=0),
        compilation_cache="",
    )
    train.train(config, str(folder / "run"))
    return config, load.load(str(folder / "run")), secret


@pytest.mark.long
def test_a_secret_known_by_heart_is_found_out(memorised, tmp_path):
    config, loaded, secret = memorised
    prepared = prepare.prepare(config)
    found = memorisation.measure(loaded, prepared.train, prepared.eval, 16, 24)
    shares = {name: found[name]["reproduced"] for name in ("train", "held_out")}
    assert shares["train"]["50"]["value"] > 0.9 and shares["held_out"]["8"]["value"] == 0.0
    values = [shares["train"][str(length)]["value"] for length in memorisation.LENGTHS]
    assert values == sorted(values, reverse=True)
    assert found["train"]["longest_exact"] == 50
    said = found["train"]["longest_exact_prompt"] + found["train"]["longest_exact_text"]
    assert said in secret
    # What it writes for other prompts is the secret, too.
    assert found["held_out"]["anywhere_in_train"]["longest"] > 16
    for row in found["held_out"]["anywhere_in_train"]["rows"]:
        assert row["matched"] in secret and len(row["matched"]) == row["tokens"]
    tokenizer = loaded.tokenizer
    found["samples"] = memorisation.overlap(
        tokenizer.encode_batch(["zz" + secret[5:35] + "zz", "~~~"]),
        prepared.train.tokens,
        tokenizer,
    )
    best, none = found["samples"]["rows"]
    assert (best["text"], best["start"], best["matched"]) == (0, 2, secret[5:35])
    assert none["tokens"] == 0
    memorisation.write(found, epath.Path(tmp_path), 3)
    assert json.loads((tmp_path / "memorisation.json").read_text())["samples"] == found["samples"]
    assert "50 tokens reproduced  1.0" in (tmp_path / "memorisation.txt").read_text()


@pytest.mark.long
def test_continuations_are_those_of_sampling(memorised):
    _, loaded, _ = memorised
    texts = ["abcdefgh", "jjjjjjjj", "acegiacj"]
    prompts = np.stack(loaded.tokenizer.encode_batch(texts))
    found = memorisation.continuations(loaded, prompts, 12)
    wanted = generate.generate(
        loaded,
        [generate.Prompt(text) for text in texts],
        samplers.SamplingParams(temperature=0.0),
        max_tokens=12,
    )
    for row, completion in zip(found, wanted, strict=True):
        kept = row[: completion.num_tokens - (completion.finish_reason == "eos")]
        assert loaded.tokenizer.decode(kept) == completion.completion


@pytest.mark.long
def test_mistakes_are_told(memorised, tmp_path):
    config, loaded, _ = memorised
    prepared = prepare.prepare(config)
    with pytest.raises(errors.UserError, match="--prompt_tokens=51 and 50 that follow.*use 50"):
        memorisation.measure(loaded, prepared.train, prepared.eval, 4, 51)
    with pytest.raises(errors.UserError, match="takes a decoder of objective causal or prefix"):
        memorisation.check(helpers.tiny_run_config(helpers.BERT, objective={"name": "mlm"}))
    file = tmp_path / "samples.jsonl"
    for text, part in (
        ("", "is empty"),
        ('{"completion": "a"}\n{"text": "b"}\n', "line 2 has no text 'completion'"),
        ("{", "line 1 is no JSON"),
    ):
        file.write_text(text)
        with pytest.raises(errors.UserError, match=part):
            memorisation.read_samples(str(file))
    with pytest.raises(errors.UserError, match="no such file"):
        memorisation.read_samples(str(tmp_path / "none"))
