"""Tiny models and batches that tests share."""

import dataclasses

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.data import batch as batch_lib
from llm_jax.models import build

TINY = config_lib.ModelConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=32,
    max_length=32,
    dtype="float32",
    scan_layers=True,  # as on an accelerator
    init_stddev=0.2,  # large enough that what a layer does shows in the logits
)

GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "is_gated": False,
    "use_bias": True,
    "num_kv_heads": None,
}


def tiny_model_config(**changes) -> config_lib.ModelConfig:
    """Returns `TINY` with changes."""
    return dataclasses.replace(TINY, **changes)


def tiny_run_config(model: dict | None = None, **sections) -> config_lib.RunConfig:
    """Returns a checked run of a tiny model; `optim={...}` and so on change sections."""
    config = config_lib.RunConfig(
        model=tiny_model_config(**(model or {})),
        data=config_lib.DataConfig(batch_size=8, sequence_length=16),
        optim=config_lib.OptimConfig(warmup_steps=2),
        train=config_lib.TrainConfig(num_steps=6),
        compilation_cache="",
    )
    for name, changes in sections.items():
        section = dataclasses.replace(getattr(config, name), **changes)
        config = dataclasses.replace(config, **{name: section})
    config_lib.check(config)
    return config


def make_mesh(
    shape=(1, 1, 1, 1, 1), rules="fsdp", **choices
) -> tuple[jax.sharding.Mesh, sharding.AxisRules]:
    """Returns a mesh of the first devices and the rules of a preset, with other choices if given."""
    config = config_lib.MeshConfig(*shape, rules=rules, **choices)
    mesh = mesh_lib.make(config, jax.devices()[: int(np.prod(shape))])
    return mesh, sharding.axis_rules(config)


def make_model(config: config_lib.ModelConfig, rules: sharding.AxisRules, seed: int = 0):
    """Returns an initialised model; call it under a mesh."""
    return jax.jit(lambda key: build.make_model(key, config, rules))(jax.random.key(seed))


def random_batch(config: config_lib.RunConfig, seed: int = 0, ragged: bool = True):
    """Returns a host batch of random tokens; `ragged` gives two documents a row, uneven weights."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    segments = np.ones(shape, np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    weights = np.ones(shape, np.float32)
    if ragged:
        for row in range(shape[0]):
            cut = int(rng.integers(1, shape[1]))
            segments[row, cut:] = 2
            positions[row, cut:] -= cut
            weights[row, int(rng.integers(1, shape[1])) :] = 0.0
    return batch_lib.Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def place(host_batch, mesh, rules):
    """Puts a host batch on a mesh."""
    target = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    return jax.tree.map(lambda x: jax.device_put(x, target), host_batch)


def random_model(
    config: config_lib.ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: sharding.AxisRules,
    seed: int = 0,
):
    """Returns a model whose every parameter is random, so that biases and norm scales count.

    The values are numpy's: nothing is compiled, and they do not depend on the mesh.
    """
    with jax.set_mesh(mesh):
        abstract = build.abstract_model(config, rules)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        value = mean + 0.2 * rng.standard_normal(leaf.shape)
        target = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.device_put(value.astype(leaf.dtype), target)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares two trees leaf by leaf.

    An error may be `tolerance` times the largest magnitude of its leaf, or of 1% of the largest in
    the tree where that is more: some gradients (of key biases) are zero but for rounding.
    """
    actual, expected = jax.device_get(actual), jax.device_get(expected)
    named = jax.tree_util.tree_flatten_with_path(expected)[0]
    leaves = jax.tree.leaves(actual)
    assert len(leaves) == len(named)
    largest = max(np.abs(np.asarray(leaf, np.float64)).max() for _, leaf in named)
    for leaf, (path, wanted) in zip(leaves, named):
        leaf, wanted = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
        assert leaf.shape == wanted.shape, jax.tree_util.keystr(path)
        scale = max(np.abs(wanted).max(), 0.01 * largest)
        error = np.abs(leaf - wanted).max() / (scale or 1.0)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} of the scale"


def assert_equal(actual, expected) -> None:
    """Compares two trees bit by bit; NaN equals NaN."""
    actual, expected = jax.device_get(actual), jax.device_get(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
