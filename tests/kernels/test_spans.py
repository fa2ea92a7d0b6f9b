"""Keys that come to the forward kernel in spans, where VMEM does not hold them all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import forward
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from tests import helpers
from tests.kernels import attention_oracle
from tests.kernels import test_attention

SPANNED = (
    "causal",
    "full",
    "window",
    "two_sided_window",
    "lengths",
    "packed",
    "not",
    "everything",
    "wide_values",
    "offset_packed",
)


@pytest.mark.parametrize("changes", [{"span": 4}, {"span": 8}, {"kv": 12, "span": 12, "own": 3}])
@pytest.mark.parametrize("name", SPANNED)
def test_keys_may_come_in_spans(name, changes):
    """With sizes that let VMEM hold some of the keys at a time, in one visit or several."""
    case, extra = test_attention.named(name)
    sizes = dataclasses.replace(
        test_attention.BLOCKS, forward=dataclasses.replace(test_attention.BLOCKS.forward, **changes)
    )
    run = jax.jit(test_attention.attend(case, extra, "pallas", blocks=sizes))
    y = run(test_attention.parameters_of(case))
    helpers.assert_close(y, attention_oracle.attention(case))
    np.testing.assert_array_equal(y, run(test_attention.parameters_of(case)))


def test_heads_too_wide_are_named_and_any_length_fits():
    def run(length, width):
        q = jax.ShapeDtypeStruct((1, length, 1, 1, width), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((1, length, 1, width), jnp.bfloat16)
        attend = functools.partial(
            op.attention, mask=masks.causal(), scale=1.0, implementation="pallas", chunk=1024
        )
        return jax.eval_shape(attend, q, k, k)

    assert run(2**18, 128).shape == (1, 2**18, 1, 1, 128)
    with pytest.raises(ValueError, match="widths 65536 and 65536 need .* use 'chunked'"):
        run(1024, 65536)


def test_sizes_follow_what_vmem_holds():
    def span(mask, length):
        sizes = blocks_lib.for_device("TPU v6 lite", 128, 4096).forward
        lengths, widths = (length, length), (128, 128)
        sizes = forward.fitted(sizes, mask, lengths, widths, jnp.bfloat16)
        keys = sizes.span or length
        assert forward.vmem_bytes(128, 128, keys, sizes, jnp.bfloat16) <= forward.VMEM_LIMIT
        return sizes.span

    assert span(masks.causal(), 2**15) is None
    assert span(masks.causal(), 2**17) < 2**16
    # No more than the window and the queries that share it.
    assert span(masks.local_window(1023, 0), 2**15) <= 1024 + 4096
    ids = jnp.ones((1, 2**15), jnp.int32)
    assert span(masks.local_window(1023, 0) & masks.Segments(ids, ids), 2**15) <= 1024 + 4096
