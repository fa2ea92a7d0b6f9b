"""Attention to a cache equals the reference, whatever its queries may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.decode_attention import op
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import reference
from tests import helpers

B, S, K, G, C = 3, 11, 2, 3, 4
SEGMENTS_BS = jnp.asarray(np.arange(S)[None, :] >= np.asarray([0, 4, S])[:, None], jnp.int32)


def _inputs(dtype, num_queries=1):
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTKGC = jax.random.normal(keys[0], (B, num_queries, K, G, C), dtype)
    k_BSKC = jax.random.normal(keys[1], (B, S, K, C), dtype)
    return q_BTKGC, k_BSKC, jax.random.normal(keys[2], (B, S, K, C), dtype)


def _attend(q_BTKGC, k_BSKC, v_BSKC, **how):
    k_BKCS, v_BKSC = jnp.transpose(k_BSKC, (0, 2, 3, 1)), jnp.swapaxes(v_BSKC, 1, 2)
    return op.attention(q_BTKGC, k_BKCS, v_BKSC, **how)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("offset", [0, 6, S - 3])
@pytest.mark.parametrize(
    "mask, score",
    [
        (masks.causal(), {}),
        (masks.local_window(left=2, right=0), {"softcap": 0.7}),
        (masks.full(), {}),
        (masks.causal(), {"bias": biases.Alibi(jnp.linspace(0.1, 1.0, K * G).reshape(K, G))}),
        (masks.causal(), {"sinks_KG": jnp.linspace(-1.0, 1.0, K * G).reshape(K, G)}),
        (masks.Segments(jnp.ones((B, 3), jnp.int32), SEGMENTS_BS), {}),
    ],
    ids=["causal", "window_softcap", "full", "alibi", "sinks", "segments"],
)
def test_attention_to_a_cache_equals_the_reference(
    mask, score, offset, dtype, tolerance, num_queries
):
    mask = masks.cut(mask, slice(num_queries), slice(None))
    inputs = _inputs(dtype, num_queries)
    how = {"mask": mask, "scale": 0.5, "q_offset": offset} | score
    wanted = np.asarray(reference.attention(*inputs, **how), np.float32)
    actual = np.asarray(_attend(*inputs, **how), np.float32)
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def test_a_query_that_sees_nothing_gets_zeros():
    """The third row's keys are all of another segment."""
    mask = masks.Segments(jnp.ones((B, 1), jnp.int32), SEGMENTS_BS)
    y_BTKGC = _attend(*_inputs("float32"), mask=mask, scale=0.5, q_offset=S - 1)
    assert np.all(np.asarray(y_BTKGC[2]) == 0.0)
    assert np.all(np.any(np.asarray(y_BTKGC[:2]) != 0.0, axis=-1))


@pytest.mark.parametrize("num_queries", [1, 3])
def test_heads_may_lie_on_several_devices(num_queries):
    """Slopes, sinks and lengths are whole everywhere, as a model makes them."""
    q_BTKGC, k_BSKC, v_BSKC = _inputs("float32", num_queries)
    how = {
        "mask": masks.causal() & masks.KeysBelow(jnp.asarray([5, 11, 9])),
        "bias": biases.Alibi(jnp.linspace(0.1, 1.0, K * G).reshape(K, G)),
        "sinks_KG": jnp.linspace(-1.0, 1.0, K * G).reshape(K, G),
    }
    how |= {"scale": 0.5, "q_offset": 6}
    wanted = _attend(q_BTKGC, k_BSKC, v_BSKC, **how)
    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 2), "tp")

    def put(letters, array):
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, rules.act(letters)))

    placed = put("BTKGC", q_BTKGC), put("BSKC", k_BSKC), put("BSKC", v_BSKC)
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda *qkv: _attend(*qkv, **how))(*placed)
    helpers.assert_close(actual, wanted)


def test_a_cache_in_the_layout_of_activations_is_refused():
    q_BTKGC, k_BSKC, v_BSKC = _inputs("float32")
    with pytest.raises(ValueError, match=r"k \[B,K,C,S\] = \(3, 11, 2, 4\)"):
        op.attention(q_BTKGC, k_BSKC, v_BSKC, mask=masks.causal(), scale=1.0, q_offset=0)
