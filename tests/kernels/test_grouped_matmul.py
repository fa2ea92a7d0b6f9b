"""One suite that every implementation of the grouped matrix product passes, against numpy float64."""

import functools
import logging
import re

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels import placement
from llm_jax.kernels.grouped_matmul import blocks
from llm_jax.kernels.grouped_matmul import op
from tests import helpers

R, D, F = 50, 24, 40
IMPLEMENTATIONS = ["reference", "tiled", "ragged_dot", "pallas"]
# Laps, chunks and pieces end within groups; several passes, of several tiles.
BLOCKS = blocks.Blocks(ring=64, chunk=32, piece=32, rest=16, columns=64, tile=32, depth=48, slots=2)
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}

# Rows of each group, of 50 rows.
CASES = {
    "ragged": (7, 0, 21, 1, 16, 5),
    "equal": (10, 10, 10, 10, 10),
    "tail": (3, 0, 20, 0),
    "empty ends": (0, 0, 33, 17, 0),
    "one group": (50,),
    "no rows": (0, 0, 0),
}


def _arrays(sizes, dtype="float32", shape=(R, D, F), seed=0):
    """Returns x, w, sizes and the result's gradient; rows of no group are no numbers."""
    rng = np.random.default_rng(seed)
    R, D, F = shape
    x_RD, dy_RF = rng.standard_normal((R, D)), rng.standard_normal((R, F))
    x_RD[sum(sizes) :] = np.nan
    dy_RF[sum(sizes) :] = np.inf
    w_EDF = rng.standard_normal((len(sizes), D, F))
    x_RD, w_EDF, dy_RF = (jnp.asarray(array, dtype) for array in (x_RD, w_EDF, dy_RF))
    return x_RD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_RF


def _oracle(x_RD, w_EDF, sizes_E, dy_RF):
    """Returns the product and the gradients of x and w, group by group in float64."""
    x_RD, w_EDF, dy_RF = (np.float64(array) for array in (x_RD, w_EDF, dy_RF))
    y_RF, dx_RD, dw_EDF = np.zeros_like(dy_RF), np.zeros_like(x_RD), np.zeros_like(w_EDF)
    start = 0
    for group, size in enumerate(np.asarray(sizes_E)):
        rows = slice(start, start + size)
        y_RF[rows] = x_RD[rows] @ w_EDF[group]
        dx_RD[rows] = dy_RF[rows] @ w_EDF[group].T
        dw_EDF[group] = x_RD[rows].T @ dy_RF[rows]
        start += size
    return y_RF, dx_RD, dw_EDF


@functools.partial(jax.jit, static_argnums=0)
def _both(implementation, x_RD, w_EDF, sizes_E, dy_RF):
    how = {"implementation": implementation, "blocks": BLOCKS}
    run = functools.partial(op.grouped_matmul, sizes_E=sizes_E, **how)
    y_RF, pull = jax.vjp(run, x_RD, w_EDF)
    return y_RF, *pull(dy_RF)


def _run(implementation, *arrays):
    """Returns the product and both gradients."""
    return jax.device_get(_both(implementation, *arrays))


def _assert_close(actual, wanted, dtype):
    """By the largest value of each; gradients twice the tolerance of the product."""
    for index, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        assert one.dtype == dtype
        error = np.abs(np.float64(one) - other).max()
        assert error <= TOLERANCES[dtype] * (1 + (index > 0)) * np.abs(other).max(), index


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients_equal_the_oracle(name, implementation, dtype):
    arrays = _arrays(CASES[name], dtype)
    _assert_close(_run(implementation, *arrays), _oracle(*arrays), dtype)


def test_the_cases_have_rows_of_no_group_and_groups_of_no_rows():
    assert any(sum(sizes) < R for sizes in CASES.values())
    assert any(0 in sizes and sum(sizes) == R for sizes in CASES.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=st.data())
