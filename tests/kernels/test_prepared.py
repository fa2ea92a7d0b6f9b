"""Tables made once for many layers: the same numbers, and nothing made again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import pallas
from llm_jax.models import build
from tests import helpers
from tests.kernels import test_attention as suite

B, T, K, G, C = suite.B, suite.T, suite.K, suite.G, suite.C


def _prepared(case, like_BT, implementation="pallas"):
    return op.prepare(
        jax.tree.map(jnp.asarray, case.mask),
        like_BT,
        num_keys=suite.S,
        widths=(C, C),
        group=G,
        dtype="float32",
        implementation=implementation,
        bias=None if case.bias is None else jax.tree.map(jnp.asarray, case.bias),
        blocks=suite.BLOCKS,
    )


def _gradient(case, extra, mask=None):
    def loss(parameters, mask):
        changed = case if mask is None else suite.dataclasses.replace(case, mask=mask)
        return jnp.sum(suite.attend(changed, extra, "pallas")(parameters) ** 2)

    return jax.jit(jax.value_and_grad(loss))(suite.parameters_of(case), mask)


@pytest.mark.parametrize(
    "name",
    ["packed", *(pytest.param(x, marks=pytest.mark.long) for x in ("everything", "everything_t5"))],
)
def test_prepared_tables_change_nothing(name):
    case, extra = suite.named(name)
    prepared = _prepared(case, jnp.zeros((B, T)))
    assert isinstance(prepared, pallas.Prepared)
    actual, wanted = _gradient(case, extra, prepared), _gradient(case, extra)
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


def test_masks_without_arrays_and_other_implementations_need_no_tables():
    case, _ = suite.named("causal")
    assert _prepared(case, jnp.zeros((B, T))) == case.mask
    packed, _ = suite.named("packed")
    for implementation in ("auto", "chunked"):  # on a CPU
        assert isinstance(_prepared(packed, jnp.zeros((B, T)), implementation), masks.And)


def test_other_implementations_take_the_mask_alone():
    case, extra = suite.named("packed")
    prepared = suite.dataclasses.replace(case, mask=_prepared(case, jnp.zeros((B, T))))
    parameters = suite.parameters_of(case)
    actual, wanted = (suite.attend(one, extra, "chunked")(parameters) for one in (prepared, case))
    np.testing.assert_array_equal(actual, wanted)


def test_tables_for_something_else_are_named():
    case, extra = suite.named("packed")
    mask = _prepared(case, jnp.zeros((B, T)))
    other = suite.dataclasses.replace(case, mask=mask)
    run = suite.attend(other, extra, "pallas", "bfloat16")
    with pytest.raises(ValueError, match="prepared for dtype = float32 and not bfloat16"):
        jax.eval_shape(run, suite.parameters_of(case))


def _model():
    sizes = {"num_layers": 3, "embed_dim": 16, "num_heads": 2, "vocab_size": 32, "max_length": 16}
    config = config_lib.ModelConfig(**sizes, dtype="float32", attention="pallas", scan_layers=True)
    tokens_BT = np.arange(32).reshape(2, 16) % 32
    segments_BT = np.repeat([[1, 2], [1, 3]], 8, axis=1)
    return config, tokens_BT, segments_BT


def test_layers_share_the_tables():
    """Sorting makes the tables; nothing else in the model sorts."""
    config, tokens_BT, segments_BT = _model()

    def loss(model):
        positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
        return jnp.sum(model(jnp.asarray(tokens_BT), positions, jnp.asarray(segments_BT)) ** 2)

    mesh, rules = helpers.make_mesh((1, 1, 1, 1, 1), "dp")
    with jax.set_mesh(mesh):
        model = build.make_model(jax.random.key(0), config, rules)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(model)
    outside, inside = _sorts(jaxpr.jaxpr, False)
    assert outside > 0 and inside == 0


def _sorts(jaxpr, is_inside):
    """Returns how many sorts stand outside and inside of scans."""
    counts = [0, 0]
    for equation in jaxpr.eqns:
        counts[is_inside] += equation.primitive.name == "sort"
        is_scan = is_inside or equation.primitive.name == "scan"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for place, count in enumerate(_sorts(inner, is_scan)):
                    counts[place] += count
    return counts


def test_tables_may_lie_on_several_devices():
    config, tokens_BT, segments_BT = _model()

    def logits(shape, name):
        mesh, rules = helpers.make_mesh(shape, name)
        with jax.set_mesh(mesh):
            model = jax.jit(lambda: build.make_model(jax.random.key(0), config, rules))()
            place = jax.sharding.NamedSharding(mesh, rules.act("BT"))
            put = functools.partial(jax.device_put, device=place)
            positions = np.broadcast_to(np.arange(16), (2, 16))
            return jax.device_get(
                jax.jit(lambda m, *x: m(*x))(
                    model, put(tokens_BT), put(positions), put(segments_BT)
                )
            )

    helpers.assert_close(logits((1, 2, 1, 1, 2), "fsdp_tp"), logits((1, 1, 1, 1, 1), "dp"))
