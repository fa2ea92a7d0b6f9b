"""Every knob of a run: its default, its unit and the checks across fields.

A config file builds an `ml_collections.ConfigDict` from `new()`, states its differences, and the
command line overrides single keys. `from_config_dict` turns the result, strictly and once, into the
frozen `RunConfig` below; nothing behind that door reads a ConfigDict.
"""

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from llm_jax import errors

POSITIONS = ("rope", "learned", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "llama3")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post")
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "relu_squared")
REMATS = ("none", "full", "dots", "qkv", "attention_output", "offload")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "reference", "chunked", "jax_nn", "pallas")
CROSS_ENTROPIES = ("auto", "reference", "chunked", "pallas")
PACKINGS = ("packed", "concat")
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")
NONFINITE = ("stop", "skip")
RULES = ("fsdp", "fsdp_tp", "fsdp_cp", "multislice", "dp", "tp")
KV_HEADS = ("sharded", "replicated")
CONTEXTS = ("gather", "ring")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of a Transformer. Widths are in elements, lengths in tokens."""

    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: embed_dim / num_heads
    mlp_dim: int | None = None  # None: 4 * embed_dim
    vocab_size: int = 256
    max_length: int = 1024  # positions of the learned table; the KV cache never exceeds it

    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # of head_dim that is rotated (partial RoPE)
    rope_scaling: str = "none"
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # llama3 scaling: wavelengths longer than this are divided
    rope_high_freq_factor: float = 4.0  # llama3 scaling: wavelengths shorter than this are kept
    rope_original_length: int = 8192  # llama3 scaling: length of the unscaled pretraining

    norm: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    is_gated: bool = True  # SwiGLU, GEGLU: the activation gates a second projection
    use_bias: bool = False  # in projections and in LayerNorm
    tie_embeddings: bool = True
    use_qk_norm: bool = False  # RMSNorm over each head's queries and keys
    window: int | None = None  # tokens a query sees, itself included; None: all before it
    attention_softcap: float | None = None  # scores are capped to +-this by tanh
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_stddev: float = 0.02

    dtype: str = "auto"  # of activations and matmuls; auto: what the platform is fast at
    param_dtype: str = "float32"
    attention: str = "auto"
    attention_chunk: int = 512  # queries scored at a time by the chunked implementation
    scan_layers: bool | None = None  # None: scanned on accelerators, unrolled on a CPU
    remat: str = "none"  # offload: what layers begin with and attention gives waits in host memory

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "tfds:state_of_the_union"  # tfds:NAME[/config] | text:GLOB | jsonl:GLOB:field
    tokenizer: str = "bytes"  # bytes | bpe:PATH | train_bpe:VOCAB_SIZE | sentencepiece:PATH
    batch_size: int = 8  # sequences in one optimiser step, over all devices
    sequence_length: int = 256  # tokens
    packing: str = "packed"  # packed: documents do not see each other; concat: they do
    train_split: str = "train"
    eval_split: str = "validation"
    eval_fraction: float = 0.05  # held out of text: and jsonl: sources, which have no splits
    cache_dir: str = "~/.cache/llm_jax"  # token caches and prepared TFDS data
    prefetch: int = 2  # batches made ahead of the step that reads them


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule, clipping and accumulation."""

    name: str = "adamw"
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.1  # on matrices and tables; not on biases and norm scales
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_lr_fraction: float = 0.1  # of the peak, at the last step
    cooldown_fraction: float = 0.2  # wsd: the last part of the run, which decays linearly
    b1: float = 0.9  # first moment (adamw, lion, muon's adam), momentum (sgd)
    b2: float = 0.95  # second moment (adamw, lion, muon's adam)
    epsilon: float = 1e-8
    muon_momentum: float = 0.95
    clip_norm: float | None = 1.0  # of the global gradient; None: no clipping
    accumulation_steps: int = 1  # microbatches that a step's batch is split into
    offload_state: bool = False  # moments wait in host memory for their update


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, cadence and safety of a run. Everything `_every` counts optimiser steps."""

    num_steps: int = 1000
    seed: int = 0  # of initialisation, data order and dropout
    log_every: int = 10
    eval_every: int = 100  # 0: never
    eval_steps: int = 0  # batches of one evaluation; 0: the whole split
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)^2)
    cross_entropy: str = "auto"  # by the size of the logits, which only reference holds whole
    cross_entropy_chunk: int = 1024  # tokens of a device whose logits exist at a time
    on_nonfinite: str = "stop"  # loss or gradient NaN or Inf: stop the run, or skip the update


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the state is saved and what is kept."""

    every: int = 100  # steps; 0: only at the end and on SIGTERM
    max_to_keep: int = 3  # latest ones; the best by evaluation loss is kept beside them


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    replica: int = 1  # data parallel over the slow network (across slices)
    data: int = -1  # batch and weights (FSDP)
    seq: int = 1  # sequence (context parallel)
    expert: int = 1
    tensor: int = 1  # heads, feed-forward width and vocabulary
    rules: str = "fsdp"
    context: str = "gather"  # how keys reach the queries of a cut sequence: gather | ring
    kv_heads: str = "sharded"  # sharded | replicated over tensor: their query groups are sharded

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.replica, self.data, self.seq, self.expert, self.tensor)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    slice: str = "cpu"  # what the config was written for: cpu, v5e:4x4, ...
    profile: bool = False  # write a trace of a few steps to WORKDIR/profile
    compilation_cache: str = "~/.cache/llm_jax/xla"  # "" turns it off


