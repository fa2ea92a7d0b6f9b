"""Masks against their definition, pair by pair; attention against numpy float64."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import mask as mask_lib
from llm_jax.kernels.flash_attention import op
from tests import helpers

B, T, S, K, G, C = 2, 11, 11, 2, 3, 4


def _brute_force(mask, num_queries, num_keys, start):
    """The definition, one pair at a time."""
    rows = 1 if mask.q_segments_BT is None else len(mask.q_segments_BT)
    allowed = np.zeros((rows, num_queries, num_keys), bool)
    for b in range(rows):
        for i in range(num_queries):
            t = int(mask.offset) + start + i
            for s in range(num_keys):
                is_seen = not mask.is_causal or s <= t
                is_seen = is_seen and (mask.window is None or t - s < mask.window)
                if mask.q_segments_BT is not None:
                    same = mask.q_segments_BT[b, start + i] == mask.k_segments_BS[b, s]
                    is_seen = is_seen and bool(same)
                allowed[b, i, s] = is_seen
    return allowed


@st.composite
def _cases(draw):
    """A mask over at most 9 queries and keys, and a cut of its queries."""
    num_queries, num_keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    segments = {}
    if draw(st.booleans()):
        rows = draw(st.integers(1, 3))
        numbers = st.integers(0, 2)

        def array(length):
            flat = draw(st.lists(numbers, min_size=rows * length, max_size=rows * length))
            return np.asarray(flat, np.int32).reshape(rows, length)

        segments = {"q_segments_BT": array(num_queries), "k_segments_BS": array(num_keys)}
    mask = mask_lib.AttentionMask(
        is_causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 9)),
        offset=draw(st.integers(0, 5)),
        **segments,
    )
    start = draw(st.integers(0, num_queries - 1))
    return mask, draw(st.integers(1, num_queries - start)), num_keys, start


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(_cases())
def test_mask_equals_its_definition(case):
    mask, count, num_keys, start = case
    wanted = _brute_force(mask, count, num_keys, start)
    np.testing.assert_array_equal(mask.allowed_BTS(count, num_keys, start), wanted)
    distance = mask.offset + start + np.arange(count)[:, None] - np.arange(num_keys)
    np.testing.assert_array_equal(mask.distance_TS(count, num_keys, start), distance)


def _inputs(dtype="float32", num_queries=T):
    rng = np.random.default_rng(0)
    shapes = (B, num_queries, K, G, C), (B, S, K, C), (B, S, K, C)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _numpy_attention(q, k, v, allowed, scale, softcap=None, slopes=None, offset=0):
    """One query of one head at a time, in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    allowed = np.broadcast_to(allowed, (q.shape[0], q.shape[1], k.shape[1]))
    y = np.zeros(q.shape)
    for b, t, kv, g in np.ndindex(q.shape[:4]):
        seen = np.flatnonzero(allowed[b, t])
        if not len(seen):
            continue
        scores = k[b, seen, kv] @ q[b, t, kv, g] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[kv, g] * np.abs(offset + t - seen)
        weights = np.exp(scores - scores.max())
        y[b, t, kv, g] = weights / weights.sum() @ v[b, seen, kv]
    return y


def _segments(num_queries=T):
    k_segments = np.ones((B, S), np.int32)
    k_segments[0, 4:] = 2
    k_segments[1, 9:] = 0
    return {
        "q_segments_BT": jnp.asarray(k_segments[:, -num_queries:]),
        "k_segments_BS": jnp.asarray(k_segments),
    }


_SLOPES = jnp.asarray([[0.5, 0.25, 0.125], [1.0, 2.0, 0.0]])

CASES = {
    "causal": ({}, {}),
    "bidirectional": ({"is_causal": False}, {}),
    "window": ({"window": 3}, {}),
    "bidirectional_window": ({"window": 3, "is_causal": False}, {}),
    "segments": (_segments(), {}),
    "softcap": ({}, {"softcap": 0.7}),
    "alibi": ({}, {"alibi_slopes_KG": _SLOPES}),
    "bidirectional_alibi": ({"is_causal": False}, {"alibi_slopes_KG": _SLOPES}),
    "everything": (
        {"window": 5} | _segments(),
        {"softcap": 0.7, "alibi_slopes_KG": _SLOPES},
    ),
    "offset": ({"offset": 7}, {"alibi_slopes_KG": _SLOPES}),
    "traced_offset": ({"offset": jnp.asarray(7)}, {"alibi_slopes_KG": _SLOPES}),
    "offset_segments": ({"offset": 7} | _segments(4), {}),
}


def _case(name, dtype="float32"):
    mask_fields, options = CASES[name]
    queries = 4 if "offset" in mask_fields else T
    return _inputs(dtype, queries), mask_lib.AttentionMask(**mask_fields), options


def _attend(name, options, implementation="reference"):
    """`op.attention` with a chunk that does not divide 11 queries."""
    return functools.partial(
        op.attention, scale=0.6, implementation=implementation, chunk=4, **options
    )


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_numpy(name, implementation):
    (q, k, v), mask, options = _case(name)
    # Not an argument of the jitted function: an offset that is a Python integer stays one.
    y = jax.jit(functools.partial(_attend(name, options, implementation), mask=mask))(q, k, v)
    allowed = _brute_force(mask, q.shape[1], S, 0)
    slopes = options["alibi_slopes_KG"] if "alibi_slopes_KG" in options else None
    softcap = options["softcap"] if "softcap" in options else None
    wanted = _numpy_attention(q, k, v, allowed, 0.6, softcap, slopes, int(mask.offset))
    helpers.assert_close(y, wanted)


