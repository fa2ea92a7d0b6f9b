"""A mixture gives each source its share of rows, all of its items in turn, the same however a run is cut."""

import json

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import mixture
from llm_jax.data import pipeline
from llm_jax.data import prepare
from llm_jax.data.objectives import stage as stage_lib
from tests import helpers


class _Numbers(stage_lib.Stage):
    """Rows that hold the number of their item."""

    def __init__(self, first, count):
        self.name, self.num_items, self._first = f"from {first}", count, first

    def __call__(self, items, rows, draws):
        empty = helpers.random_batch(helpers.tiny_run_config({}))
        tokens = np.where(items < 0, -1, self._first + items)[:, None].astype(np.int32)
        fields = dict.fromkeys(("targets", "segments", "positions"), tokens)
        return empty._replace(tokens=tokens, weights=(tokens >= 0).astype(np.float32), **fields)


SPEC = "0.25=text:a;0.1=text:b"
STAGES = (_Numbers(0, 17), _Numbers(1000, 6), _Numbers(2000, 3))
DATA = config_lib.DataConfig(batch_size=8, mixture=SPEC)


def _rows(start, count, rows=range(8), seed=3):
    stage = mixture.Mixture(STAGES, SPEC)
    batches = pipeline.train_batches(
        stage, DATA, seed=seed, start_step=start, rows=np.asarray(rows), num_steps=count
    )
    return np.stack([batch.tokens[:, 0] for batch in batches])


def test_each_source_has_its_share_after_any_number_of_rows():
    drawn = _rows(0, 60).ravel()
    for source, share in enumerate((0.65, 0.25, 0.1)):
        counts = np.cumsum(drawn // 1000 == source)
        assert np.all(np.abs(counts - share * np.arange(1, len(drawn) + 1)) < 1.5)


def test_each_source_passes_through_all_of_its_items_before_it_repeats_one():
    drawn = _rows(0, 60).ravel()
    for source, stage in enumerate(STAGES):
        own = drawn[drawn // 1000 == source] - 1000 * source
        epochs = [own[i : i + stage.num_items] for i in range(0, len(own), stage.num_items)][:-1]
        assert len(epochs) >= 8
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(stage.num_items))
        assert any(epoch.tolist() != epochs[0].tolist() for epoch in epochs)


def test_a_run_that_resumes_and_hosts_that_share_it_see_the_same():
    whole = _rows(0, 12)
    np.testing.assert_array_equal(_rows(7, 5), whole[7:])
    np.testing.assert_array_equal(_rows(0, 12, rows=range(3, 8)), whole[:, 3:])
    assert not np.array_equal(_rows(0, 12, seed=4), whole)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsonl:x", "is no share and its source"),
        ("1.5=jsonl:x", "is no share"),
        ("0.5=", "is no share"),
        ("0.0000001=text:a", "is no share"),
        ("0.5=text:a;0.5=text:b", "leave nothing to data.source"),
    ],
)
def test_what_is_no_mixture_is_refused(spec, message):
    with pytest.raises(errors.UserError, match=message):
        mixture.parse(spec)


@pytest.mark.parametrize("objective", ["causal", "sequence"])
def test_sources_of_texts_and_examples_are_mixed(objective, tmp_path):
    for name, letter in (("new", "n"), ("old", "o")):
        rows = [{"text": letter * 20, "label": letter} for _ in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    field = ":text" * (objective == "causal")
    labels = [{"text": "x", "label": label} for label in "no"]
    (tmp_path / "new.jsonl").open("a").writelines(json.dumps(row) + "\n" for row in labels)
    head = {"head": "sequence", "pooling": "last"} if objective == "sequence" else {}
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(vocab_size=264, **head),
        data=config_lib.DataConfig(
            source=f"jsonl:{tmp_path}/new.jsonl{field}",
            mixture=f"0.3=jsonl:{tmp_path}/old.jsonl{field}",
            cache_dir=str(tmp_path / "cache"),
            sequence_length=16,
            batch_size=10,
        ),
        objective=config_lib.ObjectiveConfig(name=objective),
    )
    prepared = prepare.prepare(config)
    prepare.check_same(prepared)
    stage = prepare.training_stage(config, prepared)
    (batch,) = pipeline.train_batches(
        stage, config.data, seed=0, start_step=0, rows=np.arange(10), num_steps=1
    )
    is_old = np.any(batch.tokens == ord("o"), axis=1)
    assert abs(int(is_old.sum()) - 3) <= 1 and np.any(batch.tokens[~is_old] == ord("n"))
