"""Ring attention is attention: any mask, bias, group and order of devices; and its work is balanced."""

import collections
import dataclasses
import functools
from typing import Any

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import pieces
from llm_jax.kernels.flash_attention import ring
from tests import helpers
from tests.kernels import mask_trees
from tests.kernels import test_attention as suite

B, T, K, G, C = 2, 16, 2, 2, 4
_INT = np.int32
RULES = {"rules": "fsdp_tp", "context": "ring"}


def _normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _segments():
    ids_BT = np.ones((B, T), _INT)
    ids_BT[0, 5:] = 2
    ids_BT[0, 14:] = 3
    ids_BT[1, 9:] = 0
    return masks.Segments(ids_BT, ids_BT)


_ALIBI = biases.Alibi(np.asarray([[0.5, 0.25], [1.0, 0.0]], np.float32))
_T5 = biases.Relative(_normal(K, G, 8), max_distance=6)
_SOME = {"softcap": 0.7, "sinks_KG": _normal(K, G), "dropout": 0.3}

CASES = {
    "causal": {},
    "full": {"mask": masks.full()},
    "window": {"mask": masks.local_window(left=4, right=0)},
    "two_sided_window": {"mask": masks.local_window(left=2, right=5)},
    "prefix": {"mask": masks.causal() | masks.KeysBelow(np.asarray([3, 11], _INT))},
    "lengths": {
        "mask": masks.KeysBelow(np.asarray([5, 16], _INT))
        & masks.QueriesBelow(np.asarray([16, 4], _INT))
    },
    "not": {"mask": ~masks.local_window(left=1, right=1)},
    "packed": {"mask": masks.causal() & _segments()},
    "alibi": {"bias": _ALIBI},
    "t5": {"mask": masks.full(), "bias": _T5},
    "everything": {"mask": masks.local_window(left=9, right=0) & _segments(), "bias": _ALIBI}
    | _SOME,
    "everything_t5": {"mask": masks.causal() & _segments(), "bias": _T5} | _SOME,
}
# By sizes along replica, data, seq, expert, tensor.
_EACH = [(name, "chunked", (1, 1, 4, 1, 1)) for name in CASES]
_EACH += [
    ("everything", "chunked", (1, 2, 2, 1, 2)),
    ("causal", "pallas", (1, 1, 2, 1, 1)),
    # Kernels are dear to interpret.
    *(
        pytest.param(name, "pallas", (1, 1, 4, 1, 1), marks=pytest.mark.long)
        for name in ("window", "prefix", "packed", "t5", "everything_t5")
    ),
    pytest.param("everything", "pallas", (1, 2, 2, 1, 2), marks=pytest.mark.long),
]


def _attend(arguments, implementation, **how):
    changes = dict(arguments)
    mask = changes.pop("mask", masks.causal())
    rate = changes.pop("dropout", None)
    if rate is not None:
        changes["dropout"] = dropout_lib.Dropout(jnp.uint32(7), rate)
    run = functools.partial(
        op.attention,
        mask=jax.tree.map(jnp.asarray, mask),
        scale=0.6,
        implementation=implementation,
        chunk=3,
        blocks=suite.BLOCKS,
        softcap=changes.pop("softcap", None),
        dropout=changes.pop("dropout", None),
        **how,
    )
    names = sorted(changes)
    return names, lambda q, k, v, *others: run(q, k, v, **dict(zip(names, others)))


def _numbers(arguments, length=T):
    shapes = (B, length, K, G, C), (B, length, K, C), (B, length, K, C + 1)
    names = sorted(arguments.keys() & {"bias", "sinks_KG"})
    return [_normal(*shape) for shape in shapes] + [arguments[name] for name in names]


def _order(num_devices, length):
    """Returns the tokens in the order in which devices hold them, by the definition."""
    size = length // (2 * num_devices)
    parts = np.arange(length).reshape(-1, size)
    pairs = [parts[[i, 2 * num_devices - 1 - i]] for i in range(num_devices)]
    return np.concatenate(pairs).reshape(-1)


def _in_ring(arguments, implementation, sizes, probe):
    """Returns result and gradients of a ring, in the order of the text, and the compiled program."""
    mesh, rules = helpers.make_mesh(sizes, **RULES)
    order = _order(sizes[2], probe.shape[1])
    back = np.argsort(order)

    def put(letters, x):
        return jax.device_put(x, NamedSharding(mesh, rules.act(letters)))

    mask = arguments.get("mask", masks.causal())
    mask = masks.map_arrays(lambda dims, x: x if dims == "B" else x[:, order], mask)
    _, run = _attend(arguments | {"mask": mask}, implementation, context="ring")
    arrays = _numbers(arguments, probe.shape[1])
    letters = ("BTKGC", "BSKC", "BSKC")
    placed = [put(of, x[:, order]) for of, x in zip(letters, arrays)]
    placed += jax.device_put(arrays[3:], NamedSharding(mesh, PartitionSpec()))

    def both(probe, *arrays):
        y, pull = jax.vjp(run, *arrays)
        return y, pull(probe)

    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(put("BTKGC", probe[:, order]), *placed).compile()
        y, (dq, dk, dv, *others) = program(put("BTKGC", probe[:, order]), *placed)
    assert dk.sharding.spec[1] == dv.sharding.spec[1] == "seq"
    found = jax.device_get((y, dq, dk, dv))
    return [x[:, back] for x in found] + jax.tree.leaves(jax.device_get(others)), program


