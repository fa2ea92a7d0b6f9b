"""Tasks score what the model says of each example of the split, as a run has trained it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import evaluate
from llm_jax import train
from llm_jax.evaluation import files
from llm_jax.evaluation import predict
from llm_jax.evaluation import tasks
from tests import commands
from tests import helpers
from tests.multihost import runs

WORDS = ["red", "green", "blue", "small", "large"]
RECORDS = [
    {
        "text": f"{WORDS[i % 5]} thing {i}",
        "label": WORDS[i % 5],
        "short": WORDS[i % 5],
        "words": [WORDS[i % 5], "thing", str(i)],
        "tags": ["B-C" if i % 5 < 3 else "B-S", "O", "O"],
        "question": "Which?",
        "answer": {"text": [WORDS[i % 5]], "answer_start": [0]} if i % 7 else None,
    }
    for i in range(80)
]
KINDS = {
    "sequence": ("encoder", {"target_field": "label"}, {"num_labels": 5, "pooling": "mean"}),
    "token": ("encoder", {"input_fields": "words", "target_field": "tags"}, {"num_labels": 3}),
    "span": ("encoder", {"input_fields": "question,text", "target_field": "answer"}, {}),
    "seq2seq": ("encoder_decoder", {"target_field": "short"}, {}),
    "causal": ("decoder", {}, {}),
}


def _config(folder, objective, num_steps, **changes):
    architecture, data, model = KINDS[objective]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    head = objective if objective in ("sequence", "token", "span") else "lm"
    model = {
        "num_layers": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "head": head,
        "vocab_size": 264,
    } | model
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(
            architecture=architecture, dtype="float32", max_length=64, **model
        ),
        data=config_lib.DataConfig(
            source=f"jsonl:{folder}/data.jsonl" + ":text" * (objective == "causal"),
            cache_dir=str(folder / "cache"),
            batch_size=16,
            sequence_length=32,
            eval_fraction=0.3,
            **data,
        ),
        objective=config_lib.ObjectiveConfig(name=objective, target_length=16),
        optim=config_lib.OptimConfig(warmup_steps=1, learning_rate=1e-2),
        train=config_lib.TrainConfig(num_steps=num_steps, eval_every=0),
        compilation_cache="",
        **changes,
    )


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Returns the workdir of a run of an objective, trained once."""
    made = {}

    def run(objective, num_steps=30):
        if objective not in made:
            folder = tmp_path_factory.mktemp(objective)
            train.train(_config(folder, objective, num_steps), str(folder / "run"))
            made[objective] = folder / "run"
        return made[objective]

    return run


def _score(workdir, name, **options):
    def read(step_dir, meta):
        return evaluate.run(step_dir, meta, str(workdir), [name], tasks.Options(**options))[0]

    return checkpoint.read_latest(str(workdir), None, read)


