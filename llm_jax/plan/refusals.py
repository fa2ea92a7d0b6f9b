"""A program that a slice does not take, in words: what is too much, and which setting makes it less."""

import re

from llm_jax import config as config_lib
from llm_jax.plan import estimate as estimate_lib

_GIB = 1 << 30
_NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_NO_RAGGED = "Ragged all-to-all is currently not supported in limited ICI routing"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_ALLOCATION = re.compile(
    r"\d+\. Size: ([\d.]+)([KMGT])\n(?:\s+Operator: [^\n]*?op_name=\"([^\"]*)\"[^\n]*\n)?\s+Shape: (\S+)"
)
_MOST = 5  # allocations that are listed


def memory_shortage(text: str) -> tuple[int, int] | None:
    """Returns the bytes that the compiler needed and has, or None if it failed for something else."""
    match = _NEEDED.search(text) or _USED.search(text)
    if match is None:
        return None
    needed, unit, has, other = match.groups()
    return int(float(needed) * _UNITS[unit]), int(float(has) * _UNITS[other])


def largest_allocations(text: str) -> list[str]:
    """Returns a line for each of the largest allocations, where the compiler lists them."""
    found = []
    for size, unit, operator, shape in _ALLOCATION.findall(text)[:_MOST]:
        what = f" in {operator}" if operator else ""
        found.append(f"{size} {unit}iB: {shape}{what}")
    return found


def explain(
    text: str, config: config_lib.RunConfig, estimate: estimate_lib.Estimate
) -> list[str] | None:
    """Returns lines on a program that is refused: if it is too large, by how much, what takes it, what helps.

    Args:
      text: of the compiler.
      estimate: of the same config and slice.

    Returns:
      None if the compiler failed for something else.
    """
    if _NO_RAGGED in text:
        return [
            "the compiler moves no ragged rows over the links of this slice, which do not close to rings, and"
            " dropless experts over mesh.expert need that <- mesh.expert=1, model.moe.dispatch=capacity, or"
            " another slice (v5e:4x4 and v5p:4x4x4 have it)"
        ]
    shortage = memory_shortage(text)
    if shortage is None:
        return None
    needed, has = shortage
    lines = [f"needs {needed / _GIB:.2f} GiB of HBM where a program may have {has / _GIB:.2f}"]
    lines += largest_allocations(text)
    parts = {
        "saved": estimate.saved,
        "loss": estimate.loss,
        "gradients": estimate.gradients + estimate.accumulated,
        "parameters": estimate.parameters + estimate.optimiser,
        "layer": estimate.layer,
    }
    names = {
        "saved": "activations kept for the backward pass",
        "loss": "logits and the head",
        "gradients": "gradients",
        "parameters": "parameters and optimiser",
        "layer": "one layer's weights and activations",
    }
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        helps = _HELPS[name](config)
        lines.append(
            f"estimated {size / _GIB:.2f} GiB: {names[name]}" + (f" <- {helps}" if helps else "")
        )
    return lines


def _less_saved(config: config_lib.RunConfig) -> str:
    ways = []
    steps = ("none", "dots", "qkv", "attention_output", "full", "offload")
    stronger = dict(zip(steps, steps[1:]))
    if config.model.remat in stronger:
        ways.append(f"model.remat={stronger[config.model.remat]}")
    ways.append(f"optim.accumulation_steps={2 * config.optim.accumulation_steps}")
    ways.append("a smaller data.batch_size, or a larger mesh.seq")
    return ", ".join(ways)


def _less_loss(config: config_lib.RunConfig) -> str:
    if config.train.cross_entropy in ("reference", "auto"):
        return "train.cross_entropy=chunked"
    return f"train.cross_entropy_chunk={config.train.cross_entropy_chunk // 2}, or a larger mesh.tensor"


def _fewer_gradients(config: config_lib.RunConfig) -> str:
    if config.mesh.rules in ("dp", "tp"):
        return "mesh.rules=fsdp"
    return "more chips on mesh.data or mesh.tensor"


def _fewer_parameters(config: config_lib.RunConfig) -> str:
    if config.mesh.rules in ("dp", "tp"):
        return "mesh.rules=fsdp"
    return "more chips on mesh.data, optim.offload_state=true, or optim.name=adafactor"


def _smaller_layer(config: config_lib.RunConfig) -> str:
    return f"mesh.rules=fsdp_tp with mesh.tensor, or optim.accumulation_steps={2 * config.optim.accumulation_steps}"


_HELPS = {
    "saved": _less_saved,
    "loss": _less_loss,
    "gradients": _fewer_gradients,
    "parameters": _fewer_parameters,
    "layer": _smaller_layer,
}
