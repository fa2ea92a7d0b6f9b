"""Checkpoints: bit-exact on any mesh, self-explaining, and never silently wrong when damaged."""

import collections
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import train_step
from llm_jax.models import build
from tests import helpers

TOKENIZER = {"kind": "bytes"}
MESHES = {
    "one": ((1, 1, 1, 1, 1), "fsdp"),
    "data4": ((1, 4, 1, 1, 1), "fsdp"),
    "data2_tensor2": ((1, 2, 1, 1, 2), "fsdp_tp"),
    "replica2_data2": ((2, 2, 1, 1, 1), "fsdp"),
}
# Values that arithmetic or text would not bring back as they are.
SPECIAL = np.asarray([np.nan, -0.0, np.inf, 1e-42], np.float32)


def _abstract_state(config, mesh, rules) -> train_step.TrainState:
    with jax.set_mesh(mesh):
        return jax.eval_shape(functools.partial(train_step.init_state, config, rules))


def _random_state(config, mesh, rules, step: int) -> train_step.TrainState:
    """Returns a state of random values, which depend on the step and not on the mesh."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        spec = jax.sharding.PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            value = rng.integers(0, 1000, leaf.shape)
        else:
            value = rng.standard_normal(leaf.shape)
        value = np.array(value, leaf.dtype)
        if value.size > 8:
            value.reshape(-1)[: len(SPECIAL)] = SPECIAL
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))

    state = jax.tree.map(draw, _abstract_state(config, mesh, rules))
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def _bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def _save(folder, config, mesh, rules, *steps: int) -> None:
    manager = checkpoint.Checkpoints(str(folder), config, TOKENIZER)
    for step in steps:
        manager.save(_random_state(config, mesh, rules, step))
    manager.close()


def _restore(folder, config, mesh, rules, tokenizer=TOKENIZER):
    manager = checkpoint.Checkpoints(str(folder), config, tokenizer)
    try:
        with jax.set_mesh(mesh):
            return manager.restore_latest(_abstract_state(config, mesh, rules), mesh)
    finally:
        manager.close()


def _kept(folder) -> list[int]:
    return checkpoint.steps(checkpoint.directory(str(folder)))


# --- round trips --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_on(tmp_path_factory):
    """Returns the folder of a run that saved one checkpoint on the named mesh."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        _save(folder, helpers.tiny_run_config(), *helpers.make_mesh(*MESHES[name]), 3)
        return folder

    return save


@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("source", MESHES)
def test_any_mesh_restores_what_any_mesh_saved(saved_on, source, target):
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh(*MESHES[target])
    restored = _restore(saved_on(source), config, mesh, rules)
    expected = _random_state(config, mesh, rules, 3)
    assert _bits(restored) == _bits(expected)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
    for got, wanted in zip(jax.tree.leaves(restored.model), jax.tree.leaves(expected.model)):
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


@pytest.mark.parametrize("source", MESHES)
def test_parameters_alone_restore_on_one_device(saved_on, source):
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()

    def read(step_dir, meta):
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(meta.config.model, rules)
            return checkpoint.restore_params(step_dir, meta, abstract, mesh)

    model = checkpoint.read_latest(str(saved_on(source)), None, read)
    assert _bits(model) == _bits(_random_state(config, mesh, rules, 3).model)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_the_state_of_every_optimiser_comes_back(tmp_path, name):
    config = helpers.tiny_run_config(optim={"name": name})
    source, target = helpers.make_mesh(*MESHES["data2_tensor2"]), helpers.make_mesh()
    _save(tmp_path, config, *source, 3)
    restored = _restore(tmp_path, config, *target)
    assert _bits(restored) == _bits(_random_state(config, *target, 3))
    assert len(_bits(restored.opt_state)) > 1


