"""Block sizes by device and head width."""

import dataclasses

from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import forward_visits


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the two kernels."""

    forward: forward_visits.Blocks = forward_visits.Blocks()
    backward: backward_visits.Blocks = backward_visits.Blocks()


# By the kind of device, as JAX names it. Those of v5e and v6e won a search by modelled time (causal,
# T 4,096, widths 64 and 128); for the others nothing was searched.
_NARROW = Blocks(
    forward_visits.Blocks(lead=8, lag=1, slots=4),
    backward_visits.Blocks(masked_q=256, masked_k=256, masked_unroll=4),
)
_BY_DEVICE = {
    "TPU v4": _NARROW,
    "TPU v5 lite": _NARROW,
    "TPU v5": _NARROW,
    "TPU v6 lite": Blocks(),
    "TPU7x": Blocks(),
    # Interpreted, for tests.
    "cpu": Blocks(
        forward_visits.Blocks(q=256, kv=256, tile=128, chunk=128, lead=2, lag=1),
        backward_visits.Blocks(256, 256, 128, 128, 128, 128, 2, 1),
    ),
}


def is_known(device_kind: str) -> bool:
    """Returns whether there are sizes for a device."""
    return device_kind in _BY_DEVICE


def for_device(device_kind: str, width: int) -> Blocks:
    """Returns the sizes for heads of `width`.

    Raises:
      ValueError: a device that the kernels are not made for.
    """
    if not is_known(device_kind):
        raise ValueError(
            f"attention 'pallas' has no block sizes for {device_kind!r}, only for"
            f" {', '.join(_BY_DEVICE)}"
        )
    blocks = _BY_DEVICE[device_kind]
    if width > 128:  # to stay within VMEM
        smaller = dataclasses.replace(
            blocks.backward,
            macro_q=min(blocks.backward.macro_q, 2048),
            macro_k=min(blocks.backward.macro_k, 2048),
        )
        return dataclasses.replace(blocks, backward=smaller)
    if width < 128 and blocks in (_NARROW, Blocks()):
        smaller = backward_visits.Blocks(masked_q=512, masked_unroll=2)
        return dataclasses.replace(blocks, backward=smaller)
    return blocks
