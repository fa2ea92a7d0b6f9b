"""One suite that every implementation of attention passes, against numpy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import backward_plan
from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import reference
from tests import helpers
from tests.kernels import attention_oracle

B, T, S, K, G, C = 2, 11, 11, 2, 3, 4
IMPLEMENTATIONS = ["reference", "chunked", "jax_nn", "pallas"]
# So small that 11 queries and keys are several blocks, of several tiles and chunks, all ragged.
BLOCKS = blocks_lib.Blocks(
    forward_visits.Blocks(q=8, kv=4, tile=4, chunk=2, lead=2, lag=1),
    backward_visits.Blocks(8, 8, 4, 4, 2, 2, 2, 2),
)


def _segments(num_queries=T):
    k_ids_BS = np.ones((B, S), np.int32)
    k_ids_BS[0, 4:] = 2
    k_ids_BS[1, 9:] = 0
    return masks.Segments(k_ids_BS[:, -num_queries:], k_ids_BS)


def _normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


_ALIBI = biases.Alibi(np.asarray([[0.5, 0.25, 0.125], [1.0, 2.0, 0.0]]))
_RELATIVE = biases.Relative(_normal(K, G, 8), max_distance=6)
_ONE_WAY = biases.Relative(_normal(K, G, 6), max_distance=9, is_bidirectional=False)

# What a case changes; sizes are those of the arrays.
CASES = {
    "causal": {},
    "full": {"mask": masks.full()},
    "window": {"mask": masks.local_window(left=2, right=0)},
    "two_sided_window": {"mask": masks.local_window(left=2, right=3)},
    "prefix": {"mask": masks.causal() | masks.KeysBelow(np.asarray([3, 7], np.int32))},
    "lengths": {
        "mask": masks.KeysBelow(np.asarray([5, 11], np.int32))
        & masks.QueriesBelow(np.asarray([11, 4], np.int32))
    },
    "packed": {"mask": masks.causal() & _segments()},
    "not": {"mask": ~masks.local_window(left=1, right=1)},
    "softcap": {"softcap": 0.7},
    "alibi": {"bias": _ALIBI},
    "full_alibi": {"mask": masks.full(), "bias": _ALIBI},
    "t5": {"mask": masks.full(), "bias": _RELATIVE},
    "one_way_t5": {"bias": _ONE_WAY},
    "array": {"bias": biases.Full(_normal(B, K, G, T, S))},
    "shared_array": {"mask": masks.full(), "bias": biases.Full(_normal(1, K, 1, T, S))},
    "sinks": {"sinks_KG": _normal(K, G)},
    "dropout": {"dropout": 0.4},
    "everything": {
        "mask": masks.local_window(left=4, right=0) & _segments(),
        "softcap": 0.7,
        "bias": _ALIBI,
        "sinks_KG": _normal(K, G),
        "dropout": 0.2,
    },
    "everything_t5": {
        "mask": masks.local_window(left=7, right=2) & _segments(),
        "softcap": 0.7,
        "bias": _RELATIVE,
        "sinks_KG": _normal(K, G),
        "dropout": 0.2,
    },
    "everything_array": {
        "mask": masks.full() & _segments(),
        "softcap": 0.7,
        "bias": biases.Full(_normal(B, 1, G, T, S)),
        "sinks_KG": _normal(K, G),
        "dropout": 0.2,
    },
    "cross": {"mask": masks.full(), "num_queries": 5},
    "wide_values": {"value_width": 7},
    "offset": {"q_offset": 7, "num_queries": 4, "bias": _ALIBI},
    "offset_t5": {"q_offset": 7, "num_queries": 4, "bias": _RELATIVE, "mask": masks.full()},
    "offset_one_way_t5": {"q_offset": 6, "num_queries": 5, "bias": _ONE_WAY},
    "offset_array": {"q_offset": 7, "num_queries": 4, "bias": biases.Full(_normal(1, 1, 1, 4, S))},
    "offset_packed": {"mask": masks.causal() & _segments(4), "q_offset": 7, "num_queries": 4},
    "offset_everything": {
        "mask": masks.local_window(left=4, right=0) & _segments(4),
        "q_offset": 7,
        "num_queries": 4,
        "softcap": 0.7,
        "bias": _ALIBI,
        "sinks_KG": _normal(K, G),
        "dropout": 0.2,
    },
}


# What an implementation does not take; a test holds it to saying so.
REFUSED = {
    "reference": (),
    "chunked": (),
    "jax_nn": tuple(
        name
        for name, changes in CASES.items()
        if changes.keys() & {"softcap", "sinks_KG", "dropout", "value_width"}
    ),
    "pallas": (),
}


def _case(changes, num_queries=T, value_width=C, dropout=None):
    """Returns the oracle's case and the operation's arguments, both of the same numbers."""
    changes = {"mask": masks.causal()} | changes
    q, k = _normal(B, num_queries, K, G, C), _normal(B, S, K, C)
    v = _normal(B, S, K, value_width)
    factors, extra = None, {}
    if dropout is not None:
        extra["dropout"] = dropout_lib.Dropout(jnp.uint32(7), dropout)
        shape = (B, K, G, num_queries, S)
        factors = np.asarray(
            reference.dropout_factors(extra["dropout"], shape, np.arange(num_queries), np.arange(S))
        )
    case = attention_oracle.Case(q=q, k=k, v=v, factors_BKGTS=factors, **changes)
    # Numbers of float32, so that the oracle sees what the operation does.
    rounded = {
        name: jax.tree.map(lambda x: np.asarray(np.float32(x), np.float64), value)
        for name, value in attention_oracle.parameters(case).items()
    }
    return dataclasses.replace(case, **rounded), extra


def named(name):
    """Returns a case of `CASES`."""
    changes = dict(CASES[name])
    sizes = {
        key: changes.pop(key) for key in ("num_queries", "value_width", "dropout") if key in changes
    }
    return _case(changes, **sizes)


def attend(case, extra, implementation, dtype="float32", blocks=BLOCKS):
    """Returns the operation as a function of the case's parameters; chunks do not divide 11."""
    how = {"mask": jax.tree.map(jnp.asarray, case.mask), "scale": case.scale}
    how |= {"q_offset": case.q_offset, "softcap": case.softcap, "blocks": blocks} | extra

    def run(parameters):
        rest = {name: x for name, x in parameters.items() if name not in ("q", "k", "v")}
        q, k, v = (parameters[name].astype(dtype) for name in ("q", "k", "v"))
        return op.attention(q, k, v, implementation=implementation, chunk=4, **how, **rest)

    return run