def test_bfloat16_parameters_come_back(tmp_path):
    config = helpers.tiny_run_config({"param_dtype": "bfloat16"})
    mesh, rules = helpers.make_mesh()
    _save(tmp_path, config, mesh, rules, 3)
    restored = _restore(tmp_path, config, mesh, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.model)} == {jnp.dtype("bfloat16")}
    assert _bits(restored) == _bits(_random_state(config, mesh, rules, 3))


def test_a_new_run_has_nothing_to_restore(tmp_path):
    assert _restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh()) is None


# --- fingerprints -------------------------------------------------------------------------------


def test_fingerprints_do_not_depend_on_the_mesh(saved_on):
    metas = [
        checkpoint.read_meta(checkpoint.directory(str(saved_on(name))) / "3") for name in MESHES
    ]
    assert all(meta.fingerprints == metas[0].fingerprints for meta in metas)
    # Arrays of equal shape and different content are told apart.
    assert len(set(metas[0].fingerprints.values())) > 0.9 * len(metas[0].fingerprints)


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run's folder with checkpoints of steps 1, 2 and 3, and what steps 2 and 3 hold."""
    folder = tmp_path_factory.mktemp("three")
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    _save(folder, config, mesh, rules, 1, 2, 3)
    return folder, {step: _bits(_random_state(config, mesh, rules, step)) for step in (1, 2, 3)}


def _largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
    path.write_bytes(b"")


def _delete(path):
    path.unlink()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _reword(path):
    """Changes what the checkpoint says of itself into something that is just as valid."""
    path.write_bytes(path.read_bytes().replace(b'"kind": "bytes"', b'"kind": "bytez"'))


