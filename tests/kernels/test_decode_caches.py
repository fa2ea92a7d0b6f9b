"""Caches hold what was written, in any layout; int8 rounds by half a unit; layouts suit devices."""

import functools
import re

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op
from llm_jax.kernels.decode_attention import paged
from llm_jax.kernels.decode_attention import pallas
from llm_jax.kernels.decode_attention import quantize
from llm_jax.kernels.flash_attention import biases
from tests import helpers
from tests.kernels import decode_cases
from tests.kernels import decode_oracle

B, S, K, C, PAGE = 2, 12, 2, 4, 2


def _random(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.standard_normal((B, num_tokens, K, C)), jnp.float32) for _ in "kv")


def _empty(layout):
    dtype = "int8" if layout.startswith("int8") else "float32"
    if layout.endswith("paged"):
        table = jnp.asarray(np.random.default_rng(0).permutation(B * S // PAGE).reshape(B, -1))
        sizes = {"num_pages": B * S // PAGE, "page_size": PAGE, "num_heads": K, "width": C}
        return paged.make_cache(table.astype(jnp.int32), dtype=dtype, **sizes)
    make = caches.make_slots_last if layout == "slots_last" else caches.make_contiguous
    return make(B, K, S, C, dtype)


@functools.partial(jax.jit, donate_argnames="cache")
def _write(cache, k_BTKC, v_BTKC, slot):
    if isinstance(cache, paged.Paged):
        num_tokens = k_BTKC.shape[1]
        return paged.write(cache, k_BTKC, v_BTKC, jnp.full(B, slot + num_tokens, jnp.int32))
    return cache.write(k_BTKC, v_BTKC, slot)


@pytest.mark.parametrize("layout", decode_cases.LAYOUTS)
def test_a_cache_holds_what_was_written(layout):
    k_BSKC, v_BSKC = _random(S)
    cache = _empty(layout)
    start = 0
    for num_tokens in (5, 1, 1, 3):
        at = np.s_[:, start : start + num_tokens]
        cache = _write(cache, k_BSKC[at], v_BSKC[at], start)
        start += num_tokens
    for actual, written in zip(cache.dense(), (k_BSKC, v_BSKC)):
        wanted = quantize.restored(*quantize.quantized(written)) if "int8" in layout else written
        np.testing.assert_array_equal(actual[:, :start], wanted[:, :start])
        assert not np.any(actual[:, start:])
    assert cache.num_slots == S


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(0, S + 3), min_size=B, max_size=B), seed=st.integers(0, 99)
)
def test_tokens_go_to_the_slots_before_each_rows_length(dtype, lengths, seed):
    """Those of negative slots, and past the table, go nowhere: not into other rows' pages."""
    k_BTKC, v_BTKC = _random(3, seed)
    cache = _empty("int8_paged" if dtype == "int8" else "paged")
    cache = jax.jit(paged.write)(cache, k_BTKC, v_BTKC, jnp.asarray(lengths, jnp.int32))
    wanted = np.zeros((2, B, S, K, C), np.float32)
    for b, length in enumerate(lengths):
        for i, slot in enumerate(range(length - 3, length)):
            if 0 <= slot < S:
                wanted[:, b, slot] = k_BTKC[b, i], v_BTKC[b, i]
    if dtype == "int8":
        wanted = np.asarray(quantize.restored(*quantize.quantized(jnp.asarray(wanted))))
    np.testing.assert_array_equal(np.stack(cache.dense()), wanted)


def test_rows_may_share_pages():
    """A prompt that two rows have in common is in the memory once."""
    case = decode_cases.make_case(lengths=[12, 7])
    case.k_BSKC[1, :4], case.v_BSKC[1, :4] = case.k_BSKC[0, :4], case.v_BSKC[0, :4]
    cache = decode_cases.make_cache(case, "paged")
    shared = paged.Paged(
        cache.kv_pages, None, cache.table.at[1, :2].set(cache.table[0, :2]), cache.num_heads
    )
    q_BTKGC = jnp.asarray(case.q_BTKGC, jnp.float32)
    how = {"scale": case.scale, "implementation": "pallas", "sizes": decode_cases.SIZES}
    y_BTKGC = op.attention(q_BTKGC, shared, lengths_B=jnp.asarray(case.lengths_B), **how)
    helpers.assert_close(y_BTKGC, decode_oracle.attention(case))


@pytest.mark.parametrize("layout", decode_cases.LAYOUTS)
def test_a_sharded_cache_is_written_as_a_whole_one(layout):
    k_BTKC, v_BTKC = _random(3)
    wanted = _write(_empty(layout), k_BTKC, v_BTKC, 4).dense()
    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 2), "tp")
    with jax.set_mesh(mesh):
        k, v = (jax.device_put(x, rules.act("__K_")) for x in (k_BTKC, v_BTKC))
        cache = _empty(layout)
        if layout.endswith("contiguous"):
            dtype = cache.kv_B2SW.dtype
            cache = caches.make_contiguous(B, K, S, C, dtype, None, "tensor")
        elif layout.endswith("paged"):
            pages = jax.device_put(cache.kv_pages, rules.act("___K"))
            scales = cache.scales_pages
            if scales is not None:
                scales = jax.device_put(scales, rules.act("__K_"))
            cache = paged.Paged(pages, scales, cache.table, K)
        else:
            cache = caches.make_slots_last(B, K, S, C, "float32", None, "tensor")
        written = _write(cache, k, v, 4)
        for leaf in jax.tree.leaves(written):
            is_table = leaf.dtype == jnp.int32
            assert is_table or "tensor" in jax.typeof(leaf).sharding.spec
        actual = jax.device_get(written.dense())
    for one, other in zip(actual, wanted):
        np.testing.assert_array_equal(one, other)


