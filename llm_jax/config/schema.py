"""Every knob of a run: its default and its unit."""

import dataclasses

ARCHITECTURES = ("decoder", "encoder", "encoder_decoder")
HEADS = ("lm", "none", "sequence", "token", "span")
POOLINGS = ("first", "mean", "last")
POSITIONS = ("rope", "learned", "sinusoidal", "relative", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "output")
QK_NORMS = ("head", "projection")
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "relu_squared")
REMATS = ("none", "full", "dots", "qkv", "attention_output", "offload")
PARAMETRISATIONS = ("standard", "mup", "completep")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "reference", "chunked", "jax_nn", "pallas")
CROSS_ENTROPIES = ("auto", "reference", "chunked", "pallas")
PACKINGS = ("packed", "concat", "none")
TOO_LONG = ("truncate", "refuse")
TEXT_OBJECTIVES = ("causal", "prefix", "mlm", "span_corruption", "ul2")
LABEL_OBJECTIVES = ("sequence", "token", "span")  # each with the head of its name
CHAT_OBJECTIVES = ("chat", "preference")  # of conversations
OBJECTIVES = (*TEXT_OBJECTIVES, "seq2seq", "contrastive", *CHAT_OBJECTIVES, *LABEL_OBJECTIVES)
OBJECTIVES_OF = {  # by architecture
    "decoder": tuple(name for name in OBJECTIVES if name != "mlm"),
    "encoder": ("mlm", "contrastive", *LABEL_OBJECTIVES),
    "encoder_decoder": ("span_corruption", "ul2", "seq2seq"),
}
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon", "soap", "schedule_free", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")
NONFINITE = ("stop", "skip")
RULES = ("fsdp", "fsdp_tp", "fsdp_cp", "fsdp_ep", "multislice", "dp", "tp")
KV_HEADS = ("sharded", "replicated")
CONTEXTS = ("gather", "ring")
ROUTERS = (
    *("softmax", "sigmoid", "switch", "gshard", "relu"),
    *("expert_choice", "sinkhorn", "base", "soft", "hash", "random"),
)
DISPATCHES = ("auto", "dense", "capacity", "sorted")
BALANCES = ("batch", "sequence")
EXPERT_STACKS = ("all", "encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts in place of the feed-forward part of some layers. They have no biases.

    What a router does, and where it is from, is in `llm_jax/models/moe/`.
    """

    num_experts: int = 0  # 0: all layers are dense
    experts_per_token: int = 2  # on average, where the router decides how many
    expert_dim: int | None = None  # feed-forward width of one; None: model.mlp_dim
    num_shared_experts: int = 0  # that all tokens have, as one of so many times expert_dim
    first_dense_layers: int = 0
    every: int = 1  # of the layers after those, the last of each so many has experts
    stacks: str = "all"  # of an encoder-decoder: which have experts

    router: str = "softmax"
    normalise_weights: bool = True  # softmax, sigmoid, sinkhorn: those of a token sum to 1
    weight_scale: float = 1.0  # multiplies these weights
    num_groups: int = 1  # softmax, sigmoid: of experts, of which a token takes the best
    groups_per_token: int = 1
    jitter: float = 0.0  # switch: training multiplies what the router reads by 1 +- this, at random
    max_experts_per_token: int | None = None  # relu: None for no bound
    slots_per_expert: int = 1  # soft: mixtures of tokens that each expert reads
    sinkhorn_iterations: int = 8
    is_router_frozen: bool = False  # a control: it stays as it was drawn

    balance_loss: float = 0.01  # weight, in each layer; softmax, sigmoid, switch, gshard, sinkhorn
    balance_over: str = "batch"  # batch | sequence
    router_z_loss: float = 0.0  # weight of mean(logsumexp(router's logits)^2), in each layer
    use_selection_bias: bool = False  # softmax, sigmoid: balance without a loss (DeepSeek-V3)
    selection_bias_rate: float = 1e-3  # of a step
    relu_penalty_rate: float = 1.2  # relu: the loss's weight grows or shrinks by this in a step

    dispatch: str = "auto"  # sorted drops nothing; capacity gives each expert places in a row
    capacity_factor: float = 1.25  # capacity, expert_choice: places over an even share of tokens
    eval_capacity_factor: float | None = None  # capacity: outside of training; None: the same
    buffer_factor: float | None = (
        None  # sorted, mesh.expert > 1: a device's room for others' slots,
    )
    # over those it has itself; None: for all there may be, so that none is dropped

    @property
    def is_on(self) -> bool:
        return self.num_experts > 0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of matrices that stay as they are (LoRA; Hu et al. 2022)."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # updates are scaled by alpha / rank
    # Patterns, by commas, of "attention/q", "cross_attention/v", "mlp/up", ...; "*": all matrices of layers.
    targets: str = "attention/q,attention/v"

    @property
    def is_on(self) -> bool:
        return self.rank > 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of a Transformer. Widths are in elements, lengths in tokens."""

    architecture: str = "decoder"
    num_layers: int = 4
    num_decoder_layers: int | None = None  # of an encoder-decoder; None: as many as num_layers
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: embed_dim / num_heads
    mlp_dim: int | None = None  # None: 4 * embed_dim
    vocab_size: int = 256
    max_length: int = 1024  # positions of the learned table; the KV cache never exceeds it

    positions: str = "rope"  # relative: T5's bias by bucket of distance, shared by all layers
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None  # in local layers, unscaled; None: as in the others
    rope_fraction: float = 1.0  # of head_dim that is rotated (partial RoPE)
    rope_scaling: str = "none"
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # llama3 scaling: wavelengths longer than this are divided
    rope_high_freq_factor: float = 4.0  # llama3 scaling: wavelengths shorter than this are kept
    rope_original_length: int = 8192  # llama3, yarn scaling: length of the unscaled pretraining
    rope_beta_fast: float = 32.0  # yarn scaling: what turns more often than this in it is kept
    rope_beta_slow: float = 1.0  # yarn scaling: what turns less often than this is divided
    rope_attention_factor: float | None = (
        None  # yarn scaling: of what is rotated; None: 0.1 ln(rope_scaling_factor) + 1
    )
    rope_interleave: bool = False  # pairs are neighbours (DeepSeek), not half a width apart
    relative_buckets: int = 32
    relative_max_distance: int = 128  # from here on all distances share a bucket

    norm: str = "rmsnorm"
    norm_placement: str = (
        "pre"  # of a branch: pre, post (after the sum), output, sandwich: pre, output
    )
    norm_epsilon: float = 1e-5
    norm_offset: bool = False  # norms scale by 1 + weight (Gemma)
    activation: str = "silu"
    is_gated: bool = True  # SwiGLU, GEGLU: the activation gates a second projection
    use_bias: bool = False  # in projections and in LayerNorm
    use_qkv_bias: bool = False  # in projections to queries, keys and values, whatever use_bias
    tie_embeddings: bool = True
    scale_embeddings: bool = False  # by the root of embed_dim
    scale_logits: bool = False  # by its inverse (T5 with tied embeddings)
    use_embedding_norm: bool = False  # BERT
    is_entry_normalised: bool = False  # the first attention reads what enters as it is (ModernBERT)
    num_token_types: int = 0  # BERT: sentence A or B; 0: none
    use_qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm: str = "head"  # over each head's (Qwen 3), or over the whole projection (OLMo 2)
    attention_scale: float | None = None  # of scores; None: the root of a key's width, inverted
    kv_latent_dim: int | None = None  # MLA: what keys and values are made of; None: no MLA
    q_latent_dim: int | None = None  # MLA: what queries are made of; None: projected at once
    rope_head_dim: int | None = (
        None  # MLA: of a head, rotated, beside head_dim, which is not; None: half of head_dim
    )
    value_head_dim: int | None = None  # MLA: of a head's values; None: head_dim
    latent_norm_epsilon: float = 1e-6  # MLA: of the RMSNorms of latents
    window: int | None = (
        None  # tokens a query sees, itself included; an encoder's: half on each side
    )
    layer_pattern: str = ""  # L (local: has the window) and G (global), repeated; "": all have it
    attention_softcap: float | None = None  # scores are capped to +-this by tanh
    logit_softcap: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0  # of attention weights
    init_stddev: float = 0.02
    # How init, rates and multipliers follow width and depth (models/parametrisation.py), from a model that was tuned:
    parametrisation: str = "standard"
    base_width: int = 128  # its embed_dim
    base_depth: int = 4  # its num_layers
    base_head_dim: int | None = None  # its head_dim, where heads grow; None: as wide as here

    head: str = "lm"  # what reads the last states: lm, or labels of a sequence, each token, a span
    use_head_transform: bool = False  # BERT: dense, activation and norm before the vocabulary
    use_head_bias: bool = False  # of the vocabulary
    use_pooler: bool = False  # BERT: dense and tanh before labels of a sequence
    pooling: str = "first"  # which states stand for a sequence
    num_labels: int = 2  # of head sequence or token; 1: regression
    decoder_start_id: int = 0  # what an encoder-decoder's decoder reads first

    dtype: str = "auto"  # of activations and matmuls; auto: what the platform is fast at
    param_dtype: str = "float32"
    attention: str = "auto"
    attention_chunk: int = 512  # queries scored at a time by the chunked implementation
    scan_layers: bool | None = None  # None: scanned on accelerators, unrolled on a CPU
    remat: str = "none"  # offload: what layers begin with and attention gives waits in host memory
    moe: MoeConfig = MoeConfig()
    lora: LoraConfig = LoraConfig()

    @property
    def decoder_layers(self) -> int:
        """Layers of a decoder, alone or after an encoder."""
        if self.architecture == "encoder_decoder" and self.num_decoder_layers is not None:
            return self.num_decoder_layers
        return self.num_layers

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rope_head_width(self) -> int:
        """Of a head's queries and keys with latents: what is rotated, beside `head_width`."""
        return self.head_width // 2 if self.rope_head_dim is None else self.rope_head_dim

    @property
    def key_width(self) -> int:
        """Of a head's queries and keys, all of it."""
        return self.head_width + (0 if self.kv_latent_dim is None else self.rope_head_width)

    @property
    def value_width(self) -> int:
        return self.head_width if self.value_head_dim is None else self.value_head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def expert_width(self) -> int:
        return self.mlp_width if self.moe.expert_dim is None else self.moe.expert_dim

    def has_experts(self, stack: str) -> bool:
        """Returns whether layers of a stack, `encoder` or `decoder`, have experts."""
        is_meant = self.architecture != "encoder_decoder" or self.moe.stacks in ("all", stack)
        return self.moe.is_on and is_meant

    def expert_layers(self, num_layers: int) -> tuple[bool, ...]:
        """Returns for each layer of a stack with experts whether it has them."""
        first, every = self.moe.first_dense_layers, self.moe.every
        return tuple(
            index >= first and (index - first) % every == every - 1 for index in range(num_layers)
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    # tfds:NAME[/config] | text:GLOB | jsonl:GLOB:field; of examples tfds:NAME[/config] | jsonl:GLOB
    source: str = "tfds:state_of_the_union"
    input_fields: str = (
        "text"  # of an example: the field of its text, or of two: "question,context"
    )
    target_field: str = "label"  # of an example: text to write, label, number, labels or answer
    # Stages of llm_jax.data.preprocessing, by commas, for texts that get a label: "normalise,segment,stem".
    preprocessing: str = ""
    language: str = "english"  # of those stages
    # Of conversations: a file of Jinja, or "plain"; "": that of tokenizer=workdir:PATH.
    chat_template: str = ""
    too_long: str = (
        "truncate"  # examples that no row holds: truncate (a warning counts them) | refuse
    )
    tokenizer: str = "bytes"  # | bpe:PATH | train_bpe:SIZE | sentencepiece:PATH | workdir:PATH
    batch_size: int = 8  # sequences in one optimiser step, over all devices
    sequence_length: int = 256  # tokens
    # Other sources that rows are of, and their shares: "0.25=jsonl:GLOB:field;0.1=tfds:NAME".
    mixture: str = ""
    packing: str = "packed"  # concat: documents see each other; none: one example a row
    train_split: str = "train"
    eval_split: str = "validation"
    eval_source: str = ""  # of evaluation, all of it, or of tfds: its eval_split; "": source has it
    eval_fraction: float = 0.05  # held out of text: and jsonl: sources, which have no splits
    cache_dir: str = "~/.cache/llm_jax"  # token caches and prepared TFDS data
    prefetch: int = 2  # batches made ahead of the step that reads them


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is to be predicted of a text, or of an example."""

    name: str = "causal"
    mask_rate: float = 0.15  # mlm: share of tokens to predict
    use_whole_words: bool = False  # mlm: all tokens of a word, or none
    noise_density: float = 0.15  # span_corruption: share of tokens to predict
    mean_span_length: float = 3.0  # span_corruption: tokens
    min_prefix: float = 0.0  # prefix: share of a window that is given, drawn between these
    max_prefix: float = 1.0
    target_length: int = 128  # tokens of a decoder's row, for an encoder-decoder
    num_sentinels: int = 100  # that a tokenizer without its own is given (span_corruption, ul2)
    temperature: float = 0.05  # contrastive: that cosines are divided by
    beta: float = 0.1  # preference: how dear it is to leave the model that training starts from
    is_symmetric: bool = True  # contrastive: the second text of a pair looks for the first as well
    is_input_bidirectional: bool = False  # decoders: inputs before targets see each other both ways


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule, clipping and accumulation."""

    name: str = "adamw"
    learning_rate: float = 1e-3  # peak
    weight_decay: float = 0.1  # on matrices and tables; not on biases and norm scales
    is_decay_independent: bool = False  # of the peak: weights lose weight_decay times the schedule
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_lr_fraction: float = 0.1  # of the peak, at the last step
    cooldown_fraction: float = 0.2  # wsd: the last part of the run, which decays linearly
    # First moment (adamw, lion, soap, muon's adam), momentum (sgd), share of the average (schedule_free).
    b1: float = 0.9
    b2: float = 0.95  # second moment (adamw, lion, soap, schedule_free, muon's adam)
    epsilon: float = 1e-8
    muon_momentum: float = 0.95
    soap_every: int = 10  # updates between refreshes of the eigenbases
    soap_max_width: int = 8192  # a side of a matrix that is wider has no eigenbasis
    clip_norm: float | None = 1.0  # of the global gradient; None: no clipping
    accumulation_steps: int = 1  # microbatches that a step's batch is split into
    offload_state: bool = False  # moments wait in host memory for their update
    # Differential privacy (llm_jax/private_gradients.py): of the gradient of each row; None: off.
    dp_clip_norm: float | None = None
    dp_noise_multiplier: float = 1.0  # standard deviation of the noise, over dp_clip_norm
    dp_delta: float | None = None  # that epsilon is told for; None: 1 over the rows of an epoch


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What a run starts from, and which parameters learn. Patterns are of paths as `inspect` prints them."""

    # Workdir of the run whose parameters this one starts from, or of one that was converted; its latest
    # checkpoint, or that of "WORKDIR@STEP" and "WORKDIR@best". "": parameters are drawn.
    start: str = ""
    # Patterns, by commas, of parameters that are drawn though there is a start, beside those it lacks: of
    # heads and low-rank updates.
    fresh: str = ""
    # Patterns of parameters that learn; "": all, or with model.lora its updates and heads of labels.
    learn: str = ""
    freeze: str = ""  # patterns of those among them that do not
    frozen_layers: int = 0  # so many of each stack, from below, and the embeddings do not learn
    # A layer learns at this times the rate of the one above it, embeddings below the first one.
    layer_decay: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, cadence and safety of a run. Everything `_every` counts optimiser steps."""

    num_steps: int = 1000
    seed: int = 0  # of initialisation, data order and dropout
    log_every: int = 10
    eval_every: int = 100  # 0: never
    eval_steps: int = 0  # batches of one evaluation; 0: the whole split
    telemetry_every: int = 0  # steps between looks inside, a multiple of log_every; 0: never
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
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    tune: TuneConfig = TuneConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    slice: str = "cpu"  # what the config was written for: cpu, v5e:4x4, ...
    profile: bool = False  # write a trace of a few steps to WORKDIR/profile
    compilation_cache: str = "~/.cache/llm_jax/xla"  # "" turns it off

    @property
    def target_length(self) -> int:
        """Tokens of a row that an encoder-decoder's decoder reads; 0 for other models."""
        is_pair = self.model.architecture == "encoder_decoder"
        return self.objective.target_length if is_pair else 0

    @property
    def tokens_per_step(self) -> int:
        """Of all rows, those of an encoder and of a decoder together."""
        return self.data.batch_size * (self.data.sequence_length + self.target_length)


MESH_AXES = ("replica", "data", "seq", "expert", "tensor")


def rope_width(m: ModelConfig) -> int:
    """Returns how many elements of each head RoPE rotates."""
    if m.kv_latent_dim is not None:
        return m.rope_head_width
    return round(m.rope_fraction * m.head_width)
