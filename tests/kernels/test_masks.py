"""Masks against their definition, pair by pair; block bounds against the blocks themselves."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import masks
from tests.kernels import attention_oracle
from tests.kernels import mask_trees

B = mask_trees.B


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(mask_trees.cases())
def test_a_mask_and_its_bounds_equal_the_definition(case):
    mask, num_queries, num_keys, offset, q_block, k_block = case
    wanted = attention_oracle.allowed(mask, B, num_queries, num_keys, offset)
    t_T, s_S = offset + np.arange(num_queries), np.arange(num_keys)
    actual = np.broadcast_to(masks.allowed_BTS(mask, t_T, s_S), wanted.shape)
    np.testing.assert_array_equal(actual, wanted)

    bounds = masks.block_bounds(mask, num_queries, num_keys, q_block, k_block, offset)
    shape = (B, -(-num_queries // q_block), -(-num_keys // k_block))
    some, every = (np.broadcast_to(x, shape) for x in bounds)
    for b, i, j in np.ndindex(shape):
        block = wanted[b, i * q_block : (i + 1) * q_block, j * k_block : (j + 1) * k_block]
        assert some[b, i, j] or not block.any()
        assert not every[b, i, j] or block.all()

    for start in range(0, num_queries, q_block):
        queries = range(start, min(start + q_block, num_queries))
        keys = masks.visible_keys(mask, queries, num_keys, offset, k_block)
        hidden = np.delete(wanted[:, queries.start : queries.stop], list(keys), axis=2)
        assert not hidden.any()
        cut = masks.cut(mask, slice(queries.start, queries.stop), slice(2, 7))
        actual = masks.allowed_BTS(cut, t_T[queries.start : queries.stop], s_S[2:7])
        part = wanted[:, queries.start : queries.stop, 2:7]
        np.testing.assert_array_equal(np.broadcast_to(actual, part.shape), part)


def test_bounds_are_exact_where_masks_are_simple():
    """Work is in proportion to what is open: no block is visited for nothing."""
    for mask, num_visited, num_open in [
        (masks.causal(), 10, 6),
        (masks.full(), 16, 16),
        (masks.local_window(left=3, right=0), 7, 0),
        (masks.local_window(left=7, right=0), 9, 3),
        (~masks.causal(), 10, 6),
        (masks.causal() & masks.KeysBelow(np.asarray([4])), 4, 3),
        (masks.causal() | masks.KeysBelow(np.asarray([8])), 11, 9),
    ]:
        some, every = (
            np.broadcast_to(x, (1, 4, 4)) for x in masks.block_bounds(mask, 16, 16, 4, 4)
        )
        assert (some.sum(), every.sum()) == (num_visited, num_open), mask


def test_packed_rows_visit_their_own_documents_alone():
    ids = np.repeat([[0, 1, 2, 3]], 4, axis=1)
    some, every = masks.block_bounds(masks.Segments(ids, ids), 16, 16, 4, 4)
    np.testing.assert_array_equal(some[0], np.eye(4, dtype=bool))
    np.testing.assert_array_equal(every[0], np.eye(4, dtype=bool))


def test_a_static_mask_has_static_bounds():
    def traced():
        some, every = masks.block_bounds(masks.causal() & masks.local_window(5), 16, 16, 4, 4)
        assert isinstance(some, np.ndarray) and isinstance(every, np.ndarray)
        return 0

    jax.jit(traced)()
    assert masks.is_static(masks.causal() & ~masks.full())
    assert not masks.is_static(masks.causal() & masks.KeysBelow(jnp.zeros(1)))


def test_a_mask_passes_through_jit_as_an_argument():
    mask = masks.causal() & masks.Segments(jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32))
    slots = jnp.arange(3)
    allowed = jax.jit(masks.allowed_BTS)(mask, slots, slots)
    np.testing.assert_array_equal(allowed[0], np.tri(3, dtype=bool))
    with pytest.raises(NotImplementedError):
        masks.Mask().allowed(0, 0)