def _rows(workdir, name):
    (folder,) = (workdir / "evaluation").iterdir()
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_labels_of_sequences(run_of):
    workdir = run_of("sequence")
    found = _score(workdir, "classification")
    rows = _rows(workdir, "classification")
    held_out = {row["text"] for row in rows}
    assert found["examples"] == len(rows) == len(held_out) == 24
    assert held_out < {record["text"] for record in RECORDS}
    right = [row["target"] == row["prediction"] for row in rows]
    assert found["scores"]["accuracy"]["value"] == np.mean(right) > 0.6
    assert all(row["target"] == row["text"].split()[0] for row in rows)
    (folder,) = (workdir / "evaluation").iterdir()
    assert json.loads((folder / "classification.json").read_text()) == found
    assert (folder / "classification.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in tasks.table(found)


def test_labels_of_words(run_of):
    found = _score(run_of("token"), "classification")
    rows = _rows(run_of("token"), "classification")
    assert all(len(row["prediction"]) == len(row["target"]) == 3 for row in rows)
    assert all(row["target"] == RECORDS[int(row["words"][2])]["tags"] for row in rows)
    assert found["scores"]["entity_f1"]["value"] > 0.5


def test_spans_are_texts_of_the_context(run_of):
    found = _score(run_of("span", 60), "spans")
    rows = _rows(run_of("span"), "spans")
    assert all(row["prediction"] in row["text"] for row in rows)
    assert {len(row["target"]) for row in rows} == {0, 1}
    assert found["scores"]["token_f1"]["value"] > 0.3


def test_the_best_span_is_that_of_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.standard_normal((12, 2))
        start = 4
        best = max(
            (logits[start + a, 0] + logits[start + b, 1], a, b)
            for a in range(7)
            for b in range(a, 7)
        )
        none = logits[0].sum()
        wanted = (-1, -1) if none > best[0] else best[1:]
        assert predict._best_span(logits, start, True) == wanted


@pytest.mark.parametrize("num_beams", [1, 2])
def test_texts_are_written_for_what_the_model_reads_in_training(run_of, num_beams):
    workdir = run_of("seq2seq", 60)
    found = _score(workdir, "generation", num_beams=num_beams, max_tokens=8)
    rows = _rows(workdir, "generation")
    assert [row["target"] for row in rows] == [row["text"].split()[0] for row in rows]
    exact = np.mean([row["target"] == row["prediction"] for row in rows])
    assert found["scores"]["exact_match"]["value"] == exact
    assert found["scores"]["chrf"]["value"] > 20.0
    assert found["settings"]["num_beams"] == num_beams


def test_perplexity_scores_each_token_once_with_what_is_before_it(run_of):
    workdir = run_of("causal")
    found = _score(workdir, "perplexity", stride=8)

    def read(step_dir, meta):
        config, mesh, rules = meta.config, *helpers.make_mesh()
        from llm_jax.data import prepare
        from llm_jax.models import build

        with jax.set_mesh(mesh):
            model = checkpoint.restore_params(
                step_dir, meta, build.abstract_model(config.model, rules), mesh
            )
            prepared = prepare.prepare(config)
            ids = np.asarray(prepared.eval.tokens, np.int32)

            @jax.jit
            def logits(tokens):
                places = jnp.arange(tokens.shape[1])[None]
                return model(tokens, places)

            for stride in (8, 32):
                eos_id = prepared.eval.eos_id
                found, places = predict.window_losses(
                    config, model, mesh, rules, prepared.eval, stride
                )
                # Each once, but for what follows the end of a document.
                np.testing.assert_array_equal(
                    np.sort(places), 1 + np.flatnonzero(ids[:-1] != eos_id)
                )
                losses = dict(zip((places - 1).tolist(), found, strict=True))
                for index in np.sort(places - 1)[[0, 5, 31, 32, 33, 77, 150, -1]].tolist():
                    # The window that scores it first: ends at the first end behind it.
                    end = 32 + -(-max(0, index + 1 - 32) // stride) * stride
                    first, end = end - 32, min(end, len(ids) - 1)
                    # And no more of what is before than the token's own document.
                    ends = np.flatnonzero(ids[: index + 1] == eos_id)
                    begin = max([first, *(ends + 1)])
                    tokens = np.zeros((1, 32), np.int32)
                    tokens[0, : end - begin] = ids[begin:end]
                    row = np.asarray(logits(tokens))[0, index - begin].astype(np.float64)
                    wanted = np.log(np.exp(row).sum()) - row[ids[index + 1]]
                    assert losses[index] == pytest.approx(wanted, abs=1e-4)
        return prepared

    prepared = checkpoint.read_latest(str(workdir), None, read)
    rows = _rows(workdir, "perplexity")
    # The first token of a document follows nothing.
    num_scored = prepared.eval.num_tokens - prepared.eval.num_documents
    assert sum(row["tokens"] for row in rows) == num_scored
    total = sum(row["tokens"] * row["loss"] for row in rows)
    assert found["scores"]["loss"]["value"] == pytest.approx(total / num_scored)


def test_windows_of_no_overlap_give_the_loss_of_the_run(run_of):
    loss = _score(run_of("causal"), "loss")["eval/validation/loss"]
    found = _score(run_of("causal"), "perplexity", stride=32)
    assert found["scores"]["loss"]["value"] == pytest.approx(loss, rel=1e-5)


def test_a_source_of_its_own_is_scored_whole_without_what_was_trained_on(run_of, tmp_path):
    workdir = run_of("sequence")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS[:13]))

    def read(step_dir, meta):
        own = {"eval_source": f"jsonl:{tmp_path}/test.jsonl", "source": "jsonl:not_here.jsonl"}
        data = dataclasses.replace(meta.config.data, **own)
        meta = dataclasses.replace(meta, config=dataclasses.replace(meta.config, data=data))
        given = (str(workdir), ["classification"], tasks.Options(), "test")
        return evaluate.run(step_dir, meta, *given)[0]

    assert checkpoint.read_latest(str(workdir), None, read)["examples"] == 13
    assert [row["text"] for row in _rows(workdir, "classification-test")] == [
        row["text"] for row in RECORDS[:13]
    ]


