"""A mistake in a config or on the command line is one line that says what would do."""

import dataclasses
import importlib
import itertools
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


def _set(path, value):
    """Returns the defaults as nested dicts with one setting changed; `;` separates several."""
    raw = config_lib.to_dict(config_lib.RunConfig())
    for one, new in zip(path.split(";"), value if ";" in path else [value]):
        *sections, name = one.split(".")
        target = raw
        for section in sections:
            target = target[section]
        target[name] = new
    return raw


def _message(raw):
    with pytest.raises(errors.UserError) as error:
        config_lib.from_dict(raw)
    message = str(error.value)
    assert "\n" not in message and message.startswith("config"), message
    return message


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, nearest",
    [
        ("model.num_layer", "num_layers"),
        ("optim.learningrate", "learning_rate"),
        ("modle", "model"),
        ("train.steps", "num_steps"),
        ("mesh.tensors", "tensor"),
    ],
)
def test_unknown_key_gets_the_nearest(path, nearest):
    message = _message(_set(path, 1))
    assert f"config.{path} is not a setting (did you mean '{nearest}'?)" == message


def test_unknown_key_without_a_neighbour_gets_the_list():
    message = _message(_set("checkpoint.zzzzzz", 1))
    assert (
        message
        == "config.checkpoint.zzzzzz is not a setting; config.checkpoint has every, max_to_keep"
    )


@pytest.mark.parametrize(
    "path, value, kind",
    [
        ("model.num_layers", "4", "int"),
        ("model.num_layers", 2.5, "int"),
        ("model.num_layers", True, "int"),
        ("model.num_layers", None, "int"),
        ("model.num_layers", float("inf"), "int"),
        ("model.window", "8", "int or None"),
        ("model.use_bias", 1, "bool"),
        ("model.scan_layers", "yes", "bool or None"),
        ("optim.learning_rate", "1e-3", "float"),
        ("optim.learning_rate", False, "float"),
        ("optim.clip_norm", [1.0], "float or None"),
        ("data.source", 3, "str"),
        ("data.source", None, "str"),
    ],
)
def test_wrong_type_is_named(path, value, kind):
    message = _message(_set(path, value))
    wanted = f"config.{path} = {value!r} is a {type(value).__name__}; it takes a {kind}"
    assert message == wanted


def test_section_that_is_no_section():
    assert "config.model is 5" in _message(_set("model", 5))
    with pytest.raises(errors.UserError, match="section"):
        config_lib.from_dict([])


