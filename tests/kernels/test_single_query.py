"""Attention of one query equals the reference, whatever it may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import mask as mask_lib
from llm_jax.kernels.flash_attention import reference
from llm_jax.kernels.flash_attention import single_query

B, S, K, G, C = 3, 11, 2, 3, 4
SEGMENTS_BS = jnp.asarray(np.arange(S)[None, :] >= np.asarray([0, 4, S])[:, None], jnp.int32)


def _inputs(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTKGC = jax.random.normal(keys[0], (B, 1, K, G, C), dtype)
    k_BSKC = jax.random.normal(keys[1], (B, S, K, C), dtype)
    return q_BTKGC, k_BSKC, jax.random.normal(keys[2], (B, S, K, C), dtype)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("offset", [0, 6, S - 1])
@pytest.mark.parametrize(
    "mask, score",
    [
        ({}, {}),
        ({"window": 3}, {"softcap": 0.7}),
        ({"is_causal": False}, {}),
        ({}, {"alibi_slopes_KG": jnp.linspace(0.1, 1.0, K * G).reshape(K, G)}),
        ({"q_segments_BT": jnp.ones((B, 1), jnp.int32), "k_segments_BS": SEGMENTS_BS}, {}),
    ],
    ids=["causal", "window_softcap", "full", "alibi", "segments"],
)
def test_one_query_equals_the_reference(mask, score, offset, dtype, tolerance):
    mask = mask_lib.AttentionMask(offset=offset, **mask)
    q_BTKGC, k_BSKC, v_BSKC = _inputs(dtype)
    how = {"mask": mask, "scale": 0.5} | score
    wanted = np.asarray(reference.attention(q_BTKGC, k_BSKC, v_BSKC, **how), np.float32)
    actual = np.asarray(single_query.attention(q_BTKGC, k_BSKC, v_BSKC, **how), np.float32)
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def test_a_query_that_sees_nothing_gets_zeros():
    """The third row's keys are all of another segment."""
    mask = mask_lib.AttentionMask(
        q_segments_BT=jnp.ones((B, 1), jnp.int32), k_segments_BS=SEGMENTS_BS, offset=S - 1
    )
    y_BTKGC = single_query.attention(*_inputs("float32"), mask=mask, scale=0.5)
    assert np.all(np.asarray(y_BTKGC[2]) == 0.0)
    assert np.all(np.any(np.asarray(y_BTKGC[:2]) != 0.0, axis=-1))
