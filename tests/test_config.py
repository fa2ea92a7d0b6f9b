"""Configs survive their round trips; a mistake on the command line is one line that says what would do."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

from absl import flags
import ml_collections
import pytest

from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


# --- round trips ------------------------------------------------------------------------------


def test_defaults_are_a_valid_config():
    assert config_lib.from_config_dict(config_lib.new()) == config_lib.RunConfig()


def test_new_takes_values_but_no_keys():
    raw = config_lib.new()
    raw.model.window = 8
    raw.model.update(num_kv_heads=2, logit_softcap=30.0)
    config = config_lib.from_config_dict(raw)
    assert (config.model.window, config.model.logit_softcap) == (8, 30.0)
    with pytest.raises(AttributeError, match="num_layers"):
        raw.model.num_layer = 3
    with pytest.raises(TypeError):
        raw.model.num_layers = "three"


def test_every_default_has_its_declared_type():
    def walk(section):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                walk(value)
            else:
                assert isinstance(value, field.type), field.name

    walk(config_lib.RunConfig())


def test_types_are_those_of_the_dataclass():
    raw = {"optim": {"learning_rate": 1}, "model": {"num_layers": 2.0}}
    config = config_lib.from_dict(raw)
    assert type(config.optim.learning_rate) is float and type(config.model.num_layers) is int


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_json(path):
    raw = importlib.import_module(f"configs.{path.stem}").get_config("")
    config = config_lib.from_config_dict(raw)
    assert config != config_lib.RunConfig()
    text = json.dumps(config_lib.to_dict(config), allow_nan=False)
    assert config_lib.from_dict(json.loads(text)) == config


def test_every_setting_survives_json():
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(
            num_kv_heads=2, window=7, logit_softcap=30.0, scan_layers=False
        ),
        optim=config_lib.OptimConfig(clip_norm=None, epsilon=1e-20),
        mesh=config_lib.MeshConfig(data=2, tensor=-1, rules="tp"),
        profile=True,
    )
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.RunConfig().slice = "v5e:4x4"


# --- the command line -------------------------------------------------------------------------


TINY = f"--config={ROOT}/configs/tiny.py"


def test_overrides(parse):
    config = parse(
        TINY,
        "--config.model.num_layers=2",
        "--config.model.window=16",
        "--config.optim.learning_rate=1e-4",
        "--config.optim.name=lion",
        "--config.profile=true",
        "--config.mesh.tensor=-1",
        "--config.mesh.data",
        "1",
    )
    assert config.model.num_layers == 2 and config.model.window == 16
    assert config.optim.learning_rate == 1e-4 and config.optim.name == "lion"
    assert config.profile and config.mesh.tensor == -1 and config.mesh.data == 1
    assert config.model.vocab_size == 4096, "from the file"


def test_none_overrides(parse):
    config = parse(TINY, "--config.optim.clip_norm=None", "--config.model.mlp_dim=none")
    assert config.optim.clip_norm is None
    assert config.model.mlp_dim is None and config.model.mlp_width == 4 * config.model.embed_dim


@pytest.mark.parametrize("last, wanted", [("None", None), ("2.5", 2.5)])
def test_last_override_wins(parse, last, wanted):
    first = "0.5" if wanted is None else "None"
    config = parse(TINY, f"--config.optim.clip_norm={first}", f"--config.optim.clip_norm={last}")
    assert config.optim.clip_norm == wanted


@pytest.mark.parametrize(
    "argv, parts",
    [
        ([TINY, "--config.model.num_layer=2"], ["config.model.num_layer", "'num_layers'"]),
        ([TINY, "--config.modle.num_layers=2"], ["config.modle", "'model'"]),
        ([TINY, "--config.model.num_layers.x=2"], ["num_layers.x"]),
        ([TINY, "--config.model.num_layers=two"], ["num_layers=two"]),
        ([TINY, "--config.model.num_layers=2.5"], ["num_layers=2.5"]),
        ([TINY, "--config.optim.learning_rate=fast"], ["learning_rate=fast"]),
        ([TINY, "--config.model.num_layers=None"], ["num_layers=None"]),
        ([TINY, "--config.model=5"], ["config.model"]),
        ([TINY, "--configs.model.num_layers=2"], ["configs"]),
        ([TINY, "--wrokdir=x"], ["wrokdir"]),
        ([TINY, "train"], ["'train' is not a flag", "--config.x.y=value"]),
        ([f"--config={ROOT}/configs/tinny.py"], ["tinny.py", "'tiny'"]),
        (["--config=nowhere/x.py"], ["no file nowhere/x.py"]),
        (["--config"], ["--config"]),
    ],
)
def test_bad_flag_is_one_line(parse, capsys, argv, parts):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    out, err = capsys.readouterr()
    assert exit_.value.code == command.USAGE_ERROR == 2
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_missing_config_is_named(parse):
    with pytest.raises(errors.UserError, match="--config is missing: Config file"):
        parse()


def test_config_file_must_return_a_config_dict(parse, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def get_config():\n    return {'model': {}}\n")
    with pytest.raises(errors.UserError, match="must return a ConfigDict"):
        parse(f"--config={path}")


def test_config_file_may_not_bring_new_keys(parse, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'model': {'depth': 3}})\n"
    )
    with pytest.raises(errors.UserError, match="config.model.depth is not a setting"):
        parse(f"--config={path}")
    assert isinstance(flags.FLAGS.config, ml_collections.ConfigDict)


@pytest.mark.parametrize(
    "argv, part",
    [
        ([], "--config is missing"),
        (["--config=configs/tiny.py"], "--workdir is missing"),
        (["--config=configs/tiny.py", "--config.model.num_layer=2"], "did you mean 'num_layers'?"),
        (["--config=configs/tiny.py", "--config.model.num_heads=3", "--workdir=x"], "embed_dim"),
    ],
)
def test_command_ends_with_one_line(argv, part, tmp_path):
    """Through a real process: start-up chatter and tracebacks would show."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.train", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert part in done.stderr
    assert not (ROOT / "x").exists()


