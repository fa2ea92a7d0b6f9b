"""`python -m llm_jax.checkpoint inspect` on one CPU device: what it lists, finds damaged and explains."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import train_step
from llm_jax import trees
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import mismatch
from tests import commands
from tests.checkpoint import layouts
from tests.checkpoint import states

LOSSES = {1: None, 2: 2.5, 3: 4.25}  # by step
LAYOUT = "data2_tensor2"


def _inspect(folder, *argvs: list[str]) -> list[tuple[int, str, str]]:
    return commands.run("llm_jax.checkpoint.__main__", folder, [["inspect", *a] for a in argvs])


@pytest.fixture(scope="module")
def state() -> train_step.TrainState:
    """A state on four devices."""
    place = layouts.place_of(LAYOUT)
    with jax.set_mesh(place.mesh):
        return layouts.first_state(place)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, state):
    """A run's folder with the checkpoints of `LOSSES`, saved from four devices."""
    folder = tmp_path_factory.mktemp("run")
    _save(folder, layouts.CONFIG, state)
    return folder


def _save(folder, config, state) -> None:
    manager = checkpoint.Checkpoints(str(folder), config, layouts.TOKENIZER)
    for step, loss in LOSSES.items():
        manager.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), loss)
    manager.close()


def _copy(workdir, folder) -> pathlib.Path:
    """Returns the newest checkpoint of a copy of the run."""
    shutil.copytree(workdir, folder)
    return folder / "checkpoints" / "3"


def _write_config(path, config: config_lib.RunConfig) -> None:
    path.write_text(
        "from llm_jax import config as config_lib\n"
        "def get_config(arg=''):\n"
        "    config = config_lib.new()\n"
        f"    config.update({config_lib.to_dict(config)!r})\n"
        "    if arg: config.model.num_layers = int(arg)\n"
        "    return config\n"
    )