@pytest.mark.parametrize("name", CASES)
def test_chunked_gradients_equal_those_of_the_reference(name):
    (q, k, v), mask, options = _case(name)
    probe = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def gradients(implementation):
        attend = _attend(name, options, implementation)
        return jax.jit(jax.grad(lambda *qkv: jnp.vdot(attend(*qkv, mask=mask), probe), (0, 1, 2)))(
            q, k, v
        )

    helpers.assert_close(gradients("chunked"), gradients("reference"), 2e-5)


def test_reference_gradient_equals_a_finite_difference():
    (q, k, v), mask, options = _case("everything")
    rng = np.random.default_rng(1)
    probe = rng.standard_normal(q.shape)
    direction = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (q, k, v)]
    attend = _attend("everything", options)
    value = jax.jit(lambda *qkv: jnp.vdot(attend(*qkv, mask=mask), probe))
    grads = jax.grad(value, (0, 1, 2))(q, k, v)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(grads, direction))
    allowed = _brute_force(mask, T, S, 0)

    def shifted(step):
        moved = [
            np.asarray(x, np.float64) + step * np.asarray(d, np.float64)
            for x, d in zip((q, k, v), direction)
        ]
        y = _numpy_attention_64(*moved, allowed, options)
        return np.vdot(y, probe)

    wanted = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    assert slope == pytest.approx(wanted, rel=2e-5)


def _numpy_attention_64(q, k, v, allowed, options):
    class Array(np.ndarray):
        """float64 that stays float64."""

        def astype(self, dtype):
            del dtype
            return np.asarray(self)

    q, k, v = (x.view(Array) for x in (q, k, v))
    slopes = np.asarray(options["alibi_slopes_KG"])
    return _numpy_attention(q, k, v, allowed, 0.6, options["softcap"], slopes)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_bfloat16_stays_bfloat16(implementation):
    (q, k, v), mask, options = _case("everything", "bfloat16")
    y = jax.jit(_attend("everything", options, implementation))(q, k, v, mask=mask)
    assert y.dtype == jnp.bfloat16
    slopes = np.asarray(options["alibi_slopes_KG"])
    allowed = _brute_force(mask, T, S, 0)
    wanted = _numpy_attention(q, k, v, allowed, 0.6, options["softcap"], slopes)
    helpers.assert_close(y.astype(jnp.float32), wanted, 2e-2)


def test_large_scores_do_not_overflow():
    q, k, v = _inputs()
    mask = mask_lib.AttentionMask()
    attend = functools.partial(_attend("causal", {}), mask=mask)
    y, grads = jax.value_and_grad(lambda q: attend(q, k, v).sum())(q * 1e6)
    assert np.isfinite(y) and np.isfinite(grads).all()
    allowed = _brute_force(mask, T, S, 0)
    helpers.assert_close(attend(q * 1e6, k, v), _numpy_attention(q * 1e6, k, v, allowed, 0.6))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_query_without_a_key_gets_zeros_and_finite_gradients(implementation):
    q, k, v = _inputs()
    lonely = np.ones((B, T), np.int32)
    lonely[:, 5] = 9  # a segment that no key has
    mask = mask_lib.AttentionMask(
        q_segments_BT=jnp.asarray(lonely), k_segments_BS=jnp.ones((B, S), jnp.int32)
    )
    attend = jax.jit(functools.partial(_attend("segments", {}, implementation), mask=mask))
    y = np.asarray(attend(q, k, v))
    np.testing.assert_array_equal(y[:, 5], 0.0)
    assert np.abs(y[:, 4]).min() > 0
    grads = jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(grad).all() for grad in grads)
    np.testing.assert_array_equal(grads[0][:, 5], 0.0)


def test_chunks_never_hold_all_scores():
    """Neither as one array, nor in what the forward pass keeps for the backward pass."""
    length, heads = 64, 8
    rng = np.random.default_rng(0)
    shapes = (1, length, 1, heads, 2), (1, length, 1, 2), (1, length, 1, 2)
    qkv = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def sizes(implementation):
        attend = functools.partial(
            op.attention,
            mask=mask_lib.AttentionMask(),
            scale=1.0,
            implementation=implementation,
            chunk=8,
        )
        gradient = jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2))
        largest = max(_sizes(jax.make_jaxpr(gradient)(*qkv).jaxpr))
        kept = jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], *qkv)
        return largest, sum(leaf.size for leaf in jax.tree.leaves(kept))

    all_scores = heads * length**2
    assert min(sizes("reference")) >= all_scores
    assert max(sizes("chunked")) <= all_scores / 8
    assert sizes("auto") == sizes("chunked")


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., :3], k, v),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q[:, :, :1], k, v),
        lambda q, k, v: (q, k, v[:, :5]),
        lambda q, k, v: (q[:, :, :, 0], k, v),
        lambda q, k, v: (q, k[0], v[0]),
    ],
)
def test_shapes_that_do_not_fit_are_named(change):
    q, k, v = change(*_inputs())
    with pytest.raises(ValueError) as error:
        _attend("causal", {})(q, k, v, mask=mask_lib.AttentionMask())
    for x in (q, k, v):
        assert str(x.shape) in str(error.value)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'flash'"):
        _attend("causal", {}, "flash")(*_inputs(), mask=mask_lib.AttentionMask())