@pytest.mark.parametrize(
    "path, value, parts",
    [
        # Counts and lengths.
        ("model.num_layers", 0, ["model.num_layers = 0", "at least 1"]),
        ("model.window", 0, ["model.window = 0", "at least 1"]),
        ("model.vocab_size", -1, ["model.vocab_size = -1"]),
        ("model.attention_chunk", 0, ["model.attention_chunk = 0"]),
        ("data.batch_size", 0, ["data.batch_size = 0"]),
        ("data.prefetch", -1, ["data.prefetch = -1", "at least 0"]),
        ("train.num_steps", 0, ["train.num_steps = 0"]),
        ("train.log_every", 0, ["train.log_every = 0"]),
        ("train.seed", -1, ["train.seed = -1"]),
        ("train.eval_every", -5, ["train.eval_every = -5"]),
        ("optim.accumulation_steps", 0, ["optim.accumulation_steps = 0"]),
        ("optim.warmup_steps", -1, ["optim.warmup_steps = -1"]),
        ("checkpoint.max_to_keep", 0, ["checkpoint.max_to_keep = 0"]),
        ("checkpoint.every", -1, ["checkpoint.every = -1"]),
        # Numbers.
        ("optim.learning_rate", float("nan"), ["optim.learning_rate = nan"]),
        ("optim.learning_rate", float("inf"), ["optim.learning_rate = inf"]),
        ("optim.learning_rate", -1e-3, ["optim.learning_rate = -0.001"]),
        ("optim.weight_decay", -0.1, ["optim.weight_decay = -0.1"]),
        ("optim.clip_norm", 0.0, ["optim.clip_norm = 0.0", "None"]),
        ("optim.b1", 1.5, ["optim.b1 = 1.5", "[0, 1]"]),
        ("optim.final_lr_fraction", -0.1, ["optim.final_lr_fraction", "[0, 1]"]),
        ("optim.cooldown_fraction", 2.0, ["optim.cooldown_fraction", "[0, 1]"]),
        ("train.z_loss", -1.0, ["train.z_loss = -1.0"]),
        ("model.dropout", 1.0, ["model.dropout = 1.0", "drop everything"]),
        ("model.dropout", -0.1, ["model.dropout = -0.1"]),
        ("model.init_stddev", -1.0, ["model.init_stddev"]),
        ("model.logit_softcap", 0.0, ["model.logit_softcap = 0.0", "above 0"]),
        ("model.attention_softcap", -1.0, ["model.attention_softcap = -1.0", "above 0"]),
        ("model.norm_epsilon", 0.0, ["model.norm_epsilon = 0.0"]),
        ("model.rope_theta", 0.0, ["model.rope_theta = 0.0"]),
        ("data.eval_fraction", 0.0, ["data.eval_fraction = 0.0", "(0, 1)"]),
        ("data.eval_fraction", 1.0, ["data.eval_fraction = 1.0"]),
        # Contradictions.
        ("model.num_heads", 3, ["model.num_heads = 3", "embed_dim = 128", "head_dim"]),
        ("model.num_kv_heads", 3, ["model.num_kv_heads = 3", "num_heads = 4"]),
        ("model.num_kv_heads", 8, ["model.num_kv_heads = 8", "num_heads = 4"]),
        ("model.head_dim", 7, ["model.rope_fraction = 1.0", "head width 7", "even"]),
        ("model.rope_fraction", 0.0, ["model.rope_fraction = 0.0", "above 0"]),
        ("model.rope_fraction", 0.1, ["model.rope_fraction = 0.1", "is 3"]),
        ("model.rope_scaling_factor", 0.5, ["model.rope_scaling_factor = 0.5", "at least 1.0"]),
        (
            "model.rope_scaling;model.rope_low_freq_factor",
            ["llama3", 4.0],
            ["model.rope_low_freq_factor = 4.0", "rope_high_freq_factor = 4.0"],
        ),
        ("data.sequence_length", 2048, ["data.sequence_length = 2048", "1024", "max_length"]),
        ("optim.accumulation_steps", 3, ["optim.accumulation_steps = 3", "batch_size = 8"]),
        ("optim.warmup_steps", 1001, ["optim.warmup_steps = 1001", "num_steps = 1000"]),
        ("mesh.data;mesh.tensor", [-1, -1], ["config.mesh", "only one may be -1"]),
        ("mesh.data", 0, ["mesh.data = 0", "-1"]),
        ("mesh.tensor", -2, ["mesh.tensor = -2"]),
        (
            "mesh.context;model.attention",
            ["ring", "jax_nn"],
            ["mesh.context = 'ring'", "model.attention = 'jax_nn'", "'auto'", "'gather'"],
        ),
        (
            "mesh.context;model.architecture",
            ["ring", "encoder_decoder"],
            ["mesh.context = 'ring'", "'encoder_decoder'", "'gather'"],
        ),
        # Families.
        ("model.layer_pattern", "LX", ["model.layer_pattern = 'LX'", "L and G"]),
        ("model.layer_pattern", "LG", ["model.layer_pattern = 'LG'", "model.window"]),
        ("model.relative_buckets", 5, ["model.relative_buckets = 5", "even"]),
        ("model.relative_max_distance", 16, ["relative_max_distance = 16", "above"]),
        ("model.attention_scale", 0.0, ["model.attention_scale = 0.0", "None"]),
        ("model.attention_dropout", 1.0, ["model.attention_dropout = 1.0"]),
        ("model.num_labels", 0, ["model.num_labels = 0"]),
        ("model.num_decoder_layers", 2, ["num_decoder_layers = 2", "num_layers"]),
        ("model.num_token_types", 2, ["num_token_types = 2", "set it to 0"]),
        ("model.architecture;model.head", ["encoder_decoder", "token"], ["model.head = 'token'"]),
        (
            "model.is_entry_normalised;model.norm_placement",
            [True, "post"],
            ["model.is_entry_normalised = True", "use pre"],
        ),
        # Objectives.
        ("objective.name", "masked", ["objective.name = 'masked'", "choose from causal"]),
        ("objective.mask_rate", 0.0, ["objective.mask_rate = 0.0", "(0, 1)"]),
        ("objective.mask_rate", 1.5, ["objective.mask_rate = 1.5", "[0, 1]"]),
        ("objective.noise_density", 1.0, ["objective.noise_density = 1.0", "(0, 1)"]),
        ("objective.mean_span_length", 0.5, ["objective.mean_span_length = 0.5", "at least 1"]),
        ("objective.num_sentinels", 0, ["objective.num_sentinels = 0"]),
        (
            "objective.noise_density;objective.mean_span_length",
            [0.8, 3.0],
            ["objective.noise_density = 0.8", "spans of 3.0 tokens", "longer spans"],
        ),
        (
            "objective.min_prefix;objective.max_prefix",
            [0.5, 0.25],
            ["objective.min_prefix = 0.5", "max_prefix = 0.25"],
        ),
        (
            "model.architecture;objective.target_length",
            ["encoder_decoder", 2048],
            ["objective.target_length = 2048", "1024", "max_length"],
        ),
        # Sources.
        ("data.input_fields", "a,b,c", ["data.input_fields = 'a,b,c'", "one field, or two"]),
        ("data.input_fields", "a,", ["data.input_fields = 'a,'"]),
        ("data.source", "tfds", ["data.source = 'tfds'", "tfds:NAME"]),
        ("data.source", "csv:x", ["data.source = 'csv:x'", "jsonl:GLOB:field"]),
        ("data.source", "jsonl:x.jsonl", ["jsonl:GLOB:field"]),
    ],
)
def test_value_that_will_not_do(path, value, parts):
    message = _message(_set(path, value))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "path, choices",
    [
        ("model.positions", config_lib.POSITIONS),
        ("model.rope_scaling", config_lib.ROPE_SCALINGS),
        ("model.architecture", config_lib.ARCHITECTURES),
        ("model.head", config_lib.HEADS),
        ("model.pooling", config_lib.POOLINGS),
        ("model.qk_norm", config_lib.QK_NORMS),
        ("model.norm", config_lib.NORMS),
        ("model.norm_placement", config_lib.NORM_PLACEMENTS),
        ("model.activation", config_lib.ACTIVATIONS),
        ("model.dtype", config_lib.DTYPES),
        ("model.param_dtype", ("float32", "bfloat16")),
        ("model.attention", config_lib.ATTENTIONS),
        ("model.remat", config_lib.REMATS),
        ("objective.name", config_lib.OBJECTIVES),
        ("data.packing", config_lib.PACKINGS),
        ("data.too_long", config_lib.TOO_LONG),
        ("optim.name", config_lib.OPTIMIZERS),
        ("optim.schedule", config_lib.SCHEDULES),
        ("train.on_nonfinite", config_lib.NONFINITE),
        ("train.cross_entropy", config_lib.CROSS_ENTROPIES),
        ("mesh.rules", config_lib.RULES),
        ("mesh.context", config_lib.CONTEXTS),
        ("mesh.kv_heads", config_lib.KV_HEADS),
    ],
)
def test_choices(path, choices):
    for choice in choices:
        config_lib.from_dict(_set(path, choice))
    typo = choices[0][:-1]
    message = _message(_set(path, typo))
    assert f"config.{path} = {typo!r}" in message and ", ".join(choices) in message
    assert f"did you mean '{choices[0]}'?" in message


