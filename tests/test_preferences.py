"""Direct preference optimisation: the paper's loss, against a reference that stays, from checkpoint to score."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import evaluate
from llm_jax import losses
from llm_jax import train
from llm_jax import train_step
from llm_jax.data import chat
from llm_jax.evaluation import tasks
from llm_jax.sampling import chat as terminal
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from tests import helpers


def test_the_loss_is_that_of_the_paper(one_device):
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 5, 2)).astype(np.float32)
    weights = np.array([1, 1, 0, 1, 1], np.float32)
    run = jax.jit(functools.partial(losses.preference_sums, beta=0.3))
    sums = run(*map(jnp.asarray, (policy, reference, weights)))
    margin = (policy - reference).astype(np.float64) @ [1, -1]
    wanted = np.log1p(np.exp(-0.3 * margin)) @ weights
    np.testing.assert_allclose(sums.cross_entropy, wanted, rtol=1e-6)
    assert float(sums.weight) == 4.0


def _batch(config):
    """Rows of two answers of uneven lengths, what is asked included; the last row is padding."""
    batch = helpers.random_batch(config)
    places = np.arange(config.data.sequence_length)[None]
    cuts = np.random.default_rng(1).integers(4, 9, (8, 1))
    segments = np.where(places < cuts, 1, np.where(places < cuts + 5, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, places - cuts, np.where(segments == 1, places, 0))
    weights = ((positions >= 1) & (segments > 0)).astype(np.float32)
    weights[-1] = 0
    reference = np.random.default_rng(2).normal(size=(8, 2)).astype(np.float32) * 4 - 30
    return batch._replace(
        segments=segments,
        positions=positions.astype(np.int32),
        weights=weights,
        reference=reference,
    )


def _placed(batch, mesh, rules):
    """Puts a batch on a mesh; of the answers' numbers both lie together, as a reference gives them."""
    placed = helpers.place(batch._replace(reference=None), mesh, rules)
    spec = jax.sharding.PartitionSpec(rules.act("B")[0], None)
    reference = jax.device_put(batch.reference, jax.sharding.NamedSharding(mesh, spec))
    return placed._replace(reference=reference)


@functools.cache
def _gradients(shape, rules, micro=1):
    config = helpers.tiny_run_config(
        {},
        objective={"name": "preference"},
        data={"packing": "none"},
        optim={"accumulation_steps": micro},
    )
    mesh, axis_rules = helpers.make_mesh(shape, rules)
    parameters = helpers.random_model(config.model, mesh, axis_rules)
    batch = _placed(_batch(config), mesh, axis_rules)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(train_step.gradients, config))
        grads, sums, _ = run(parameters, batch, jax.random.key(0))
    return jax.tree.leaves(jax.device_get(grads)), jax.device_get(sums)


@pytest.mark.parametrize(
    ("shape", "rules", "micro"),
    [((1, 4, 1, 1, 2), "fsdp_tp", 1), ((1, 1, 1, 1, 1), "fsdp", 4)],
)
def test_meshes_and_microbatches_equal_one(shape, rules, micro):
    grads, sums = _gradients(shape, rules, micro)
    one_grads, one_sums = _gradients((1, 1, 1, 1, 1), "fsdp")
    assert float(one_sums.weight) == 7.0
    helpers.assert_close(sums, one_sums)
    helpers.assert_close(grads, one_grads)


def test_answers_do_not_see_each_other(one_device):
    config = helpers.tiny_run_config({}, objective={"name": "preference"}, data={"packing": "none"})
    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 1), "fsdp")
    model = helpers.random_model(config.model, mesh, rules)
    batch = _batch(config)
    other = batch._replace(tokens=np.where(batch.segments == 1, 3, batch.tokens).astype(np.int32))

    @jax.jit
    def scores(model, batch):
        tokens, _ = train_step.token_losses(config, model, batch)
        return train_step.of_answers(tokens.cross_entropy_BT, batch)

    with jax.set_mesh(mesh):
        first, second = (scores(model, _placed(b, mesh, rules)) for b in (batch, other))
    np.testing.assert_allclose(first[:, 1], second[:, 1], rtol=1e-5)
    assert np.all(np.abs(first[:-1, 0] - second[:-1, 0]) > 1e-3)


# --- from a run to a run ---------------------------------------------------------------------------

