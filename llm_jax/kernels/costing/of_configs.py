"""The kernels inside a config's programs, by programs of their own.

Where documents begin, and how much of a cache is filled, is data: inside a whole program the model can
only guess what a kernel visits. Alone, with tables that are constants, its time is exact.
"""

from collections.abc import Mapping
import dataclasses
import math

from llm_jax import config as config_lib
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes


def is_uniform(model: config_lib.ModelConfig) -> bool:
    """Returns whether one attention stands for those of all layers."""
    return model.architecture != "encoder_decoder" and len(set(model.layer_pattern)) < 2


def attention(
    config: config_lib.RunConfig, slice_name: str, axes: Mapping[str, int]
) -> kernel_cost.Case:
    """Returns the attention of one layer of a training step on one device, each row one document.

    That is the most that the kernels can have to do. Of a sequence that is cut it is the whole:
    `step_seconds` takes the share.

    Args:
      axes: sizes of the mesh's axes.
    """
    model, length = config.model, config.data.sequence_length
    rows = config.data.batch_size // config.optim.accumulation_steps
    rows = max(1, rows // axes["replica"] // axes["data"] // axes["expert"])
    heads, key_heads = _own_heads(model, axes["tensor"])
    shape = shapes.Attention(
        rows,
        length,
        heads=heads,
        key_heads=key_heads,
        width=model.key_width,
        value_width=None if model.value_width == model.key_width else model.value_width,
        mask=_mask(model, length),
        softcap=model.attention_softcap,
        has_gradient=True,
    )
    return _alone("attention", shape, slice_name)


def _mask(model: config_lib.ModelConfig, length: int) -> str:
    if model.architecture == "encoder":
        return "full"
    return f"window {model.window}" if model.window else f"packed {length}"


def decode(
    config: config_lib.RunConfig, slice_name: str, num_rows: int, num_slots: int, tensor: int
) -> kernel_cost.Case:
    """Returns the attention of one layer to a full contiguous cache, one query a row, on one device."""
    model = config.model
    heads, key_heads = _own_heads(model, tensor)
    width, num_values = model.head_width, None
    if model.kv_latent_dim is not None:  # latents are one head's, which all queries share
        key_heads, num_values = 1, model.kv_latent_dim
        width = model.kv_latent_dim + model.rope_head_width
    shape = shapes.Decode(
        (num_slots,) * num_rows,
        key_heads=key_heads,
        group=heads // key_heads,
        width=width,
        page=None,
        window=model.window,
        num_values=num_values,
    )
    return _alone("decode", shape, slice_name)


def _alone(name: str, shape, slice_name: str) -> kernel_cost.Case:
    wanted = topology.parse(slice_name)
    single = f"{wanted.chip.name}:{'x'.join('1' for _ in wanted.sides)}"
    arguments = {"shape": dataclasses.asdict(shape)}
    return kernel_cost.Case(programs.target(name), single, arguments)


def _own_heads(model: config_lib.ModelConfig, tensor: int) -> tuple[int, int]:
    """Returns how many query and key heads one device has: groups are cut where key heads are too few."""
    key_heads = model.kv_heads // math.gcd(model.kv_heads, tensor)
    return model.num_heads // tensor, key_heads


def kernel_seconds(
    program: kernel_cost.ProgramCost, alone: kernel_cost.ProgramCost
) -> tuple[float, float]:
    """Returns the time of a program's kernels by that of `alone`, and what the program guesses for it.

    A kernel of `program` is as long as that of the same name in `alone`.
    """
    exact = guessed = 0.0
    for lone in alone.kernels:
        kind = _kind(lone.name)
        for one in program.kernels:
            if _kind(one.name) == kind:
                exact += lone.seconds * one.num_executions
                guessed += one.seconds * one.num_executions
    return exact, guessed


def step_seconds(
    config: config_lib.RunConfig,
    num_parts: int,
    program: kernel_cost.ProgramCost,
    alone: kernel_cost.ProgramCost,
) -> tuple[float, float]:
    """Returns the time of a training step's kernels on one device, and what its program guesses for it.

    Args:
      num_parts: devices that a sequence is cut over. Gathered keys leave the last of them the most pairs
        of a causal mask; around a ring all have as many.
      program: the step.
      alone: from `attention`.
    """
    exact, guessed = kernel_seconds(program, alone)
    if num_parts == 1:
        return exact, guessed
    if config.mesh.context == "gather":
        return exact * (2 * num_parts - 1) / num_parts**2, guessed
    # A ring runs a kernel for each part of the keys: passes are counted instead of executions.
    layers = config.model.num_layers * config.optim.accumulation_steps
    is_repeated = config.model.remat in ("full", "dots", "qkv")
    passes = {"flash_attention_forward": 1 + is_repeated, "flash_attention_backward": 1}
    seconds = sum(passes.get(_kind(one.name), 0) * one.seconds for one in alone.kernels)
    return layers * seconds / num_parts, guessed


def _kind(name: str) -> str:
    kinds = ("flash_attention_forward", "flash_attention_backward", "decode_attention")
    return next((kind for kind in kinds if kind in name), name)
