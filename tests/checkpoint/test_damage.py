"""Damaged checkpoints: found whatever file it is, named, left out, and never restored wrong."""

import collections
import itertools
import logging
import pathlib
import shutil

import jax
import pytest

from llm_jax import checkpoint
from llm_jax import errors
from tests import helpers
from tests.checkpoint import states


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _delete(path):
    path.unlink()


def _reword(path):
    """Changes what the checkpoint says of itself into something that is just as valid."""
    path.write_bytes(path.read_bytes().replace(b'"kind": "bytes"', b'"kind": "bytez"'))


DAMAGES = {
    "truncated_parameters": (_truncate, "params"),
    "deleted_parameters": (_delete, "params"),
    "flipped_parameters": (states.flip, "params"),
    "truncated_training": (_truncate, "training"),
    "flipped_training": (states.flip, "training"),
    "emptied_meta": (states.empty, "meta"),
    "flipped_meta": (states.flip, "meta"),
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
    damage(step_dir / "meta" if part is None else states.largest_file(step_dir / part))

    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(str(tmp_path), config, states.TOKENIZER)
    with caplog.at_level(logging.WARNING, "llm_jax"), jax.set_mesh(mesh):
        restored = manager.restore_latest(states.abstract_state(config, mesh, rules), mesh)
    assert states.bits(restored) == contents[2]
    assert f"{step_dir} is damaged" in caplog.text

    assert states.kept(tmp_path) == [1, 2]
    (aside,) = (tmp_path / "checkpoints_damaged").iterdir()
    assert aside.name.startswith("3-") and any(aside.rglob("*"))
    manager.save(states.random_state(config, mesh, rules, 3))
    manager.close()
    assert states.bits(states.restore(tmp_path, config, mesh, rules)) == contents[3]


@pytest.mark.long
def test_whatever_file_is_damaged_the_state_is_never_wrong(three_steps, tmp_path, caplog):
    folder, contents = three_steps
    newest = folder / "checkpoints" / "3"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    used = collections.defaultdict(list)
    for index, (name, damage) in enumerate(
        itertools.product(files, (_truncate, _delete, states.flip))
    ):
        run = tmp_path / str(index)
        shutil.copytree(folder, run)
        damage(run / "checkpoints" / "3" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llm_jax"):
            restored = states.restore(run, config, mesh, rules)
        step = int(restored.step)
        assert states.bits(restored) == contents[step], (name, damage)
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
    states.empty(states.largest_file(tmp_path / "checkpoints" / "3" / "meta"))

    def step_of(step_dir, meta):
        assert step_dir.name == str(meta.step)
        return meta.step

    with caplog.at_level(logging.WARNING, "llm_jax"):
        assert checkpoint.read_latest(str(tmp_path), None, step_of) == 2
    assert f"{tmp_path / 'checkpoints' / '3'} is damaged" in caplog.text
    assert states.kept(tmp_path) == [1, 2, 3]
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
        states.flip(states.largest_file(tmp_path / "checkpoints" / str(step) / "params"))
    with pytest.raises(errors.UserError, match="all 3 checkpoints under .* are damaged"):
        states.restore(tmp_path, helpers.tiny_run_config(), *helpers.make_mesh())
    assert states.kept(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-17"])
def test_a_save_that_was_cut_off_is_not_seen(three_steps, tmp_path, suffix, caplog):
    folder, contents = three_steps
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    left = tmp_path / "checkpoints" / f"4{suffix}"
    shutil.copytree(tmp_path / "checkpoints" / "3", left)
    _delete(states.largest_file(left / "params"))
    assert states.kept(tmp_path) == [1, 2, 3]
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    assert states.bits(states.restore(tmp_path, config, mesh, rules)) == contents[3]
    assert "damaged" not in caplog.text
    states.save(tmp_path, config, mesh, rules, 4)
    assert int(states.restore(tmp_path, config, mesh, rules).step) == 4
