"""Cases of attention to a cache, and caches of every layout that hold their keys and values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op
from llm_jax.kernels.decode_attention import paged
from llm_jax.kernels.decode_attention import pallas
from llm_jax.kernels.decode_attention import quantize
from llm_jax.kernels.flash_attention import biases
from tests.kernels import decode_oracle

LAYOUTS = ("slots_last", "contiguous", "paged", "int8_contiguous", "int8_paged")
# So small that a dozen slots are several blocks of several pages.
SIZES = pallas.Sizes(block=4, page=2, ring=3, lag=1, lanes=8)
PAGE = 2


def make_case(
    *, B=2, T=1, K=2, G=3, C=4, lengths=None, starts=None, slots=12, seed=0, **how
) -> decode_oracle.Case:
    """Returns a random case; `alibi`, `table` and `sinks` as Booleans."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.asarray(np.float32(rng.standard_normal(shape)), np.float64)

    heads = {
        "slopes_KG": np.abs(normal(K, G)),
        "sinks_KG": normal(K, G),
        "table_KGU": normal(K, G, 6),
    }
    wanted = {
        "slopes_KG": how.pop("alibi", False),
        "sinks_KG": how.pop("sinks", False),
        "table_KGU": how.pop("table", False),
    }
    return decode_oracle.Case(
        normal(B, T, K, G, C),
        normal(B, slots, K, C),
        normal(B, slots, K, C),
        np.asarray([slots] * B if lengths is None else lengths, np.int32),
        np.asarray([0] * B if starts is None else starts, np.int32),
        **{name: array for name, array in heads.items() if wanted[name]},
        **how,
    )


def rounded(case: decode_oracle.Case) -> decode_oracle.Case:
    """Returns the case with the keys and values that int8 keeps."""

    def kept(x):
        return np.asarray(quantize.restored(*quantize.quantized(jnp.asarray(x))), np.float64)

    return dataclasses.replace(case, k_BSKC=kept(case.k_BSKC), v_BSKC=kept(case.v_BSKC))


def make_cache(case: decode_oracle.Case, layout: str, dtype="float32", junk=1e3) -> op.Cache:
    """Returns a cache of the case's rows; whatever they do not hold is `junk`."""
    B, S, K, C = case.k_BSKC.shape
    slots = np.arange(S)
    is_row_BS = (slots >= case.starts_B[:, None]) & (slots < case.lengths_B[:, None])
    k, v = (
        jnp.asarray(np.where(is_row_BS[..., None, None], x, junk), dtype)
        for x in (case.k_BSKC, case.v_BSKC)
    )
    if layout == "slots_last":
        return caches.SlotsLast(jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2))
    kind = "int8" if layout.startswith("int8") else dtype
    kv_B2SW, scales_B2KS = caches.packed(k, v, jnp.dtype(kind))
    if layout.endswith("contiguous"):
        return caches.Contiguous(kv_B2SW, scales_B2KS, K)
    # Pages in any order; what is after a row's last page in its table is not to be looked at.
    num = S // PAGE
    table = np.random.default_rng(1).permutation(B * num + 3)[: B * num].reshape(B, num)
    kv_pages = np.full((B * num + 3, 2, PAGE, K * C), 77 if kind == "int8" else junk)
    kv_pages[table] = np.moveaxis(np.asarray(kv_B2SW).reshape(B, 2, num, PAGE, K * C), 2, 1)
    scales_pages = None
    if scales_B2KS is not None:
        scales_pages = np.full((B * num + 3, 2, K, PAGE), junk, np.float32)
        cut = np.asarray(scales_B2KS).reshape(B, 2, K, num, PAGE)
        scales_pages[table] = np.moveaxis(cut, 3, 1)
        scales_pages = jnp.asarray(scales_pages)
    is_used = np.arange(num) * PAGE < case.lengths_B[:, None]
    table = np.where(is_used, table, 10**6)
    return paged.Paged(jnp.asarray(kv_pages, kind), scales_pages, jnp.asarray(table, jnp.int32), K)


def arguments(case: decode_oracle.Case) -> dict:
    """Returns the arrays that `op.attention` takes beside queries and cache, by name."""

    def array(x):
        return None if x is None else jnp.asarray(x, jnp.float32)

    bias = None
    if case.slopes_KG is not None:
        bias = biases.Alibi(array(case.slopes_KG))
    if case.table_KGU is not None:
        table_KGU = array(case.table_KGU)
        bias = biases.Relative(table_KGU, case.max_distance, case.is_bidirectional)
    return {
        "lengths_B": jnp.asarray(case.lengths_B),
        "starts_B": jnp.asarray(case.starts_B),
        "bias": bias,
        "sinks_KG": array(case.sinks_KG),
    }


@functools.partial(
    jax.jit,
    static_argnames=("implementation", "scale", "window", "softcap", "is_causal", "sizes"),
)
def run(q_BTKGC, cache, arrays, **how):
    """Runs the operation; compiled once for all lengths, starts and tables."""
    return op.attention(q_BTKGC, cache, **arrays, **how)


def attend(case: decode_oracle.Case, layout, implementation, dtype="float32", junk=1e3, **how):
    """Returns the operation's result, float64."""
    cache = make_cache(case, layout, dtype, junk)
    numbers = {name: getattr(case, name) for name in ("scale", "window", "softcap", "is_causal")}
    how = {"sizes": SIZES} | numbers | how
    q_BTKGC = jnp.asarray(case.q_BTKGC, dtype)
    y_BTKGC = run(q_BTKGC, cache, arguments(case), implementation=implementation, **how)
    return np.asarray(y_BTKGC, np.float64)