def _by_reference(arguments, probe):
    _, run = _attend(arguments, "reference")
    y, pull = jax.vjp(jax.jit(run), *map(_as_arrays, _numbers(arguments, probe.shape[1])))
    return jax.tree.leaves(jax.device_get((y, pull(jnp.asarray(probe)))))


def _as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("name, implementation, sizes", _EACH)
def test_result_and_gradients_equal_one_device(name, implementation, sizes):
    probe = _normal(B, T, K, G, C + 1)
    actual, program = _in_ring(CASES[name], implementation, sizes, probe)
    wanted = _by_reference(CASES[name], probe)
    helpers.assert_close(actual[0], wanted[0])
    helpers.assert_close(actual[1:], wanted[1:], 2e-5)
    assert "collective-permute" in program.as_text()


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2e-2)])
def test_bfloat16(dtype, tolerance):
    _, one = _attend({}, "reference")
    mesh, rules = helpers.make_mesh((1, 1, 4, 1, 1), **RULES)
    order = _order(4, T)
    arrays = [jnp.asarray(x, dtype) for x in _numbers({})]
    wanted = jax.jit(one)(*(x.astype(jnp.float32) for x in arrays))
    _, run = _attend({}, "chunked", context="ring")
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x[:, order], rules.act(letters))
            for x, letters in zip(arrays, ("BTKGC", "BSKC", "BSKC"))
        ]
        y = jax.jit(run)(*placed)
    assert y.dtype == dtype
    actual = np.asarray(jax.device_get(y), np.float32)[:, np.argsort(order)]
    helpers.assert_close(actual, wanted, tolerance)


@st.composite
def _masks(draw):
    """Trees of masks over as many keys as queries, which are a multiple of what four devices hold."""
    return draw(mask_trees._trees(8, 8))


@pytest.mark.long
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(_masks())
def test_any_mask(mask):
    probe = _normal(B, 8, K, G, C + 1)
    actual, _ = _in_ring({"mask": mask}, "chunked", (1, 1, 4, 1, 1), probe)
    wanted = _by_reference({"mask": mask}, probe)
    for one, other in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=4e-5, rtol=0)


def test_nothing_is_gathered():
    """Keys, values and their gradients are on their way in shares; only slopes would need more."""
    probe = _normal(B, T, K, G, C + 1)
    _, program = _in_ring({"sinks_KG": _normal(K, G)}, "chunked", (1, 1, 4, 1, 1), probe)
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    share = f"f32[{B},{T // 4},{K},{C}]"
    permuted = [line for line in text.splitlines() if " collective-permute(" in line]
    assert any(share in line for line in permuted)
    assert not any(f"[{B},{T},{K}," in line for line in text.splitlines() if "%param" not in line)


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_zigzag_and_back(num_devices):
    mesh, rules = helpers.make_mesh((1, 2, num_devices, 1, 1), **RULES)
    tokens_BT = np.arange(4 * 16).reshape(4, 16)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens_BT, rules.act("BT"))
        turned = jax.jit(ring.zigzag)(placed)
        back = jax.jit(ring.natural)(turned)
    assert turned.sharding == placed.sharding
    order = _order(num_devices, 16) if num_devices > 1 else np.arange(16)
    np.testing.assert_array_equal(turned, tokens_BT[:, order])
    np.testing.assert_array_equal(back, tokens_BT)


# --- the work -------------------------------------------------------------------------------------

_UNITS = forward_visits.Blocks(q=8, kv=4, tile=4, chunk=4, lead=2, lag=1, own=1)


def _num_units(mask, length, q_offset):
    """Returns how many tiles by chunks the forward kernel visits for a mask that is known."""
    visits = forward_visits.make_visits(mask, length, length, _UNITS, q_offset)
    sizes = [np.count_nonzero(kind.pattern) for kind in visits.kinds]
    counts = np.reshape(visits.stop - visits.start, (-1, len(sizes)))
    return int((counts * sizes).sum())


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_every_device_has_the_same_work_in_every_step_of_a_causal_ring(num_devices):
    length = 16
    distance, kinds = ring.schedule(masks.causal(), num_devices, length)
    units = {
        far: _num_units(masks.causal(), length, far * length)
        for far in np.unique(distance).tolist()
    }
    work = np.vectorize(lambda far, kind: units[far] if kind != ring.SKIP else 0)(distance, kinds)
    by_step = work.sum((2, 3))  # [device, step]
    np.testing.assert_array_equal(by_step, np.broadcast_to(by_step[:1], by_step.shape))
    # Of a device's own keys the diagonal tiles come on top.
    of_all = units[1]
    assert set(by_step[0, 1:]) == {2 * of_all}
    assert of_all < by_step[0, 0] < 3 * of_all and by_step[0, 0] == of_all + 2 * units[0]
    # All of the causal triangle, once.
    whole = _num_units(masks.causal(), 2 * num_devices * length, 0)
    assert by_step.sum() == whole
    # Were the sequence cut in the order of the text, the last device would have more than all others.
    of_stretch = units[0] + of_all * np.arange(2 * num_devices)
    in_order = of_stretch.reshape(num_devices, 2).sum(1)
    assert in_order.sum() == whole and in_order[-1] > 1.4 * whole / num_devices


