"""Every mesh and rule gives the loss, gradients and updates of one device."""

import functools

import jax
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import optim
from llm_jax import sharding
from llm_jax import train_step
from tests import helpers

MODELS = {
    "gpt2": helpers.GPT2 | {"dropout": 0.2},
    "llama": {
        "tie_embeddings": False,
        "use_qk_norm": True,
        "attention": "chunked",
        # Of a sharded sequence, a chunk must be a multiple of the shards.
        "attention_chunk": 8,
    },
    "kernels": {"attention": "pallas", "attention_softcap": 2.0},
    "bert": helpers.BERT | {"attention_dropout": 0.2},
    "classifier": helpers.BERT | {"head": "sequence", "num_labels": 3, "use_pooler": True},
    "token_labels": helpers.BERT | {"head": "token", "num_labels": 3, "dropout": 0.2},
    "span": helpers.BERT | {"head": "span"},
    "prefix": {},
    "t5": helpers.T5 | {"dropout": 0.2},
    "gemma3": helpers.GEMMA3,
    "latents": helpers.LATENTS | {"attention": "chunked", "attention_chunk": 8},
    "lora": {"lora": config_lib.LoraConfig(rank=2, targets="*")},
    "experts": helpers.EXPERTS,
    "switch": helpers.SWITCH,
}

# Sizes along replica, data, seq, expert, tensor; rules; other choices.
MESHES = {
    "dp": ((1, 8, 1, 1, 1), "dp"),
    "fsdp": ((1, 4, 1, 1, 1), "fsdp"),
    "fsdp_replica": ((2, 4, 1, 1, 1), "fsdp"),
    "fsdp_seq": ((1, 2, 4, 1, 1), "fsdp"),
    "fsdp_tp": ((1, 2, 1, 1, 2), "fsdp_tp"),
    "fsdp_tp_seq": ((1, 2, 2, 1, 2), "fsdp_tp"),
    "tp": ((1, 2, 1, 1, 2), "tp"),
    "fsdp_cp": ((1, 2, 2, 1, 1), "fsdp_cp"),
    "fsdp_cp_ring": ((1, 2, 4, 1, 1), "fsdp_cp", ("context", "ring")),
    "fsdp_ep": ((1, 1, 1, 4, 1), "fsdp_ep"),
    "fsdp_ep_tp": ((1, 2, 1, 2, 2), "fsdp_ep"),
    "fsdp_ep_seq": ((2, 1, 2, 2, 1), "fsdp_ep"),
    "multislice": ((2, 2, 1, 1, 2), "multislice"),
    "multislice_ring": ((2, 1, 2, 1, 2), "multislice", ("context", "ring")),
    "replicated_heads": ((1, 2, 1, 1, 2), "fsdp_tp", ("kv_heads", "replicated")),
    "replicated_heads_ring": (
        (1, 1, 2, 1, 2),
        "fsdp_tp",
        ("kv_heads", "replicated"),
        ("context", "ring"),
    ),
}
# Every head of GPT-2 has keys of its own, so that there are no groups to shard. Kernels are dear to
# interpret: one ring has all that differs for them.
_LEFT_OUT = {
    "gpt2": ("replicated_heads", "replicated_heads_ring"),
    "kernels": ("fsdp_cp", "fsdp_cp_ring", "multislice", "multislice_ring", "replicated_heads"),
}
_MESHES_OF = {
    "bert": ("fsdp", "fsdp_tp_seq", "fsdp_cp_ring"),
    "classifier": ("fsdp_tp_seq",),
    "t5": ("dp", "fsdp_replica", "fsdp_tp_seq", "multislice"),
    "token_labels": ("fsdp_tp_seq",),
    "span": ("fsdp_tp_seq",),
    "prefix": ("fsdp_tp_seq", "multislice_ring"),
    "lora": ("fsdp_tp_seq", "multislice"),
    "experts": ("fsdp_tp_seq", "fsdp_cp_ring", "fsdp_ep", "fsdp_ep_tp", "fsdp_ep_seq"),
    "switch": ("fsdp_tp_seq", "fsdp_ep_tp", "fsdp_ep_seq"),
    "gemma3": ("fsdp_seq", "fsdp_tp_seq", "multislice_ring"),
    "latents": ("fsdp_tp", "fsdp_tp_seq", "fsdp_cp_ring", "multislice", "tp"),
}

# One model is cut in every way each time; the others in these, and in all the rest by the long tests.
_SHORT_OF = {
    "gpt2": ("dp", "fsdp_tp_seq", "multislice_ring"),
    "kernels": ("fsdp_seq",),
    "experts": ("fsdp_ep_tp",),
    "switch": ("fsdp_ep_seq",),
} | dict.fromkeys(("bert", "t5", "prefix", "gemma3", "latents", "lora"), ("fsdp_tp_seq",))


def _marks(model, mesh):
    return [] if mesh in _SHORT_OF.get(model, (mesh,)) else [pytest.mark.long]