@pytest.mark.parametrize(
    "architecture, head, objective, parts",
    [
        ("encoder", "lm", "causal", ["'causal'", "architecture = 'encoder'", "takes mlm"]),
        ("decoder", "lm", "mlm", ["'mlm'", "causal, prefix, span_corruption, ul2, seq2seq"]),
        ("encoder_decoder", "lm", "prefix", ["'prefix'", "span_corruption, ul2, seq2seq"]),
        ("encoder", "lm", "token", ["'token'", "it needs model.head = 'token'"]),
        ("encoder", "span", "mlm", ["'mlm'", "model.head = 'span' takes span"]),
        ("encoder", "none", "mlm", ["model.head = 'none'", "use lm"]),
    ],
)
def test_objective_that_the_model_does_not_take(architecture, head, objective, parts):
    path = "model.architecture;model.head;objective.name"
    config = config_lib.from_dict(_set(path, [architecture, head, objective]))
    with pytest.raises(errors.UserError) as error:
        config_lib.check_objective(config)
    assert all(part in str(error.value) for part in ["config.", *parts]), error.value


@pytest.mark.parametrize(
    "objective, packing", [("causal", "none"), ("seq2seq", "concat"), ("sequence", "concat")]
)
def test_packing_that_the_objective_does_not_take(objective, packing):
    head = objective if objective == "sequence" else "lm"
    path = "objective.name;model.head;data.packing"
    config = config_lib.from_dict(_set(path, [objective, head, packing]))
    with pytest.raises(errors.UserError, match=f"data.packing = '{packing}'.*takes packed or "):
        config_lib.check_objective(config)


