"""Every implementation against the oracle over random masks, scores, groups, widths and lengths."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import reference
from tests.kernels import attention_oracle
from tests.kernels import mask_trees
from tests.kernels import test_attention as suite

B = mask_trees.B


def _numbers(seed, *shape):
    """Numbers of float32 in float64, so that the oracle sees what the operation does."""
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(np.float32(drawn), np.float64)


@st.composite
def _biases(draw, K, G, T, S):
    kind = draw(st.sampled_from([None, "alibi", "t5", "one way", "array"]))
    if kind == "alibi":
        return biases.Alibi(np.abs(_numbers(3, K, G)))
    if kind in ("t5", "one way"):
        return biases.Relative(_numbers(4, K, G, 8), 7, is_bidirectional=kind == "t5")
    if kind == "array":
        shared = [draw(st.booleans()) for _ in range(3)]
        sizes = [1 if is_one else size for is_one, size in zip(shared, (B, K, G))]
        return biases.Full(_numbers(5, *sizes, T, S))
    return None


@st.composite
def _cases(draw):
    mask, T, S, offset, _, _ = draw(mask_trees.cases())
    K, G, C, Cv = (draw(st.integers(1, top)) for top in (2, 3, 5, 5))
    rate = draw(st.sampled_from([None, 0.3]))
    factors, extra = None, {}
    if rate is not None:
        extra["dropout"] = dropout_lib.Dropout(jnp.uint32(7), rate)
        shape = (B, K, G, T, S)
        factors = np.asarray(
            reference.dropout_factors(extra["dropout"], shape, np.arange(T), np.arange(S))
        )
    case = attention_oracle.Case(
        q=_numbers(0, B, T, K, G, C),
        k=_numbers(1, B, S, K, C),
        v=_numbers(2, B, S, K, Cv),
        mask=mask,
        q_offset=offset,
        softcap=draw(st.sampled_from([None, 0.7])),
        bias=draw(_biases(K, G, T, S)),
        sinks_KG=_numbers(6, K, G) if draw(st.booleans()) else None,
        factors_BKGTS=factors,
    )
    return case, extra


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(_cases())
@pytest.mark.parametrize(
    "implementation", ["chunked", pytest.param("pallas", marks=pytest.mark.long)]
)
def test_result_and_gradients_equal_the_oracles(implementation, drawn):
    case, extra = drawn
    run = suite.attend(case, extra, implementation)
    rng = np.random.default_rng(1)
    probe = rng.standard_normal((*case.q.shape[:-1], case.v.shape[-1]))
    parameters = suite.parameters_of(case)
    both = jax.jit(jax.vjp, static_argnums=0)
    y, pull = both(run, parameters)
    np.testing.assert_allclose(y, attention_oracle.attention(case), rtol=0, atol=2e-5)
    (gradient,) = jax.jit(lambda pull, dy: pull(dy))(pull, jnp.asarray(probe, y.dtype))
    for argument, value in attention_oracle.parameters(case).items():
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), value)
        products = jax.tree.map(np.vdot, gradient[argument], direction)
        wanted = attention_oracle.slope(case, argument, direction, probe)
        assert sum(jax.tree.leaves(products)) == pytest.approx(wanted, rel=4e-5, abs=4e-5), argument
