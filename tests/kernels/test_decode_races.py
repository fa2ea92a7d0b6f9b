"""The kernel's own copies: each is waited for before it is read, and nothing unwritten is used."""

from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from tests.kernels import decode_cases
from tests.kernels import decode_oracle


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "paged", "int8_paged"])
def test_copies_do_not_race(layout):
    """With a simulated device whose memory starts as NaN and whose copies end as late as they may."""
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    # Rows of several blocks, of none, and of a part of one; a window that leaves pages out.
    case = decode_cases.make_case(B=4, T=2, lengths=[12, 0, 3, 11], starts=[3, 0, 0, 0], window=7)
    wanted = decode_cases.rounded(case) if layout.startswith("int8") else case
    with pltpu.force_tpu_interpret_mode(strict):
        actual = decode_cases.attend(case, layout, "pallas", junk=np.nan)
    np.testing.assert_allclose(actual, decode_oracle.attention(wanted), rtol=1e-5, atol=1e-5)
