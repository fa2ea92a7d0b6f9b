"""What contradicts what, as far as it shows before a device is looked at."""

import math

from llm_jax import errors
from llm_jax.config import checks_moe
from llm_jax.config import checks_private
from llm_jax.config import checks_train
from llm_jax.config import schema
from llm_jax.config import values


def check(config: schema.RunConfig) -> None:
    """Checks each value and every contradiction that shows before a device is looked at.

    Raises:
      errors.UserError: names the field, its value and what would do.
    """
    _check_model(config.model)
    _check_data(config)
    _check_objective_values(config)
    checks_train.check(config)
    _check_tune(config)
    _check_mesh(config.mesh)
    checks_moe.check_run(config)
    checks_private.check(config)
    is_ring = config.mesh.context == "ring"
    if is_ring and (config.model.architecture == "encoder_decoder" or config.model.head != "lm"):
        raise errors.UserError(
            "config.mesh.context = 'ring' orders the tokens of one sequence, which model.architecture ="
            f" {config.model.architecture!r} with model.head = {config.model.head!r} does not take; use"
            " context = 'gather'"
        )
    if is_ring and config.model.attention == "jax_nn":
        raise errors.UserError(
            "config.mesh.context = 'ring' needs the logsumexp of attention, which model.attention ="
            " 'jax_nn' does not give; use attention = 'auto', or context = 'gather'"
        )


def _check_tune(config: schema.RunConfig) -> None:
    lora, tune, model = config.model.lora, config.tune, config.model
    values.require_at_least("model.lora", lora, 0, "rank")
    holds = math.isfinite(lora.alpha) and lora.alpha > 0
    values.require(holds, "model.lora.alpha", lora.alpha, "it must be above 0 and finite")
    if lora.is_on:
        has_some = bool(lora.targets.replace(",", " ").strip())
        values.require(has_some, "model.lora.targets", lora.targets, "name some, or '*' for all")
    fewest = min(model.num_layers, model.decoder_layers)
    values.require(
        0 <= tune.frozen_layers <= fewest,
        "tune.frozen_layers",
        tune.frozen_layers,
        f"it must be from 0 to {fewest}, the layers that there are",
    )
    holds = 0.0 < tune.layer_decay <= 1.0
    values.require(holds, "tune.layer_decay", tune.layer_decay, "it must be above 0 and at most 1")


def _check_model(m: schema.ModelConfig) -> None:
    sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    values.require_at_least("model", m, 1, *sizes, "vocab_size", "max_length", "window")
    values.require_at_least("model", m, 1, "attention_chunk", "rope_original_length")
    values.require_at_least("model", m, 0.0, "init_stddev")
    values.require_at_least("model", m, 1, "base_width", "base_depth", "base_head_dim")
    values.require_choice("model", m, "parametrisation", schema.PARAMETRISATIONS)
    values.require(
        m.parametrisation == "standard" or not m.moe.is_on,
        "model.parametrisation",
        m.parametrisation,
        "models with experts have 'standard': nothing is known of their routers",
    )
    values.require_choice("model", m, "positions", schema.POSITIONS)
    values.require_choice("model", m, "rope_scaling", schema.ROPE_SCALINGS)
    values.require_choice("model", m, "norm", schema.NORMS)
    values.require_choice("model", m, "norm_placement", schema.NORM_PLACEMENTS)
    values.require_choice("model", m, "activation", schema.ACTIVATIONS)
    values.require_choice("model", m, "dtype", schema.DTYPES)
    values.require_choice("model", m, "param_dtype", schema.DTYPES[1:])
    values.require_choice("model", m, "attention", schema.ATTENTIONS)
    if m.attention == "jax_nn" and m.attention_softcap is not None:
        raise errors.UserError(
            "config.model.attention = 'jax_nn' has no soft-cap, but attention_softcap ="
            f" {m.attention_softcap}; set it to None, or use attention 'auto'"
        )
    values.require_choice("model", m, "remat", schema.REMATS)
    values.require_fraction("model", m, "dropout", "rope_fraction")
    values.require(m.dropout < 1.0, "model.dropout", m.dropout, "1.0 would drop everything")
    for name in ("attention_softcap", "logit_softcap", "norm_epsilon", "rope_theta"):
        value = getattr(m, name)
        if value is not None:
            holds = math.isfinite(value) and value > 0
            values.require(holds, f"model.{name}", value, "it must be above 0 and finite")
    if m.head_dim is None:
        values.require(
            m.embed_dim % m.num_heads == 0,
            "model.num_heads",
            m.num_heads,
            f"it must divide embed_dim = {m.embed_dim}, or model.head_dim must be given",
        )
    values.require(
        m.num_heads % m.kv_heads == 0,
        "model.num_kv_heads",
        m.kv_heads,
        f"it must divide num_heads = {m.num_heads}",
    )
    if m.positions == "rope":
        _check_rope(m)
    _check_family(m)
    _check_latents(m)
    checks_moe.check(m)


