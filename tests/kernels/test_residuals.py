"""What a kernel keeps for the backward pass under remat: its result and logsumexp, once each."""

import functools

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.models import stack

B, T, K, G, C = 2, 16, 2, 2, 8


def test_the_result_is_kept_once_and_not_computed_again():
    attend = functools.partial(
        op.attention, mask=masks.causal(), scale=1.0, implementation="pallas", chunk=8
    )
    qkv = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, K, G, C), (B, T, K, C))]
    qkv.append(qkv[1])

    def loss(policy, q, k, v):
        return jnp.sum(jax.checkpoint(attend, policy=stack.REMAT_POLICIES[policy])(q, k, v))

    def kept(policy):
        backward = jax.eval_shape(lambda *x: jax.vjp(functools.partial(loss, policy), *x)[1], *qkv)
        leaves = jax.tree.leaves(backward)
        return sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float32 and leaf.ndim)

    def num_forward(policy):
        gradient = jax.grad(functools.partial(loss, policy))
        return str(jax.make_jaxpr(gradient)(*qkv)).count("name=flash_attention_forward")

    assert kept("attention_output") - kept("full") == B * T * K * G * (C + 1)
    assert (num_forward("attention_output"), num_forward("full")) == (1, 2)
