"""Each objective trains the models that it is for, from its source to a checkpoint that is evaluated."""

import json
import math

import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import evaluate
from llm_jax import metrics
from llm_jax import train
from llm_jax.checkpoint import inspection
from llm_jax.checkpoint import tables

RECORDS = [
    {
        "text": f"item {i} is {'fine' if i % 3 else 'bad'}",
        "label": "good" if i % 3 else "bad",
        "score": i / 50,
        "words": ["New", "York", "is", str(i)],
        "tags": ["B", "I", "O", "O"],
        "question": "Which number?",
        "question_of": f"where is {i}",
        "answer": {"text": [str(i)], "answer_start": [5]},
    }
    for i in range(60)
]
EXAMPLES = {
    "seq2seq": {"target_field": "label"},
    "contrastive": {"input_fields": "question_of", "target_field": "text"},
    "sequence": {},
    "token": {"input_fields": "words", "target_field": "tags"},
    "span": {"input_fields": "question,text", "target_field": "answer"},
}
LONG = pytest.mark.long


def _config(folder, objective, architecture, **model):
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    is_text = objective in config_lib.TEXT_OBJECTIVES
    head = objective if objective in ("sequence", "token", "span") else "lm"
    head = "none" if objective == "contrastive" else head
    shape = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_labels": 3, "head": head}
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(
            architecture=architecture, vocab_size=384, dtype="float32", **shape | model
        ),
        data=config_lib.DataConfig(
            source=f"jsonl:{folder}/*.jsonl" + ":text" * is_text,
            cache_dir=str(folder / "cache"),
            batch_size=8,
            sequence_length=40,
            **EXAMPLES.get(objective, {}),
        ),
        objective=config_lib.ObjectiveConfig(
            name=objective, target_length=32, is_input_bidirectional=True
        ),
        optim=config_lib.OptimConfig(warmup_steps=1, learning_rate=1e-2),
        train=config_lib.TrainConfig(num_steps=8, log_every=1, eval_every=8),
        compilation_cache="",
    )
    config_lib.check(config)
    return config


@pytest.mark.parametrize(
    "objective, architecture, model",
    [
        ("mlm", "encoder", {"num_token_types": 2}),
        ("span_corruption", "encoder_decoder", {}),
        ("sequence", "encoder", {}),
        ("contrastive", "encoder", {"pooling": "mean"}),
        pytest.param("contrastive", "decoder", {"pooling": "last"}, marks=LONG),
        pytest.param("span", "encoder", {"num_token_types": 2}, marks=LONG),
        pytest.param("prefix", "decoder", {}, marks=LONG),
        pytest.param("span_corruption", "decoder", {}, marks=LONG),
        pytest.param("ul2", "encoder_decoder", {}, marks=LONG),
        pytest.param("seq2seq", "encoder_decoder", {}, marks=LONG),
        pytest.param("seq2seq", "decoder", {}, marks=LONG),
        pytest.param("sequence", "decoder", {"pooling": "last"}, marks=LONG),
        pytest.param("token", "encoder", {}, marks=LONG),
    ],
)
def test_objectives_train_and_evaluate(tmp_path, objective, architecture, model):
    config = _config(tmp_path, objective, architecture, **model)
    workdir = str(tmp_path / "run")
    train.train(config, workdir)
    rows = metrics.read(workdir)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    (last,) = [row["eval/validation/loss"] for row in rows if "eval/validation/loss" in row]
    assert math.isfinite(last)
    scores = checkpoint.read_latest(workdir, None, evaluate.score)
    assert scores["eval/validation/loss"] == pytest.approx(last, rel=1e-5)
    assert "eval/validation/bits_per_byte" not in scores  # of text that is predicted whole
    if objective == "sequence":
        step_dir = inspection.find(workdir)
        assert checkpoint.read_meta(step_dir).labels == ["bad", "good"]
        found = tables.text(inspection.inspect(step_dir), None, tables.Options())
        assert "labels      bad, good" in found