def parameters_of(case):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), attention_oracle.parameters(case))


def pairs(*names):
    """Returns names of cases, all by default, each with every implementation that takes it."""
    return [
        (name, implementation)
        for name in names or CASES
        for implementation in IMPLEMENTATIONS
        if name not in REFUSED[implementation]
    ]


PAIRS = pairs()


def mostly_long(cases, *kept):
    """Marks kernels that take tens of seconds in interpret mode as `long`, but for the cases of these names."""
    return [
        pytest.param(
            *case, marks=[pytest.mark.long] if case[1] == "pallas" and case[0] not in kept else []
        )
        for case in cases
    ]


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_attention_equals_the_oracle(name, implementation):
    case, extra = named(name)
    y = jax.jit(attend(case, extra, implementation))(parameters_of(case))
    helpers.assert_close(y, attention_oracle.attention(case))


@pytest.mark.parametrize(
    "name, implementation",
    mostly_long(PAIRS, "causal", "packed", "softcap", "window", "sinks", "t5", "offset", "dropout"),
)
def test_every_gradient_equals_the_oracles_slope(name, implementation):
    case, extra = named(name)
    rng = np.random.default_rng(1)
    probe = rng.standard_normal((*case.q.shape[:-1], case.v.shape[-1]))
    run = attend(case, extra, implementation)
    parameters = parameters_of(case)
    gradient = jax.jit(jax.grad(lambda p: jnp.vdot(run(p), probe)))(parameters)
    for argument, value in attention_oracle.parameters(case).items():
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), value)
        products = jax.tree.map(np.vdot, gradient[argument], direction)
        slope = sum(jax.tree.leaves(products))
        wanted = attention_oracle.slope(case, argument, direction, probe)
        assert slope == pytest.approx(wanted, rel=2e-5, abs=2e-5), argument


@pytest.mark.parametrize("name, implementation", [p for p in PAIRS if p[1] != "reference"])
def test_gradients_equal_those_of_the_reference(name, implementation):
    case, extra = named(name)
    parameters = parameters_of(case)
    shape = (*case.q.shape[:-1], case.v.shape[-1])
    probe = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)

    def gradients(implementation):
        run = attend(case, extra, implementation)
        return jax.jit(jax.grad(lambda p: jnp.vdot(run(p), probe)))(parameters)

    helpers.assert_close(gradients(implementation), gradients("reference"), 2e-5)