def _check_rope(m: schema.ModelConfig) -> None:
    values.require(
        m.kv_latent_dim is not None or (schema.rope_width(m) % 2 == 0 and schema.rope_width(m) > 0),
        "model.rope_fraction",
        m.rope_fraction,
        f"{m.rope_fraction} of head width {m.head_width} is {schema.rope_width(m)}; RoPE rotates"
        " pairs, so it must come out even and above 0",
    )
    values.require_at_least("model", m, 1.0, "rope_scaling_factor")
    bounds = {
        "llama3": ("rope_low_freq_factor", "rope_high_freq_factor"),
        "yarn": ("rope_beta_slow", "rope_beta_fast"),
    }
    values.require(
        m.rope_scaling != "yarn" or m.rope_theta > 1,
        "model.rope_theta",
        m.rope_theta,
        "rope_scaling = 'yarn' goes by wavelengths that grow: it must be above 1",
    )
    if m.rope_scaling in bounds:
        low, high = bounds[m.rope_scaling]
        value, most = getattr(m, low), getattr(m, high)
        holds = 0 < value < most
        values.require(holds, f"model.{low}", value, f"it must lie in (0, {high} = {most})")


def _check_latents(m: schema.ModelConfig) -> None:
    """Checks multi-head latent attention: what it needs, and what it leaves no room for."""
    sizes = ("kv_latent_dim", "q_latent_dim", "rope_head_dim", "value_head_dim")
    values.require_at_least("model", m, 1, *sizes)
    holds = math.isfinite(m.latent_norm_epsilon) and m.latent_norm_epsilon > 0
    path = "model.latent_norm_epsilon"
    values.require(holds, path, m.latent_norm_epsilon, "it must be above 0 and finite")
    if m.kv_latent_dim is None:
        for name in sizes[1:]:
            value = getattr(m, name)
            would_do = "it is of multi-head latent attention: set model.kv_latent_dim, or leave it"
            values.require(value is None, f"model.{name}", value, f"{would_do} None")
        return
    wanted = {
        "architecture": ("decoder", "only a decoder attends to latents"),
        "positions": ("rope", "beside its latent a key has a part that is rotated"),
        "num_kv_heads": (None, "every head makes keys of the latent, which takes their place"),
        "use_qk_norm": (False, "latents have norms instead"),
        "use_bias": (False, "projections from and to latents have none"),
        "use_qkv_bias": (False, "projections from and to latents have none"),
        "rope_fraction": (1.0, "rope_head_dim says how much of a head is rotated"),
    }
    for name, (value, why) in wanted.items():
        path, given = f"model.{name}", getattr(m, name)
        hint = f"with model.kv_latent_dim = {m.kv_latent_dim} it must be {value!r}: {why}"
        values.require(given == value, path, given, hint)
    width = m.rope_head_width
    values.require(
        width % 2 == 0 and width > 0,
        "model.rope_head_dim",
        m.rope_head_dim,
        f"RoPE rotates pairs, so it must be even and above 0, not {width}",
    )
    values.require(
        m.attention != "jax_nn" or m.key_width == m.value_width,
        "model.attention",
        m.attention,
        f"it needs keys and values of one width, and those of latents have {m.key_width} and"
        f" {m.value_width}; use 'auto', or value_head_dim = {m.key_width}",
    )


