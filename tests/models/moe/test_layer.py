"""Every router, dispatch and mesh gives what running every expert on every token gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax.models import context as context_lib
from llm_jax.models.moe import balanced
from llm_jax.models.moe import dispatch
from llm_jax.models.moe import layer
from tests import helpers

B, T, D, E = 8, 12, 16, 8
# Padding, among it a row of nothing else: shares of experts are ragged, and some experts get none.
_LENGTHS = (12, 12, 5, 12, 0, 12, 7, 1)
_ONE = ((1, 1, 1, 1, 1), "fsdp")
MESHES = {
    "expert_2": ((1, 1, 1, 2, 1), "fsdp_ep"),
    "expert_4": ((1, 1, 1, 4, 1), "fsdp_ep"),
    "expert_data_tensor": ((1, 2, 1, 2, 2), "fsdp_ep"),
    "expert_seq": ((1, 1, 2, 2, 2), "fsdp_ep"),
}
_PER_TOKEN = {"switch": 1, "base": 1}
_ROUTERS = [name for name in config_lib.ROUTERS if name != "soft"]


def _config(router, dispatch="auto", is_gated=True, **moe) -> config_lib.ModelConfig:
    moe = config_lib.MoeConfig(
        num_experts=E,
        experts_per_token=_PER_TOKEN.get(router, 2),
        router=router,
        dispatch=dispatch,
        **moe,
    )
    changes = {"architecture": "encoder", "embed_dim": D, "mlp_dim": 24, "is_gated": is_gated}
    data = {"packing": "concat"}  # soft mixtures take no packed documents
    return helpers.tiny_run_config(changes | {"moe": moe}, data=data).model


@functools.cache
def _arrays():
    rng = np.random.default_rng(0)
    x_BTD, weights_BTD = rng.standard_normal((2, B, T, D)).astype(np.float32)
    # Two rows whose tokens all want the same experts.
    x_BTD[:2] = x_BTD[0, 0] + 0.1 * x_BTD[:2]
    tokens_BT = rng.integers(0, 50, (B, T)).astype(np.int32)
    return x_BTD, weights_BTD, tokens_BT, np.arange(T)[None] < np.asarray(_LENGTHS)[:, None]


@functools.cache
def _results(config, mesh_shape, rules_name, seed=3):
    """Returns states, statistics and gradients of a layer on a mesh."""
    mesh, rules = helpers.make_mesh(mesh_shape, rules_name)
    with jax.set_mesh(mesh):
        module = jax.jit(lambda: layer.Moe(jax.random.key(0), config, rules))()
        x_BTD, weights_BTD, tokens_BT, is_token_BT = (
            jax.device_put(a, jax.NamedSharding(mesh, rules.act("BTD"[: a.ndim])))
            for a in _arrays()
        )
        key = None if seed is None else jax.random.key(seed)

        def run(module, x_BTD):
            context = context_lib.Context(None, tokens_BT=tokens_BT, is_token_BT=is_token_BT)
            y_BTD, routed = module(x_BTD, context, key)
            return jnp.sum(y_BTD * weights_BTD) + routed.loss, (y_BTD, routed)

        gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
        (_, (y_BTD, routed)), grads = gradient(module, x_BTD)
        return jax.device_get((y_BTD, routed, grads))


def _parts(config):
    """Returns a layer on one device, and what it is given."""
    mesh, rules = helpers.make_mesh()
    x_BTD, _, tokens_BT, is_token_BT = map(jnp.asarray, _arrays())
    with jax.set_mesh(mesh):
        module = layer.Moe(jax.random.key(0), config, rules)
    return module, x_BTD, context_lib.Context(None, tokens_BT=tokens_BT, is_token_BT=is_token_BT)


def _assert_same(actual, wanted):
    helpers.assert_close(actual[:2], wanted[:2])
    helpers.assert_close(actual[2], wanted[2], 2e-5)


def _room(router, dispatch) -> dict:
    """Returns a capacity that drops nothing."""
    if dispatch != "capacity" or router == "expert_choice":
        return {"capacity_factor": 1.0}
    return {"capacity_factor": float(E)}


def _reference(config):
    moe = dataclasses.replace(config.moe, dispatch="dense")
    return _results(dataclasses.replace(config, moe=moe), *_ONE)


@pytest.mark.parametrize("dispatch", ["sorted", "capacity"])
@pytest.mark.parametrize("router", _ROUTERS)
def test_dispatches_equal_dense(router, dispatch):
    config = _config(router, dispatch, **_room(router, dispatch))
    wanted = _reference(config)
    _assert_same(_results(config, *_ONE), wanted)
    load = wanted[1].load_E
    # Ragged, so that there is something to get wrong; but where experts choose.
    assert (load.max() > load.min()) == (router != "expert_choice")
    assert load.sum() > 0


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dispatch", ["sorted", "capacity"])
@pytest.mark.parametrize(
    "router",
    [
        name if name == "softmax" else pytest.param(name, marks=pytest.mark.long)
        for name in _ROUTERS
    ],
)
def test_meshes_equal_one_device(router, dispatch, mesh):
    config = _config(router, dispatch, **_room(router, dispatch))
    _assert_same(_results(config, *MESHES[mesh]), _reference(config))


@pytest.mark.parametrize("mesh", ["expert_data_tensor", "expert_seq"])
def test_soft_mixtures_equal_one_device(mesh):
    config = _config("soft", slots_per_expert=3)
    _assert_same(_results(config, *MESHES[mesh]), _results(config, *_ONE))


@pytest.mark.parametrize("dispatch", ["sorted", "capacity"])
def test_plain_experts_and_frozen_routers(dispatch):
    config = _config(
        "softmax", dispatch, is_gated=False, is_router_frozen=True, capacity_factor=float(E)
    )
    wanted = _reference(config)
    _assert_same(_results(config, *_ONE), wanted)
    assert not np.any(wanted[2][0].router.router_DE[...])
    assert np.any(wanted[2][0].up_EDF[...])


# --- the definition, token by token -----------------------------------------------------------------


def _expert(module, index, x):
    """Returns what one expert makes of a token, in float64."""
    up, gate, out = (
        np.asarray(w[...], np.float64)[index]
        for w in (module.up_EDF, module.gate_EDF, module.out_EFD)
    )
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ out


def test_a_token_gets_the_weighted_sum_of_its_experts_and_the_shared_one():
    config = _config("softmax", num_shared_experts=2)
    module, x_BTD, context = _parts(config)
    with jax.set_mesh(helpers.make_mesh()[0]):
        y_BTD, _ = module(x_BTD, context)
    x = np.asarray(x_BTD, np.float64)
    logits = x @ np.asarray(module.router.router_DE[...], np.float64)
    wanted = np.zeros_like(x)
    for place in np.ndindex(B, T):
        chosen = np.argsort(-logits[place])[:2]
        weights = np.exp(logits[place][chosen] - logits[place].max())
        if context.is_token_BT[place]:
            for index, weight in zip(chosen, weights / weights.sum()):
                wanted[place] += weight * _expert(module, index, x[place])
        gate, up = (
            x[place] @ np.asarray(w[...], np.float64)
            for w in (module.shared.gate_DF, module.shared.up_DF)
        )
        wanted[place] += (gate / (1 + np.exp(-gate)) * up) @ np.asarray(module.shared.out_FD[...])
    assert module.shared.up_DF.shape == (D, 2 * config.expert_width)
    helpers.assert_close(y_BTD, wanted)


def test_soft_slots_are_weighted_means_of_tokens():
    config = _config("soft", slots_per_expert=2)
    module, x_BTD, context = _parts(config)
    with jax.set_mesh(helpers.make_mesh()[0]):
        y_BTD, _ = module(x_BTD, context)
    x, phi = np.asarray(x_BTD, np.float64), np.asarray(module.router.router_DEX[...], np.float64)
    phi = phi / np.linalg.norm(phi, axis=0)
    wanted = np.zeros_like(x)
    for row, length in enumerate(_LENGTHS):
        own = x[row, :length]
        angles = np.einsum("td,dex->tex", own / np.linalg.norm(own, axis=1, keepdims=True), phi)
        into = np.exp(angles) / np.exp(angles).sum(0)
        back = np.exp(angles) / np.exp(angles).sum((1, 2), keepdims=True)
        for expert, slot in np.ndindex(E, 2):
            made = _expert(module, expert, into[:, expert, slot] @ own)
            wanted[row, :length] += back[:, expert, slot, None] * made
    helpers.assert_close(y_BTD, wanted)


# --- what is dropped --------------------------------------------------------------------------------


def test_capacity_keeps_first_choices_in_order_and_counts_the_rest():
    config = _config("softmax", "capacity", capacity_factor=1.0)
    _, routed, _ = _results(config, *_ONE)
    module, x_BTD, context = _parts(config)
    with jax.set_mesh(helpers.make_mesh()[0]):
        chosen, _ = module.router(x_BTD, context, None)
    size = balanced.room_of_expert(T, E, 2)
    kept = dispatch.within_capacity(chosen, size)
    wanted = np.zeros(chosen.experts_BTR.shape, bool)
    for row in range(B):
        taken = np.zeros(E + 1, int)
        for choice, token in np.ndindex(2, T):
            expert = int(chosen.experts_BTR[row, token, choice])
            wanted[row, token, choice] = expert < E and taken[expert] < size
            taken[expert] += 1
    np.testing.assert_array_equal(kept.is_used_BTR, wanted)
    num_dropped = int(np.asarray(chosen.is_used_BTR).sum() - wanted.sum())
    assert num_dropped > 0 and routed.num_dropped == num_dropped
    assert routed.load_E.sum() == np.asarray(chosen.is_used_BTR).sum()


def test_places_of_evaluation_may_be_others():
    config = _config("switch", "capacity", capacity_factor=0.5, eval_capacity_factor=float(E))
    assert _results(config, *_ONE)[1].num_dropped > 0
    assert _results(config, *_ONE, seed=None)[1].num_dropped == 0


def test_a_device_without_room_drops_and_counts():
    small = _config("softmax", "sorted", buffer_factor=0.5)
    large = _config("softmax", "sorted", buffer_factor=4.0)
    whole = _config("softmax", "sorted")
    dropped = _results(small, *MESHES["expert_4"])[1].num_dropped
    slots = _results(whole, *MESHES["expert_4"])[1].load_E.sum()
    # Four devices have room for half of their own slots each, padding among them.
    assert slots - 0.5 * B * T * 2 <= dropped < slots
    _assert_same(_results(large, *MESHES["expert_4"]), _reference(whole))
    # Of the mesh that shares tokens between devices each is counted once.
    assert _results(small, *MESHES["expert_data_tensor"])[1].num_dropped < slots


def test_jitter_is_of_training_alone():
    config, plain = _config("switch", jitter=0.3), _config("switch")
    helpers.assert_equal(
        _results(config, *_ONE, seed=None)[:2], _results(plain, *_ONE, seed=None)[:2]
    )
    assert np.any(_results(config, *_ONE)[0] != _results(plain, *_ONE)[0])
    assert np.any(_results(config, *_ONE)[0] != _results(config, *_ONE, seed=4)[0])


def test_padding_costs_no_expert_anything():
    _, routed, (_, x_grad) = _results(_config("softmax", "sorted"), *_ONE)
    assert routed.num_tokens == sum(_LENGTHS) and routed.load_E.sum() == 2 * sum(_LENGTHS)
    is_token_BT = _arrays()[3]
    assert not np.any(x_grad[~is_token_BT]) and np.all(np.any(x_grad[is_token_BT], axis=-1))