# Sizes along replica, data, seq, expert, tensor.
_ROWS_AND_HEADS, _QUERIES_AND_HEADS = (1, 2, 1, 1, 2), (1, 1, 2, 1, 2)
_GROUPS = (1, 1, 1, 1, 3)
_PLAINER = ("packed", "prefix", "sinks", "causal")


@pytest.mark.parametrize(
    "name, implementation, sizes",
    mostly_long(
        [
            (*pair, _ROWS_AND_HEADS)
            for pair in pairs(*(f"everything{x}" for x in ("", "_t5", "_array")), *_PLAINER)
        ]
        + [
            (*pair, _QUERIES_AND_HEADS)
            for pair in pairs("offset_t5", "offset_array", "offset_packed", "offset_everything")
        ],
        "offset_packed",
    )
    + mostly_long(
        [
            ("offset_everything", implementation, _GROUPS)
            for implementation in ("reference", "chunked", "pallas")
        ]
    ),
)
def test_arrays_may_lie_on_several_devices(name, implementation, sizes):
    case, extra = named(name)
    probe = np.random.default_rng(1).standard_normal((*case.q.shape[:-1], C)).astype(np.float32)
    run = attend(case, extra, implementation)
    gradient = jax.grad(lambda p, probe: jnp.sum(run(p) * probe))
    parameters = parameters_of(case)
    wanted = jax.device_get((jax.jit(run)(parameters), jax.jit(gradient)(parameters, probe)))
    # Three devices do not divide two key heads, but the three queries of each.
    kv_heads = "sharded" if K % sizes[-1] == 0 else "replicated"
    mesh, rules = helpers.make_mesh(sizes, "fsdp_tp", kv_heads=kv_heads)

    def put(letters, array):
        sharding = jax.sharding.NamedSharding(mesh, rules.act(letters))
        return jax.device_put(array, sharding)

    letters = {"q": "BTKGC", "k": "BSKC", "v": "BSKC"}
    placed = {key: put(letters[key], parameters[key]) for key in letters}
    # Slopes and sinks as a model has them: everywhere whole.
    placed |= jax.device_put(
        {key: parameters[key] for key in parameters.keys() - letters.keys()},
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    with jax.set_mesh(mesh):
        # The other implementations are cut up by the compiler, whatever their masks.
        actual = jax.jit(run)(placed), jax.jit(gradient)(placed, put("BTKGC", probe))
    helpers.assert_close(actual[0], wanted[0])
    helpers.assert_close(jax.tree.leaves(actual[1]), jax.tree.leaves(wanted[1]), 2e-5)


@pytest.mark.parametrize("name, implementation", pairs("everything", "packed"))
def test_bfloat16_stays_bfloat16(name, implementation):
    case, extra = named(name)
    y = jax.jit(attend(case, extra, implementation, "bfloat16"))(parameters_of(case))
    assert y.dtype == jnp.bfloat16
    rounded = {
        name: np.asarray(jnp.asarray(getattr(case, name), jnp.bfloat16), np.float64)
        for name in ("q", "k", "v")
    }
    wanted = attention_oracle.attention(dataclasses.replace(case, **rounded))
    helpers.assert_close(y.astype(jnp.float32), wanted, 2e-2)


@pytest.mark.parametrize(
    "name, implementation",
    mostly_long(pairs(*(name for name in CASES if name.startswith("offset"))), "offset_packed"),
)
def test_an_offset_may_be_traced(name, implementation):
    case, extra = named(name)
    parameters = parameters_of(case)

    def loss(parameters, offset):
        run = attend(dataclasses.replace(case, q_offset=offset), extra, implementation)
        y = run(parameters)
        return jnp.sum(y**2), y

    gradient = jax.grad(loss, has_aux=True)
    traced, y = jax.jit(gradient)(parameters, jnp.asarray(case.q_offset))
    helpers.assert_close(y, attention_oracle.attention(case))
    known, _ = gradient(parameters, case.q_offset)
    helpers.assert_close(traced, known, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    case, extra = named("causal")
    case = dataclasses.replace(case, q=case.q * 1e6)
    run = jax.jit(jax.value_and_grad(lambda p: attend(case, extra, implementation)(p).sum()))
    y, grads = run(parameters_of(case))
    assert np.isfinite(y) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    actual = attend(case, extra, implementation)(parameters_of(case))
    helpers.assert_close(actual, attention_oracle.attention(case))


@pytest.mark.parametrize("name, implementation", mostly_long(pairs("causal", "sinks"), "causal"))
def test_a_query_without_a_key_gets_zeros_and_no_gradient(name, implementation):
    lonely = np.ones((B, T), np.int32)
    lonely[:, 5] = 9  # a segment that no key has
    changes = {"mask": masks.Segments(lonely, np.ones((B, S), np.int32))}
    if name == "sinks":
        changes["sinks_KG"] = _normal(K, G)
    case, extra = _case(changes)
    run = jax.jit(attend(case, extra, implementation))
    parameters = parameters_of(case)
    y = np.asarray(run(parameters))
    np.testing.assert_array_equal(y[:, 5], 0.0)
    assert np.abs(y[:, 4]).min() > 0
    grads = jax.grad(lambda p: jnp.sum(run(p) ** 2))(parameters)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads["q"][:, 5], 0.0)


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
    case, _ = named("causal")
    q, k, v = change(*(jnp.asarray(x) for x in (case.q, case.k, case.v)))
    with pytest.raises(ValueError) as error:
        op.attention(q, k, v, mask=case.mask, scale=1.0, implementation="reference", chunk=4)
    for x in (q, k, v):
        assert str(x.shape) in str(error.value)


@pytest.mark.parametrize(
    "extra, shape",
    [
        ({"sinks_KG": jnp.zeros((G, K))}, (G, K)),
        ({"bias": biases.Alibi(jnp.zeros((K, 1)))}, (K, 1)),
        ({"bias": biases.Relative(jnp.zeros((1, G, 8)))}, (1, G, 8)),
        ({"bias": biases.Full(jnp.zeros((B, K, G, T, 1)))}, (B, K, G, T, 1)),
        ({"bias": biases.Full(jnp.zeros((3, K, G, T, S)))}, (3, K, G, T, S)),
    ],
)
def test_scores_that_do_not_fit_are_named(extra, shape):
    case, _ = named("causal")
    q, k, v = (jnp.asarray(x) for x in (case.q, case.k, case.v))
    how = {"mask": case.mask, "scale": 1.0, "implementation": "reference", "chunk": 4}
    with pytest.raises(ValueError) as error:
        op.attention(q, k, v, **how, **extra)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "packed",
        *(
            pytest.param(x, marks=pytest.mark.long)
            for x in ("causal", "everything", "everything_t5")
        ),
    ],
)
def test_gradients_that_do_not_fit_at_once_are_made_in_two_runs(name):
    """Of the queries and of the keys, each by a run of the kernel."""
    case, extra = named(name)
    parameters = parameters_of(case)
    # A table's tiles may take half; less is refused.
    least = 1
    if isinstance(case.bias, biases.Relative):
        least = 2 * backward_plan.table_bytes(case.bias, BLOCKS.backward)
    backward = dataclasses.replace(BLOCKS.backward, vmem_bytes=least)
    small = dataclasses.replace(BLOCKS, backward=backward)

    def program(sizes):
        run = attend(case, extra, "pallas", blocks=sizes)
        return jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))

    def num_kernels(sizes):
        return str(jax.make_jaxpr(program(sizes))(parameters)).count("flash_attention_backward")

    assert num_kernels(small) == 2 * num_kernels(BLOCKS) > 0
    helpers.assert_close(program(small)(parameters), program(BLOCKS)(parameters), 2e-5)


