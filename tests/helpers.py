"""Tiny models and batches that tests share."""

import dataclasses

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.data import batch as batch_lib
from llm_jax.data import placement
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

BERT = GPT2 | {
    "architecture": "encoder",
    "norm_placement": "post",
    "activation": "gelu",
    "use_embedding_norm": True,
    "num_token_types": 2,
    "use_head_transform": True,
    "use_head_bias": True,
}

T5 = {
    "architecture": "encoder_decoder",
    "num_decoder_layers": 3,
    "positions": "relative",
    "relative_buckets": 6,
    "relative_max_distance": 8,
    "num_kv_heads": None,
    "activation": "gelu_tanh",
    "attention_scale": 1.0,
    "scale_logits": True,
}

TRANSFORMER_2017 = {
    "architecture": "encoder_decoder",
    "positions": "sinusoidal",
    "scale_embeddings": True,
    "norm": "layernorm",
    "norm_placement": "post",
    "activation": "relu",
    "is_gated": False,
    "use_bias": True,
    "num_kv_heads": None,
}

# DeepSeek's: a dense layer first, experts that all tokens share, balance by biases.
EXPERTS = {
    "num_layers": 3,
    "moe": config_lib.MoeConfig(
        num_experts=4,
        expert_dim=12,
        num_shared_experts=1,
        first_dense_layers=1,
        router="sigmoid",
        num_groups=2,
        use_selection_bias=True,
        balance_over="sequence",
        router_z_loss=0.1,
    ),
}

# Experts in every other layer, with places for some of the tokens, whose loss is of the whole batch.
SWITCH = {
    "architecture": "encoder_decoder",
    "num_layers": 4,
    "num_decoder_layers": 2,
    "moe": config_lib.MoeConfig(
        num_experts=4,
        experts_per_token=1,
        every=2,
        router="switch",
        dispatch="capacity",
        capacity_factor=1.0,
        balance_loss=0.5,
    ),
}

GEMMA3 = {
    "num_layers": 3,
    "layer_pattern": "LG",
    "window": 4,
    "rope_local_theta": 100.0,
    "norm_placement": "sandwich",
    "norm_offset": True,
    "use_qk_norm": True,
    "scale_embeddings": True,
}

LATENTS = {  # every width is another, but for the model's and the queries' latent
    "num_kv_heads": None,
    "kv_latent_dim": 8,
    "q_latent_dim": 16,
    "head_dim": 6,
    "rope_head_dim": 4,
    "value_head_dim": 5,
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
        objective=config_lib.ObjectiveConfig(target_length=12),
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


def _random_segments(rng, shape: tuple[int, int], ragged: bool):
    """Returns document numbers and positions: one document a row, or if `ragged` two."""
    segments = np.ones(shape, np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    cuts = rng.integers(1, shape[1], shape[0])
    for row in range(shape[0] if ragged else 0):
        segments[row, cuts[row] :] = 2
        positions[row, cuts[row] :] -= cuts[row]
    return segments, positions


def random_batch(config: config_lib.RunConfig, seed: int = 0, ragged: bool = True):
    """Returns a host batch of random tokens; `ragged` gives two documents a row, uneven weights.

    It has the fields that the model takes, and labels where its head asks for them.
    """
    rng = np.random.default_rng(seed)
    model, vocab_size = config.model, config.model.vocab_size
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = rng.integers(0, vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    segments, positions = _random_segments(rng, shape, ragged)
    weights = np.ones(shape, np.float32)
    for row in range(shape[0] if ragged else 0):
        weights[row, int(rng.integers(1, shape[1])) :] = 0.0
    batch = batch_lib.Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)
    if model.num_token_types:
        types = rng.integers(0, model.num_token_types, shape).astype(np.int32)
        batch = batch._replace(token_types=types)
    if config.objective.name == "prefix":
        batch = batch._replace(prefix=positions < rng.integers(0, shape[1], (shape[0], 1)))
    if model.architecture == "encoder_decoder":
        length = 2 * shape[1]  # of an encoder, whose sequence is another
        encoder_segments, encoder_positions = _random_segments(rng, (shape[0], length), ragged)
        encoder_tokens = rng.integers(0, vocab_size, (shape[0], length)).astype(np.int32)
        batch = batch._replace(
            encoder_tokens=encoder_tokens,
            encoder_segments=encoder_segments,
            encoder_positions=encoder_positions,
        )
    return _with_labels(rng, model, batch)


def _with_labels(rng, model: config_lib.ModelConfig, batch: batch_lib.Batch) -> batch_lib.Batch:
    num_rows, length = batch.tokens.shape
    if model.head == "sequence" and model.num_labels == 1:
        targets = rng.standard_normal(num_rows).astype(np.float32)
    elif model.head == "sequence":
        targets = rng.integers(0, model.num_labels, num_rows).astype(np.int32)
    elif model.head == "span":
        targets = np.sort(rng.integers(0, length, (num_rows, 2)), axis=1).astype(np.int32)
    elif model.head == "token":
        targets = rng.integers(0, model.num_labels, batch.tokens.shape).astype(np.int32)
        return batch._replace(targets=targets)
    else:
        return batch
    weights = rng.integers(1, 3, num_rows).astype(np.float32)
    return batch._replace(targets=targets, weights=weights)


def place(host_batch, mesh, rules):
    """Puts a host batch on a mesh."""
    target = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    rows = np.arange(len(host_batch.tokens))
    return placement.to_mesh(host_batch, target, len(rows), rows)


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
