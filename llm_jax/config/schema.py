"""Every knob of a run: its default and its unit."""

import dataclasses

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


def rope_width(m: ModelConfig) -> int:
    """Returns how many elements of each head RoPE rotates."""
    return round(m.rope_fraction * m.head_width)
