"""What learns is what the settings say, at the rates they say, from what they say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import start
from llm_jax import train
from llm_jax import train_step
from llm_jax import trees
from llm_jax import tuning
from llm_jax.models import build
from tests import helpers


def _updated(config, seed=0):
    """Returns the parameters by name before and after one step."""
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        model = helpers.random_model(config.model, mesh, rules, seed=seed)
        state = jax.jit(lambda: train_step.init_state(config, rules))()
        state = dataclasses.replace(state, model=model)
        batch = helpers.place(helpers.random_batch(config), mesh, rules)
        after, _ = jax.jit(lambda state: train_step.train_step(config, state, batch))(state)
    return tuple(
        {name: np.asarray(leaf) for name, leaf in trees.by_name(s.model).items()}
        for s in (state, after)
    )


# Fast enough that what parameters change by is far above their rounding.
_SGD = {"name": "sgd", "b1": 0.0, "learning_rate": 10.0, "clip_norm": None, "warmup_steps": 0}


def _is_bias(name):
    return "bias" in name or name.startswith("labels/")


def _is_not_frozen(name):
    return "embedding/" not in name and "norm" not in name


@pytest.mark.parametrize(
    "tune, learned, optimizer",
    [
        ({"learn": "*bias*,labels/*"}, _is_bias, "adamw"),
        ({"freeze": "embedding/*, *norm*"}, _is_not_frozen, "muon"),
        ({"freeze": "embedding/*, *norm*"}, _is_not_frozen, "adafactor"),
    ],
    ids=["bias_only", "freeze_muon", "freeze_adafactor"],
)
def test_only_what_is_said_learns(tune, learned, optimizer):
    model = helpers.BERT | {"head": "sequence", "num_labels": 3}
    before, after = _updated(
        helpers.tiny_run_config(
            model, tune=tune, optim={"name": optimizer}, objective={"name": "sequence"}
        )
    )
    for name, leaf in before.items():
        is_same = np.array_equal(leaf, after[name])
        # Zero gradients: of token types that no row has.
        assert is_same != learned(name) or name == "position_PD", name


def test_an_update_is_multiplied_by_its_rate():
    model = {"num_layers": 3}
    plain = _updated(helpers.tiny_run_config(model, optim=_SGD))
    tuned = _updated(helpers.tiny_run_config(model, optim=_SGD, tune={"layer_decay": 0.5}))
    for name, leaf in plain[0].items():
        factor = 0.5**3
        if "stack/" in name:
            factor = np.reshape([0.25, 0.5, 1.0], (3,) + (1,) * (leaf.ndim - 1))
        elif name.startswith("final_norm"):
            factor = 1.0
        change, slower = plain[1][name] - leaf, tuned[1][name] - leaf
        helpers.assert_close(slower, factor * change, 1e-4)


@pytest.mark.parametrize(
    "model, wanted",
    [
        (
            helpers.EXPERTS,  # a dense layer first
            {
                "stack/layers/mlp/up_DF": [0.25],
                "stack/expert_layers/mlp/up_EDF": [0.5, 1.0],
                "embedding/table_VD": 0.125,
            },
        ),
        (
            helpers.T5,  # two layers, then three
            {
                "encoder/stack/layers/mlp/up_DF": [0.5, 1.0],
                "decoder/stack/layers/cross_attention/q_DKGC": [0.25, 0.5, 1.0],
                "encoder/final_norm/scale_D": 1.0,
                "decoder/relative/table_KGU": 0.125,
                "encoder/relative/table_KGU": 0.25,
                "embedding/table_VD": 0.25,
            },
        ),
        (
            helpers.BERT,
            {"head_bias_V": 1.0, "head_transform/norm/scale_D": 1.0, "position_PD": 0.25},
        ),
    ],
    ids=["experts", "t5", "bert"],
)
def test_rates_follow_the_depth_within_a_stack(model, wanted):
    config = helpers.tiny_run_config(model, tune={"layer_decay": 0.5})
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        abstract = build.abstract_model(config.model, rules)
    found = tuning.rates(config, abstract)
    found = dict(zip(trees.by_name(abstract), map(np.ravel, jax.tree.leaves(found)), strict=True))
    for name, factors in wanted.items():
        np.testing.assert_array_equal(found[name], np.ravel(factors), name)


def test_frozen_layers_and_embeddings_stay():
    before, after = _updated(
        helpers.tiny_run_config(helpers.GPT2 | {"num_layers": 3}, tune={"frozen_layers": 2})
    )
    for name, leaf in before.items():
        if "stack/" in name:
            np.testing.assert_array_equal(leaf[:2], after[name][:2])
            assert np.any(leaf[2] != after[name][2]), name
        else:
            assert np.array_equal(leaf, after[name]) == (not name.startswith("final_norm")), name


def test_biases_of_routers_stay_with_what_does_not_learn():
    """They move by the load of experts, without a gradient."""
    for tune, is_same in (({}, False), ({"freeze": "*router*"}, True)):
        before, after = _updated(helpers.tiny_run_config(helpers.EXPERTS, tune=tune))
        (name,) = (name for name in before if "selection_bias" in name)
        assert np.array_equal(before[name], after[name]) == is_same


@pytest.mark.parametrize(
    "tune, said",
    [
        ({"learn": "stak/*"}, "tune.learn: 'stak/"),
        ({"freeze": "*"}, "no parameter that learns"),
        ({"fresh": "heads/*"}, "tune.fresh: 'heads/"),
    ],
)
def test_patterns_that_fit_nothing_are_named(tune, said):
    config = helpers.tiny_run_config(tune=tune)
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        names = trees.by_name(build.abstract_model(config.model, rules))
    with pytest.raises(errors.UserError, match=said.replace("*", r"\*")):
        tuning.check(config, names)


@pytest.mark.parametrize(
    "field, value",
    [("frozen_layers", -1), ("frozen_layers", 3), ("layer_decay", 0.0), ("layer_decay", 1.5)],
)
def test_settings_are_checked(field, value):
    with pytest.raises(errors.UserError, match=f"tune.{field}"):
        helpers.tiny_run_config(tune={field: value})


# --- the start ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a small run of text, with data of sequences beside it."""
    folder = tmp_path_factory.mktemp("pretrained")
    rows = [{"text": f"item {i}", "label": "ab"[i % 2]} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(
            num_layers=2, embed_dim=16, num_heads=2, vocab_size=384, dtype="float32"
        ),
        data=config_lib.DataConfig(
            source=f"jsonl:{folder}/data.jsonl:text",
            cache_dir=str(folder / "cache"),
            batch_size=8,
            sequence_length=16,
        ),
        optim=config_lib.OptimConfig(warmup_steps=1),
        train=config_lib.TrainConfig(num_steps=2, eval_every=0),
        compilation_cache="",
    )
    train.train(config, str(folder / "run"))
    return folder


