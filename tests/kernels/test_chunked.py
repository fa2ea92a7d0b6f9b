"""Attention by chunks of queries: what it holds, and what it leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op


def test_chunks_never_hold_all_scores():
    """Neither as one array, nor in what the forward pass keeps for the backward pass."""
    length, heads = 64, 8
    rng = np.random.default_rng(0)
    shapes = (1, length, 1, heads, 2), (1, length, 1, 2), (1, length, 1, 2)
    qkv = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def sizes(implementation):
        run = functools.partial(
            op.attention, mask=masks.causal(), scale=1.0, implementation=implementation, chunk=8
        )
        gradient = jax.grad(lambda *qkv: run(*qkv).sum(), (0, 1, 2))
        largest = max(_sizes(jax.make_jaxpr(gradient)(*qkv).jaxpr))
        kept = jax.eval_shape(lambda *qkv: jax.vjp(run, *qkv)[1], *qkv)
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


def test_chunks_leave_out_keys_that_a_window_hides():
    q = jnp.ones((1, 1024, 1, 1, 2))
    k = jnp.ones((1, 1024, 1, 2))

    def largest(mask):
        run = functools.partial(op.attention, mask=mask, scale=1.0, implementation="chunked")
        return max(_sizes(jax.make_jaxpr(functools.partial(run, chunk=128))(q, k, k).jaxpr))

    assert largest(masks.local_window(left=100, right=0)) == 128 * 256
    assert largest(masks.causal()) == 128 * 1024
