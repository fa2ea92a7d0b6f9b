"""What will not do in a config is refused in one line that says what would."""

import dataclasses
import itertools

import pytest

from llm_jax import config as config_lib
from llm_jax import errors


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
        (
            "model.rope_scaling;model.rope_beta_slow",
            ["yarn", 32.0],
            ["model.rope_beta_slow = 32.0", "rope_beta_fast = 32.0"],
        ),
        ("model.rope_scaling;model.rope_theta", ["yarn", 1.0], ["rope_theta = 1.0", "above 1"]),
        ("model.rope_attention_factor", 0.0, ["model.rope_attention_factor = 0.0", "None"]),
        ("data.sequence_length", 2048, ["data.sequence_length = 2048", "1024", "max_length"]),
        ("optim.accumulation_steps", 3, ["optim.accumulation_steps = 3", "batch_size = 8"]),
        ("optim.warmup_steps", 1001, ["optim.warmup_steps = 1001", "num_steps = 1000"]),
        ("optim.soap_every", 0, ["optim.soap_every = 0", "at least 1"]),
        ("optim.name", "schedule_free", ["optim.schedule = 'cosine'", "use 'constant'"]),
        (
            "optim.name;optim.schedule;optim.b1",
            ["schedule_free", "constant", 0.0],
            ["optim.b1 = 0.0", "above 0"],
        ),
        (
            "optim.name;optim.schedule;tune.layer_decay",
            ["schedule_free", "constant", 0.9],
            ["tune.layer_decay = 0.9", "use 1.0"],
        ),
        (
            "optim.name;optim.schedule;tune.frozen_layers",
            ["schedule_free", "constant", 1],
            ["tune.frozen_layers = 1", "use tune.freeze"],
        ),
        (
            "optim.name;optim.schedule;model.moe.num_experts",
            ["schedule_free", "constant", 4],
            ["optim.name = 'schedule_free'", "dense"],
        ),
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
        # Latents.
        ("model.kv_latent_dim", 0, ["model.kv_latent_dim = 0", "at least 1"]),
        ("model.q_latent_dim", 8, ["model.q_latent_dim = 8", "set model.kv_latent_dim"]),
        ("model.value_head_dim", 8, ["model.value_head_dim = 8", "leave it None"]),
        (
            "model.kv_latent_dim;model.num_kv_heads",
            [8, 2],
            ["model.num_kv_heads = 2", "kv_latent_dim = 8", "must be None"],
        ),
        (
            "model.kv_latent_dim;model.positions",
            [8, "alibi"],
            ["model.positions = 'alibi'", "must be 'rope'"],
        ),
        (
            "model.kv_latent_dim;model.architecture",
            [8, "encoder_decoder"],
            ["model.architecture = 'encoder_decoder'", "must be 'decoder'"],
        ),
        ("model.kv_latent_dim;model.use_bias", [8, True], ["model.use_bias = True", "have none"]),
        ("model.kv_latent_dim;model.use_qkv_bias", [8, True], ["model.use_qkv_bias = True"]),
        ("model.kv_latent_dim;model.use_qk_norm", [8, True], ["use_qk_norm = True", "latents"]),
        ("model.kv_latent_dim;model.rope_fraction", [8, 0.5], ["rope_fraction = 0.5"]),
        ("model.kv_latent_dim;model.rope_head_dim", [8, 3], ["rope_head_dim = 3", "even"]),
        ("model.kv_latent_dim;model.head_dim", [8, 6], ["rope_head_dim = None", "not 3"]),
        (
            "model.kv_latent_dim;model.attention",
            [8, "jax_nn"],
            ["model.attention = 'jax_nn'", "48 and 32", "value_head_dim = 48"],
        ),
        ("model.latent_norm_epsilon", 0.0, ["model.latent_norm_epsilon = 0.0"]),
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
        # What schedule_free asks for, and nothing else minds.
        config_lib.from_dict(_set(f"optim.schedule;{path}", ["constant", choice]))
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
        ("encoder", "none", "mlm", ["model.head = 'none'", "it needs model.head = 'lm'"]),
        ("encoder", "lm", "contrastive", ["it needs model.head = 'none'"]),
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
        ("contrastive", {"input_fields": "a,b"}, ["data.input_fields = 'a,b'", "takes one"]),
        ("sequence", {"source": "text:x"}, ["data.source = 'text:x'", "jsonl:GLOB"]),
        ("chat", {"input_fields": "a,b"}, ["data.input_fields = 'a,b'", "of a conversation"]),
        ("chat", {"tokenizer": "train_bpe:300"}, ["'train_bpe:300'", "workdir:PATH"]),
        ("preference", {"target_field": "a"}, ["data.target_field = 'a'", "chosen,rejected"]),
        ("preference", {"target_field": "a,b"}, ["tune.start = ''", "name its workdir"]),
    ],
)
def test_examples_that_the_objective_does_not_take(objective, data, parts):
    is_of_decoder = objective in config_lib.CHAT_OBJECTIVES
    heads = {"contrastive": "none"} | dict.fromkeys(config_lib.CHAT_OBJECTIVES, "lm")
    head = heads[objective] if objective in heads else objective
    architecture = "decoder" if is_of_decoder else "encoder"
    model = config_lib.ModelConfig(architecture=architecture, head=head)
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
        target = "chosen,rejected" if objective == "preference" else "label"
        data = dataclasses.replace(config.data, input_fields=fields, target_field=target)
        tune = dataclasses.replace(config.tune, start="somewhere")
        try:
            config_lib.check_objective(dataclasses.replace(config, data=data, tune=tune))
        except errors.UserError:
            continue
        taken.add((architecture, objective))
        wanted = {"contrastive": "none"} | {name: name for name in config_lib.HEADS}
        assert head == (wanted[objective] if objective in wanted else "lm")
    assert len(taken) == 11 + 5 + 3


@pytest.mark.parametrize(
    "path, value",
    [
        ("optim.warmup_steps", 1000),
        ("optim.accumulation_steps", 8),
        ("data.sequence_length", 1024),
        ("model.num_kv_heads", 1),
        ("model.head_dim", 48),
        ("model.positions;model.head_dim", ["none", 7]),
        ("model.kv_latent_dim;model.window", [8, 4]),
        ("model.kv_latent_dim;model.attention;model.value_head_dim", [8, "jax_nn", 48]),
        ("optim.learning_rate", 1),
        ("model.num_layers", 2.0),
        ("objective.name;data.source", ["seq2seq", "jsonl:x.jsonl"]),
        ("mesh.data;mesh.tensor", [2, -1]),
        ("optim.clip_norm", None),
    ],
)
def test_edges_that_will_do(path, value):
    config_lib.from_dict(_set(path, value))