def test_any_sizes(implementation, data):
    """In few shapes: each is compiled anew."""
    shape = data.draw(st.sampled_from([(1, 1, 3), (33, 7, 1), (150, 5, 9)]))
    cuts = st.lists(st.integers(0, shape[0]), min_size=4, max_size=4)
    sizes = tuple(int(size) for size in np.diff([0, *sorted(data.draw(cuts))]))
    arrays = _arrays(sizes, shape=shape, seed=data.draw(st.integers(0, 9)))
    _assert_close(_run(implementation, *arrays), _oracle(*arrays), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_float32(implementation):
    """In bfloat16 a sum of ones ends at 256."""
    x_RD, w_EDF, sizes_E, dy_RF = (
        jnp.ones(shape, jnp.bfloat16) for shape in ((1024, 1024), (1, 1024, 8), (1,), (1024, 8))
    )
    sizes_E = (1024 * sizes_E).astype(jnp.int32)
    y_RF, _, dw_EDF = _run(implementation, x_RD, w_EDF, sizes_E, dy_RF)
    assert (y_RF == 1024).all() and (dw_EDF == 1024).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_is_no_number_is_so_for_its_own_group_alone(implementation):
    sizes = CASES["ragged"]
    x_RD, w_EDF, sizes_E, dy_RF = _arrays(sizes)
    x_RD, dy_RF = x_RD.at[10].set(np.nan), dy_RF.at[30].set(np.inf)  # of groups 2 and 4
    y_RF, dx_RD, dw_EDF = _run(implementation, x_RD, w_EDF, sizes_E, dy_RF)
    assert np.isnan(y_RF[10]).all() and np.isfinite(np.delete(y_RF, 10, 0)).all()
    assert not np.isfinite(dx_RD[30]).any() and np.isfinite(np.delete(dx_RD, 30, 0)).all()
    assert np.isfinite(dw_EDF).all((1, 2)).tolist() == [True, True, False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_copies_do_not_race(dtype):
    """With a simulated device whose memory starts as NaN and whose copies end as late as they may."""
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    arrays = _arrays((70, 0, 30, 1, 60, 20), dtype, shape=(250, D, F))
    with pltpu.force_tpu_interpret_mode(strict):
        _assert_close(_run("pallas", *arrays), _oracle(*arrays), dtype)


def test_more_rows_than_there_are_are_not_read():
    """Sizes are data: what they add up to cannot be refused, and must not lead out of the arrays."""
    arrays = _arrays((20, 20, 10))
    too_many = (*arrays[:2], jnp.asarray((20, 20, 500), jnp.int32), arrays[3])
    _assert_close(_run("pallas", *too_many), _oracle(*arrays), "float32")


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("depth, width", [(2048, 1024), (1408, 2048), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("num_rows", [128, 1280, 32768])
def test_sizes_fit_in_vmem(device_kind, dtype, size, depth, width, num_rows):
    chip, how = blocks.device(device_kind), (device_kind, num_rows, depth, width, dtype)
    for is_transposed in (False, True):
        one = blocks.for_product(*how, is_transposed=is_transposed)
        rows, matrices = one.ring * (depth + one.columns), one.slots * depth * one.columns
        sums = 4 * one.piece * one.tile
        assert size * (rows + matrices) + sums <= chip.vmem_limit
    one = blocks.for_gradient(*how)
    assert size * (one.ring + one.piece) * (one.depth + one.columns) <= chip.vmem_limit
    matrices = (4 + size * one.slots) * one.depth * one.columns
    assert size * one.ring * (one.depth + one.columns) + matrices <= chip.vmem_limit
    assert num_rows % one.chunk == 0
    passes = -(-depth // one.depth) * -(-width // one.columns)
    assert passes % chip.cores == 0


def test_sizes_of_unknown_devices_and_too_wide_rows_are_refused():
    with pytest.raises(ValueError, match="no sizes for 'TPU7x', only for cpu, TPU v5 lite"):
        blocks.device("TPU7x")
    with pytest.raises(ValueError, match="rows of width 1048576 on 'TPU v5'; use 'ragged_dot'"):
        blocks.for_product("TPU v5", 8192, 1 << 20, 128, "bfloat16", is_transposed=False)
    with pytest.raises(ValueError, match="tile must divide columns"):
        blocks.Blocks(ring=64, chunk=32, piece=32, rest=16, columns=64, tile=48)
    with pytest.raises(ValueError, match="rest must be chunk at most"):
        blocks.Blocks(ring=64, chunk=32, piece=64, rest=64, columns=64, tile=64)


# --- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_of_shard_map_each_device_has_rows_and_groups_of_its_own(
    implementation, is_shared, check_vma
):
    """With matrices that all devices share, their gradient is the sum over devices."""
    cases = [(7, 0, 21), (20, 10, 20), (0, 3, 1), (0, 0, 50)]
    parts = [_arrays(sizes, seed=seed) for seed, sizes in enumerate(cases)]
    if is_shared:
        parts = [(part[0], parts[0][1], *part[2:]) for part in parts]
    wanted = [_oracle(*part) for part in parts]
    mesh, _ = helpers.make_mesh((1, 1, 1, 4, 1))
    cut = jax.P("expert")
    specs = (cut, jax.P() if is_shared else cut, cut)
    x_RD, w_EDF, sizes_E, dy_RF = (jnp.concatenate(arrays) for arrays in zip(*parts))
    arrays = (x_RD, parts[0][1] if is_shared else w_EDF, sizes_E)
    product = jax.shard_map(
        functools.partial(op.grouped_matmul, implementation=implementation, blocks=BLOCKS),
        in_specs=specs,
        out_specs=cut,
        check_vma=check_vma,
    )

    def both(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(lambda *floats: product(*floats, sizes_E), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, spec))
            for array, spec in zip((*arrays, dy_RF), (*specs, cut))
        ]
        actual = jax.device_get(jax.jit(both)(*placed))
    y_RF, dx_RD = (np.concatenate(results) for results in list(zip(*wanted))[:2])
    dw = [one[2] for one in wanted]
    _assert_close(actual, (y_RF, dx_RD, sum(dw) if is_shared else np.concatenate(dw)), "float32")


# --- what is refused, what is chosen ------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x_RD": jnp.zeros((R, D, 1))}, ValueError, r"x [R,D] = (50, 24, 1), w [E,D,F]"),
        (
            {"x_RD": jnp.zeros((R, D + 1))},
            ValueError,
            "x [R,D] = (50, 25), w [E,D,F] = (3, 24, 40)",
        ),
        ({"x_RD": jnp.zeros((0, D))}, ValueError, "use 1 or more of each dimension"),
        ({"w_EDF": jnp.zeros((D, F))}, ValueError, "w [E,D,F] = (24, 40)"),
        ({"sizes_E": jnp.zeros(4, jnp.int32)}, ValueError, "sizes [E] = (4,)"),
        ({"sizes_E": jnp.zeros((3, 1), jnp.int32)}, ValueError, "sizes [E] = (3, 1)"),
        ({"sizes_E": jnp.zeros(3)}, TypeError, "sizes of float32: use int32"),
        (
            {"w_EDF": jnp.zeros((3, D, F), jnp.bfloat16)},
            TypeError,
            "x float32[50, 24] by w bfloat16[3, 24, 40]: use bfloat16 or float32 for both",
        ),
        ({"x_RD": jnp.zeros((R, D), jnp.float16)}, TypeError, "x float16[50, 24]"),
        ({"implementation": "fused"}, ValueError, "'fused' is none of auto, reference, tiled"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    arguments = dict(zip(("x_RD", "w_EDF", "sizes_E"), _arrays((7, 0, 21))))
    with pytest.raises(error, match=re.escape(message)):
        op.grouped_matmul(**arguments | changes)


@pytest.mark.parametrize(
    "device_kind, wanted",
    [("cpu", "tiled"), ("TPU v5 lite", "pallas"), ("TPU7x", "ragged_dot"), ("gpu", "ragged_dot")],
)
def test_auto_goes_by_the_device(device_kind, wanted, caplog, monkeypatch):
    monkeypatch.setattr(placement, "device_kind", lambda: device_kind)
    op._say.cache_clear()
    x_RD, w_EDF, sizes_E, _ = _arrays((7, 0, 21))
    with caplog.at_level(logging.INFO, logger=op.__name__):
        for _ in range(2):
            jax.eval_shape(lambda *arrays: op.grouped_matmul(*arrays), x_RD, w_EDF, sizes_E)
    message = f"grouped matmul of [50, 24] by [3, 24, 40]: {wanted}"
    assert [record.message for record in caplog.records] == [message]


# --- TPUs -----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is optional")
@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(slice_name):
    """Inside of a checked `shard_map`, in shapes that are multiples of blocks and others."""
    shapes = [(4096, 512, 384, 8), (1000, 200, 300, 5)]
    cases = [
        kernel_cost.Case(
            "tests.kernels.grouped_matmul_programs:lower_gradients",
            slice_name,
            {"shape": shape, "dtype": dtype, "implementation": implementation},
            is_executed=False,
        )
        for shape in shapes
        for dtype, implementation in (
            ("bfloat16", "auto"),
            ("float32", "pallas"),
            ("bfloat16", "ragged_dot"),
        )
    ]
    for case, result in zip(cases, kernel_cost.costs(cases), strict=True):
        assert isinstance(result, kernel_cost.ProgramCost), result
        names = sorted(kernel.name.rstrip(".0123456789") for kernel in result.kernels)
        ours = ["grouped_matmul_gradient", "grouped_matmul_product", "grouped_matmul_product"]
        assert (names == ours) == (case.arguments["implementation"] != "ragged_dot"), names