# --- the set of flags -------------------------------------------------------------------------

PROCESSES = {"coordinator_address", "num_processes", "process_id", "heartbeat_timeout"}


@pytest.mark.parametrize(
    "module, wanted",
    [
        ("llm_jax.train", {"config", "workdir"} | PROCESSES),
        ("llm_jax.prepare", {"config"}),
        (
            "llm_jax.evaluate",
            {
                *("workdir", "step", "tasks", "split", "source", "config"),
                *("num_beams", "max_tokens", "stride"),
            }
            | PROCESSES,
        ),
        (
            "llm_jax.search.__main__",
            {
                *("workdir", "step", "pooling", "max_length", "documents", "index", "query"),
                *("pairs", "count", "limit"),
            },
        ),
        (
            "llm_jax.evaluation.harness",
            {
                "workdir",
                "step",
                "tasks",
                "include_path",
                "num_fewshot",
                "limit",
                "batch_size",
            },
        ),
        (
            "llm_jax.sampling.chat",
            {
                *("workdir", "step", "system", "max_tokens", "seed", "tensor"),
                *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
            },
        ),
        (
            "llm_jax.evaluation.forgetting",
            {
                *("before", "after", "task", "old", "new", "old_source", "new_source"),
                *("output", "max_tokens"),
            }
            | PROCESSES,
        ),
        (
            "llm_jax.understanding.__main__",
            {
                *("workdir", "step", "output", "text", "file", "target", "layers"),
                *("num_prompts", "prompt_tokens", "samples"),
                *("chips", "hours", "watts", "load", "host", "pue", "grid"),
            },
        ),
        (
            "llm_jax.sampling.__main__",
            PROCESSES
            | {
                "workdir",
                "step",
                "prompt",
                "prompts",
                "output",
                "max_tokens",
                "num_samples",
                "seed",
                "stop",
                "batch_size",
                "tensor",
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "repetition_penalty",
                "num_beams",
                "length_penalty",
                "early_stopping",
            },
        ),
    ],
)
def test_flags_are_frozen(module, wanted):
    """A new setting belongs in the config; a new flag is a decision, made here."""
    imported = importlib.import_module(module)
    before = set(flags.FLAGS)
    define = imported.define_flags if hasattr(imported, "define_flags") else command.define_config
    define()
    defined = set(flags.FLAGS) - before
    for name in defined:
        delattr(flags.FLAGS, name)
    assert defined == wanted
