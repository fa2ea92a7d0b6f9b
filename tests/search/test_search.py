"""Vectors depend on their text alone, an index finds what is nearest, and ranks are counted as they are defined."""

import json
import pathlib

import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.search import embedder as embedder_lib
from llm_jax.search import index as index_lib
from llm_jax.search import ranking
from tests import commands
from tests import helpers

TEXTS = [f"text number {i}, {'and more ' * (i % 5)}of it" for i in range(37)]


def _save(folder, **model):
    tokenizer = tokenizer_lib.load("bytes")
    if model["architecture"] == "encoder":
        tokenizer = tokenizer.extended(["<cls>", "<mask>"])
    model = helpers.tiny_model_config(
        **helpers.GPT2 | {"head": "none", "vocab_size": 264, "max_length": 64} | model
    )
    config = config_lib.RunConfig(model=model, data=config_lib.DataConfig(sequence_length=16))
    mesh, rules = helpers.make_mesh()
    params = helpers.random_model(config.model, mesh, rules)
    checkpoint.save_params(str(folder), config, tokenizer.to_dict(), trees.to_nested(params))
    return str(folder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "run"
    return _save(folder, architecture="encoder", num_token_types=2, pooling="mean")


@pytest.fixture(scope="module")
def embedder(workdir):
    return embedder_lib.load(workdir)


def test_a_vector_depends_on_its_text_alone(embedder):
    together = embedder(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
    for index in (0, 4, 36):
        np.testing.assert_allclose(embedder([TEXTS[index]])[0], together[index], atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(
        embedder([TEXTS[i] for i in shuffled]), together[shuffled], atol=1e-5
    )
    assert np.abs(together[0] - together[4]).max() > 1e-2


def test_what_is_too_long_loses_its_end(embedder, caplog):
    long = "x" * 200
    np.testing.assert_allclose(embedder([long]), embedder([long[:62]]), atol=1e-5)
    assert "1 of 1 texts lose their ends: 62 tokens fit" in caplog.text


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_embeds_by_the_pooling_asked_for(tmp_path, pooling):
    workdir = _save(tmp_path / "run", architecture="decoder", pooling="first")
    found = embedder_lib.load(workdir, pooling=pooling)(TEXTS[:3])
    other = embedder_lib.load(workdir)(TEXTS[:3])
    assert np.abs(found - other).max() > 1e-2


def test_an_index_finds_the_nearest_whatever_its_blocks(embedder, tmp_path, monkeypatch):
    documents = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    documents[7]["note"] = "a line\u2028another\x85and more"
    index_lib.build(tmp_path / "index", embedder, documents, "text")
    opened = index_lib.open_index(tmp_path / "index")
    queries = embedder(["number 3, of it", "and more", "zzz"])
    cosines = queries @ np.asarray(opened.vectors_MD).T
    for block in (1 << 16, 10):
        monkeypatch.setattr(index_lib, "_BLOCK", block)
        for hits, row in zip(opened.search(queries, 5), cosines, strict=True):
            wanted = np.sort(row)[::-1][:5]
            np.testing.assert_allclose([hit.score for hit in hits], wanted, atol=1e-5)
            for hit in hits:
                assert hit.document == documents[hit.number]
                assert row[hit.number] == pytest.approx(hit.score, abs=1e-5)
    assert len(opened.search(queries, 100)[0]) == len(TEXTS)
    np.testing.assert_allclose(opened.embedder()(TEXTS[:2]), embedder(TEXTS[:2]), atol=1e-6)


def test_a_damaged_index_is_told(embedder, tmp_path):
    index_lib.build(tmp_path / "index", embedder, [{"text": "a"}, {"text": "b"}], "text")
    with pytest.raises(errors.UserError, match="is there already"):
        index_lib.build(tmp_path / "index", embedder, [{"text": "a"}], "text")
    (tmp_path / "index" / "documents.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(errors.UserError, match="documents.jsonl is not what was written"):
        index_lib.open_index(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text('{"version": 1')
    with pytest.raises(errors.UserError, match="index.json is damaged"):
        index_lib.open_index(tmp_path / "index")
    with pytest.raises(errors.UserError, match="has no index.json"):
        index_lib.open_index(tmp_path)
    with pytest.raises(errors.UserError, match="document 2 has no text 'text'.*'tex'"):
        index_lib.build(tmp_path / "other", embedder, [{"text": "a"}, {"tex": "b"}], "text")
    assert not (tmp_path / "other").exists()


def test_ranks_and_scores_are_those_of_sorting(embedder):
    rng = np.random.default_rng(0)
    queries, documents = rng.standard_normal((40, 6)), rng.standard_normal((30, 6))
    right = rng.integers(0, 30, 40)
    found = ranking.ranks(queries, documents, right)
    order = np.argsort(-(queries @ documents.T), axis=1)
    wanted = 1 + np.argmax(order == right[:, None], axis=1)
    np.testing.assert_array_equal(found, wanted)
    scores = ranking.scores(found)
    assert scores["recall@5"].mean() == np.mean(wanted <= 5)
    np.testing.assert_allclose(scores["mrr@10"], np.where(wanted <= 10, 1 / wanted, 0))
    # scikit-learn counts gains of all documents; ours of the one that is right.
    metrics = pytest.importorskip("sklearn.metrics")
    relevance = np.eye(30)[right]
    ndcg = metrics.ndcg_score(relevance, queries @ documents.T, k=10)
    assert scores["ndcg@10"].mean() == pytest.approx(ndcg)


def test_one_vector_for_all_is_chance():
    same = np.ones((50, 4)) / 2
    ranks = ranking.ranks(same, same, np.arange(50))
    np.testing.assert_array_equal(ranks, 25.5)


@pytest.mark.slow
def test_the_commands(workdir, tmp_path):
    rows = [{"q": text[:14], "d": text} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index, pairs = f"--index={tmp_path}/index", f"--pairs={tmp_path}/rows.jsonl:q,d"
    documents = f"--documents={tmp_path}/rows.jsonl:d"
    made, asked, scored, wrong = commands.run(
        "llm_jax.search.__main__",
        tmp_path,
        [
            ["index", f"--workdir={workdir}", documents, index],
            ["query", index, f"--query={TEXTS[3]}", "--count=2"],
            ["evaluate", f"--workdir={workdir}", pairs],
            ["evaluate", f"--workdir={workdir}", "--pairs=rows.jsonl:q"],
        ],
    )
    assert made[0] == 0 and "37 documents, 16 elements each" in made[1]
    lines = asked[1].splitlines()
    assert len(lines) == 2 and json.loads(lines[0].partition("  ")[2]) == rows[3]
    found = json.loads(scored[1].splitlines()[-1])
    assert found["queries"] == len(TEXTS)
    recall = found["scores"]["recall@1"]
    assert recall["low"] <= recall["value"] <= recall["high"]
    (kept,) = pathlib.Path(workdir).glob(f"evaluation/*/search-{tmp_path.name}-rows.jsonl")
    hits = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [hit["query"] for hit in hits] == [row["q"] for row in rows]
    first = sum(hit["prediction"] == hit["target"] for hit in hits) / len(hits)
    assert first == pytest.approx(recall["value"], abs=1 / len(hits))
    assert wrong[0] == 2 and "name two fields" in wrong[2]
