"""What is forgotten shows as a difference on the old task, of the same examples; replay leaves less of it."""

import json

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import train
from llm_jax.evaluation import forgetting
from llm_jax.evaluation import tasks

OLD, NEW = "abcdefgh" * 4, "12345678" * 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a function of the config of a text, and the workdirs of three runs: old, new, new with replay."""
    folder = tmp_path_factory.mktemp("forgetting")
    for name, text in (("old", OLD), ("new", NEW)):
        rows = [json.dumps({"text": text[i % 8 :] + text[: i % 8]}) + "\n" for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(rows))

    def config(name, start="", mixture=""):
        return config_lib.RunConfig(
            model=config_lib.ModelConfig(
                num_layers=1, embed_dim=32, num_heads=2, vocab_size=256, dtype="float32"
            ),
            data=config_lib.DataConfig(
                source=f"jsonl:{folder}/{name}.jsonl:text",
                mixture=mixture,
                eval_fraction=0.2,
                cache_dir=str(folder / "cache"),
                batch_size=8,
                sequence_length=32,
            ),
            optim=config_lib.OptimConfig(learning_rate=1e-2, warmup_steps=1),
            tune=config_lib.TuneConfig(start=start),
            train=config_lib.TrainConfig(num_steps=40, eval_every=0),
            compilation_cache="",
        )

    begun = str(folder / "begun")
    train.train(config("old"), begun)
    train.train(config("new", begun), str(folder / "alone"))
    replay = f"0.25=jsonl:{folder}/old.jsonl:text"
    train.train(config("new", begun, replay), str(folder / "replayed"))
    return config, folder


def test_replay_forgets_less(runs):
    config, folder = runs
    scored = {
        (run, side): forgetting.score(
            str(folder / run), config(side), "perplexity", tasks.Options()
        )
        for run in ("begun", "alone", "replayed")
        for side in ("old", "new")
    }
    changes = {
        key: forgetting.compare(scored["begun", key[1]][1], rows)
        for key, (_, rows) in scored.items()
    }
    assert changes["begun", "old"]["value"] == 0.0
    assert changes["alone", "old"]["value"] > 1.0 > 4 * changes["replayed", "old"]["value"]
    assert changes["alone", "old"]["low"] > 0.0 and changes["alone", "old"]["p_value"] < 0.01
    for run in ("alone", "replayed"):
        assert changes[run, "new"]["high"] < -1.0
    # The difference is that of the scores, as all documents have one number of tokens.
    means = [scored[run, "old"][0]["scores"]["loss"]["value"] for run in ("alone", "begun")]
    np.testing.assert_allclose(changes["alone", "old"]["value"], means[0] - means[1], rtol=1e-5)
    assert not (folder / "begun" / "evaluation").exists()


def test_a_table_has_a_row_for_each_run():
    one = {"scores": {"loss": {"value": 1.0, "low": 0.5, "high": 1.5}}}
    changed = one | {"difference": {"value": 0.25, "low": 0.0, "high": 0.5, "p_value": 0.04}}
    runs = {"a": {"old": one, "new": one}, "b": {"old": changed, "new": changed}}
    text = forgetting.table({"task": "perplexity", "score": "loss", "runs": runs})
    assert len(text.splitlines()) == 4 and "+0.2500 (p 0.040)" in text.splitlines()[3]


def test_what_is_right_counts_where_there_is_no_loss():
    rows = [{"target": "a", "prediction": "a"}, {"target": "a", "prediction": "b"}]
    assert forgetting.values_of(rows).tolist() == [1.0, 0.0]
    assert forgetting.values_of([{"loss": 0.5}]).tolist() == [0.5]
