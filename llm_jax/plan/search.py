"""Tries meshes, remat policies, batch sizes and accumulation for a config on a slice, and ranks them.

What cannot divide or fit by arithmetic is left out, what is left is ordered by estimated time, and the
first of it is compiled.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import sharding
from llm_jax.aot import topology
from llm_jax.plan import estimate as estimate_lib
from llm_jax.plan import planner
from llm_jax.plan import text

# The estimate of memory may be a third too high: what it puts this far above a chip is not compiled.
_ESTIMATE_SLACK = 1.3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config to try, with what it changes as `--config.` overrides."""

    config: config_lib.RunConfig
    overrides: str
    estimate: estimate_lib.Estimate


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search saw.

    Attributes:
      num_tried: combinations that divide.
      num_fitting: those of them that fit by the estimate.
      plans: of those that were compiled, with their overrides: what fits first, the fastest first.
    """

    num_tried: int
    num_fitting: int
    plans: tuple[tuple[planner.Plan, str], ...]


def candidates(
    config: config_lib.RunConfig,
    slice_name: str,
    remats: Sequence[str] = ("none", "dots", "qkv", "attention_output", "full"),
    batch_sizes: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Yields the combinations that divide, whether they fit or not.

    Args:
      batch_sizes: instead of the config's own.
    """
    wanted = topology.parse(slice_name)
    for mesh, remat, batch_size in itertools.product(
        _meshes(config, wanted), remats, batch_sizes or (config.data.batch_size,)
    ):
        for parts in _divisors(batch_size):
            changed = dataclasses.replace(
                config,
                mesh=mesh,
                model=dataclasses.replace(config.model, remat=remat),
                data=dataclasses.replace(config.data, batch_size=batch_size),
                optim=dataclasses.replace(config.optim, accumulation_steps=parts),
            )
            try:
                config_lib.check(changed)
                estimate = estimate_lib.estimate(changed, slice_name)
            except errors.UserError:  # what does not divide is no candidate
                continue
            yield Candidate(changed, overrides(config, changed), estimate)


def _meshes(
    config: config_lib.RunConfig, wanted: topology.Slice
) -> Iterator[config_lib.MeshConfig]:
    per_slice = wanted.num_chips // wanted.num_slices
    for tensor in _divisors(per_slice):
        for seq in _divisors(per_slice // tensor):
            for context in ("gather",) if seq == 1 else ("gather", "ring"):
                yield config_lib.MeshConfig(
                    replica=wanted.num_slices,
                    data=per_slice // tensor // seq,
                    seq=seq,
                    tensor=tensor,
                    rules=_rules(config.mesh.rules, wanted.num_slices, seq, tensor),
                    context=context,
                    kv_heads=sharding.fitting_kv_heads(config.model, tensor),
                )


def _rules(given: str, num_slices: int, seq: int, tensor: int) -> str:
    """Returns the preset that uses the axes which are larger than 1."""
    if num_slices > 1 or (seq > 1 and tensor > 1):
        return "multislice"
    if tensor > 1:
        return "fsdp_tp"
    if seq > 1:
        return "fsdp_cp"
    return "dp" if given == "dp" else "fsdp"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def overrides(before: config_lib.RunConfig, after: config_lib.RunConfig) -> str:
    """Returns the flags that make one config of the other."""
    old, new = config_lib.to_dict(before), config_lib.to_dict(after)
    changed = [
        f"--config.{section}.{name}={value}"
        for section, values in new.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if old[section][name] != value
    ]
    return " ".join(changed)


def search(
    config: config_lib.RunConfig,
    slice_name: str,
    *,
    num_compiled: int,
    batch_sizes: Sequence[int] = (),
    cache_directory: str | None = None,
    num_processes: int = 1,
) -> Found:
    """Compiles the most promising candidates and ranks them by modelled time of a token.

    Raises:
      errors.UserError: nothing divides, or nothing fits.
    """
    tried = list(candidates(config, slice_name, batch_sizes=batch_sizes))
    if not tried:
        raise errors.UserError(
            f"no mesh of {slice_name} divides the config: see data.batch_size, data.sequence_length"
            " and the model's sizes"
        )
    limit = topology.parse(slice_name).chip.hbm_bytes * _ESTIMATE_SLACK
    fitting = [one for one in tried if one.estimate.peak <= limit]
    if not fitting:
        least = min(tried, key=lambda one: one.estimate.peak)
        raise errors.UserError(
            f"nothing fits {slice_name}: the least, {least.overrides or 'the config as it is'}, takes"
            f" an estimated {text.gibibytes(least.estimate.peak)} GiB a chip; use a larger slice"
        )
    fitting.sort(key=lambda one: (_seconds_per_token(one), one.estimate.peak))
    chosen = fitting[:num_compiled]
    plans = planner.plan(
        [(one.config, slice_name) for one in chosen],
        cache_directory=cache_directory,
        num_processes=num_processes,
    )
    pairs = [(plan, one.overrides) for plan, one in zip(plans, chosen)]
    pairs.sort(key=lambda pair: _rank(pair[0]))
    return Found(len(tried), len(fitting), tuple(pairs))


def _seconds_per_token(one: Candidate) -> float:
    data = one.config.data
    return one.estimate.seconds / data.batch_size / data.sequence_length


def _rank(plan: planner.Plan) -> tuple[bool, float]:
    return not plan.is_compiled, plan.seconds / plan.tokens if plan.is_compiled else 0.0


def describe(found: Found, name: str, slice_name: str) -> list[str]:
    """Returns the ranked table."""
    lines = [
        f"{name} on {slice_name}: {found.num_tried:,} combinations divide, {found.num_fitting:,} may"
        f" fit, {len(found.plans)} compiled",
        "",
    ]
    rows = [("", "ms a step", "MFU", "waiting", "GiB", "of")]
    for number, (plan, _) in enumerate(found.plans, 1):
        if not plan.is_compiled:
            rows.append((f"{number}.", "does not fit", "", "", "", ""))
            continue
        memory = plan.program.memory
        rows.append(
            (
                f"{number}.",
                f"{plan.seconds * 1e3:,.1f}",
                f"{plan.mfu:.1%}",
                f"{plan.program.exposed_seconds / plan.seconds:.0%}",
                text.gibibytes(memory.peak + memory.code),
                text.gibibytes(plan.chip.hbm_bytes),
            )
        )
    lines += text.table(rows)
    lines.append("")
    lines += [
        f"  {number}. {changes or '(as it is)'}"
        for number, (_, changes) in enumerate(found.plans, 1)
    ]
    return lines