WORDS = ["red", "green", "blue", "black"]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"{WORDS[i % 4]} {i}"},
            {"role": "assistant", "content": WORDS[i % 4]},
        ],
        "prompt": [{"role": "user", "content": f"{WORDS[i % 4]} {i}"}],
        "chosen": WORDS[i % 4],
        "rejected": f"not {WORDS[i % 4]}",
    }
    for i in range(64)
]


def _config(folder, **sections):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    data = {
        "source": f"jsonl:{path}",
        "eval_source": f"jsonl:{path}",
        "cache_dir": str(folder / "cache"),
        "chat_template": "plain",
        "input_fields": "messages",
        "sequence_length": 96,
        "batch_size": 8,
    }
    small = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "vocab_size": 264, "max_length": 128}
    sections = {
        "model": small | sections.get("model", {}),
        "data": data | sections.get("data", {}),
        "objective": {"name": "chat"} | sections.get("objective", {}),
        "optim": {"learning_rate": 1e-2, "warmup_steps": 1} | sections.get("optim", {}),
        "tune": sections.get("tune", {}),
        "train": {"num_steps": 120, "eval_every": 0} | sections.get("train", {}),
    }
    return config_lib.from_dict(
        config_lib.to_dict(config_lib.RunConfig()) | {"compilation_cache": ""} | sections
    )


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    train.train(_config(folder), str(folder / "run"))
    return folder


def _score(workdir, name, **changes):
    def read(step_dir, meta):
        meta = dataclasses.replace(meta, **changes)
        return evaluate.run(step_dir, meta, str(workdir), [name], tasks.Options())[0]

    return checkpoint.read_latest(str(workdir), None, read)


def test_a_run_on_conversations_answers_and_remembers_how(talking):
    meta = checkpoint.read_latest(str(talking / "run"), None, lambda _, meta: meta)
    assert meta.chat["source"] == chat.PLAIN
    found = _score(talking / "run", "chat")
    rows = (talking / "run" / "evaluation" / "120" / "chat.jsonl").read_text().splitlines()
    right = [json.loads(row)["prediction"] == json.loads(row)["target"] for row in rows]
    assert found["scores"]["exact_match"]["value"] == np.mean(right) > 0.9


def test_the_terminal_talks_and_forgets_what_does_not_fit(talking, capsys):
    loaded = load.load(str(talking / "run"))
    template = terminal.load_template(str(talking / "run"), loaded.step)
    how = {"params": samplers.SamplingParams(temperature=0.0), "max_tokens": 8}
    conversation = terminal.Conversation(loaded, template, **how)
    lines = ["green 5", "", f"blue {'6' * 60}", f"black {'7' * 40}", "x" * 300, "/new", "red 8"]
    terminal.talk(conversation, lines, is_terminal=False)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].strip() == "green" and "red" in out.splitlines()[-1]
    assert "left out" in err and "shorten it" in err
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    # What was said streams as it is kept.
    assert out.splitlines()[-1].strip() == conversation.messages[-1]["content"]


@pytest.mark.parametrize("rank", [0, 4])
def test_preferences_are_learned_against_the_start(talking, tmp_path, rank):
    start = {
        "model": {"lora": {"rank": rank, "targets": "*"}},
        "data": {
            "tokenizer": f"workdir:{talking}/run",
            "chat_template": "",
            "input_fields": "prompt",
            "target_field": "rejected,chosen",  # the wrong way round: what it did not learn before
            "packing": "none",
        },
        "objective": {"name": "preference"},
        "optim": {"learning_rate": 3e-3},
        "tune": {"start": f"{talking}/run"},
    }
    config = _config(tmp_path, train={"num_steps": 1}, **start)
    train.train(config, str(tmp_path / "first"))
    rows = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    # Nothing has been gained before the first step: ln 2.
    assert json.loads(rows[0])["train/loss"] == pytest.approx(np.log(2), rel=1e-5)
    config = _config(tmp_path, train={"num_steps": 25}, **start)
    train.train(config, str(tmp_path / "run"))
    scores = _score(tmp_path / "run", "preferences")["scores"]
    assert scores["likelier_before"]["value"] < 0.1
    assert scores["accuracy"]["value"] > 0.9 and scores["margin"]["value"] > 1.0
    assert _score(tmp_path / "run", "loss")["eval/validation/loss"] < 0.6
