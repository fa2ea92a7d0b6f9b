"""Weights that lie by outputs, and the programs that multiply few rows with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import backend
from llm_jax.kernels import few_rows
from tests import helpers

# Letters have these sizes; equations are those of projections.
SIZES = {"B": 2, "T": 3, "D": 8, "K": 2, "G": 3, "H": 6, "C": 4, "F": 12}
EQUATIONS = ["BTD,DF->BTF", "BTD,DKC->BTKC", "BTHC,HCD->BTD", "BTKGC,KGCD->BTD", "BD,DF->BF"]


def _random(dims, seed, **sizes):
    shape = [(SIZES | sizes)[letter] for letter in dims]
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _weight(equation):
    before, after = equation.split("->")
    dims = before.split(",")[1]
    return _random(dims, 1), sum(letter not in after for letter in dims)


@pytest.mark.parametrize("num_rows", [1, 2], ids=["one_row", "rows"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_is_the_einsum(equation, num_rows, one_device):
    sizes = {"B": num_rows, "T": 1 if num_rows == 1 else 3}
    x = _random(equation.split(",")[0], 0, **sizes)
    weight, num_inputs = _weight(equation)
    turned = few_rows.outputs_first(weight, num_inputs)
    assert turned.shape == weight.shape
    y = few_rows.multiply(equation, x, turned)
    np.testing.assert_allclose(y, jnp.einsum(equation, x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 4), (8, -1, 4), (8, 2, 12)])
def test_dimensions_join_and_split_as_those_of_the_weight_do(shape, one_device):
    weight = _random("DKGC", 1)
    x = _random("BTD", 0)
    turned = few_rows.outputs_first(weight, 1).reshape(shape)
    wanted = weight.reshape(shape)
    assert turned.shape == wanted.shape
    y = few_rows.multiply("BTD,DHC->BTHC", x, turned)
    np.testing.assert_allclose(y, jnp.einsum("BTD,DHC->BTHC", x, wanted), rtol=1e-5, atol=1e-5)


def test_what_a_turned_weight_cannot_do_is_refused(one_device):
    turned = few_rows.outputs_first(_random("DF", 1), 1)
    with pytest.raises(ValueError, match="BTD,FD->BTF: a weight for few rows has inputs first"):
        few_rows.multiply("BTD,FD->BTF", _random("BTD", 0), turned)
    with pytest.raises(TypeError, match="no elements to take"):
        turned[0]


def test_where_few_rows_are_fast():
    """On one CPU, in bfloat16; a mesh of several or of TPUs has other ways."""
    for shape, wanted in (((1, 1, 1, 1, 1), True), ((1, 2, 1, 1, 1), False)):
        mesh, _ = helpers.make_mesh(shape, "tp")
        with jax.set_mesh(mesh):
            wanted = wanted and backend.has_library_flags()
            assert few_rows.are_fast("bfloat16") == few_rows.are_fast(jnp.bfloat16) == wanted
            assert not few_rows.are_fast("float32")


def test_a_call_of_few_rows_is_a_program_of_its_own(one_device, float32_of_few_rows):
    """Compiled with other options, which this XLA knows; it gives the same, and is compiled once."""

    @few_rows.jit(lambda x, y, is_few: is_few, static_argnames="is_few")
    def product(x, y, is_few):
        return x @ y.T + is_few

    x, y = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((32, 64), jnp.bfloat16)
    np.testing.assert_array_equal(product(x, y, True), product(x, y, False) + 1)
    assert product.num_programs() == 2
    product(x, y, True)
    assert product.num_programs() == 2