def _fine_tuning(pretrained, **model):
    config = start.config_of(str(pretrained / "run"))
    config.data.update(source=f"jsonl:{pretrained}/data.jsonl", cache_dir=str(pretrained / "cache"))
    config.data.update(batch_size=8, sequence_length=16)
    config.model.update(head="sequence", num_labels=2, pooling="last", **model)
    config.objective.name = "sequence"
    config.train.update(num_steps=2, eval_every=2)
    config.optim.update(warmup_steps=1)
    config.compilation_cache = ""
    return config


def _params(workdir):
    def read(step_dir, meta):
        named = {name: info for name, info in checkpoint.params_of(step_dir, meta).items()}
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=place)
            for name, info in named.items()
        }
        return checkpoint.read_params(step_dir, meta, targets)

    return checkpoint.read_latest(workdir, None, read)


def test_a_run_starts_from_anothers_parameters_and_learns_its_head(pretrained, tmp_path, capsys):
    config = _fine_tuning(pretrained)
    config.tune.learn = "labels/*"
    train.train(config_lib.from_config_dict(config), str(tmp_path / "tuned"))
    said = capsys.readouterr().err
    assert "drawn anew: labels/dense_DY" in said
    old, new = _params(str(pretrained / "run")), _params(str(tmp_path / "tuned"))
    assert new.keys() - old.keys() == {"labels/dense_DY", "labels/dense_bias_Y"}
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    # And goes on from its own, not from the start.
    config.train.num_steps = 3
    state = train.train(config_lib.from_config_dict(config), str(tmp_path / "tuned"))
    assert int(state.step) == 3
    assert "resumed" in capsys.readouterr().err


def test_updates_are_trained_and_merged_for_generation(pretrained, tmp_path):
    from llm_jax.sampling import load

    config = start.config_of(f"{pretrained}/run@2")
    config.model.lora.rank = 2
    config.data.update(
        source=f"jsonl:{pretrained}/data.jsonl:text", cache_dir=str(pretrained / "cache")
    )
    config.data.update(batch_size=8, sequence_length=16)
    config.train.update(num_steps=2, eval_every=0)
    config.optim.warmup_steps = 1
    config.compilation_cache = ""
    train.train(config_lib.from_config_dict(config), str(tmp_path / "lora"))
    params = _params(str(tmp_path / "lora"))
    loaded = load.load(str(tmp_path / "lora"))
    attention = params["stack/layers/attention/lora/q_down_DI"]
    update = (
        16.0
        / 2
        * np.einsum("LDI,LIKGC->LDKGC", attention, params["stack/layers/attention/lora/q_up_IKGC"])
    )
    base = params["stack/layers/attention/q_DKGC"]
    assert np.abs(update).max() > 1e-5
    for layer, block in enumerate(loaded.model.blocks):
        wanted = base[layer] + update[layer]
        np.testing.assert_allclose(block.attention.q_DKGC[...], wanted, rtol=1e-6, atol=1e-7)
        assert block.attention.lora is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"embed_dim": 32}, "embedding/table_VD is float32"),
        ({"num_layers": 3}, "stack/layers/attention/k_DKC"),
        ({"use_bias": True}, "bias_F is missing there"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(pretrained, tmp_path, change, said):
    config = _fine_tuning(pretrained, **change)
    with pytest.raises(errors.UserError, match=said):
        train.train(config_lib.from_config_dict(config), str(tmp_path / "run"))


def test_another_tokenizer_and_a_start_that_is_not_there_are_refused(pretrained, tmp_path):
    config = _fine_tuning(pretrained)
    config.data.tokenizer = "train_bpe:300"
    with pytest.raises(errors.UserError, match="another tokenizer"):
        train.train(config_lib.from_config_dict(config), str(tmp_path / "run"))
    for spec, said in (("nowhere", "no checkpoints"), (f"{pretrained}/run@7", "has steps")):
        config = _fine_tuning(pretrained)
        config.tune.start = spec
        with pytest.raises(errors.UserError, match=said):
            train.train(config_lib.from_config_dict(config), str(tmp_path / "run"))
