"""The programs of a config, lowered for a slice: its training step, and generation."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import train_step as train_step_lib
from llm_jax.data import batch as batch_lib
from llm_jax.models import build
from llm_jax.sampling import decode as decode_lib
from llm_jax.sampling import samplers


def for_tpu(config: config_lib.RunConfig) -> config_lib.RunConfig:
    """Returns the config with what is left to the platform decided as on a TPU."""
    model = config.model
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype="bfloat16")
    if model.scan_layers is None:
        model = dataclasses.replace(model, scan_layers=True)
    return dataclasses.replace(config, model=model)


def abstract_batch(
    config: config_lib.RunConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> batch_lib.Batch:
    """Returns what a step reads, as shapes placed on a mesh."""
    rules, model = sharding.axis_rules(config.mesh), config.model
    num_rows, length = config.data.batch_size, config.data.sequence_length

    def array(dtype, *sizes, dims="BT"):
        placed = NamedSharding(mesh, rules.act(dims))
        return jax.ShapeDtypeStruct((num_rows, *sizes), dtype, sharding=placed)

    own = config.target_length or length  # of what the decoder reads, where there are two
    batch = batch_lib.Batch(
        *(array(x, own) for x in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32))
    )
    if model.architecture == "encoder_decoder":
        names = ("encoder_tokens", "encoder_segments", "encoder_positions")
        batch = batch._replace(**{name: array(jnp.int32, length) for name in names})
    if model.num_token_types:
        batch = batch._replace(token_types=array(jnp.int32, length))
    is_given = config.objective.name in ("span_corruption", "ul2", "seq2seq")
    has_prefix = is_given and config.objective.is_input_bidirectional
    if model.architecture == "decoder" and (config.objective.name == "prefix" or has_prefix):
        batch = batch._replace(prefix=array(jnp.bool_, length))
    if model.head in ("sequence", "span"):
        is_regression = model.head == "sequence" and model.num_labels == 1
        dtype = jnp.float32 if is_regression else jnp.int32
        targets = array(dtype, *(2,) * (model.head == "span"), dims="B")
        batch = batch._replace(targets=targets, weights=array(jnp.float32, dims="B"))
    if config.objective.name == "contrastive":
        targets = array(jnp.int32, dims="B")
        batch = batch._replace(targets=targets, weights=array(jnp.float32, dims="B"))
    if config.objective.name == "preference":
        placed = NamedSharding(mesh, PartitionSpec(rules.act("B")[0], None))
        reference = jax.ShapeDtypeStruct((num_rows, 2), jnp.float32, sharding=placed)
        batch = batch._replace(reference=reference)
    return batch


def abstract_state(config: config_lib.RunConfig) -> train_step_lib.TrainState:
    """Returns what a step updates, as shapes; a mesh must be set."""
    rules = sharding.axis_rules(config.mesh)
    return train_step_lib.abstract_state(config, rules)


def train_step(devices: Sequence[jax.Device], *, config: Mapping[str, Any]) -> jax.stages.Lowered:
    """Lowers one update for the devices of a slice: a target of `kernel_cost.Case`.

    Args:
      config: as `config.to_dict` makes it.

    Raises:
      errors.UserError: a config that is wrong, or does not fit the devices.
    """
    checked = for_tpu(config_lib.from_dict(dict(config)))
    mesh = mesh_lib.make(checked.mesh, devices)
    sharding.check(checked, mesh)
    with jax.set_mesh(mesh):
        state = placed(abstract_state(checked), mesh)
        batch = abstract_batch(checked, mesh)
        return train_step_lib.make_train_step(checked).lower(state, batch)


def placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gives the leaves of an abstract tree, which know axes' names alone, places on a mesh."""

    def one(leaf):
        # Scalars are made without a place: they are everywhere.
        spec, memory = PartitionSpec(), None
        if leaf.sharding is not None:
            spec, memory = leaf.sharding.spec, leaf.sharding.memory_kind
        place = NamedSharding(mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(one, tree)


def _generation(
    devices: Sequence[jax.Device],
    config: Mapping[str, Any],
    num_rows: int,
    length: int,
    num_slots: int,
    tensor: int,
) -> tuple[jax.sharding.Mesh, tuple, dict[str, Any]]:
    """Returns a mesh as `sampling.load` makes it, and what prefill is called with on it."""
    model = for_tpu(config_lib.from_dict(dict(config))).model
    kv_heads = sharding.fitting_kv_heads(model, tensor)
    mesh_config = config_lib.MeshConfig(tensor=tensor, rules="tp", kv_heads=kv_heads)
    mesh = mesh_lib.make(mesh_config, devices)
    sharding.check_model(model, mesh_config, mesh)
    rules = sharding.axis_rules(mesh_config)
    with jax.set_mesh(mesh):
        cached = jax.eval_shape(decode_lib.prepare_model, build.abstract_model(model, rules))
    of_rows = NamedSharding(mesh, rules.act("B"))
    key = jax.eval_shape(jax.random.key, 0).dtype
    arrays = (
        placed(cached, mesh),
        jax.ShapeDtypeStruct(
            (num_rows, length), jnp.int32, sharding=NamedSharding(mesh, rules.act("BT"))
        ),
        jax.ShapeDtypeStruct((num_rows,), jnp.int32, sharding=of_rows),
        jax.ShapeDtypeStruct((num_rows,), key, sharding=of_rows),
    )
    how = {
        "params": samplers.SamplingParams(),
        "eos_id": 0,
        "pad_id": 0,
        "num_slots": num_slots,
    }
    return mesh, arrays, how


def prefill(devices: Sequence[jax.Device], **sizes: Any) -> jax.stages.Lowered:
    """Lowers reading prompts, as generation does it.

    Args:
      sizes: config (as for `train_step`), num_rows, length (tokens of a prompt), num_slots (of the
        cache) and tensor (devices that share one copy of the weights).

    Raises:
      errors.UserError: a model that `tensor` does not divide.
    """
    mesh, arrays, how = _generation(devices, **sizes)
    with jax.set_mesh(mesh):
        return decode_lib.prefill.lower(*arrays, **how)


def decode(devices: Sequence[jax.Device], **sizes: Any) -> jax.stages.Lowered:
    """Lowers one token of generation after a prompt; arguments as of `prefill`."""
    mesh, (model, *prompts), how = _generation(devices, **sizes)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(functools.partial(decode_lib.prefill, **how), model, *prompts)
        del how["num_slots"]
        return decode_lib.decode.lower(model, placed(state, mesh), num_tokens=1, **how)
