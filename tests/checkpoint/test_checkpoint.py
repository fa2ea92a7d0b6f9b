"""Checkpoints: bit-exact for every optimiser and dtype, and which of them are kept."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from tests import helpers
from tests.checkpoint import states

# --- round trips (`test_restore_matrix` has those between layouts) --------------------------------


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_the_state_of_every_optimiser_comes_back(tmp_path, name):
    config = helpers.tiny_run_config(optim={"name": name, "schedule": "constant"})
    source, target = helpers.make_mesh(*states.MESHES["data2_tensor2"]), helpers.make_mesh()
    states.save(tmp_path, config, *source, 3)
    restored = states.restore(tmp_path, config, *target)
    assert states.bits(restored) == states.bits(states.random_state(config, *target, 3))
    assert len(states.bits(restored.opt_state)) > 1


def test_bfloat16_parameters_come_back(tmp_path):
    config = helpers.tiny_run_config({"param_dtype": "bfloat16"})
    mesh, rules = helpers.make_mesh()
    states.save(tmp_path, config, mesh, rules, 3)
    restored = states.restore(tmp_path, config, mesh, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.model)} == {jnp.dtype("bfloat16")}
    assert states.bits(restored) == states.bits(states.random_state(config, mesh, rules, 3))


def test_a_new_run_has_nothing_to_restore(tmp_path):
    assert states.restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh()) is None


# --- fingerprints -------------------------------------------------------------------------------


def test_fingerprints_do_not_depend_on_the_mesh(tmp_path):
    metas = []
    for name, mesh in states.MESHES.items():
        states.save(tmp_path / name, helpers.tiny_run_config(), *helpers.make_mesh(*mesh), 3)
        metas.append(checkpoint.read_meta(checkpoint.directory(str(tmp_path / name)) / "3"))
    assert all(meta.fingerprints == metas[0].fingerprints for meta in metas)
    # Arrays of equal shape and different content are told apart.
    assert len(set(metas[0].fingerprints.values())) > 0.9 * len(metas[0].fingerprints)


# --- what is kept -------------------------------------------------------------------------------


def _save_all(folder, losses: dict[int, float | None], max_to_keep: int) -> None:
    config = helpers.tiny_run_config(checkpoint={"max_to_keep": max_to_keep})
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(str(folder), config, states.TOKENIZER)
    for step, loss in losses.items():
        manager.save(states.random_state(config, mesh, rules, step), loss)
    manager.close()


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {1: float("nan"), 2: 5.0, 3: 1.0, 4: 4.0, 5: float("nan"), 6: None, 7: 2.0}
    _save_all(tmp_path, losses, max_to_keep=2)
    assert states.kept(tmp_path) == [3, 6, 7]


def test_the_best_is_kept_by_a_run_that_starts_again(tmp_path):
    _save_all(tmp_path, {1: 5.0, 2: 1.0}, max_to_keep=1)
    _save_all(tmp_path, {3: 4.0, 4: None}, max_to_keep=1)
    assert states.kept(tmp_path) == [2, 4]
    _save_all(tmp_path, {5: 0.5, 6: 0.7}, max_to_keep=1)
    assert states.kept(tmp_path) == [5, 6]


def test_the_best_is_found_by_name(tmp_path):
    _save_all(tmp_path, {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan")}, max_to_keep=5)

    def read(step_dir, meta):
        return meta.step

    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step("best"), read) == 2
    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step(None), read) == 5
    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step("3"), read) == 3
    # The next best one is taken where the best is damaged.
    states.empty(states.largest_file(tmp_path / "checkpoints" / "2" / "meta"))
    assert checkpoint.read_latest(str(tmp_path), "best", read) == 3
    with pytest.raises(errors.UserError, match="--step=bets is no step: use a number, or best"):
        checkpoint.parse_step("bets")


def test_the_best_needs_an_evaluation(tmp_path):
    _save_all(tmp_path, {1: None, 2: None}, max_to_keep=2)
    with pytest.raises(errors.UserError, match="--step=best: no checkpoint .* was evaluated"):
        checkpoint.read_latest(str(tmp_path), "best", lambda step_dir, meta: meta.step)


def test_only_the_latest_are_kept_without_evaluation(tmp_path):
    _save_all(tmp_path, dict.fromkeys(range(1, 6)), max_to_keep=3)
    assert states.kept(tmp_path) == [3, 4, 5]
