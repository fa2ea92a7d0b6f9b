"""Specs of the presets, and the sizes that a mesh does not take."""

from jax.sharding import PartitionSpec
import pytest

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import errors
from llm_jax import sharding
from tests import helpers

BATCH = ("replica", "data")


def test_every_name_of_a_rule_is_a_preset():
    assert set(sharding.PRESETS) == set(config_lib.RULES)
    for name, rules in sharding.PRESETS.items():
        assert sharding.axis_rules(config_lib.MeshConfig(rules=name)) == rules


@pytest.mark.parametrize(
    "name, letters, wanted",
    [
        ("dp", "DF", (None, None)),
        ("dp", "VD", (None, None)),
        ("fsdp", "DF", ("data", None)),
        ("fsdp", "FD", (None, "data")),
        ("fsdp", "DKGC", ("data", None, None, None)),
        ("fsdp", "LDF", (None, "data", None)),
        ("fsdp", "KGC", (None, None, None)),
        ("fsdp_tp", "DF", ("data", "tensor")),
        ("fsdp_tp", "FD", ("tensor", "data")),
        ("fsdp_tp", "KGCD", ("tensor", None, None, "data")),
        ("fsdp_tp", "VD", ("tensor", "data")),
        ("fsdp_tp", "PD", (None, "data")),
        ("fsdp_cp", "DF", (("data", "seq"), None)),
        ("fsdp_cp", "VD", (None, ("data", "seq"))),
        ("multislice", "DKGC", (("data", "seq"), "tensor", None, None)),
        # A latent's width where there is no model's; heads as ever.
        ("fsdp", "ZHC", ("data", None, None)),
        ("fsdp_tp", "DZ", ("data", None)),
        ("fsdp_tp", "ZHC", ("data", "tensor", None)),
        ("multislice", "DHC", (("data", "seq"), "tensor", None)),
        ("tp", "ZHC", (None, "tensor", None)),
        ("tp", "DF", (None, "tensor")),
        ("tp", "KGCD", ("tensor", None, None, None)),
        ("tp", "VD", ("tensor", None)),
        # Vectors are replicated whatever the rules.
        ("fsdp", "D", (None,)),
        ("fsdp_tp", "F", (None,)),
        ("fsdp_tp", "LF", (None, None)),
    ],
)
def test_specs_of_parameters(name, letters, wanted):
    assert sharding.PRESETS[name].param(letters) == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    "name, letters, wanted",
    [
        ("dp", "BTD", (BATCH, "seq", None)),
        ("fsdp", "BTV", (BATCH, "seq", None)),
        ("fsdp", "BSKC", (BATCH, None, None, None)),
        ("fsdp_tp", "BTD", (BATCH, "seq", None)),
        ("fsdp_tp", "BTF", (BATCH, "seq", "tensor")),
        ("fsdp_tp", "BTKGC", (BATCH, "seq", "tensor", None, None)),
        ("fsdp_tp", "BTHC", (BATCH, "seq", "tensor", None)),
        ("fsdp_tp", "BTZ", (BATCH, "seq", None)),
        ("tp", "BTV", (BATCH, "seq", "tensor")),
        ("tp", "BT", (BATCH, "seq")),
    ],
)
def test_specs_of_activations(name, letters, wanted):
    assert sharding.PRESETS[name].act(letters) == PartitionSpec(*wanted)


def test_a_ring_leaves_keys_cut():
    for preset in ("fsdp", "fsdp_cp", "multislice"):
        gathered, ring = (
            sharding.axis_rules(config_lib.MeshConfig(rules=preset, context=context))
            for context in ("gather", "ring")
        )
        assert (gathered.act("BS")[1], ring.act("BS")[1]) == (None, "seq")
        assert ring.act("BTD") == gathered.act("BTD") and ring.params == gathered.params


def test_groups_take_the_place_of_replicated_key_heads():
    rules = sharding.axis_rules(config_lib.MeshConfig(rules="fsdp_tp", kv_heads="replicated"))
    assert rules.param("DKGC") == PartitionSpec("data", None, "tensor", None)
    assert rules.param("DKC") == PartitionSpec("data", None, None)
    assert rules.act("BTKGC") == PartitionSpec(BATCH, "seq", None, "tensor", None)
    assert rules.act("BSKC") == PartitionSpec(BATCH, None, None, None)
    assert rules.act("BTF") == sharding.PRESETS["fsdp_tp"].act("BTF")


@pytest.mark.parametrize(
    "kv_heads, tensor, wanted",
    [(4, 4, "sharded"), (2, 4, "replicated"), (1, 8, "replicated"), (8, 3, "sharded")],
)
def test_replicated_key_heads_are_for_what_only_groups_can_be_split_into(kv_heads, tensor, wanted):
    model = helpers.tiny_model_config(num_heads=8, num_kv_heads=kv_heads)
    assert sharding.fitting_kv_heads(model, tensor) == wanted


def test_rules_name_known_dimensions_and_axes():
    for rules in sharding.PRESETS.values():
        for letter, axes in (*rules.params, *rules.acts):
            assert letter in dims.DIMS
            assert set((axes,) if isinstance(axes, str) else axes) <= set(config_lib.MESH_AXES)


def test_rules_hash_by_value():
    first = sharding.AxisRules((("D", "data"),), (("B", BATCH),))
    second = sharding.AxisRules((("D", "data"),), (("B", BATCH),))
    assert first == second and hash(first) == hash(second)
    assert len(set(sharding.PRESETS.values())) == len(sharding.PRESETS)
    assert first != sharding.AxisRules((("D", "tensor"),), (("B", BATCH),))


def test_axis_size():
    mesh, _ = helpers.make_mesh((2, 2, 1, 1, 2), "fsdp_tp")
    sizes = [sharding.axis_size(mesh, axes) for axes in (None, "data", BATCH, "seq", ())]
    assert sizes == [1, 2, 4, 1, 1]