@pytest.mark.parametrize(
    "objective, data, parts",
    [
        ("token", {"input_fields": "a,b"}, ["data.input_fields = 'a,b'", "list of words"]),
        ("span", {"input_fields": "a"}, ["data.input_fields = 'a'", "question,context"]),
        ("sequence", {"source": "text:x"}, ["data.source = 'text:x'", "jsonl:GLOB"]),
    ],
)
def test_examples_that_the_objective_does_not_take(objective, data, parts):
    model = config_lib.ModelConfig(architecture="encoder", head=objective)
    config = config_lib.RunConfig(
        model=model,
        data=config_lib.DataConfig(**data),
        objective=config_lib.ObjectiveConfig(name=objective),
    )
    config_lib.check(config)
    with pytest.raises(errors.UserError) as error:
        config_lib.check_objective(config)
    assert all(part in str(error.value) for part in parts), error.value


def test_each_objective_is_for_some_model():
    taken = set()
    for architecture, head, objective in itertools.product(
        config_lib.ARCHITECTURES, config_lib.HEADS, config_lib.OBJECTIVES
    ):
        path = "model.architecture;model.head;objective.name"
        if architecture == "encoder_decoder" and head != "lm":
            continue
        config = config_lib.from_dict(_set(path, [architecture, head, objective]))
        fields = "question,context" if objective == "span" else "text"
        data = dataclasses.replace(config.data, input_fields=fields)
        try:
            config_lib.check_objective(dataclasses.replace(config, data=data))
        except errors.UserError:
            continue
        taken.add((architecture, objective))
        assert (head == objective) == (head != "lm")
    assert len(taken) == 8 + 4 + 3


@pytest.mark.parametrize(
    "path, value",
    [
        ("optim.warmup_steps", 1000),
        ("optim.accumulation_steps", 8),
        ("data.sequence_length", 1024),
        ("model.num_kv_heads", 1),
        ("model.head_dim", 48),
        ("model.positions;model.head_dim", ["none", 7]),
        ("optim.learning_rate", 1),
        ("model.num_layers", 2.0),
        ("objective.name;data.source", ["seq2seq", "jsonl:x.jsonl"]),
        ("mesh.data;mesh.tensor", [2, -1]),
        ("optim.clip_norm", None),
    ],
)
def test_edges_that_will_do(path, value):
    config_lib.from_dict(_set(path, value))


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
    config = config_lib.from_dict(_set("optim.learning_rate;model.num_layers", [1, 2.0]))
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
        ("llm_jax.evaluate", {"workdir", "step"} | PROCESSES),
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