def _leaves(state) -> dict[str, jax.Array]:
    """Returns the arrays of a state by the paths that a checkpoint gives them."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    named = {"/".join(trees.path_keys(path)): leaf for path, leaf in paths}
    return {
        f"params/{path.removeprefix('model/')}"
        if path.startswith("model/")
        else f"training/{path}": leaf
        for path, leaf in named.items()
    }


# --- what it lists ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listings(workdir, tmp_path_factory):
    """What the command says of one run in several ways."""
    argvs = {
        "text": [str(workdir)],
        "whole_config": [str(workdir), "--config", "--training"],
        "json": [str(workdir), "--json", "--training"],
        "checkpoints": [str(workdir / "checkpoints"), "--json", "--training"],
        "step": [str(workdir / "checkpoints" / "3"), "--json", "--training"],
        "best": [str(workdir), "--json", "--step=best"],
        "first": [str(workdir), "--json", "--step=1"],
    }
    results = _inspect(tmp_path_factory.mktemp("out"), *argvs.values())
    for code, out, err in results:
        assert (code, err) == (0, ""), out + err
    return {name: out for name, (_, out, _) in zip(argvs, results)}


def test_every_array_is_listed_as_it_was_saved(listings, state):
    listed = {row["path"]: row for row in json.loads(listings["json"])["arrays"]}
    expected = _leaves(state)
    assert set(listed) == set(expected)
    for path, leaf in expected.items():
        row = listed[path]
        assert (tuple(row["shape"]), row["dtype"]) == (leaf.shape, leaf.dtype.name), path
        assert row["bytes"] == leaf.nbytes
        if not path.endswith("/step"):  # set by hand, on one device
            assert tuple(row["spec"]) == tuple(leaf.sharding.spec), path
    assert listed["params/stack/layers/mlp/up_DF"]["spec"] == [None, "data", "tensor"]


def test_the_record_and_the_totals_are_those_of_the_run(listings, state):
    result = json.loads(listings["json"])
    assert config_lib.from_dict(result["config"]) == layouts.CONFIG
    assert (result["step"], result["eval_loss"]) == (3, 4.25)
    assert result["mesh"] == {"replica": 1, "data": 2, "seq": 1, "expert": 1, "tensor": 2}
    assert result["versions"]["jax"] == jax.__version__
    assert (result["tokenizer"]["kind"], result["tokenizer"]["vocab_size"]) == ("bytes", 256)
    assert {row["step"]: row["eval_loss"] for row in result["steps"]} == LOSSES
    assert (result["damage"], result["is_verified"]) == ([], False)
    for part, total in result["totals"].items():
        leaves = [leaf for path, leaf in _leaves(state).items() if path.startswith(f"{part}/")]
        assert total == {
            "arrays": len(leaves),
            "elements": sum(leaf.size for leaf in leaves),
            "bytes": sum(leaf.nbytes for leaf in leaves),
        }


def test_a_path_is_a_run_or_its_checkpoints_or_one_of_them(listings):
    assert listings["checkpoints"] == listings["json"]
    assert listings["step"] == listings["json"]
    best, first = json.loads(listings["best"]), json.loads(listings["first"])
    assert (best["step"], first["step"]) == (2, 1)
    assert {row["path"].split("/")[0] for row in best["arrays"]} == {"params"}


def test_the_tables_say_the_same_in_words(listings):
    text = listings["text"]
    for line in (
        r"step +3 of 6",
        r"evaluation +4\.2500 nats a token",
        r"tokenizer +bytes, 256 ids, .*",
        r"saved from +4 devices: data=2, tensor=2",
        r"steps +1: not evaluated",
        r" +2: 2\.5000 nats a token, the best",
        r"  model\.embed_dim +16",
        r"params/embedding/table_VD +\[32, 16\] +float32 +\(tensor, data\) +2,048",
        r"params/final_norm/scale_D +\[16\] +float32 +replicated +64",
        r"params +11 +8,272 +33,088 +32\.3 KiB",
        r"training +26 +16,548 +66,192 +64\.6 KiB",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    # What is left at its default and the optimiser's arrays are printed when asked for.
    assert "model.rope_theta" not in text and "opt_state" not in text
    whole = listings["whole_config"]
    assert re.search(r"^  model\.rope_theta +10000\.0$", whole, re.MULTILINE)
    assert "training/opt_state/0/mu/embedding/table_VD" in whole


# --- damage -------------------------------------------------------------------------------------


def _change_fingerprint(step_dir: pathlib.Path) -> None:
    """Makes one array another than what was saved, by changing what is known of it."""

    def change(raw):
        raw["fingerprints"]["params/final_norm/scale_D"] ^= 1

    states.rewrite(step_dir, change)


def test_damage_is_found_and_named(workdir, tmp_path):
    changed = _copy(workdir, tmp_path / "changed")
    _change_fingerprint(changed)
    no_arrays = _copy(workdir, tmp_path / "no_arrays")
    shutil.rmtree(no_arrays / "params" / "ocdbt.process_0")
    no_index = _copy(workdir, tmp_path / "no_index")
    (no_index / "training" / "manifest.ocdbt").unlink()
    no_record = _copy(workdir, tmp_path / "no_record")
    states.flip(no_record / "meta" / "metadata")
    argvs = [
        [str(workdir), "--verify"],
        [str(changed), "--verify"],
        [str(no_arrays), "--verify", "--json"],
        [str(no_arrays), "--json"],
        [str(no_index)],
        [str(no_record), "--json"],
        [str(no_record), "--step=2"],
        [str(no_record.parent), "--step=2", "--verify"],
    ]
    (whole, of_changed, of_arrays, unread, of_index, of_record, on_step, other) = _inspect(
        tmp_path, *argvs
    )
    assert whole[0] == 0 and "yes: all 37 arrays are what was saved" in whole[1]
    assert of_changed[0] == 1
    assert of_changed[1].count("NO: ") == 1
    assert "NO: array params/final_norm/scale_D is not what was saved" in of_changed[1]
    damage = json.loads(of_arrays[1])["damage"]
    assert of_arrays[0] == 1 and len(damage) >= 3  # small ones lie in the index
    assert all(line.startswith("array params/") for line in damage)
    # No array is read unless asked to: only so does the size of a checkpoint not matter.
    assert unread[0] == 0 and json.loads(unread[1])["damage"] == []
    assert of_index[0] == 1 and "NO: training/manifest.ocdbt is missing" in of_index[1]
    # Without its record, the arrays are still listed.
    assert of_record[0] == 1
    found = json.loads(of_record[1])
    assert "its record (meta) cannot be read" in found["damage"][0] and "config" not in found
    assert {row["path"]: row["spec"] for row in found["arrays"]}["params/embedding/table_VD"] == [
        "tensor",
        "data",
    ]
    assert on_step[0] == 2 and "is the folder of one step already" in on_step[2]
    assert other[0] == 0 and "UNREADABLE" in other[1]  # step 3 beside it


def test_checkpoints_from_before_shardings_were_recorded(workdir, tmp_path):
    old, older = _copy(workdir, tmp_path / "old"), _copy(workdir, tmp_path / "older")
    for step_dir in (old, older):
        states.forget(step_dir, "arrays", "mesh")
    (older / "params" / "_sharding").unlink()
    new = _copy(workdir, tmp_path / "new")
    (new / "params" / "_sharding").write_bytes(b"")  # our own record does without
    of_old, of_older, of_new = _inspect(
        tmp_path, [str(old)], [str(older), "--verify"], [str(new), "--verify"]
    )
    assert (of_old[0], of_older[0], of_new[0]) == (0, 0, 0)
    row = r"^params/embedding/table_VD +\[32, 16\] +float32 +{} +2,048$"
    for out in (of_old[1], of_new[1]):
        assert re.search(row.format(r"\(tensor, data\)"), out, re.MULTILINE)
    assert re.search(row.format("not recorded"), of_older[1], re.MULTILINE)
    assert "saved from  4 devices: data=2, tensor=2" in of_old[1]


# --- explanations -------------------------------------------------------------------------------


def _changed(**sections) -> config_lib.RunConfig:
    config = layouts.CONFIG
    for name, changes in sections.items():
        section = dataclasses.replace(getattr(config, name), **changes)
        config = dataclasses.replace(config, **{name: section})
    config_lib.check(config)
    return config


def test_a_checkpoint_is_held_against_configs_and_others(workdir, tmp_path, state):
    lion = _changed(optim={"name": "lion"})
    _write_config(tmp_path / "same.py", layouts.CONFIG)
    _write_config(tmp_path / "wide.py", _changed(model={"mlp_dim": 48, "use_bias": True}))
    _write_config(tmp_path / "lion.py", lion)
    _write_config(tmp_path / "theta.py", _changed(model={"rope_theta": 5e5}))
    _write_config(tmp_path / "longer.py", _changed(train={"num_steps": 99}))
    _save(tmp_path / "other", _changed(optim={"learning_rate": 0.5}), state)
    against = ["same.py", "same.py:3", "wide.py", "lion.py", "theta.py", "longer.py", "other"]
    argvs = [[str(workdir), "--json", f"--against={name}"] for name in against]
    *results, as_text = _inspect(tmp_path, *argvs, [str(workdir), "--against=wide.py"])
    found = {
        n: (code, json.loads(out)["comparison"]) for n, (code, out, _) in zip(against, results)
    }
    for name in ("same.py", "longer.py", "other"):
        assert found[name][0] == 0 and found[name][1]["fits"], name
    assert found["longer.py"][1]["settings"] == {"train.num_steps": [6, 99]}
    assert found["other"][1]["settings"] == {"optim.learning_rate": [0.001, 0.5]}
    for name in ("same.py:3", "wide.py", "lion.py", "theta.py"):
        assert found[name][0] == 1 and not found[name][1]["fits"], name

    deeper = found["same.py:3"][1]["mismatches"]
    assert {m["kind"] for m in deeper} == {"other shape"} and len(deeper) == 3 * 9
    assert all(m["settings"] == ["config.model.num_layers"] for m in deeper)
    # Lion has one moment and Adam two.
    gone = found["lion.py"][1]["mismatches"]
    assert {m["kind"] for m in gone} == {"unexpected"} and len(gone) == 11
    assert all("/nu/" in m["path"] and m["settings"] == ["config.optim.name"] for m in gone)
    # Other frequencies are no other arrays, but another model.
    assert found["theta.py"][1]["mismatches"] == []
    assert found["theta.py"][1]["refused"] == [
        "config.model.rope_theta: 10000.0 in the checkpoint, 500000.0 now"
    ]
    assert as_text[0] == 1
    for line in (
        r"against wide\.py: \d+ arrays differ \(params, training\); training would not resume: .*",
        r"params/stack/layers/mlp/up_DF +other shape +float32\[2,16,64\] +float32\[2,16,48\]"
        r" +config\.model\.mlp_dim",
        r"params/stack/layers/mlp/up_bias_F +missing +- +float32\[2,48\] +config\.model\.use_bias",
        r"config\.model\.mlp_dim +None +48",
    ):
        assert re.search(f"^{line}$", as_text[1], re.MULTILINE), line


@pytest.mark.parametrize(
    "field, value, kinds",
    [
        ("model.num_layers", 3, {"other shape"}),
        ("model.embed_dim", 32, {"other shape"}),
        ("model.num_kv_heads", 4, {"other shape"}),
        ("model.vocab_size", 64, {"other shape"}),
        ("model.head_dim", 8, {"other shape"}),
        ("model.param_dtype", "bfloat16", {"other dtype"}),
        ("model.norm", "layernorm", set()),
        ("model.is_gated", False, {"unexpected"}),
        ("model.use_bias", True, {"missing"}),
        ("model.use_qk_norm", True, {"missing"}),
        ("model.tie_embeddings", False, {"missing"}),
        ("model.positions", "learned", {"missing"}),
        ("model.norm_placement", "post", {"unexpected"}),
        ("optim.name", "muon", {"missing", "unexpected"}),
        ("model.rope_theta", 1e6, set()),
        ("model.remat", "full", set()),
        ("optim.weight_decay", 0.0, set()),
        ("train.seed", 5, set()),
    ],
)
def test_the_setting_that_was_changed_is_found_responsible(field, value, kinds):
    section, name = field.split(".")
    # Beside it, settings that change no array.
    noise = {"model": {"logit_softcap": 30.0}, "optim": {"b1": 0.8}, "data": {"batch_size": 4}}
    changes = {
        s: noise.get(s, {}) | ({name: value} if s == section else {}) for s in (*noise, section)
    }
    config = _changed(**changes)
    saved, wanted = contents.of_config(layouts.CONFIG), contents.of_config(config)
    found = mismatch.compare(saved, wanted, layouts.CONFIG, config)
    assert all(m.settings == (f"config.{field}",) for m in found)
    assert {m.kind for m in found} == kinds
    # The paths are those that differ, no more and no fewer.
    differ = {p for p in saved | wanted if str(saved.get(p)) != str(wanted.get(p))}
    assert {m.path for m in found} == differ


def test_the_arrays_of_a_config_are_those_of_a_state_wherever_one_asks(state):
    expected = {path: (leaf.shape, leaf.dtype.name) for path, leaf in _leaves(state).items()}
    place = layouts.place_of(LAYOUT)
    for parts in (contents.PARTS, (contents.PARAMS,), (contents.TRAINING,)):
        for mesh in (contextlib.nullcontext(), jax.set_mesh(place.mesh)):
            with mesh:
                arrays = contents.of_config(layouts.CONFIG, parts)
            assert {path: (info.shape, info.dtype) for path, info in arrays.items()} == {
                path: what for path, what in expected.items() if contents.part_of(path) in parts
            }


def _responsible(config: config_lib.RunConfig) -> dict[str, tuple[str, ...]]:
    saved, wanted = contents.of_config(layouts.CONFIG), contents.of_config(config)
    return {m.path: m.settings for m in mismatch.compare(saved, wanted, layouts.CONFIG, config)}


def test_settings_that_act_together_are_found_together():
    # Neither LayerNorm nor biases alone give norms biases; layers are stacked besides.
    by_path = _responsible(_changed(model={"norm": "layernorm", "use_bias": True, "num_layers": 3}))
    assert by_path["params/final_norm/bias_D"] == ("config.model.norm", "config.model.use_bias")
    assert by_path["params/stack/layers/mlp/up_bias_F"] == ("config.model.use_bias",)
    assert by_path["params/stack/layers/mlp/up_DF"] == ("config.model.num_layers",)


def test_settings_that_cannot_be_changed_alone_are_found_too():
    by_path = _responsible(_changed(model={"embed_dim": 24, "num_heads": 12}))  # of a width of 16
    both = ("config.model.embed_dim", "config.model.num_heads")
    assert by_path["params/stack/layers/attention/q_DKGC"] == both
    assert by_path["params/embedding/table_VD"] == both[:1]


# --- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_one_line(workdir, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.py").write_text("def get_config():\n    return {}['x']\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    cases = {
        ("inspect",): "PATH is missing: A workdir",
        (): "COMMAND is missing: What to do: inspect",
        ("inpsect", str(workdir)): "'inpsect' is no command (did you mean 'inspect'?)",
        ("inspect", "none"): "none is no folder",
        ("inspect", "empty"): "empty has no checkpoints",
        ("inspect", str(workdir), "more"): "'more' is not a flag",
        ("inspect", str(workdir), "--step=7"): "has steps [1, 2, 3]",
        ("inspect", str(workdir), "--step=x"): "--step=x is no step",
        ("inspect", str(workdir), "--stop=7"): "stop",
        (
            "inspect",
            str(workdir),
            "--against=brokn.py",
        ): "no file brokn.py (did you mean 'broken'?)",
        ("inspect", str(workdir), "--against=broken.py"): "broken.py line 2: 'x'",
        ("inspect", str(workdir), "--against=other.py"): "other.py has no get_config()",
        ("inspect", str(workdir), "--against=empty"): "empty has no checkpoints",
    }
    results = commands.run("llm_jax.checkpoint.__main__", tmp_path, [list(argv) for argv in cases])
    for (argv, expected), (code, out, err) in zip(cases.items(), results):
        assert (code, out) == (2, ""), argv
        assert len(err.splitlines()) == 1 and expected in err, (argv, err)
