"""A cache whose values are a part of its keys: attention to it equals the oracle, on any mesh, of one read."""

import dataclasses
import logging

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op
from tests import helpers
from tests.kernels import decode_cases
from tests.kernels import decode_oracle

C, NUM_VALUES, S = 6, 4, 12


def _case(**how):
    case = decode_cases.make_case(K=1, G=4, C=C, slots=S, **how)
    return dataclasses.replace(case, v_BSKC=case.k_BSKC[..., :NUM_VALUES])


def _cache(case, junk=1e3, row_axes=None):
    """Returns a cache written in two goes; what no row holds is `junk`."""
    slots = np.arange(S)
    is_row_BS = (slots >= case.starts_B[:, None]) & (slots < case.lengths_B[:, None])
    k_BSC = jnp.asarray(np.where(is_row_BS[..., None], case.k_BSKC[:, :, 0], junk), jnp.float32)
    cache = caches.make_values_in_keys(len(k_BSC), S, C, NUM_VALUES, "float32", row_axes)
    return cache.write(k_BSC[:, :5], 0).write(k_BSC[:, 5:], jnp.int32(5))


def _attend(case, **how):
    numbers = {name: getattr(case, name) for name in ("scale", "window", "softcap")}
    q_BTKGC = jnp.asarray(case.q_BTKGC, jnp.float32)
    arguments = decode_cases.arguments(case)
    return op.attention(q_BTKGC, _cache(case), **arguments, **(numbers | how))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(2, S), min_size=2, max_size=2),
    start=st.integers(0, 3),
    num_queries=st.integers(1, 2),
    window=st.sampled_from([None, 1, 4]),
    softcap=st.sampled_from([None, 0.7]),
)
def test_equals_the_oracle(implementation, lengths, start, num_queries, window, softcap):
    how = {"lengths": lengths, "starts": [start, 0], "window": window, "softcap": softcap}
    case = _case(T=num_queries, **how)
    y_BTKGC = _attend(case, implementation=implementation)
    helpers.assert_close(y_BTKGC, decode_oracle.attention(case))


def test_rows_and_queries_may_lie_on_several_devices():
    case = _case(lengths=[7, 12])
    mesh, rules = helpers.make_mesh((1, 2, 1, 1, 2), "tp")
    spec = jax.sharding.PartitionSpec(rules.act("B")[0], None, None, "tensor", None)
    with jax.set_mesh(mesh):
        cache = _cache(case, row_axes=rules.act("B")[0])
        assert cache.k_BSC.sharding.shard_shape(cache.k_BSC.shape) == (1, S, C)
        q_BTKGC = jax.device_put(jnp.asarray(case.q_BTKGC, jnp.float32), spec)
        lengths_B = jax.device_put(jnp.asarray(case.lengths_B), rules.act("B"))
        attend = jax.jit(lambda q, c, n: op.attention(q, c, lengths_B=n, scale=case.scale))
        y_BTKGC = attend(q_BTKGC, cache, lengths_B)
        # A dimension of one device may have lost its axis.
        assert y_BTKGC.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 5)
        helpers.assert_close(y_BTKGC, decode_oracle.attention(case))


def test_the_log_says_what_attends(caplog):
    op._say.cache_clear()
    with caplog.at_level(logging.INFO):
        _attend(_case(), implementation="auto")
    assert "1 queries to a cache (ValuesInKeys) on cpu: reference" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"implementation": "pallas"}, r"no ValuesInKeys: k \[B,S,C\] = \(2, 12, 6\) of which 4"),
        ({"implementation": "single_query"}, "and ValuesInKeys"),
    ],
)
def test_what_does_not_take_it_says_so(changes, message):
    with pytest.raises(ValueError, match=message):
        _attend(_case(), **changes)


@pytest.mark.parametrize("K, num_values", [(2, 4), (1, 0), (1, 7)])
def test_shapes_that_do_not_fit_are_told(K, num_values):
    cache = caches.ValuesInKeys(jnp.zeros((2, S, C)), num_values)
    lengths_B = jnp.full(2, S, jnp.int32)
    with pytest.raises(ValueError, match=f"of which {num_values} are values, do not fit"):
        op.attention(jnp.zeros((2, 1, K, 3, C)), cache, lengths_B=lengths_B, scale=1.0)
