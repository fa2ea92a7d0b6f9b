"""Fingerprints and nested dicts: what a checkpoint is checked and read back by."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import train_step
from llm_jax import trees
from tests import helpers


def _bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def _fingerprint(array) -> int:
    return trees.fingerprints({"x": jnp.asarray(array)})["x"]


# Few mantissa bits and distances of many powers of two: what weights that are not random look like.
plain_values = st.integers(-8, 8).map(lambda n: n / 4)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.sampled_from(["float32", "bfloat16", "int32"]), st.data())
def test_fingerprints_show_a_flipped_bit(dtype, data):
    array = np.arange(600).astype(jnp.dtype(dtype))
    words = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize]).copy()
    place = data.draw(st.integers(0, 599))
    words[place] ^= words.dtype.type(1 << data.draw(st.integers(0, 8 * array.itemsize - 1)))
    assert _fingerprint(words.view(array.dtype)) != _fingerprint(array)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.integers(0, 1023), st.integers(0, 1023), plain_values, plain_values)
@hypothesis.example(0, 256, 1.0, 2.0)
@hypothesis.example(0, 512, 1.0, 1.5)
@hypothesis.example(3, 4, 1.0, -1.0)
def test_fingerprints_show_an_exchange_of_two_elements(first, second, one, other):
    hypothesis.assume(first != second and one != other)
    array = np.zeros(1024, np.float32)
    array[first], array[second] = one, other
    exchanged = array.copy()
    exchanged[first], exchanged[second] = other, one
    assert _fingerprint(exchanged) != _fingerprint(array)


def test_fingerprints_show_exchanged_rows_and_signs_of_zero():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert _fingerprint(array[[1, 0, 2]]) != _fingerprint(array)
    assert _fingerprint(np.zeros(3, np.float32)) != _fingerprint(-np.zeros(3, np.float32))


def test_fingerprints_of_pieces_sum_to_that_of_the_whole(monkeypatch):
    """Checkpoints of before there were pieces stay valid."""
    rng = np.random.default_rng(0)
    shapes = [(7, 3, 5), (50, 4), (13,), (6, 1, 40)]
    mesh, rules = helpers.make_mesh((1, 2, 1, 1, 4), rules="fsdp_tp")
    arrays = {str(shape): jnp.asarray(rng.standard_normal(shape)) for shape in shapes}
    arrays["bfloat16"] = jnp.asarray(rng.standard_normal((9, 8)), jnp.bfloat16)
    for dims, shape in {"VD": (8, 10), "LDF": (5, 4, 8)}.items():
        target = jax.sharding.NamedSharding(mesh, rules.param(dims))
        arrays[dims] = jax.device_put(rng.standard_normal(shape).astype(np.float32), target)
    whole = trees.fingerprints(arrays)
    monkeypatch.setattr(trees, "_PIECE_ELEMENTS", 8)
    trees._fingerprints.clear_cache()
    assert trees.fingerprints(arrays) == whole
    trees._fingerprints.clear_cache()


@pytest.mark.parametrize("name", ["muon", "soap", "schedule_free"])
def test_names_in_nested_trees_come_back(name):
    config = helpers.tiny_run_config(optim={"name": name, "schedule": "constant"})
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(train_step.init_state, config, rules))()
    for tree in (state.model, state.opt_state):
        nested = trees.to_nested(tree)
        assert len(jax.tree.leaves(nested)) == len(jax.tree.leaves(tree))
        assert _bits(trees.from_nested(tree, nested)) == _bits(tree)
        emptied = jax.tree.map(lambda leaf: leaf * 0, tree)
        assert _bits(trees.from_nested(emptied, nested)) == _bits(tree)