# Not so small that a unit of it is no normal float32.
_NUMBERS = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0.0 or abs(x) > 1e-30)


@hypothesis.settings(deadline=None)
@hypothesis.given(npst.arrays(np.float32, (3, 5), elements=_NUMBERS))
def test_int8_is_off_by_half_a_unit_at_most(x):
    units, scale = quantize.quantized(jnp.asarray(x))
    assert units.dtype == jnp.int8 and scale.shape == x.shape[:-1]
    error = np.abs(np.asarray(quantize.restored(units, scale), np.float64) - x)
    top = np.max(np.abs(x), axis=-1, keepdims=True)
    assert np.all(error <= top / 254 * (1 + 1e-4))
    negated, _ = quantize.quantized(jnp.asarray(-x))
    np.testing.assert_array_equal(negated, -units)


# --- which layout, and what the kernel takes ------------------------------------------------------

V5E = "TPU v5 lite"


@pytest.mark.parametrize(
    "heads, width, slots, dtype, message",
    [
        (8, 128, 128, "bfloat16", None),
        (2, 64, 128, "bfloat16", None),
        (1, 256, 16, "bfloat16", None),
        (1, 64, 128, "bfloat16", r"\[K, C\] = \[1, 64\]"),
        (4, 96, 128, "bfloat16", r"\[K, C\] = \[4, 96\]"),
        (8, 128, 8, "bfloat16", "multiple of 16 slots, not 8"),
        (8, 128, 8, "float32", None),
        (8, 128, 64, "int8", "multiple of 128 slots, not 64"),
        (8, 128, 256, "int8", None),
    ],
)
def test_the_kernel_says_what_it_does_not_take(heads, width, slots, dtype, message):
    reason = pallas.layout_refusal(heads, width, slots, dtype, V5E)
    assert (reason is None) == (message is None)
    assert message is None or re.search(message, reason)


def test_a_device_without_sizes_is_named():
    assert "'TPU v3'" in pallas.layout_refusal(8, 128, 128, "bfloat16", "TPU v3")


@pytest.mark.parametrize(
    "implementation, kind", [("auto", "slots"), ("chunked", "slots"), ("pallas", "contiguous")]
)
def test_a_cpu_keeps_its_layout_unless_the_kernel_is_asked_for(implementation, kind):
    cache = op.make_cache(
        B,
        K,
        num_slots=S,
        width=C,
        dtype="float32",
        implementation=implementation,
    )
    wanted = caches.SlotsLast if kind == "slots" else caches.Contiguous
    assert isinstance(cache, wanted)
    assert cache.num_slots == (S if kind == "slots" else pallas.SLOTS)


@pytest.mark.parametrize(
    "width, implementation, is_kernel",
    [(64, "auto", True), (96, "auto", False), (64, "chunked", False)],
)
def test_a_tpu_gets_the_layout_of_what_attends(width, implementation, is_kernel, monkeypatch):
    monkeypatch.setattr(op.placement, "device_kind", lambda: V5E)
    how = {"num_slots": 100, "width": width, "dtype": "bfloat16", "implementation": implementation}
    cache = op.make_cache(B, K, **how)
    assert isinstance(cache, caches.Contiguous if is_kernel else caches.SlotsLast)
    q_BTKGC = jnp.zeros((B, 1, K, 1, width))
    assert op._choose(q_BTKGC, cache, V5E, None) == ("pallas" if is_kernel else "single_query")


@pytest.mark.parametrize(
    "bias, implementation", [(biases.Alibi, "pallas"), (biases.Relative, "single_query")]
)
def test_a_tpu_gets_the_layout_of_what_adds_the_bias(bias, implementation, monkeypatch):
    monkeypatch.setattr(op.placement, "device_kind", lambda: V5E)
    cache = op.make_cache(B, K, num_slots=100, width=64, dtype="bfloat16", bias=bias)
    q_BTKGC = jnp.zeros((B, 1, K, 1, 64))
    of_heads = jnp.zeros((K, 1)) if bias is biases.Alibi else jnp.zeros((K, 1, 8))
    assert op._choose(q_BTKGC, cache, V5E, bias(of_heads)) == implementation
    contiguous = caches.make_contiguous(B, K, 128, 64, "bfloat16")
    wanted = "reference" if bias is biases.Relative else "pallas"
    assert op._choose(q_BTKGC, contiguous, V5E, bias(of_heads)) == wanted


def test_int8_without_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 128, 4\) on cpu with implementation 'auto'"):
        op.make_cache(B, K, num_slots=S, width=C, dtype="int8")