_CASES = [
    pytest.param(model, mesh, marks=_marks(model, mesh))
    for model in MODELS
    for mesh in _MESHES_OF.get(model, MESHES)
    if mesh not in _LEFT_OUT.get(model, ())
]


def _config(model, **sections):
    # Two of the models, of a tied head and of one of its own, are scored by chunks of tokens.
    train = {"z_loss": 0.05, "cross_entropy_chunk": 3}
    train["cross_entropy"] = "reference" if model in ("gpt2", "bert") else "chunked"
    objective = {"name": "prefix" if model == "prefix" else "causal"}
    tune = {"learn": "*"}
    return helpers.tiny_run_config(
        MODELS[model], train=train, objective=objective, tune=tune, **sections
    )


@functools.cache
def _gradients(model, shape, rules, *choices, accumulation=1):
    """Returns gradients and loss sums on a mesh, and the specs of the gradients."""
    config = _config(model, optim={"accumulation_steps": accumulation})
    mesh, axis_rules = helpers.make_mesh(shape, rules, **dict(choices))
    parameters = helpers.random_model(config.model, mesh, axis_rules)
    batch = helpers.place(helpers.random_batch(config), mesh, axis_rules)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(train_step.gradients, config))
        grads, sums, routed = run(parameters, batch, jax.random.key(0))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(grads)]
    return jax.tree.leaves(jax.device_get(grads)), jax.device_get((sums, routed)), specs


@pytest.mark.parametrize("model, mesh", _CASES)
def test_loss_and_gradients_equal_one_device(model, mesh):
    grads, sums, specs = _gradients(model, *MESHES[mesh])
    one_grads, one_sums, _ = _gradients(model, (1, 1, 1, 1, 1), "fsdp")
    helpers.assert_close(sums, one_sums)
    helpers.assert_close(grads, one_grads, 2e-5)
    # Gradients lie as their parameters do, so that an update moves nothing.
    mesh, axis_rules = _mesh(mesh)
    with jax.set_mesh(mesh):
        abstract = _abstract_state(_config(model), axis_rules).model
    wanted = [leaf.sharding.spec for leaf in jax.tree.leaves(abstract)]
    assert specs == wanted


@pytest.mark.parametrize("context", ["gather", "ring"])
def test_accumulation_on_a_mesh_equals_one_device(context):
    mesh = (1, 2, 2, 1, 2), "fsdp_tp", ("context", context)
    grads, sums, _ = _gradients("llama", *mesh, accumulation=2)
    one_grads, one_sums, _ = _gradients("llama", (1, 1, 1, 1, 1), "fsdp")
    helpers.assert_close(sums, one_sums)
    helpers.assert_close(grads, one_grads, 2e-5)


# --- where things lie -------------------------------------------------------------------------


def _mesh(name):
    shape, rules, *choices = MESHES[name]
    return helpers.make_mesh(shape, rules, **dict(choices))


def _abstract_state(config, axis_rules):
    return jax.eval_shape(lambda: train_step.init_state(config, axis_rules))


def _axes(axes):
    """Normalises an entry of a spec."""
    return axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_lie_as_the_rules_say(mesh):
    """Each dimension by its letter; on each device lies that share of the array and no more."""
    # Of a ring or of replicated key heads too: there are groups to shard.
    config, rules = _config("llama"), MESHES[mesh][1]
    device_mesh, axis_rules = _mesh(mesh)
    with jax.set_mesh(device_mesh):
        model = helpers.make_model(config.model, axis_rules)
    table = dict(axis_rules.params)
    num_sharded = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        letters = dims.of_path(path)
        offset = leaf.ndim - len(letters)
        share = list(leaf.shape)
        for place, letter in enumerate(letters, offset):
            if len(letters) > 1 and letter in table:
                share[place] //= sharding.axis_size(device_mesh, table[letter])
        name = jax.tree_util.keystr(path)
        assert {piece.data.shape for piece in leaf.addressable_shards} == {tuple(share)}, name
        num_sharded += tuple(share) != leaf.shape
    assert (num_sharded == 0) == (rules == "dp")


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
@pytest.mark.parametrize("mesh", ["dp", "fsdp", "fsdp_tp", "fsdp_cp", "multislice"])
def test_optimiser_state_lies_as_its_parameters(name, mesh):
    device_mesh, axis_rules = _mesh(mesh)
    optimizer = {"name": name, "schedule": "constant"}
    with jax.set_mesh(device_mesh):
        state = _abstract_state(_config("gpt2", optim=optimizer), axis_rules)
    parameters = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.model)[0]
    }
    num_matched = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        text = jax.tree_util.keystr(path)
        for parameter, wanted in parameters.items():
            if text.endswith(parameter) and leaf.shape == wanted.shape:
                assert leaf.sharding.spec == wanted.sharding.spec, text
                num_matched += 1
    moments = {"adamw": 2, "soap": 2, "schedule_free": 2, "lion": 1, "sgd": 1, "adafactor": 1}
    if name in moments:
        assert num_matched == moments[name] * len(parameters)
    else:  # muon keeps one moment of a matrix and two of the rest
        num_muon = list(jax.tree.leaves(optim.muon_labels(state.model))).count("muon")
        assert num_matched == 2 * len(parameters) - num_muon