MESH_AXES = ("replica", "data", "seq", "expert", "tensor")


def new() -> ml_collections.ConfigDict:
    """Returns the defaults as a ConfigDict that takes new values but no new keys."""
    return _to_config_dict(RunConfig())


def _to_config_dict(section: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        elif value is None or type(None) in typing.get_args(field.type):
            (kind,) = set(typing.get_args(field.type)) - {type(None)}
            result[field.name] = config_dict.placeholder(kind)
            result[field.name] = value
        else:
            result[field.name] = value
    return result.lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a frozen config as nested plain dicts, for JSON."""
    return dataclasses.asdict(config)


def from_config_dict(raw: ml_collections.ConfigDict) -> RunConfig:
    """Converts and checks a ConfigDict.

    Raises:
      errors.UserError: an unknown key, a wrong type or a contradiction; one line that names the
        field, its value and what would do.
    """
    return from_dict(raw.to_dict())


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """Converts and checks nested dicts, such as those of `config.json`. Raises as above."""
    config = _build(RunConfig, raw, "config")
    check(config)
    return config


def _build(kind: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise errors.UserError(f"{path} is {raw!r}; it takes a section of settings")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in fields:
            hint = errors.nearest(name, fields) or f"; {path} has {', '.join(fields)}"
            raise errors.UserError(f"{path}.{name} is not a setting{hint}")
    values = {}
    for name, value in raw.items():
        target = fields[name].type
        if dataclasses.is_dataclass(target):
            values[name] = _build(target, value, f"{path}.{name}")
        else:
            values[name] = _typed(value, target, f"{path}.{name}")
    return kind(**values)


def _typed(value: Any, target: Any, path: str) -> Any:
    allowed = typing.get_args(target) if isinstance(target, types.UnionType) else (target,)
    if value is None and type(None) in allowed:
        return None
    (kind,) = [k for k in allowed if k is not type(None)]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    optional = " or None" if type(None) in allowed else ""
    raise errors.UserError(
        f"{path} = {value!r} is a {type(value).__name__}; it takes a {kind.__name__}{optional}"
    )


def _require(holds: bool, path: str, value: Any, would_do: str) -> None:
    if not holds:
        raise errors.UserError(f"config.{path} = {value!r} will not do: {would_do}")


def _require_choice(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    hint = errors.nearest(value, choices)
    _require(
        value in choices, f"{section}.{name}", value, f"choose from {', '.join(choices)}{hint}"
    )


def _require_at_least(section: str, config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            holds = math.isfinite(value) and value >= minimum
            _require(holds, f"{section}.{name}", value, f"it must be at least {minimum}")


def _require_fraction(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0.0 <= value <= 1.0, f"{section}.{name}", value, "it must lie in [0, 1]")


def check(config: RunConfig) -> None:
    """Checks each value and every contradiction that shows before a device is looked at.

    Raises:
      errors.UserError: names the field, its value and what would do.
    """
    _check_model(config.model)
    _check_data(config)
    _check_optim(config)
    _check_mesh(config.mesh)
    if config.mesh.context == "ring" and config.model.attention == "jax_nn":
        raise errors.UserError(
            "config.mesh.context = 'ring' needs the logsumexp of attention, which model.attention ="
            " 'jax_nn' does not give; use attention = 'auto', or context = 'gather'"
        )


def _check_model(m: ModelConfig) -> None:
    sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    _require_at_least("model", m, 1, *sizes, "vocab_size", "max_length", "window")
    _require_at_least("model", m, 1, "attention_chunk", "rope_original_length")
    _require_at_least("model", m, 0.0, "init_stddev")
    _require_choice("model", m, "positions", POSITIONS)
    _require_choice("model", m, "rope_scaling", ROPE_SCALINGS)
    _require_choice("model", m, "norm", NORMS)
    _require_choice("model", m, "norm_placement", NORM_PLACEMENTS)
    _require_choice("model", m, "activation", ACTIVATIONS)
    _require_choice("model", m, "dtype", DTYPES)
    _require_choice("model", m, "param_dtype", DTYPES[1:])
    _require_choice("model", m, "attention", ATTENTIONS)
    if m.attention == "jax_nn" and m.attention_softcap is not None:
        raise errors.UserError(
            "config.model.attention = 'jax_nn' has no soft-cap, but attention_softcap ="
            f" {m.attention_softcap}; set it to None, or use attention 'auto'"
        )
    _require_choice("model", m, "remat", REMATS)
    _require_fraction("model", m, "dropout", "rope_fraction")
    _require(m.dropout < 1.0, "model.dropout", m.dropout, "1.0 would drop everything")
    for name in ("attention_softcap", "logit_softcap", "norm_epsilon", "rope_theta"):
        value = getattr(m, name)
        if value is not None:
            holds = math.isfinite(value) and value > 0
            _require(holds, f"model.{name}", value, "it must be above 0 and finite")
    if m.head_dim is None:
        _require(
            m.embed_dim % m.num_heads == 0,
            "model.num_heads",
            m.num_heads,
            f"it must divide embed_dim = {m.embed_dim}, or model.head_dim must be given",
        )
    _require(
        m.num_heads % m.kv_heads == 0,
        "model.num_kv_heads",
        m.kv_heads,
        f"it must divide num_heads = {m.num_heads}",
    )
    if m.positions == "rope":
        _require(
            rope_width(m) % 2 == 0 and rope_width(m) > 0,
            "model.rope_fraction",
            m.rope_fraction,
            f"{m.rope_fraction} of head width {m.head_width} is {rope_width(m)}; RoPE rotates"
            " pairs, so it must come out even and above 0",
        )
        _require_at_least("model", m, 1.0, "rope_scaling_factor")
    if m.positions == "rope" and m.rope_scaling == "llama3":
        _require(
            0 < m.rope_low_freq_factor < m.rope_high_freq_factor,
            "model.rope_low_freq_factor",
            m.rope_low_freq_factor,
            f"it must lie in (0, rope_high_freq_factor = {m.rope_high_freq_factor})",
        )


def rope_width(m: ModelConfig) -> int:
    """Returns how many elements of each head RoPE rotates."""
    return round(m.rope_fraction * m.head_width)


def _check_data(config: RunConfig) -> None:
    d = config.data
    _require_at_least("data", d, 1, "batch_size", "sequence_length")
    _require_at_least("data", d, 0, "prefetch")
    _require_choice("data", d, "packing", PACKINGS)
    _require(0.0 < d.eval_fraction < 1.0, "data.eval_fraction", d.eval_fraction, "use (0, 1)")
    _require(
        d.sequence_length <= config.model.max_length,
        "data.sequence_length",
        d.sequence_length,
        f"the model has {config.model.max_length} positions (model.max_length)",
    )
    kind, _, rest = d.source.partition(":")
    _require(
        kind in ("tfds", "text", "jsonl") and bool(rest),
        "data.source",
        d.source,
        "use tfds:NAME[/config], text:GLOB or jsonl:GLOB:field",
    )
    _require(
        kind != "jsonl" or ":" in rest,
        "data.source",
        d.source,
        "jsonl needs the field that holds the text: jsonl:GLOB:field",
    )


def _check_optim(config: RunConfig) -> None:
    o, t = config.optim, config.train
    _require_choice("optim", o, "name", OPTIMIZERS)
    _require_choice("optim", o, "schedule", SCHEDULES)
    _require_fraction("optim", o, "final_lr_fraction", "cooldown_fraction", "b1", "b2")
    _require_fraction("optim", o, "muon_momentum")
    _require_at_least("optim", o, 0, "learning_rate", "weight_decay", "warmup_steps", "epsilon")
    _require_at_least("optim", o, 1, "accumulation_steps")
    for name in ("b1", "b2"):
        _require(getattr(o, name) < 1.0, f"optim.{name}", getattr(o, name), "use [0, 1)")
    if o.clip_norm is not None:
        _require(o.clip_norm > 0, "optim.clip_norm", o.clip_norm, "above 0, or None for none")
    _require_at_least("train", t, 1, "num_steps", "log_every", "cross_entropy_chunk")
    _require_at_least("train", t, 0, "eval_every", "eval_steps", "z_loss", "seed")
    _require_choice("train", t, "on_nonfinite", NONFINITE)
    _require_choice("train", t, "cross_entropy", CROSS_ENTROPIES)
    _require_at_least("checkpoint", config.checkpoint, 0, "every")
    _require_at_least("checkpoint", config.checkpoint, 1, "max_to_keep")
    _require(
        o.warmup_steps <= t.num_steps,
        "optim.warmup_steps",
        o.warmup_steps,
        f"the run has train.num_steps = {t.num_steps}",
    )
    _require(
        config.data.batch_size % o.accumulation_steps == 0,
        "optim.accumulation_steps",
        o.accumulation_steps,
        f"it must divide data.batch_size = {config.data.batch_size}",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    _require_choice("mesh", mesh, "rules", RULES)
    _require_choice("mesh", mesh, "kv_heads", KV_HEADS)
    _require_choice("mesh", mesh, "context", CONTEXTS)
    for axis in MESH_AXES:
        size = getattr(mesh, axis)
        _require(size == -1 or size >= 1, f"mesh.{axis}", size, "use a count, or -1 for the rest")
    _require(
        mesh.shape.count(-1) <= 1, "mesh", dict(zip(MESH_AXES, mesh.shape)), "only one may be -1"
    )
