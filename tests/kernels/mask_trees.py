"""Random masks: trees of every kind of leaf, over a batch of two."""

from hypothesis import strategies as st
import numpy as np

from llm_jax.kernels.flash_attention import masks

B = 2


def _arrays(draw, length, top):
    flat = draw(st.lists(st.integers(0, top), min_size=B * length, max_size=B * length))
    return np.asarray(flat, np.int32).reshape(B, length)


@st.composite
def _trees(draw, num_queries, num_keys, depth=2):
    """A mask of up to four leaves, over a batch of two."""
    kind = draw(st.sampled_from(["leaf"] if depth == 0 else ["leaf", "and", "or", "not"]))
    if kind == "not":
        return ~draw(_trees(num_queries, num_keys, depth - 1))
    if kind != "leaf":
        one, other = (draw(_trees(num_queries, num_keys, depth - 1)) for _ in range(2))
        return one & other if kind == "and" else one | other
    sides = st.none() | st.integers(-3, 9)
    leaf = draw(st.sampled_from(["band", "keys", "queries", "segments"]))
    if leaf == "band":
        return masks.local_window(draw(sides), draw(sides))
    if leaf == "segments":
        # Sorted as packing makes them, or not: bounds must hold for both.
        q, k = _arrays(draw, num_queries, 2), _arrays(draw, num_keys, 2)
        if draw(st.booleans()):
            q, k = np.sort(q), np.sort(k)
        return masks.Segments(q, k)
    lengths = _arrays(draw, 1, 10)[:, 0]
    return masks.KeysBelow(lengths) if leaf == "keys" else masks.QueriesBelow(lengths)


@st.composite
def cases(draw):
    """A mask, its queries and keys, an offset, and block sizes for both."""
    num_queries, num_keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return (
        draw(_trees(num_queries, num_keys)),
        num_queries,
        num_keys,
        draw(st.integers(0, 5)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