def _check_family(m: schema.ModelConfig) -> None:
    """Checks what only some families have."""
    values.require_choice("model", m, "architecture", schema.ARCHITECTURES)
    values.require_choice("model", m, "head", schema.HEADS)
    values.require_choice("model", m, "pooling", schema.POOLINGS)
    values.require_choice("model", m, "qk_norm", schema.QK_NORMS)
    values.require_at_least("model", m, 1, "num_decoder_layers", "num_labels")
    values.require_at_least("model", m, 0, "num_token_types", "decoder_start_id")
    values.require_fraction("model", m, "attention_dropout")
    values.require(
        m.attention_dropout < 1.0, "model.attention_dropout", m.attention_dropout, "below 1.0"
    )
    for name in ("attention_scale", "rope_local_theta", "rope_attention_factor"):
        value = getattr(m, name)
        holds = value is None or (math.isfinite(value) and value > 0)
        values.require(holds, f"model.{name}", value, "it must be above 0 and finite, or None")
    is_pattern = set(m.layer_pattern) <= {"L", "G"}
    values.require(is_pattern, "model.layer_pattern", m.layer_pattern, "use the letters L and G")
    values.require(
        "L" not in m.layer_pattern or m.window is not None,
        "model.layer_pattern",
        m.layer_pattern,
        "its local layers (L) need a model.window",
    )
    is_even = m.relative_buckets >= 4 and m.relative_buckets % 2 == 0
    values.require(
        is_even, "model.relative_buckets", m.relative_buckets, "use an even number from 4 on"
    )
    values.require(
        m.relative_max_distance > m.relative_buckets // 2,
        "model.relative_max_distance",
        m.relative_max_distance,
        f"it must be above relative_buckets / 2 = {m.relative_buckets // 2}",
    )
    values.require(
        m.num_decoder_layers is None or m.architecture == "encoder_decoder",
        "model.num_decoder_layers",
        m.num_decoder_layers,
        f"model.architecture = {m.architecture!r} has num_layers; leave it None",
    )
    values.require(
        m.num_token_types == 0 or m.architecture == "encoder",
        "model.num_token_types",
        m.num_token_types,
        f"model.architecture = {m.architecture!r} reads no token types; set it to 0",
    )
    values.require(
        m.architecture != "encoder_decoder" or m.head == "lm",
        "model.head",
        m.head,
        "an encoder_decoder writes text: use lm, or an encoder or a decoder for labels",
    )
    values.require(
        not m.is_entry_normalised or m.norm_placement == "pre",
        "model.is_entry_normalised",
        m.is_entry_normalised,
        f"norm_placement = {m.norm_placement!r} has no norm to leave out; use pre",
    )


def _check_data(config: schema.RunConfig) -> None:
    d = config.data
    values.require_at_least("data", d, 1, "batch_size", "sequence_length")
    values.require_at_least("data", d, 0, "prefetch")
    values.require_choice("data", d, "packing", schema.PACKINGS)
    values.require(0.0 < d.eval_fraction < 1.0, "data.eval_fraction", d.eval_fraction, "use (0, 1)")
    values.require(
        d.sequence_length <= config.model.max_length,
        "data.sequence_length",
        d.sequence_length,
        f"the model has {config.model.max_length} positions (model.max_length)",
    )
    values.require_choice("data", d, "too_long", schema.TOO_LONG)
    kind, _, rest = d.source.partition(":")
    values.require(
        kind in ("tfds", "text", "jsonl") and bool(rest),
        "data.source",
        d.source,
        "use tfds:NAME[/config], text:GLOB or jsonl:GLOB:field",
    )
    values.require(
        kind != "jsonl" or ":" in rest or config.objective.name not in schema.TEXT_OBJECTIVES,
        "data.source",
        d.source,
        "jsonl needs the field that holds the text: jsonl:GLOB:field",
    )
    fields = d.input_fields.split(",")
    values.require(
        all(field.strip() for field in fields) and len(fields) <= 2,
        "data.input_fields",
        d.input_fields,
        "name one field, or two with a comma between",
    )


def _check_objective_values(config: schema.RunConfig) -> None:
    o, m = config.objective, config.model
    values.require_choice("objective", o, "name", schema.OBJECTIVES)
    values.require_fraction(
        "objective", o, "mask_rate", "noise_density", "min_prefix", "max_prefix"
    )
    for name in ("mask_rate", "noise_density"):
        value = getattr(o, name)
        values.require(0.0 < value < 1.0, f"objective.{name}", value, "use (0, 1)")
    values.require_at_least("objective", o, 1, "mean_span_length", "target_length", "num_sentinels")
    values.require(o.temperature > 0.0, "objective.temperature", o.temperature, "use one above 0")
    values.require(
        o.min_prefix <= o.max_prefix,
        "objective.min_prefix",
        o.min_prefix,
        f"it must not be above max_prefix = {o.max_prefix}",
    )
    # Spans and the stretches before them take turns, and a stretch has at least a token.
    values.require(
        o.noise_density * (1.0 + 1.0 / o.mean_span_length) <= 1.0,
        "objective.noise_density",
        o.noise_density,
        f"spans of {o.mean_span_length} tokens on average leave no token between them; use longer"
        " spans or less noise",
    )
    values.require(
        m.architecture != "encoder_decoder" or o.target_length <= m.max_length,
        "objective.target_length",
        o.target_length,
        f"the model has {m.max_length} positions (model.max_length)",
    )