@pytest.mark.parametrize(
    "source, name",
    [
        ("jsonl:test.jsonl", "test"),
        ("jsonl:/data/in french/test.v2.jsonl:text", "in_french-test"),
        ("tfds:wikipedia/20230601.en", "wikipedia-20230601"),
        ("text:gs://bucket/*.txt", "bucket-_"),
    ],
)
def test_files_of_scores_are_named_by_what_was_scored(source, name):
    assert files.name_of(source) == name


def test_tasks_that_are_not_there_or_do_not_fit_are_refused(run_of):
    for name, said in (("clasification", "did you mean"), ("spans", "classification")):
        with pytest.raises(errors.UserError, match=said):
            _score(run_of("sequence"), name)
    with pytest.raises(errors.UserError, match="stride"):
        _score(run_of("causal"), "perplexity", stride=33)


@pytest.mark.slow
def test_the_command_scores_tasks_and_says_what_is_wrong(run_of, tmp_path):
    workdir = run_of("sequence")
    for name, rows in (("few", RECORDS[:5]), ("more", RECORDS[:7])):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "test.jsonl").write_text(lines)
    flags = (f"--workdir={workdir}", "--tasks=loss,classification")
    both, _, wrong = commands.run(
        "llm_jax.evaluate",
        tmp_path,
        [
            [*flags, "--source=jsonl:few/test.jsonl"],
            [*flags, "--source=jsonl:more/test.jsonl"],
            [f"--workdir={workdir}", "--split=test"],
        ],
    )
    # One leaves the other's files alone.
    assert len(_rows(workdir, "classification-few-test")) == 5
    assert len(_rows(workdir, "classification-more-test")) == 7
    assert both[0] == 0, both[2]
    loss, found = map(json.loads, both[1].splitlines())
    assert "eval/validation/loss" in loss and found["examples"] == 5
    assert found["source"] == "jsonl:few/test.jsonl"
    assert "accuracy" in both[2]
    assert wrong[0] == 2 and "files of their own by --source" in wrong[2]


@pytest.mark.long
@pytest.mark.parametrize(
    "objective, name", [("sequence", "classification"), ("seq2seq", "generation")]
)
def test_answers_do_not_depend_on_hosts(run_of, tmp_path, objective, name):
    """13 examples: the last batch of two hosts with two devices each is a part of one."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS[:13]))
    found = []
    for hosts, devices in ((1, 1), (2, 2)):
        workdir = run_of(objective, 60)
        flags = (f"--tasks={name}", f"--source=jsonl:{tmp_path}/test.jsonl", "--max_tokens=3")
        run = runs.Run("llm_jax.evaluate", workdir, *flags, hosts=hosts, devices=devices).finish()
        (line,) = run.out.getvalue().splitlines()
        record = json.loads(line.removeprefix("[0] "))
        del record["seconds"]
        name_of_data = files.name_of(f"jsonl:{tmp_path}/test.jsonl")
        found.append((record, _rows(workdir, f"{name}-{name_of_data}")))
    assert found[0] == found[1]
    assert found[0][0]["examples"] == len(found[0][1]) == 13