@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_update_equals_one_device(name):
    """Of given gradients; widths are those from which on Adafactor factors its moments.

    SOAP's bases are those of its axes: a first gradient leaves directions of which any is as good as another.
    """
    widths = {"embed_dim": 128, "mlp_dim": 256, "scan_layers": True}
    model = helpers.tiny_model_config(**MODELS["gpt2"] | widths)
    config = config_lib.OptimConfig(name=name, soap_max_width=1)

    def run(shape, rules):
        mesh, axis_rules = helpers.make_mesh(shape, rules)
        params = helpers.random_model(model, mesh, axis_rules)
        optimizer = optim.make_optimizer(config, lambda step: 1.0)

        with jax.set_mesh(mesh):
            grads = helpers.random_model(model, mesh, axis_rules, seed=1)
            state = jax.jit(optimizer.init)(params)
            update = jax.jit(optimizer.update)
            _, state = update(grads, state, params)
            return jax.tree.leaves(jax.device_get(update(params, state, params)[0]))

    helpers.assert_close(run((1, 2, 1, 1, 2), "fsdp_tp"), run((1, 1, 1, 1, 1), "fsdp"))


@pytest.mark.slow
def test_soap_of_a_given_state_equals_one_device_and_keeps_its_place():
    """Refreshes are compared by what they see: they leave directions of which any is as good as another."""
    model = helpers.tiny_model_config(**MODELS["gpt2"] | {"scan_layers": True})
    # A larger epsilon: Adam divides what is zero but for rounding by it.
    config = config_lib.OptimConfig(name="soap", soap_every=2, epsilon=1e-3)
    optimizer = optim.make_optimizer(config, lambda step: 1.0)

    def run(shape, rules, given=None):
        mesh, axis_rules = helpers.make_mesh(shape, rules)
        params = helpers.random_model(model, mesh, axis_rules)
        with jax.set_mesh(mesh):
            state = jax.jit(optimizer.init)(params)
            leaves, tree = jax.tree.flatten(state)
            places = [leaf.sharding for leaf in leaves]
            update = jax.jit(optimizer.update)
            if given is None:
                _, state = update(helpers.random_model(model, mesh, axis_rules, 1), state, params)
                assert update(params, state, params) and update._cache_size() == 1
            else:
                state = tree.unflatten(map(jax.device_put, given, places))
            updates, after = update(params, state, params)
            _, last = update(updates, after, params)
        for leaf, place in zip(jax.tree.leaves(last), places, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        return [jax.device_get(jax.tree.leaves(x)) for x in (state, updates, after)]

    state, *wanted = run((1, 1, 1, 1, 1), "fsdp")
    _, *found = run((1, 2, 1, 1, 2), "fsdp_tp", state)
    helpers.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_steps_equal_one_device_and_keep_their_place(name):
    """From `init_state`: the random draws of initialisation and dropout do not see the mesh."""
    # A larger epsilon: Adam divides what is zero but for rounding (gradients of key biases) by it.
    optimizer = {"name": name, "warmup_steps": 0, "epsilon": 1e-3, "schedule": "constant"}
    config = _config("gpt2", optim=optimizer)

    def run(shape, rules):
        mesh, axis_rules = helpers.make_mesh(shape, rules)
        batch = helpers.place(helpers.random_batch(config), mesh, axis_rules)
        with jax.set_mesh(mesh):
            state = jax.jit(lambda: train_step.init_state(config, axis_rules))()
            places = [leaf.sharding for leaf in jax.tree.leaves(state)]
            step = train_step.make_train_step(config)
            for _ in range(3):
                state, metrics = step(state, batch)
        leaves = jax.tree.leaves(state)
        assert all(
            leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in zip(leaves, places)
        )
        assert step._cache_size() == 1, "the second step compiles again"
        return jax.tree.leaves(jax.device_get(state.model)), jax.device_get(metrics)

    params, metrics = run((1, 2, 2, 1, 2), "fsdp_tp")
    one_params, one_metrics = run((1, 1, 1, 1, 1), "fsdp")
    helpers.assert_close(metrics, one_metrics, 2e-5)
    helpers.assert_close(params, one_params, 2e-5)


def test_specs_are_not_all_empty():
    """The comparison above would hold for arrays that lie everywhere whole."""
    *_, specs = _gradients("gpt2", *MESHES["fsdp_tp"])
    used = {_axes(axes) for spec in specs for axes in spec}
    assert used == {None, "data", "tensor"}
    assert np.sum([any(spec) for spec in specs]) >= 8