def check_objective(config: schema.RunConfig) -> None:
    """Checks that batches of the objective are what the model and its head are trained on.

    Not part of `check`: a model that is only sampled from, or built upon, needs no objective.

    Raises:
      errors.UserError: names the field, its value and what would do.
    """
    name, m, packing = config.objective.name, config.model, config.data.packing
    suited = [one for one in schema.OBJECTIVES_OF[m.architecture] if m.head == _head_of(one)]
    need = f"; it needs model.head = {_head_of(name)!r}" if m.head != _head_of(name) else ""
    values.require(
        name in suited,
        "objective.name",
        name,
        f"model.architecture = {m.architecture!r} with model.head = {m.head!r} takes"
        f" {', '.join(suited) or 'none'}{need}",
    )
    packings = ("packed", "concat") if name in schema.TEXT_OBJECTIVES else ("packed", "none")
    values.require(
        packing in packings,
        "data.packing",
        packing,
        f"objective.name = {name!r} takes {' or '.join(packings)}",
    )
    values.require(
        name == "sequence" or not config.data.preprocessing,
        "data.preprocessing",
        config.data.preprocessing,
        "its stages are for objective.name = 'sequence': other texts are written, or looked for by place",
    )
    if name not in schema.TEXT_OBJECTIVES:
        _check_examples(config.data, name)
    values.require(
        name != "preference" or bool(config.tune.start),
        "tune.start",
        config.tune.start,
        "objective.name = 'preference' compares with the model that training starts from: name its workdir",
    )
    trains_tokenizer = config.data.tokenizer.startswith("train_bpe")
    values.require(
        name not in schema.CHAT_OBJECTIVES or not trains_tokenizer,
        "data.tokenizer",
        config.data.tokenizer,
        f"no tokenizer is trained on conversations (objective.name = {name!r}): use that of a model, workdir:PATH",
    )


def _head_of(objective: str) -> str:
    if objective == "contrastive":
        return "none"
    return objective if objective in schema.LABEL_OBJECTIVES else "lm"


def _check_examples(d: schema.DataConfig, name: str) -> None:
    values.require(
        not d.source.startswith("text:"),
        "data.source",
        d.source,
        f"examples for objective.name = {name!r} come from tfds:NAME[/config] or jsonl:GLOB",
    )
    num_fields = len(d.input_fields.split(","))
    values.require(
        name != "token" or num_fields == 1,
        "data.input_fields",
        d.input_fields,
        "objective.name = 'token' takes the one field that has the list of words",
    )
    values.require(
        name != "contrastive" or num_fields == 1,
        "data.input_fields",
        d.input_fields,
        "objective.name = 'contrastive' takes one; data.target_field is that of the text beside it",
    )
    values.require(
        name not in schema.CHAT_OBJECTIVES or num_fields == 1,
        "data.input_fields",
        d.input_fields,
        f"objective.name = {name!r} takes one, of a conversation",
    )
    values.require(
        name != "preference" or len(d.target_field.split(",")) == 2,
        "data.target_field",
        d.target_field,
        "objective.name = 'preference' takes two, of the answer that is preferred and the other:"
        " chosen,rejected",
    )
    values.require(
        name != "span" or num_fields == 2,
        "data.input_fields",
        d.input_fields,
        "objective.name = 'span' takes two, of which the second holds the answer: question,context",
    )


def _check_mesh(mesh: schema.MeshConfig) -> None:
    values.require_choice("mesh", mesh, "rules", schema.RULES)
    values.require_choice("mesh", mesh, "kv_heads", schema.KV_HEADS)
    values.require_choice("mesh", mesh, "context", schema.CONTEXTS)
    for axis in schema.MESH_AXES:
        size = getattr(mesh, axis)
        values.require(
            size == -1 or size >= 1, f"mesh.{axis}", size, "use a count, or -1 for the rest"
        )
    values.require(
        mesh.shape.count(-1) <= 1,
        "mesh",
        dict(zip(schema.MESH_AXES, mesh.shape)),
        "only one may be -1",
    )