DAMAGES = {
    "truncated_parameters": (_truncate, "params"),
    "deleted_parameters": (_delete, "params"),
    "flipped_parameters": (_flip, "params"),
    "truncated_training": (_truncate, "training"),
    "flipped_training": (_flip, "training"),
    "emptied_meta": (_empty, "meta"),
    "flipped_meta": (_flip, "meta"),
    "reworded_meta": (_reword, "meta"),
    "deleted_meta": (shutil.rmtree, None),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_last_good_checkpoint_is_used_and_the_damaged_one_moved_aside(
    three_steps, tmp_path, caplog, name
):
    folder, contents = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    step_dir = tmp_path / "checkpoints" / "3"
    damage, part = DAMAGES[name]
    damage(step_dir / "meta" if part is None else _largest_file(step_dir / part))

    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(str(tmp_path), config, TOKENIZER)
    with caplog.at_level(logging.WARNING, "llm_jax"), jax.set_mesh(mesh):
        restored = manager.restore_latest(_abstract_state(config, mesh, rules), mesh)
    assert _bits(restored) == contents[2]
    assert f"{step_dir} is damaged" in caplog.text

    assert _kept(tmp_path) == [1, 2]
    (aside,) = (tmp_path / "checkpoints_damaged").iterdir()
    assert aside.name.startswith("3-") and any(aside.rglob("*"))
    manager.save(_random_state(config, mesh, rules, 3))
    manager.close()
    assert _bits(_restore(tmp_path, config, mesh, rules)) == contents[3]


@pytest.mark.slow
def test_whatever_file_is_damaged_the_state_is_never_wrong(three_steps, tmp_path, caplog):
    folder, contents = three_steps
    newest = folder / "checkpoints" / "3"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    used = collections.defaultdict(list)
    for index, (name, damage) in enumerate(itertools.product(files, (_truncate, _delete, _flip))):
        run = tmp_path / str(index)
        shutil.copytree(folder, run)
        damage(run / "checkpoints" / "3" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llm_jax"):
            restored = _restore(run, config, mesh, rules)
        step = int(restored.step)
        assert _bits(restored) == contents[step], (name, damage)
        used[name].append(step)
        # Files that only help need not be whole; what is left out is said to be.
        assert (step == 3) == ("is damaged" not in caplog.text), (name, damage)
        assert (run / "checkpoints_damaged").exists() == (step == 2)
        shutil.rmtree(run)
    for name, steps in used.items():
        if _is_needed(name):
            assert steps == [2, 2, 2], name
        if name.suffix == ".txt" or name.name == "_sharding":
            assert steps == [3, 3, 3], name
    # How many data files are left over, and which bytes of the others are read, differs.
    for part in ("params", "training"):
        of_data = [used[name] for name in used if name.match(f"{part}/ocdbt.process_*/d/*")]
        assert any(2 in steps for steps in of_data), part


def _is_needed(name: pathlib.PurePath) -> bool:
    """Returns whether no restore can do without: our own record, the merged index, its nodes."""
    top = ("meta/metadata", "params/manifest.ocdbt", "training/manifest.ocdbt")
    return name.as_posix() in top or name.parent.as_posix() in ("params/d", "training/d")


def test_sampling_reads_the_last_whole_one_and_moves_nothing(three_steps, tmp_path, caplog):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    _empty(_largest_file(tmp_path / "checkpoints" / "3" / "meta"))

    def step_of(step_dir, meta):
        assert step_dir.name == str(meta.step)
        return meta.step

    with caplog.at_level(logging.WARNING, "llm_jax"):
        assert checkpoint.read_latest(str(tmp_path), None, step_of) == 2
    assert f"{tmp_path / 'checkpoints' / '3'} is damaged" in caplog.text
    assert _kept(tmp_path) == [1, 2, 3]
    assert checkpoint.read_latest(str(tmp_path), 1, step_of) == 1
    with pytest.raises(errors.UserError, match="is whole"):
        checkpoint.read_latest(str(tmp_path), 3, step_of)
    with pytest.raises(errors.UserError, match=r"--step=7: .* has steps \[1, 2, 3\]"):
        checkpoint.read_latest(str(tmp_path), 7, step_of)
    with pytest.raises(errors.UserError, match="has no checkpoints"):
        checkpoint.read_latest(str(tmp_path / "none"), None, step_of)


def test_when_all_are_damaged_the_run_does_not_begin_anew(three_steps, tmp_path):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step in (1, 2, 3):
        _flip(_largest_file(tmp_path / "checkpoints" / str(step) / "params"))
    with pytest.raises(errors.UserError, match="all 3 checkpoints under .* are damaged"):
        _restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh())
    assert _kept(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-17"])
def test_a_save_that_was_cut_off_is_not_seen(three_steps, tmp_path, suffix, caplog):
    folder, contents = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    left = tmp_path / "checkpoints" / f"4{suffix}"
    shutil.copytree(tmp_path / "checkpoints" / "3", left)
    _delete(_largest_file(left / "params"))
    assert _kept(tmp_path) == [1, 2, 3]
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    assert _bits(_restore(tmp_path, config, mesh, rules)) == contents[3]
    assert "damaged" not in caplog.text
    _save(tmp_path, config, mesh, rules, 4)
    assert int(_restore(tmp_path, config, mesh, rules).step) == 4


# --- what a run may change ----------------------------------------------------------------------


def test_a_changed_model_is_refused_with_each_difference(three_steps):
    folder, _ = three_steps
    config = helpers.tiny_run_config({"num_layers": 3, "norm": "layernorm"})
    with pytest.raises(errors.UserError) as caught:
        _restore(folder, config, *helpers.make_mesh())
    message = str(caught.value)
    assert "config.model.num_layers: 2 in the checkpoint, 3 now" in message
    assert "config.model.norm: 'rmsnorm' in the checkpoint, 'layernorm' now" in message
    assert message.count("in the checkpoint") == 2
    assert "step 3" in message and "--workdir" in message
    assert _kept(folder) == [1, 2, 3]


def test_another_optimiser_or_tokenizer_is_refused(three_steps):
    folder, _ = three_steps
    mesh, rules = helpers.make_mesh()
    with pytest.raises(errors.UserError, match="optim.name: 'adamw' in the checkpoint, 'lion' now"):
        _restore(folder, helpers.tiny_run_config(optim={"name": "lion"}), mesh, rules)
    with pytest.raises(errors.UserError, match="the tokenizer is another one"):
        _restore(folder, helpers.tiny_run_config(), mesh, rules, tokenizer={"kind": "other"})


def test_other_settings_may_change(three_steps, caplog):
    folder, contents = three_steps
    config = helpers.tiny_run_config(
        optim={"learning_rate": 0.5, "weight_decay": 0.0}, train={"num_steps": 99}
    )
    with caplog.at_level(logging.INFO, "llm_jax"):
        restored = _restore(folder, config, *helpers.make_mesh())
    assert _bits(restored) == contents[3]
    assert "config.optim.learning_rate: 0.001 in the checkpoint, 0.5 now" in caplog.text


# --- what is kept -------------------------------------------------------------------------------


def _save_all(folder, losses: dict[int, float | None], max_to_keep: int) -> None:
    config = helpers.tiny_run_config(checkpoint={"max_to_keep": max_to_keep})
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(str(folder), config, TOKENIZER)
    for step, loss in losses.items():
        manager.save(_random_state(config, mesh, rules, step), loss)
    manager.close()


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {1: float("nan"), 2: 5.0, 3: 1.0, 4: 4.0, 5: float("nan"), 6: None, 7: 2.0}
    _save_all(tmp_path, losses, max_to_keep=2)
    assert _kept(tmp_path) == [3, 6, 7]


def test_the_best_is_kept_by_a_run_that_starts_again(tmp_path):
    _save_all(tmp_path, {1: 5.0, 2: 1.0}, max_to_keep=1)
    _save_all(tmp_path, {3: 4.0, 4: None}, max_to_keep=1)
    assert _kept(tmp_path) == [2, 4]
    _save_all(tmp_path, {5: 0.5, 6: 0.7}, max_to_keep=1)
    assert _kept(tmp_path) == [5, 6]


def test_the_best_is_found_by_name(tmp_path):
    _save_all(tmp_path, {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan")}, max_to_keep=5)

    def read(step_dir, meta):
        return meta.step

    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step("best"), read) == 2
    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step(None), read) == 5
    assert checkpoint.read_latest(str(tmp_path), checkpoint.parse_step("3"), read) == 3
    # The next best one is taken where the best is damaged.
    _empty(_largest_file(tmp_path / "checkpoints" / "2" / "meta"))
    assert checkpoint.read_latest(str(tmp_path), "best", read) == 3
    with pytest.raises(errors.UserError, match="--step=bets is no step: use a number, or best"):
        checkpoint.parse_step("bets")


def test_the_best_needs_an_evaluation(tmp_path):
    _save_all(tmp_path, {1: None, 2: None}, max_to_keep=2)
    with pytest.raises(errors.UserError, match="--step=best: no checkpoint .* was evaluated"):
        checkpoint.read_latest(str(tmp_path), "best", lambda step_dir, meta: meta.step)


def test_only_the_latest_are_kept_without_evaluation(tmp_path):
    _save_all(tmp_path, dict.fromkeys(range(1, 6)), max_to_keep=3)
    assert _kept(tmp_path) == [3, 4, 5]


# --- what a checkpoint says of itself -----------------------------------------------------------


def test_meta_explains_the_checkpoint(tmp_path):
    config = helpers.tiny_run_config(optim={"learning_rate": 0.1, "clip_norm": None})
    mesh, rules = helpers.make_mesh()
    tokenizer = {"kind": "bytes", "note": "é"}
    manager = checkpoint.Checkpoints(str(tmp_path), config, tokenizer)
    state = _random_state(config, mesh, rules, 12)
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


def test_a_newer_format_is_refused(three_steps, tmp_path):
    folder, _ = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = _largest_file(tmp_path / "checkpoints" / "3" / "meta")
    raw = json.loads(path.read_text())
    raw["format"] = checkpoint.FORMAT_VERSION + 1
    path.write_text(json.dumps(raw))
    with pytest.raises(errors.UserError, match=r"format 2.*reads up to 1: update it"):
        _restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh())
