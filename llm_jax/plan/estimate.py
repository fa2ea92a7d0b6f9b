"""Memory and time of a training step by arithmetic, without compiling: good for choosing what to compile.

Memory is within a third of the compiler's (`tests/plan/test_estimate.py` holds it to that on the programs
of `tests/contracts/budgets.json`); time is for ordering candidates alone.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from llm_jax import config as config_lib
from llm_jax import flops
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import tuning
from llm_jax.aot import steps
from llm_jax.aot import topology

_COMPUTE_BYTES = 2  # of an activation or a gathered weight
# Logits of a device that are computed whole, and tokens of a chunk otherwise (cross_entropy.op).
_LARGEST_LOGITS = 1 << 31
# Fitted to the compiler on the programs of the budgets: copies in other layouts, buffers of collectives;
# layers at a time, as the next one's weights come while one is computed.
_OVERHEAD = 1.1
_LAYERS_AT_A_TIME = 2
# Times that what lies between the products of a feed-forward part is held while a layer is computed anew;
# experts' slots are held less often, as their products are kernels that write where they are told.
_INNER_COPIES = 4
_EXPERT_INNER_COPIES = 2
_WAITING_BYTES = 6  # in both precisions; of one program

# Of the peak that products reach, and of the links' bandwidth that collectives do.
_PRODUCT_EFFICIENCY = 0.7
_LINK_EFFICIENCY = 0.6
# A weight is gathered for the forward pass and again for the backward pass, and its gradient scattered.
_WEIGHT_TRIPS = 3
# Activations are summed over the tensor axis after attention and the feed-forward part, in both passes.
_TENSOR_SUMS = 4
# Forward passes that are repeated, of three units of work.
_RECOMPUTED = {
    "none": 0.0,
    "dots": 0.05,
    "qkv": 0.8,
    "attention_output": 0.9,
    "offload": 0.9,
    "full": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one chip, and seconds, of a training step.

    Attributes:
      parameters, optimiser: as they lie between steps.
      accumulated: the sum of microbatches' gradients, where there are several.
      gradients: of a microbatch, float32.
      saved: what the forward pass keeps for the backward pass.
      layer: what one layer needs while it runs, gathered weights among it.
      loss: logits and the gathered head.
      seconds: for ordering alone.
    """

    parameters: int
    optimiser: int
    accumulated: int
    gradients: int
    saved: int
    layer: int
    loss: int
    seconds: float

    @property
    def temporaries(self) -> int:
        """What is allocated while a step runs, at the loss or in the last layers of the backward pass."""
        most = max(self.loss, _LAYERS_AT_A_TIME * (self.gradients + self.layer))
        return self.accumulated + int(_OVERHEAD * (self.saved + most))

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.optimiser + self.temporaries


def bytes_per_device(tree, mesh: AbstractMesh | jax.sharding.Mesh) -> int:
    """Returns what the arrays of an abstract tree take on one device; not those in host memory."""
    return sum(_leaf_bytes(leaf, mesh) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf, mesh) -> int:
    if leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host":
        return 0
    spec = () if leaf.sharding is None else leaf.sharding.spec
    ways = math.prod(sharding.axis_size(mesh, axes) for axes in spec)
    return leaf.size * leaf.dtype.itemsize // ways


def estimate(config: config_lib.RunConfig, slice_name: str) -> Estimate:
    """Returns the estimate of a config on a slice.

    Raises:
      errors.UserError: the config does not fit the slice's number of chips.
    """
    num_chips = topology.parse(slice_name).num_chips
    mesh = mesh_lib.make_abstract(config.mesh, num_chips)
    sharding.check(config, mesh)
    state = _state(config, num_chips)
    parameters = state.parameters
    sizes = _Sizes(config, mesh)
    gradients = state.learned * (1 if config.model.param_dtype == "float32" else 2)
    return Estimate(
        parameters=parameters,
        optimiser=state.optimiser,
        accumulated=gradients if config.optim.accumulation_steps > 1 else 0,
        gradients=gradients,
        saved=sizes.saved_tokens * sizes.saved_bytes(),
        layer=sizes.layer_bytes(),
        loss=sizes.loss_bytes(),
        seconds=_seconds(config, mesh, topology.parse(slice_name).chip, state.num_parameters),
    )


