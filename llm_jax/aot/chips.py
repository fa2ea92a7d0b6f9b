"""What one JAX device of each TPU generation has.

Sources: Google's specifications (cloud.google.com/tpu/docs, the pages of v4, v5e, v5p, v6e and TPU7x:
peak FLOP/s, bandwidth of HBM, of links between chips and of the network, cores); what libtpu says when a
program is too large (size of HBM); `jax.experimental.pallas.tpu.get_tpu_info` (VMEM, number
and size of matrix units). Clocks follow from them: peak = cores x units x size^2 x 2 x rows a cycle x
clock, with one row a cycle before v6e and two from then on; that of TPU7x was checked against nothing
else. Delay slots of branches and issue slots were read off compiled programs.
"""

from collections.abc import Sequence
import dataclasses

from llm_jax import errors


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, or half of a TPU7x.

    Attributes:
      num_cores: TensorCores that one device runs on together; they share its HBM. The matrix units,
        VMEM and issue slots below are those of one core.
      hbm_bytes: that the compiler gives to programs; it keeps the rest.
      ici_bandwidth: bytes a second of one link to a neighbouring chip, each way.
      ici_wraps: sides of a slice that are rings: those of such a length or, for 4, of its multiples
        where all sides are.
      dcn_bandwidth: bytes a second that a chip sends to other slices.
      mxu_size: rows and columns of a matrix unit.
      mxu_rows_per_cycle: rows of bfloat16 operands that a unit takes in each cycle.
      delay_slots: bundles after a branch that are executed before it is taken.
      num_valu, num_eup, num_xlu, num_vector_loads, num_vector_stores: such operations a cycle.
    """

    name: str
    device_kind: str
    clock_hz: float
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float
    ici_wraps: int
    dcn_bandwidth: float
    vmem_bytes: int
    num_cores: int
    num_mxus: int
    mxu_size: int
    mxu_rows_per_cycle: int
    delay_slots: int = 4
    num_valu: int = 4
    num_eup: int = 1
    num_xlu: int = 2
    num_vector_loads: int = 3
    num_vector_stores: int = 1

    def rings(self, sides: Sequence[int]) -> tuple[bool, ...]:
        """Returns which sides of a slice, by its chips along each, close to a ring."""
        if self.ici_wraps == 4:
            return tuple(1 < side and all(other % 4 == 0 for other in sides) for side in sides)
        return tuple(side == self.ici_wraps for side in sides)


_GIB = 1 << 30
_MIB = 1 << 20

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kind="TPU v4",
            clock_hz=1.05e9,
            peak_bf16_flops=275e12,
            hbm_bytes=int(30.75 * _GIB),
            hbm_bandwidth=1228e9,
            ici_bandwidth=50e9,
            ici_wraps=4,
            dcn_bandwidth=3.125e9,
            vmem_bytes=16 * _MIB,
            num_cores=2,
            num_mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            num_xlu=3,
        ),
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            clock_hz=1.5e9,
            peak_bf16_flops=197e12,
            hbm_bytes=int(15.75 * _GIB),
            hbm_bandwidth=819e9,
            ici_bandwidth=50e9,
            ici_wraps=16,
            dcn_bandwidth=3.125e9,
            vmem_bytes=128 * _MIB,
            num_cores=1,
            num_mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            num_xlu=3,
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            clock_hz=1.75e9,
            peak_bf16_flops=459e12,
            hbm_bytes=int(95.73 * _GIB),
            hbm_bandwidth=2765e9,
            ici_bandwidth=100e9,
            ici_wraps=4,
            dcn_bandwidth=6.25e9,
            vmem_bytes=64 * _MIB,
            num_cores=2,
            num_mxus=4,
            mxu_size=128,
            mxu_rows_per_cycle=1,
            num_xlu=3,
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            clock_hz=1.75e9,
            peak_bf16_flops=918e12,
            hbm_bytes=int(31.24 * _GIB),
            hbm_bandwidth=1640e9,
            ici_bandwidth=100e9,
            ici_wraps=16,
            dcn_bandwidth=12.5e9,
            vmem_bytes=128 * _MIB,
            num_cores=1,
            num_mxus=2,
            mxu_size=256,
            mxu_rows_per_cycle=2,
            num_vector_stores=2,
        ),
        Chip(
            name="tpu7x",
            device_kind="TPU7x",
            clock_hz=2.2e9,
            peak_bf16_flops=1153.5e12,
            hbm_bytes=int(94.74 * _GIB),
            hbm_bandwidth=3690e9,
            ici_bandwidth=100e9,
            ici_wraps=4,
            dcn_bandwidth=12.5e9,
            vmem_bytes=64 * _MIB,
            num_cores=1,
            num_mxus=2,
            mxu_size=256,
            mxu_rows_per_cycle=2,
            delay_slots=6,
            num_vector_stores=2,
        ),
    )
}


def by_name(name: str) -> Chip:
    """Returns the chip called `name` ("v5e"); raises `errors.UserError` for an unknown one."""
    if name not in CHIPS:
        raise errors.UserError(
            f"no TPU is called '{name}'{errors.nearest(name, CHIPS)}; known: {', '.join(CHIPS)}"
        )
    return CHIPS[name]


def by_device_kind(device_kind: str) -> Chip:
    """Returns the chip of `jax.Device.device_kind`; raises `errors.UserError` for an unknown one."""
    for chip in CHIPS.values():
        if chip.device_kind == device_kind:
            return chip
    kinds = ", ".join(f"'{chip.device_kind}'" for chip in CHIPS.values())
    raise errors.UserError(f"no TPU has device_kind '{device_kind}'; known: {kinds}")
