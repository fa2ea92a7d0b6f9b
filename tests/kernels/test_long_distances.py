"""Biases of the kernels over many thousands of keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from tests import helpers


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_slopes_hold_over_long_distances(dtype, tolerance):
    """Far blocks take their share of a slope as one number, which must not cost digits near by."""
    num_queries, num_keys = 128, 2**15
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((1, num_queries, 1, 2, 8), (1, num_keys, 1, 8), (1, num_keys, 1, 8))
    )
    slopes = np.asarray([0.5, 2.0**-13])
    first = num_keys - num_queries
    y = op.attention(
        q,
        k,
        v,
        mask=masks.causal(),
        scale=0.3,
        implementation="pallas",
        chunk=num_queries,
        q_offset=first,
        bias=biases.Alibi(jnp.asarray(slopes, jnp.float32)[None]),
    )
    distance = first + np.arange(num_queries)[:, None] - np.arange(num_keys)
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    scores = 0.3 * np.einsum("tgc,sc->gts", q[0, :, 0], k[0, :, 0])
    scores = np.where(distance >= 0, scores - slopes[:, None, None] * distance, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("gts,sc->tgc", weights, v[0, :, 0])
    helpers.assert_close(y[0, :, 0].astype(jnp.float32), wanted, tolerance)