class _State(NamedTuple):
    """What lies on one device between steps, in bytes, and how many parameters there are in all."""

    parameters: int
    learned: int  # of the parameters
    optimiser: int
    num_parameters: int


def _state(config: config_lib.RunConfig, num_chips: int) -> _State:
    # Neither batches nor remat change it: candidates of a search share it.
    model = dataclasses.replace(config.model, remat="none")
    optim = dataclasses.replace(config.optim, accumulation_steps=1)
    plain = config_lib.RunConfig(model=model, optim=optim, mesh=config.mesh, tune=config.tune)
    return _state_of(plain, num_chips)


@functools.lru_cache(maxsize=256)
def _state_of(config: config_lib.RunConfig, num_chips: int) -> _State:
    mesh = mesh_lib.make_abstract(config.mesh, num_chips)
    with jax.sharding.use_abstract_mesh(mesh):
        state = steps.abstract_state(config)
    return _State(
        bytes_per_device(state.model, mesh),
        bytes_per_device(tuning.split(config, state.model)[0], mesh),
        bytes_per_device(state.opt_state, mesh),
        flops.num_params(state.model),
    )


class _Sizes:
    """Sizes of a microbatch on one device."""

    def __init__(self, config: config_lib.RunConfig, mesh: AbstractMesh):
        self._config, self._model = config, config.model
        self._tensor = mesh.shape["tensor"]
        self._is_between_slices = mesh.shape["replica"] > 1
        self._expert = mesh.shape["expert"]
        ways = mesh.shape["replica"] * mesh.shape["data"] * mesh.shape["seq"] * self._expert
        self.tokens = config.tokens_per_step // config.optim.accumulation_steps // ways

    @property
    def _target_share(self) -> float:
        """Of the tokens, those of a decoder that has an encoder."""
        target = self._config.target_length
        return target / (self._config.data.sequence_length + target)

    @property
    def saved_tokens(self) -> int:
        """Tokens times the layers that they pass; twice through those with cross-attention."""
        model = self._model
        share = self._target_share
        layers = model.num_layers * (1 - share) + 2 * model.decoder_layers * share
        return int(self.tokens * layers)

    def saved_bytes(self) -> int:
        """Bytes of a token that a layer keeps for the backward pass."""
        m, tensor = self._model, self._tensor
        attended = m.num_heads * m.value_width // tensor
        keys = m.kv_heads * (m.key_width + m.value_width) // tensor
        inner = self._inner_width()
        products = (
            m.num_heads * m.key_width // tensor
            + keys
            + self._latents
            + (2 if m.is_gated else 1) * inner
        )
        # A ReLU's gradient needs what it gave, alone; dropout keeps a mask and what it took.
        is_simple = m.activation == "relu" and not m.dropout
        activations = (2 if is_simple else 4) * inner
        widths = {
            "full": m.embed_dim,
            "attention_output": m.embed_dim + attended,
            "qkv": m.embed_dim + m.num_heads * m.key_width // tensor + keys,
            "dots": 3 * m.embed_dim + products,
            "offload": 0,
            "none": 9 * m.embed_dim + attended + products + activations,
        }
        return _COMPUTE_BYTES * widths[m.remat]

    @property
    def _latents(self) -> int:
        """Elements of a token's latents, before their norms: each device has them whole."""
        m = self._model
        if m.kv_latent_dim is None:
            return 0
        return m.kv_latent_dim + m.rope_head_width + (m.q_latent_dim or 0)

    def _inner_width(self) -> int:
        """Elements of a token between the products of a feed-forward part, and its copies for experts."""
        m, moe = self._model, self._model.moe
        if not moe.is_on:
            return m.mlp_width // self._tensor
        slots = moe.experts_per_token * (moe.capacity_factor if moe.dispatch == "capacity" else 1)
        if self._expert > 1 and moe.dispatch != "capacity":
            # A device's room for slots of all of them.
            slots *= min(moe.buffer_factor or self._expert, self._expert)
        width = (slots + moe.num_shared_experts) * m.expert_width // self._tensor
        return int(width + 2 * slots * m.embed_dim)

    def layer_bytes(self) -> int:
        """Bytes of a layer's weights, gathered, and of its activations where they are recomputed."""
        m = self._model
        own = m.moe.num_experts / self._expert if m.moe.is_on else None
        weights = int(2 * _COMPUTE_BYTES * flops.layer_params(m, experts=own) // self._tensor)
        if m.remat == "none":
            return weights
        copies = _EXPERT_INNER_COPIES if m.moe.is_on else _INNER_COPIES
        width = 8 * m.embed_dim + copies * self._inner_width()
        return weights + _COMPUTE_BYTES * self.tokens * width

    def loss_bytes(self) -> int:
        """Bytes of logits, which their gradient replaces, and of the gathered head."""
        m, train = self._model, self._config.train
        ids = m.vocab_size // self._tensor
        tokens = int(self.tokens * (self._target_share or 1))
        is_chunked = train.cross_entropy in ("chunked", "pallas")
        is_large = train.cross_entropy == "auto" and 4 * tokens * ids > _LARGEST_LOGITS
        if is_chunked or is_large:
            tokens = min(tokens, train.cross_entropy_chunk)
        head = _COMPUTE_BYTES * m.embed_dim * ids
        if self._is_between_slices:  # its gradient waits for the exchange, whole
            head += _WAITING_BYTES * m.embed_dim * ids
        elif m.tie_embeddings and (is_chunked or is_large):
            # Summed over chunks its gradient is whole, and stays so until the embedding's is added.
            head += 2 * 4 * m.embed_dim * ids
        return 4 * tokens * ids + head


def _seconds(config, mesh, chip, num_parameters: int) -> float:
    model, data = config.model, config.data
    tokens = config.tokens_per_step
    work = flops.train_flops_per_token(model, data.sequence_length, config.target_length) * tokens
    work *= 1 + _RECOMPUTED[model.remat] / 3
    computing = work / math.prod(mesh.axis_sizes) / (chip.peak_bf16_flops * _PRODUCT_EFFICIENCY)
    bandwidth = 4 * chip.ici_bandwidth * _LINK_EFFICIENCY
    gathered = 0.0
    fsdp_ways = mesh.shape["data"] * mesh.shape["expert"]
    if fsdp_ways > 1 and config.mesh.rules not in ("dp", "tp"):
        weights = _COMPUTE_BYTES * num_parameters / mesh.shape["tensor"]
        gathered = _WEIGHT_TRIPS * weights * config.optim.accumulation_steps / bandwidth
    summed = 0.0
    own_tokens = tokens / (mesh.shape["replica"] * fsdp_ways * mesh.shape["seq"])
    if mesh.shape["tensor"] > 1:
        summed = 2 * _TENSOR_SUMS * model.num_layers * own_tokens * model.embed_dim
        summed *= _COMPUTE_BYTES / (bandwidth / 2)
    if mesh.shape["seq"] > 1:
        keys = model.kv_heads * (model.key_width + model.value_width)
        keys *= own_tokens * mesh.shape["seq"]
        summed += 4 * keys * model.num_layers * _COMPUTE_BYTES / (bandwidth / 2)
    between = 0.0
    if mesh.shape["replica"] > 1:
        own = 4 * num_parameters / fsdp_ways / mesh.shape["tensor"]
        between = 2 * own / chip.dcn_bandwidth
    if mesh.shape["expert"] > 1 and model.moe.is_on:
        # Slots there and back, in both passes and once more in what is recomputed.
        num_expert_layers = sum(model.expert_layers(model.num_layers))
        slots = model.moe.experts_per_token * own_tokens * num_expert_layers
        summed += 4 * _COMPUTE_BYTES * slots * model.embed_dim / (bandwidth / 2)
    # Weights travel while others are multiplied, though never quite; sums of activations are waited for.
    return max(computing, gathered) + 0.1 * min(computing, gathered) + summed + between
