"""What Google Cloud calls things, where it has them and what they cost: one table for the launchers.

A slice has one name everywhere (configs, planner, launch): chip and chips along each side, "v5e:4x8",
with the number of slices before it where there are several, "2*v5e:16x16".

Read on 2026-11-22, in stored copies of the pages: names and shapes from cloud.google.com/tpu/docs
(v4, v5e, v5p, v6e), which xpk 1.16 agrees with; zones from docs.cloud.google.com/tpu/docs/regions-zones
(the copy ended in Europe: europe-west4-b is from memory); runtime versions from
cloud.google.com/tpu/docs/runtimes. Prices: each row says.
"""

import dataclasses
import math

from llm_jax import errors
from llm_jax.aot import topology

PRICES_CHECKED = "2026-11-22"
_PAGE = "https://cloud.google.com/tpu/pricing"
PRICES_NOTE = f"as found on {PRICES_CHECKED}; check before you rely on it: {_PAGE}"


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of chip as Google Cloud offers it.

    Attributes:
      chip: as in `llm_jax.aot.chips`.
      accelerator_prefix: of accelerator types, "v5litepod" in "v5litepod-16".
      names_cores: whether the number in an accelerator type is of TensorCores, two a chip.
      shapes: slices that an accelerator type names without doubt, smallest first. Others exist by
        `--topology`; they are not offered here.
      runtime_version: the VM's software; None where there are no TPU VMs of it, but GKE alone.
      zones: where it is offered.
      dollars_per_chip_hour: list price on demand in the cheapest American region; None: not known.
      price_source: where that is from.
    """

    chip: str
    accelerator_prefix: str
    names_cores: bool
    shapes: tuple[str, ...]
    runtime_version: str | None
    zones: tuple[str, ...]
    dollars_per_chip_hour: float | None
    price_source: str


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    *("4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)
_CALCULATORS = "price calculators of public repositories that cite cloud.google.com/tpu/pricing"

GENERATIONS = {
    generation.chip: generation
    for generation in (
        Generation(
            chip="v4",
            accelerator_prefix="v4",
            names_cores=True,
            shapes=_3D,
            runtime_version="tpu-ubuntu2204-base",
            zones=("us-central2-b",),
            dollars_per_chip_hour=3.22,
            price_source=_CALCULATORS,
        ),
        Generation(
            chip="v5e",
            accelerator_prefix="v5litepod",
            names_cores=False,
            shapes=_2D,
            runtime_version="v2-alpha-tpuv5-lite",
            zones=("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
            dollars_per_chip_hour=1.20,
            price_source=_CALCULATORS,
        ),
        Generation(
            chip="v5p",
            accelerator_prefix="v5p",
            names_cores=True,
            shapes=(*_3D, "16x16x16", "16x16x24"),
            runtime_version="v2-alpha-tpuv5",
            zones=("us-central1-a", "us-east5-a", "europe-west4-b"),
            dollars_per_chip_hour=4.20,
            price_source="skypilot-org/skypilot#4579 (2025-01: v5p-8, four chips, $16.80)",
        ),
        Generation(
            chip="v6e",
            accelerator_prefix="v6e",
            names_cores=False,
            shapes=_2D,
            runtime_version="v2-alpha-tpuv6e",
            zones=("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a"),
            dollars_per_chip_hour=2.70,
            price_source=_CALCULATORS,
        ),
        Generation(
            chip="tpu7x",
            accelerator_prefix="tpu7x",
            names_cores=True,
            shapes=_3D,
            runtime_version=None,
            zones=("us-central1-c",),
            dollars_per_chip_hour=None,
            price_source="none found",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice, or several alike, by the name that configs use."""

    generation: Generation
    shape: str
    num_slices: int

    @property
    def name(self) -> str:
        count = f"{self.num_slices}*" if self.num_slices > 1 else ""
        return f"{count}{self.generation.chip}:{self.shape}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    @property
    def num_chips(self) -> int:
        return self.num_slices * self.chips_per_slice

    @property
    def accelerator_type(self) -> str:
        """Of one slice, as `gcloud --accelerator-type` and `xpk --tpu-type` take it."""
        per_chip = 2 if self.generation.names_cores else 1
        return f"{self.generation.accelerator_prefix}-{per_chip * self.chips_per_slice}"

    @property
    def dollars_per_hour(self) -> float | None:
        """Of all slices on demand by list price; None where that is not known."""
        price = self.generation.dollars_per_chip_hour
        return None if price is None else price * self.num_chips

    def cost(self) -> str:
        """Returns one phrase on the price, with its caveat."""
        dollars = self.dollars_per_hour
        if dollars is None:
            return f"the price of {self.generation.chip} is not in our table; {PRICES_NOTE}"
        return (
            f"{self.num_chips} chips x ${self.generation.dollars_per_chip_hour:.2f} ="
            f" ${dollars:,.2f} an hour on demand, spot less ({PRICES_NOTE})"
        )


def parse_slice(name: str) -> Slice:
    """Returns what a slice's name says.

    Raises:
      errors.UserError: the name is malformed, there is no such chip, or it has no such shape.
    """
    parsed = topology.parse(name)
    generation = GENERATIONS[parsed.chip.name]
    shape = "x".join(str(side) for side in parsed.sides)
    if shape not in generation.shapes:
        raise errors.UserError(
            f"'{name}': {generation.chip} has no slice of {shape}"
            f"{errors.nearest(shape, generation.shapes)}; there are {', '.join(generation.shapes)}"
        )
    return Slice(generation, shape, parsed.num_slices)


def check_zone(zone: str, generation: Generation) -> None:
    """Raises `errors.UserError` for a zone that is not known to offer a generation."""
    if zone in generation.zones:
        return
    raise errors.UserError(
        f"--zone={zone} is not known to offer {generation.chip}"
        f"{errors.nearest(zone, generation.zones)}; known: {', '.join(generation.zones)}."
        " If Google lists yours by now, add --any_zone"
    )


def region(zone: str) -> str:
    """Returns the region of a zone: "us-west4" of "us-west4-a"."""
    return zone.rpartition("-")[0]


def price_table() -> str:
    """Returns the rows of the README's table of prices."""
    rows = []
    for generation in GENERATIONS.values():
        price = generation.dollars_per_chip_hour
        shown = "not known" if price is None else f"{price:.2f} (unverified)"
        rows.append(f"| {generation.chip} | {shown} | {generation.price_source} |")
    return "\n".join(rows)