@dataclasses.dataclass(frozen=True)
class _Counting(pieces.Chunked):
    """Counts what each device really does."""

    counts: Any = dataclasses.field(default=None, hash=False, compare=False)

    def forward(self, q_BTKGC, k_BSKC, v_BSKC, parts):
        self._note("forward", q_BTKGC.shape[1], parts)
        return super().forward(q_BTKGC, k_BSKC, v_BSKC, parts)

    def backward(self, q_BTKGC, *others):
        self._note("backward", q_BTKGC.shape[1], others[-1])
        return super().backward(q_BTKGC, *others)

    def _note(self, direction, length, parts):
        units = length**2
        if masks.is_static(parts.mask) and parts.q_offset is None:
            units = _num_units(parts.mask, length, parts.static_offset)

        def add(device):
            self.counts[direction, int(device)] += units

        jax.debug.callback(add, jax.lax.axis_index("seq"))


def _counted(mask, num_devices, length):
    mesh, rules = helpers.make_mesh((1, 1, num_devices, 1, 1), **RULES)
    counts = collections.Counter()
    piece = _Counting(chunk=length, counts=counts)
    shapes = {"BTKGC": (1, length, 1, 1, 4), "BSKC": (1, length, 1, 4)}
    with jax.set_mesh(mesh):
        q, k, v = (
            jax.device_put(jnp.ones(shapes[letters]), rules.act(letters))
            for letters in ("BTKGC", "BSKC", "BSKC")
        )
        mask = masks.map_arrays(
            lambda dims, x: jax.device_put(x[:, _order(num_devices, length)], rules.act(dims)), mask
        )

        def loss(q, k, v):
            how = {"mask": mask, "scale": 1.0, "piece": piece, "chunk": length}
            return jnp.sum(ring.attention(q, k, v, **how))

        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
        jax.effects_barrier()
    return {
        direction: [counts[direction, device] for device in range(num_devices)]
        for direction in ("forward", "backward")
    }


def test_the_program_does_the_work_of_the_schedule_and_no_more():
    num_devices, length = 4, 64
    done = _counted(masks.causal(), num_devices, length)
    whole = _num_units(masks.causal(), length, 0)
    for direction, units in done.items():
        assert units == [whole // num_devices] * num_devices, direction


def test_keys_that_no_query_sees_cost_nothing():
    """Documents of one stretch each: a device attends to its own two alone."""
    num_devices, length = 4, 64
    ids_BT = np.repeat(np.arange(2 * num_devices, dtype=_INT), length // 8)[None]
    done = _counted(masks.causal() & masks.Segments(ids_BT, ids_BT), num_devices, length)
    assert set(map(tuple, done.values())) == {(2 * 8**2,) * num_devices}


def test_a_window_is_known_beforehand():
    _, kinds = ring.schedule(masks.local_window(left=15, right=0), 8, 16)
    # Of each stretch its own keys and those before; the first has none before.
    assert (kinds != ring.SKIP).sum() == 16 + 15
    assert (kinds == ring.FREE).sum() == 0


# --- what does not go around ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, how, message",
    [
        ({"bias": biases.Full(jnp.ones((1, 1, 1, T, T)))}, {}, "an array .*(16, 16).*'gather'"),
        ({}, {"q_offset": 3}, "slot 3 on .*'gather'"),
        ({}, {"length": 12}, "2 \\* 4 equal stretches.* 12 queries.*'gather'"),
        ({}, {"implementation": "jax_nn"}, "'jax_nn' has no ring.*'pallas' or 'chunked'"),
    ],
)
def test_what_it_does_not_take_is_named(changes, how, message):
    mesh, rules = helpers.make_mesh((1, 1, 4, 1, 1), **RULES)
    length = how.pop("length", T)
    implementation = how.pop("implementation", "chunked")
    _, run = _attend(changes, implementation, context="ring", **how)
    shapes = (B, length, K, G, C), (B, length, K, C), (B, length, K, C)
    with jax.set_mesh(mesh):
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, rules.act(of)))
            for shape, of in zip(shapes, ("BTKGC", "BSKC", "BSKC"))
        ]
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, *arrays, *changes.values())
