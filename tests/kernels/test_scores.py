"""The numbers behind biases and dropout."""

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import reference
from tests.kernels import attention_oracle


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(-300, 300), st.integers(2, 40), st.integers(2, 200), st.booleans())
def test_buckets_equal_the_papers_words(distance, half, max_distance, is_bidirectional):
    num_buckets = 4 * half
    max_distance += num_buckets
    bias = biases.Relative(jnp.zeros((1, 1, num_buckets)), max_distance, is_bidirectional)
    wanted = {
        attention_oracle.t5_bucket(distance, num_buckets, top, is_bidirectional)
        for top in (max_distance * (1 - 1e-6), max_distance * (1 + 1e-6))
    }
    # Where a distance falls on the border of two buckets, float32 may take either.
    assert int(bias.buckets(jnp.asarray(distance))) in wanted


def test_dropout_drops_its_share_of_every_row_head_query_and_key():
    shape = (4, 2, 2, 64, 64)
    dropout = dropout_lib.Dropout(jnp.uint32(3), 0.3)
    factors = np.asarray(reference.dropout_factors(dropout, shape, np.arange(64), np.arange(64)))
    assert set(np.unique(factors)) == {0.0, np.float32(1 / 0.7)}
    is_dropped = factors == 0.0
    share = 0.3
    for axis in range(5):
        others = tuple(other for other in range(5) if other != axis)
        count = is_dropped.size / is_dropped.shape[axis]
        deviation = np.sqrt(share * (1 - share) / count)
        np.testing.assert_allclose(is_dropped.mean(others), share, atol=4.5 * deviation)
    # Neighbours along each dimension, and other seeds, agree as often as independent draws do.
    independent = share**2 + (1 - share) ** 2
    other = dropout_lib.Dropout(jnp.uint32(4), 0.3)
    pairs = [(np.delete(is_dropped, 0, axis), np.delete(is_dropped, -1, axis)) for axis in range(5)]
    pairs.append(
        (is_dropped, reference.dropout_factors(other, shape, np.arange(64), np.arange(64)) == 0.0)
    )
    for one, two in pairs:
        deviation = np.sqrt(independent * (1 - independent) / one.size)
        assert abs((one == two).mean() - independent) < 5 * deviation
