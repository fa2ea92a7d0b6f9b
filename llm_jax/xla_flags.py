"""Compiler flags of each TPU generation, in one place for runs, for planning and for tests.

libtpu reads them from the environment variable LIBTPU_INIT_ARGS, once, when it is loaded; a name that
it does not know ends the process, and some values are refused only when a program would use them. So
a flag comes into this table with where it is from and what it is for, and
`tests/test_xla_flags.py` compiles a sharded program with the flags of each generation.

Sources: [guide] openxla.org/xla/flags_guidance (docs/flags_guidance.md of openxla/xla); [maxtext]
MaxText/configs/{v5e,v5p,trillium}/llama2_70b*.sh and benchmarks/xla_flags_library.py of
AI-Hypercomputer/maxtext. Nobody has measured their effect with this code on a TPU.
"""

import dataclasses

from llm_jax.aot import chips

VARIABLE = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One setting, with what it does and who says so."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


# What the guide calls defaults is set all the same: it was chosen, and a default that changes with
# the version of libtpu should not change a run.
_EVERY_CHIP = (
    Flag(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "starts collectives early and does other work until they are done [guide]; costs HBM, so it is"
        " the first to turn off where a program hardly fits",
    ),
    Flag(
        "xla_enable_async_all_gather",
        "true",
        "weights of FSDP are gathered while something else is computed [guide, maxtext]",
    ),
    Flag(
        "xla_enable_async_collective_permute",
        "true",
        "the same for rings: context parallelism, products that gather as they go [guide, maxtext]",
    ),
    Flag(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "1000000",
        "weights are gathered whole, not in turns of a product over a ring: on a v5e those turns wait"
        " for each other (Llama 7B on v5e:4x8, modelled by `llm_jax.aot`: 35.0 s a step with them,"
        " 25.0 without)",
    ),
)

# Continuation fusion: a collective runs inside the loops of a product. Other chips refuse to compile
# ("not supported/recommended on platforms other than TPU v5e ... incorrect results, hang, SDC").
_V5E = (
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "collectives become part of the products that they overlap with [guide, maxtext]",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        "the same for gathers of weights [guide, maxtext]",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "a collective may stretch over several products [maxtext]",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "the TensorCore itself drives a collective beside its products [maxtext]",
    ),
)

_V5P = (
    Flag(
        "xla_tpu_megacore_fusion_allow_ags",
        "false",
        "gathers fused into products by both cores cannot overlap with anything else [guide, maxtext]",
    ),
)

_SEVERAL_SLICES = (
    Flag(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "gradients are summed over the network between slices while others are computed"
        " [guide, maxtext]",
    ),
    Flag(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "the same across turns of the loop over layers; costs HBM [guide, maxtext]",
    ),
)

_OF_CHIP = {"v4": (), "v5e": _V5E, "v5p": _V5P, "v6e": (), "tpu7x": ()}


def flags(chip: str, *, num_slices: int = 1) -> tuple[Flag, ...]:
    """Returns the flags of a generation, with their reasons.

    Args:
      chip: as `aot.chips` names it: "v5e".
      num_slices: slices of the run; from two on, flags for the network between them are added.

    Raises:
      errors.UserError: there is no such chip.
    """
    chosen = _EVERY_CHIP + _OF_CHIP[chips.by_name(chip).name]
    return chosen + (_SEVERAL_SLICES if num_slices > 1 else ())


def for_chip(chip: str, *, num_slices: int = 1) -> tuple[str, ...]:
    """Returns `flags` as libtpu takes them: ("--xla_tpu_...=true", ...). Raises as `flags`."""
    return tuple(str(flag) for flag in flags(chip, num_slices=num_slices))


def init_args(chip: str, *, num_slices: int = 1, given: str = "") -> str:
    """Returns the value of LIBTPU_INIT_ARGS; flags in `given` come last and so replace ours."""
    return " ".join([*for_chip(chip, num_slices=num_slices), *given.split()])