def _check(shape, rules, model=None, **sections):
    sizes = dict(zip(config_lib.MESH_AXES, shape)) | {"rules": rules}
    sections["mesh"] = sizes | sections.get("mesh", {})
    config = helpers.tiny_run_config(model, **sections)
    mesh, _ = helpers.make_mesh(shape, rules)
    sharding.check(config, mesh)
    sharding.check_model(config.model, config.mesh, mesh)


@pytest.mark.parametrize(
    "shape, rules",
    [
        ((1, 8, 1, 1, 1), "dp"),
        ((2, 4, 1, 1, 1), "fsdp"),
        ((1, 2, 2, 1, 2), "fsdp_tp"),
        ((1, 2, 4, 1, 1), "fsdp_cp"),
        ((2, 1, 2, 1, 2), "multislice"),
        ((1, 2, 1, 1, 2), "tp"),
    ],
)
def test_check_accepts(shape, rules):
    _check(shape, rules)


@pytest.mark.parametrize(
    "shape, rules, changes, parts",
    [
        ((1, 8, 1, 1, 1), "fsdp", {"data": {"batch_size": 12}}, ["data.batch_size", "12", "8"]),
        (
            (1, 8, 1, 1, 1),
            "fsdp",
            {"optim": {"accumulation_steps": 2}},
            ["data.batch_size / optim.accumulation_steps = 4", "8 ways"],
        ),
        ((2, 4, 1, 1, 1), "dp", {"data": {"batch_size": 4}}, ["data.batch_size", "8 ways"]),
        ((1, 1, 8, 1, 1), "dp", {"data": {"sequence_length": 12}}, ["sequence_length = 12", "seq"]),
        (
            (1, 1, 4, 1, 1),
            "fsdp_cp",
            {"data": {"sequence_length": 12}, "mesh": {"context": "ring"}},
            ["sequence_length = 12", "two pieces for each of 4", "a multiple of 8", "'gather'"],
        ),
        (
            (1, 8, 1, 1, 1),
            "fsdp",
            {"model": {"embed_dim": 12, "head_dim": 4}},
            ["model.embed_dim = 12", "data"],
        ),
        (
            (1, 4, 1, 1, 1),
            "fsdp",
            {"model": helpers.LATENTS | {"kv_latent_dim": 6}},
            ["model.kv_latent_dim = 6", "4 ways", "data"],
        ),
        (
            (1, 4, 1, 1, 1),
            "fsdp",
            {"model": helpers.LATENTS | {"q_latent_dim": 6}},
            ["model.q_latent_dim = 6", "4 ways"],
        ),
        (
            (1, 1, 1, 1, 4),
            "tp",
            {},
            ["model.num_kv_heads = 2", "2 key-value heads", "4 ways", "use tensor = 1 or 2"],
        ),
        (
            (1, 1, 1, 1, 4),
            "tp",
            {"model": {"num_heads": 8}},
            ["model.num_kv_heads = 2", "use mesh.kv_heads = 'replicated', or tensor = 1 or 2"],
        ),
        (
            (1, 1, 1, 1, 4),
            "fsdp_tp",
            {"model": {"num_heads": 12, "head_dim": 4}, "mesh": {"kv_heads": "replicated"}},
            ["6 query groups", "4 ways", "use tensor = 1 or 2 or 3 or 6"],
        ),
        (
            (1, 1, 1, 1, 4),
            "fsdp_tp",
            {"model": {"num_kv_heads": None}, "mesh": {"kv_heads": "replicated"}},
            ["1 query groups", "use mesh.kv_heads = 'sharded', or tensor = 1"],
        ),
        (
            (1, 1, 1, 1, 2),
            "tp",
            {"model": {"attention": "jax_nn"}, "mesh": {"kv_heads": "replicated"}},
            ["model.attention = 'jax_nn'", "mesh.kv_heads", "'auto'"],
        ),
        ((1, 1, 1, 1, 2), "tp", {"model": {"vocab_size": 33}}, ["model.vocab_size = 33"]),
        ((1, 1, 1, 1, 2), "fsdp_tp", {"model": {"mlp_dim": 7}}, ["model.mlp_dim = 7"]),
    ],
)
def test_check_names_what_cannot_be_split(shape, rules, changes, parts):
    with pytest.raises(errors.UserError) as error:
        _check(shape, rules, **changes)
    message = str(error.value)
    assert message.startswith("config.") and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "shape, rules, axis",
    [
        ((1, 4, 1, 1, 2), "fsdp", "tensor"),
        ((1, 4, 1, 1, 2), "dp", "tensor"),
        ((1, 4, 1, 2, 1), "fsdp_tp", "expert"),
    ],
)
def test_check_refuses_an_axis_that_nothing_uses(shape, rules, axis):
    with pytest.raises(errors.UserError, match=f"config.mesh.{axis} = 2: .*{rules!r}"):
        _check(shape, rules)


def test_check_model_looks_at_the_model_alone():
    mesh, _ = helpers.make_mesh((1, 1, 1, 1, 4), "tp")
    mesh_config = config_lib.MeshConfig(tensor=4, data=1, rules="tp")
    sharding.check_model(helpers.tiny_model_config(num_kv_heads=4), mesh_config, mesh)
    with pytest.raises(errors.UserError, match="model.num_kv_heads = 2"):
        sharding.check_model(helpers.tiny_model_config(), mesh_config, mesh)


def test_letters_of_a_name():
    assert dims.suffix("q_bias_KGC") == "KGC"
    for name in ("weight", "w_Dx", "w_D9"):
        with pytest.raises(ValueError, match=name):
            dims.suffix(name)
