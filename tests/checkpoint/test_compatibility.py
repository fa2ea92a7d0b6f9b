"""What a checkpoint says of itself, and what keeps a run from going on from it."""

import dataclasses
import json
import logging
import shutil

import jax
import pytest

import llm_jax
from llm_jax import checkpoint
from llm_jax import errors
from llm_jax.models import build
from tests import helpers
from tests.checkpoint import states

# --- what a run may change ----------------------------------------------------------------------


def test_a_changed_model_is_refused_with_each_difference(three_steps):
    folder, _ = three_steps
    config = helpers.tiny_run_config({"num_layers": 3, "norm": "layernorm"})
    with pytest.raises(errors.UserError) as caught:
        states.restore(folder, config, *helpers.make_mesh())
    message = str(caught.value)
    assert "config.model.num_layers: 2 in the checkpoint, 3 now" in message
    assert "config.model.norm: 'rmsnorm' in the checkpoint, 'layernorm' now" in message
    assert message.count("in the checkpoint") == 2
    assert "step 3" in message and "--workdir" in message
    assert states.kept(folder) == [1, 2, 3]


def test_the_refusal_names_arrays_and_the_settings_that_change_them(three_steps):
    folder, _ = three_steps
    config = helpers.tiny_run_config({"num_layers": 3, "norm": "layernorm"})
    with pytest.raises(errors.UserError) as caught:
        states.restore(folder, config, *helpers.make_mesh())
    message = str(caught.value)
    assert (
        "params/stack/layers/attention/k_DKC is saved as float32[2,16,2,4], wanted as"
        " float32[3,16,2,4] because of config.model.num_layers;" in message
    )
    assert "arrays more" in message and "\n" not in message


def _save_other_arrays(folder, config, mesh, rules) -> None:
    """Saves arrays that this code does not make of the config, as another version of it might."""
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, mlp_dim=24, is_gated=False)
    )
    manager = checkpoint.Checkpoints(str(folder), config, states.TOKENIZER)
    manager.save(states.random_state(other, mesh, rules, 3))
    manager.close()


@pytest.mark.parametrize("is_recorded", [True, False])
def test_arrays_of_other_code_are_named_and_not_called_damaged(tmp_path, is_recorded):
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    _save_other_arrays(tmp_path, config, mesh, rules)
    if not is_recorded:
        states.forget(tmp_path / "checkpoints" / "3", "arrays", "mesh")
    expected = (
        "params/stack/layers/mlp/out_FD is saved as float32[2,24,16], wanted as float32[2,64,16]"
    )
    with pytest.raises(errors.UserError, match="step 3 does not fit this code") as caught:
        states.restore(tmp_path, config, mesh, rules)
    assert expected in str(caught.value)
    # Three parameters and their two moments: out and up are other ones, and gate is not there.
    assert str(caught.value).count(" wanted as ") == 3 and "and 6 arrays more" in str(caught.value)

    def read(step_dir, meta):
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(meta.config.model, rules)
            return checkpoint.restore_params(step_dir, meta, abstract, mesh)

    with pytest.raises(errors.UserError, match="does not have the model") as caught:
        checkpoint.read_latest(str(tmp_path), None, read)
    assert expected in str(caught.value)
    assert "params/stack/layers/mlp/gate_DF is not saved" in str(caught.value)
    assert "more" not in str(caught.value) and f"llm_jax {llm_jax.__version__}" in str(caught.value)
    assert states.kept(tmp_path) == [3]


def test_another_optimiser_or_tokenizer_is_refused(three_steps):
    folder, _ = three_steps
    mesh, rules = helpers.make_mesh()
    with pytest.raises(errors.UserError, match="optim.name: 'adamw' in the checkpoint, 'lion' now"):
        states.restore(folder, helpers.tiny_run_config(optim={"name": "lion"}), mesh, rules)
    with pytest.raises(errors.UserError, match="the tokenizer is another one"):
        states.restore(folder, helpers.tiny_run_config(), mesh, rules, tokenizer={"kind": "other"})


def test_other_settings_may_change(three_steps, caplog):
    folder, contents = three_steps
    config = helpers.tiny_run_config(
        optim={"learning_rate": 0.5, "weight_decay": 0.0}, train={"num_steps": 99}
    )
    with caplog.at_level(logging.INFO, "llm_jax"):
        restored = states.restore(folder, config, *helpers.make_mesh())
    assert states.bits(restored) == contents[3]
    assert "config.optim.learning_rate: 0.001 in the checkpoint, 0.5 now" in caplog.text


# --- what a checkpoint says of itself -----------------------------------------------------------


def test_meta_explains_the_checkpoint(tmp_path):
    config = helpers.tiny_run_config(optim={"learning_rate": 0.1, "clip_norm": None})
    mesh, rules = helpers.make_mesh()
    tokenizer = {"kind": "bytes", "note": "é"}
    manager = checkpoint.Checkpoints(str(tmp_path), config, tokenizer)
    state = states.random_state(config, mesh, rules, 12)
    manager.save(state, 1.25)
    manager.wait()
    assert manager.latest_step() == 12
    manager.close()
    meta = checkpoint.read_meta(checkpoint.directory(str(tmp_path)) / "12")
    assert (meta.step, meta.config, meta.tokenizer) == (12, config, tokenizer)
    assert meta.eval_loss == 1.25
    assert meta.versions["jax"] == jax.__version__
    assert {"flax", "optax", "llm_jax"} <= set(meta.versions)
    arrays = jax.tree.leaves((state.model, state.opt_state))
    assert len(meta.fingerprints) == len(arrays) + 2  # and step and num_skipped


def test_records_of_older_and_of_newer_code_are_read(three_steps, tmp_path):
    folder, contents = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "3"
    config = helpers.tiny_run_config()
    states.rewrite(newest, lambda raw: raw.update(what_comes_later=[1]))
    assert states.bits(states.restore(tmp_path, config, *helpers.make_mesh())) == contents[3]
    states.forget(newest, "arrays", "mesh", "what_comes_later")
    meta = checkpoint.read_meta(newest)
    assert (meta.arrays, meta.mesh) == (None, None)
    assert states.bits(states.restore(tmp_path, config, *helpers.make_mesh())) == contents[3]


def test_a_config_of_newer_code_is_one_line_that_names_the_versions(three_steps, tmp_path):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "3"
    states.rewrite(newest, lambda raw: raw["config"]["model"].update(num_wings=2))
    with pytest.raises(errors.UserError, match=f"{newest} was saved by llm_jax .*num_wings"):
        checkpoint.read_latest(str(tmp_path), None, lambda step_dir, meta: None)


def test_a_newer_format_is_refused(three_steps, tmp_path):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = states.largest_file(tmp_path / "checkpoints" / "3" / "meta")
    raw = json.loads(path.read_text())
    raw["format"] = checkpoint.FORMAT_VERSION + 1
    path.write_text(json.dumps(raw))
    with pytest.raises(errors.UserError, match=r"format 2.*reads up to 1: update it"):
        states.restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh())