@pytest.mark.parametrize(
    "name, implementation", [(name, one) for one, names in REFUSED.items() for name in names]
)
def test_what_an_implementation_does_not_take_is_named(name, implementation):
    case, extra = named(name)
    with pytest.raises(
        ValueError, match=f"'{implementation}' .*(soft-cap|sinks|dropout|4 and 7).*; use 'chunked'"
    ):
        attend(case, extra, implementation)(parameters_of(case))


def test_a_table_that_does_not_fit_is_named_and_any_array_fits():
    q = jax.ShapeDtypeStruct((1, 2**15, 1, 1, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2**15, 1, 128), jnp.bfloat16)

    def run(q, k, bias):
        how = {"implementation": "pallas", "chunk": 2**14, "blocks": blocks_lib.Blocks()}
        return op.attention(q, k, k, mask=masks.causal(), scale=1.0, bias=bias, **how)

    wide = biases.Relative(jax.ShapeDtypeStruct((1, 1, 8), jnp.float32), 2**14)
    with pytest.raises(ValueError, match="distances to 16384 need.*; use 'chunked'"):
        jax.eval_shape(run, q, k, wide)
    array = biases.Full(jax.ShapeDtypeStruct((1, 1, 1, 2**15, 2**15), jnp.bfloat16))
    assert jax.eval_shape(run, q, k, array).shape == q.shape


def test_unknown_implementation_is_named():
    case, extra = named("causal")
    with pytest.raises(ValueError, match="'flash'"):
        attend(case, extra, "flash")(parameters_of(case))
