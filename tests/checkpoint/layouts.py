"""The layouts of the restore matrix: how each saves, and what it makes of what another saved.

All of it runs in one process as in several; `worker` runs it as one of two.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import sharding
from llm_jax import train_step
from llm_jax import trees
from llm_jax.models import build
from tests import helpers

CONFIG = helpers.tiny_run_config()
TOKENIZER = {"kind": "bytes"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, its rules, and over how many processes its devices are spread."""

    shape: tuple[int, int, int, int, int]
    rules: str
    num_processes: int = 1


LAYOUTS = {
    "one": Layout((1, 1, 1, 1, 1), "fsdp"),
    "data4": Layout((1, 4, 1, 1, 1), "fsdp"),
    "data2_tensor2": Layout((1, 2, 1, 1, 2), "fsdp_tp"),
    "replica2_data2": Layout((2, 2, 1, 1, 1), "fsdp"),
    "two_processes": Layout((1, 2, 1, 1, 2), "fsdp_tp", num_processes=2),
}
PARTS = ("full", "params")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a layout holds after it saved or restored.

    Attributes:
      arrays: values by path.
      stepped: values and the loss after one more step on it; empty where only parameters were read.
      misplaced: paths of arrays that do not lie where a fresh state of this layout has them.
    """

    arrays: dict[str, np.ndarray]
    stepped: dict[str, np.ndarray]
    misplaced: list[str]

    def write(self, path: pathlib.Path) -> None:
        """Writes itself into a folder."""
        path.mkdir(parents=True)
        np.savez(path / "arrays.npz", **self.arrays)
        np.savez(path / "stepped.npz", **self.stepped)
        (path / "misplaced.json").write_text(json.dumps(self.misplaced))


def read_result(path: pathlib.Path) -> Result:
    """Returns what `Result.write` wrote."""
    return Result(
        dict(np.load(path / "arrays.npz")),
        dict(np.load(path / "stepped.npz")),
        json.loads((path / "misplaced.json").read_text()),
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """A layout's devices, and what is compiled once for them."""

    mesh: jax.sharding.Mesh
    rules: sharding.AxisRules
    step: Callable
    shardings: dict[str, jax.sharding.Sharding]  # of a new state, by path

    def abstract_state(self) -> train_step.TrainState:
        """Returns a new state as shapes; the mesh must be set."""
        return jax.eval_shape(functools.partial(train_step.init_state, CONFIG, self.rules))


@functools.cache
def place_of(name: str) -> Place:
    layout = LAYOUTS[name]
    mesh, rules = helpers.make_mesh(layout.shape, layout.rules)
    place = Place(mesh, rules, train_step.make_train_step(CONFIG), {})
    with jax.set_mesh(mesh):
        for path, leaf in _by_path(place.abstract_state()).items():
            spec = jax.sharding.PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
            place.shardings[path] = jax.sharding.NamedSharding(mesh, spec)
    return place


def first_state(place: Place) -> train_step.TrainState:
    """Returns a random model and AdamW's state before its first step, which is zero."""
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(
            np.zeros(leaf.shape, leaf.dtype), place.shardings["/".join(trees.path_keys(path))]
        ),
        place.abstract_state(),
    )
    model = helpers.random_model(CONFIG.model, place.mesh, place.rules)
    return dataclasses.replace(zeros, model=model)


def _by_path(tree: Any) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(trees.path_keys(path)): leaf for path, leaf in flat}


def _values(tree: Any, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Returns whole arrays on this host, also of parts that lie in another process."""
    if jax.process_count() > 1:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        tree = jax.jit(lambda x: x, out_shardings=everywhere)(tree)
    return {path: np.asarray(leaf) for path, leaf in _by_path(tree).items()}


def _step(
    place: Place, state: train_step.TrainState, seed: int
) -> tuple[train_step.TrainState, jax.Array]:
    """Takes a step on a batch; the memory of `state` is gone then."""
    batch = helpers.place(helpers.random_batch(CONFIG, seed), place.mesh, place.rules)
    state, metrics = place.step(state, batch)
    return state, metrics["train/loss"]


def _result(place: Place, state: Any) -> Result:
    misplaced = [
        path
        for path, leaf in _by_path(state).items()
        # A model by itself has the paths of a state's model without `model/` before them.
        if not leaf.sharding.is_equivalent_to(
            place.shardings[path if path in place.shardings else f"model/{path}"], leaf.ndim
        )
    ]
    values, stepped = _values(state, place.mesh), {}
    if isinstance(state, train_step.TrainState):
        state, loss = _step(place, state, seed=1)
        stepped = _values(state, place.mesh) | {"loss": np.asarray(loss)}
    return Result(values, stepped, misplaced)


def save(name: str, folder: pathlib.Path) -> Result:
    """Trains a step on a layout and saves into `folder`; returns what was saved."""
    place = place_of(name)
    manager = checkpoint.Checkpoints(str(folder), CONFIG, TOKENIZER)
    with jax.set_mesh(place.mesh):
        state, _ = _step(place, first_state(place), seed=0)
        manager.save(state, 2.5)
        manager.close()
        return _result(place, state)


def restore(name: str, folder: pathlib.Path, parts: str) -> Result:
    """Returns what a layout restores from `folder`: the whole state, or the parameters alone."""
    place = place_of(name)
    with jax.set_mesh(place.mesh):
        if parts == "full":
            manager = checkpoint.Checkpoints(str(folder), CONFIG, TOKENIZER)
            state = manager.restore_latest(place.abstract_state(), place.mesh)
            manager.close()
            return _result(place, state)

        def read(step_dir, meta):
            abstract = build.abstract_model(meta.config.model, place.rules)
            return checkpoint.restore_params(step_dir, meta, abstract, place.mesh)

        return _result(place, checkpoint.read_latest(str(folder), None, read))
