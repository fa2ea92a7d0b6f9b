"""Compiles a training step for a slice, and puts together what it takes and how long."""

from collections.abc import Sequence
import dataclasses

import jax

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import flops
from llm_jax import mesh as mesh_lib
from llm_jax import xla_flags
from llm_jax.aot import chips
from llm_jax.aot import kernel_cost
from llm_jax.aot import steps
from llm_jax.aot import topology
from llm_jax.kernels.costing import of_configs
from llm_jax.plan import estimate as estimate_lib

# A whole step for hundreds of chips, on a busy machine.
TIMEOUT_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a config costs on a slice.

    Attributes:
      estimate: by arithmetic; its `parameters` and `optimiser` are exact.
      program: as compiled; a Refusal if it was not.
      kernels: the attention of one layer alone, where the step attends by kernels.
    """

    config: config_lib.RunConfig
    slice_name: str
    estimate: estimate_lib.Estimate
    program: kernel_cost.ProgramCost | kernel_cost.Refusal
    kernels: kernel_cost.ProgramCost | None

    @property
    def chip(self) -> chips.Chip:
        return topology.parse(self.slice_name).chip

    @property
    def num_chips(self) -> int:
        return topology.parse(self.slice_name).num_chips

    @property
    def mesh(self) -> jax.sharding.AbstractMesh:
        """The mesh by its sizes."""
        return mesh_lib.make_abstract(self.config.mesh, self.num_chips)

    @property
    def is_compiled(self) -> bool:
        return isinstance(self.program, kernel_cost.ProgramCost)

    @property
    def kernel_seconds(self) -> float:
        """Modelled time of a step's attention kernels, each row one document."""
        return self._in_kernels()[0]

    @property
    def seconds(self) -> float:
        """Modelled time of a step."""
        exact, guessed = self._in_kernels()
        return self.program.seconds - guessed + exact

    def _in_kernels(self) -> tuple[float, float]:
        """Returns the time of the kernels, and what the program has for it."""
        if self.kernels is None:
            return 0.0, 0.0
        num_parts = self.mesh.shape["seq"]
        return of_configs.step_seconds(self.config, num_parts, self.program, self.kernels)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.config.tokens_per_step

    @property
    def flops(self) -> float:
        """Of one step on all chips, as the model needs them."""
        length, target_length = self.config.data.sequence_length, self.config.target_length
        per_row = flops.forward_flops_per_row(self.config.model, length, target_length)
        return 3 * per_row * self.config.data.batch_size

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, modelled."""
        return self.flops / self.num_chips / self.seconds / self.chip.peak_bf16_flops

    @property
    def headroom(self) -> int:
        """Bytes of HBM that are left."""
        memory = self.program.memory
        return self.chip.hbm_bytes - memory.peak - memory.code


def plan(
    pairs: Sequence[tuple[config_lib.RunConfig, str]],
    *,
    cache_directory: str | None = None,
    num_processes: int = 1,
) -> list[Plan]:
    """Returns the plan of each config on its slice, in order.

    Raises:
      errors.UserError: a config that does not fit its slice in number of chips or divisibility.
    """
    estimates = [estimate_lib.estimate(config, slice_name) for config, slice_name in pairs]
    alone = [_alone(config, slice_name) for config, slice_name in pairs]
    cases = [step_case(config, slice_name) for config, slice_name in pairs]
    costs = kernel_cost.costs(
        cases + [case for case in alone if case is not None],
        cache_directory=cache_directory,
        num_processes=num_processes,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    of_kernels = iter(costs[len(cases) :])
    plans = []
    for (config, slice_name), estimate, program, case in zip(pairs, estimates, costs, alone):
        kernels = None if case is None else next(of_kernels)
        if isinstance(program, kernel_cost.Refusal):
            kernels = None
        elif isinstance(kernels, kernel_cost.Refusal):
            raise errors.UserError(f"attention alone on {slice_name}: {kernels.reason}")
        plans.append(Plan(config, slice_name, estimate, program, kernels))
    return plans


def step_case(config: config_lib.RunConfig, slice_name: str) -> kernel_cost.Case:
    """Returns the training step of a config as a program."""
    wanted = topology.parse(slice_name)
    return kernel_cost.Case(
        f"{steps.__name__}:train_step",
        slice_name,
        {"config": config_lib.to_dict(config)},
        flags=xla_flags.for_chip(wanted.chip.name, num_slices=wanted.num_slices),
    )


def _alone(config: config_lib.RunConfig, slice_name: str) -> kernel_cost.Case | None:
    if config.model.attention not in ("auto", "pallas") or not of_configs.is_uniform(config.model):
        return None
    mesh = mesh_lib.make_abstract(config.mesh, topology.parse(slice_name).num_chips)
    return of_configs.attention(config, slice_name, dict(mesh.shape))
