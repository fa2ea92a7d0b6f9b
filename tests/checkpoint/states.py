"""Random states, the checkpoints that hold them, and ways to change those on disk."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint
from llm_jax import train_step

TOKENIZER = {"kind": "bytes"}
MESHES = {
    "one": ((1, 1, 1, 1, 1), "fsdp"),
    "data4": ((1, 4, 1, 1, 1), "fsdp"),
    "data2_tensor2": ((1, 2, 1, 1, 2), "fsdp_tp"),
    "replica2_data2": ((2, 2, 1, 1, 1), "fsdp"),
}
# Values that arithmetic or text would not bring back as they are.
SPECIAL = np.asarray([np.nan, -0.0, np.inf, 1e-42], np.float32)


def abstract_state(config, mesh, rules) -> train_step.TrainState:
    """Returns a new state as shapes."""
    with jax.set_mesh(mesh):
        return jax.eval_shape(functools.partial(train_step.init_state, config, rules))


def random_state(config, mesh, rules, step: int) -> train_step.TrainState:
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

    state = jax.tree.map(draw, abstract_state(config, mesh, rules))
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def bits(tree) -> list[bytes]:
    """Returns the bytes of each array."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def save(folder, config, mesh, rules, *steps: int) -> None:
    """Saves the random states of some steps as one run."""
    manager = checkpoint.Checkpoints(str(folder), config, TOKENIZER)
    for step in steps:
        manager.save(random_state(config, mesh, rules, step))
    manager.close()


def restore(folder, config, mesh, rules, tokenizer=TOKENIZER):
    """Returns what a run would go on from."""
    manager = checkpoint.Checkpoints(str(folder), config, tokenizer)
    try:
        with jax.set_mesh(mesh):
            return manager.restore_latest(abstract_state(config, mesh, rules), mesh)
    finally:
        manager.close()


def kept(folder) -> list[int]:
    """Returns the steps that a run has."""
    return checkpoint.steps(checkpoint.directory(str(folder)))


def largest_file(folder):
    """Returns the file that holds most."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    """Changes a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path):
    """Leaves a file without content."""
    path.write_bytes(b"")


def rewrite(step_dir, change) -> None:
    """Changes a checkpoint's record, checksum included."""
    path = largest_file(step_dir / "meta")
    raw = json.loads(path.read_text())
    raw.pop("checksum")
    change(raw)
    raw["checksum"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(raw))


def forget(step_dir, *names: str) -> None:
    """Takes out of a record what was not in it before."""
    rewrite(step_dir, lambda raw: [raw.pop(name) for name in names])
