"""What generation costs on a slice: reading prompts, and one more token of each row."""

from collections.abc import Sequence
import dataclasses

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import flops
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import xla_flags
from llm_jax.aot import kernel_cost
from llm_jax.aot import steps
from llm_jax.aot import topology
from llm_jax.kernels.costing import of_configs
from llm_jax.plan import planner
from llm_jax.plan import text

Cost = kernel_cost.ProgramCost | kernel_cost.Refusal


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A batch of prompts.

    Attributes:
      num_rows: prompts at once, over all chips.
      length: tokens of each prompt.
      num_slots: of the cache: prompt and what is generated.
      tensor: chips that share one copy of the weights.
    """

    num_rows: int
    length: int
    num_slots: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Costs of generation; `cache` is the attention of one layer to a full cache, alone."""

    config: config_lib.RunConfig
    slice_name: str
    sizes: Sizes
    prefill: Cost
    decode: Cost
    cache: Cost

    @property
    def is_compiled(self) -> bool:
        """Whether all of it was compiled."""
        return not any(isinstance(cost, kernel_cost.Refusal) for _, cost in self.costs)

    @property
    def costs(self) -> tuple[tuple[str, Cost], ...]:
        """The three programs by name."""
        return ("prefill", self.prefill), ("decode", self.decode), ("cache", self.cache)

    @property
    def seconds_per_token(self) -> float:
        """Modelled time of one token of each row, with a full cache."""
        exact, guessed = of_configs.kernel_seconds(self.decode, self.cache)
        return self.decode.seconds - guessed + exact


def plan(
    pairs: Sequence[tuple[config_lib.RunConfig, str]],
    sizes: Sizes,
    *,
    cache_directory: str | None = None,
    num_processes: int = 1,
) -> list[Plan]:
    """Returns the plans of each config on its slice.

    Raises:
      errors.UserError: as `planner.plan`, and for what is no decoder of text.
    """
    cases = []
    for config, slice_name in pairs:
        m = config.model
        if m.architecture != "decoder" or m.head != "lm":
            raise errors.UserError(
                f"--sampling plans decoders of text, not model.architecture = {m.architecture!r} with"
                f" model.head = {m.head!r}"
            )
        wanted = topology.parse(slice_name)
        kv_heads = sharding.fitting_kv_heads(config.model, sizes.tensor)
        mesh_config = config_lib.MeshConfig(tensor=sizes.tensor, rules="tp", kv_heads=kv_heads)
        mesh = mesh_lib.make_abstract(mesh_config, wanted.num_chips)
        sharding.check_model(config.model, mesh_config, mesh)
        flags = xla_flags.for_chip(wanted.chip.name, num_slices=wanted.num_slices)
        arguments = {"config": config_lib.to_dict(config)} | dataclasses.asdict(sizes)
        cases += [
            kernel_cost.Case(f"{steps.__name__}:{name}", slice_name, arguments, flags=flags)
            for name in ("prefill", "decode")
        ]
        rows = max(1, sizes.num_rows * sizes.tensor // wanted.num_chips)
        cases.append(of_configs.decode(config, slice_name, rows, sizes.num_slots, sizes.tensor))
    costs = kernel_cost.costs(
        cases,
        cache_directory=cache_directory,
        num_processes=num_processes,
        timeout_seconds=planner.TIMEOUT_SECONDS,
    )
    found = zip(costs[::3], costs[1::3], costs[2::3])
    return [Plan(*pair, sizes, *three) for pair, three in zip(pairs, found)]


def describe(one: Plan, name: str) -> list[str]:
    """Returns the lines on one plan."""
    wanted, sizes = topology.parse(one.slice_name), one.sizes
    lines = [
        f"{name}, generating on {one.slice_name}: {sizes.num_rows} prompts of {sizes.length:,} tokens,"
        f" {sizes.num_slots:,} slots, {sizes.tensor} chip(s) share the weights"
    ]
    for which, cost in one.costs:
        if isinstance(cost, kernel_cost.Refusal):
            return [*lines, f"  {which} does not compile ({cost.stage}): {cost.reason}"]
    header = ("", "prefill", "a token")
    memories = one.prefill.memory, one.decode.memory
    per_token = one.seconds_per_token
    forward = flops.forward_flops_per_token(one.config.model, sizes.length)
    peak = wanted.num_chips * wanted.chip.peak_bf16_flops
    used = forward * sizes.num_rows * sizes.length / one.prefill.seconds / peak
    rows = [
        header,
        ("HBM of a chip, GiB", *(text.gibibytes(memory.peak + memory.code) for memory in memories)),
        ("  of it arguments", *(text.gibibytes(memory.arguments) for memory in memories)),
        ("  available", *(text.gibibytes(wanted.chip.hbm_bytes),) * 2),
        ("time, modelled", *(f"{s * 1e3:,.2f} ms" for s in (one.prefill.seconds, per_token))),
        (
            "  waiting for other chips",
            *(f"{cost.exposed_seconds * 1e3:,.2f} ms" for cost in (one.prefill, one.decode)),
        ),
        ("tokens a second", f"{sizes.num_rows * sizes.length / one.prefill.seconds:,.0f}")
        + (f"{sizes.num_rows / per_token:,.0f}",),
        ("MFU", f"{used:.1%}", ""),
    ]
    return [*lines, *text.table(rows)]
