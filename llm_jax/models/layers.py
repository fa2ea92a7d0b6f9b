"""Small parts that every block is made of: parameters, norms, embeddings, dropout."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import sharding
from llm_jax.kernels import few_rows
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.models import lora
from llm_jax.models import parametrisation


def normal_param(
    key: jax.Array,
    name: str,
    shape: tuple[int, ...],
    stddev: float,
    rules: sharding.AxisRules,
    dtype: str,
) -> nnx.Param:
    """Returns a parameter drawn from N(0, stddev^2), sharded as the suffix of `name` says."""
    spec = rules.param(dims.suffix(name))
    return nnx.Param(stddev * jax.random.normal(key, shape, dtype, out_sharding=spec))


def full_param(
    name: str, shape: tuple[int, ...], value: float, rules: sharding.AxisRules, dtype: str
) -> nnx.Param:
    """Returns a constant parameter, sharded as the suffix of `name` says."""
    spec = rules.param(dims.suffix(name))
    return nnx.Param(jnp.full(shape, value, dtype, out_sharding=spec))


def bias_param(
    is_present: bool, name: str, shape: tuple[int, ...], rules: sharding.AxisRules, dtype: str
) -> nnx.Param | None:
    """Returns a zero bias, or None where there is none."""
    return full_param(name, shape, 0.0, rules, dtype) if is_present else None


def project(
    equation: str,
    x: jax.Array,
    weight: nnx.Param | jax.Array | few_rows.OutputsFirst | lora.Updated,
    bias: nnx.Param | jax.Array | None,
    out_sharding: PartitionSpec,
) -> jax.Array:
    """Returns `einsum(equation, x, weight) + bias`, computed in the dtype of `x`.

    The weight is cast before it is gathered, so that a sharded one travels in the smaller dtype.
    """
    weight = weight[...]
    if isinstance(weight, few_rows.OutputsFirst):
        y = jax.sharding.reshard(few_rows.multiply(equation, x, weight), out_sharding)
    elif isinstance(weight, lora.Updated):
        y = lora.multiply(equation, x, weight, out_sharding)
    else:
        y = jnp.einsum(equation, x, weight.astype(x.dtype), out_sharding=out_sharding)
    return y if bias is None else y + bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), statistics in float32."""

    def __init__(self, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        width, dtype = config.embed_dim, config.param_dtype
        self.is_centred = config.norm == "layernorm"
        self.epsilon, self.has_offset = config.norm_epsilon, config.norm_offset
        start = 0.0 if config.norm_offset else 1.0
        self.scale_D = full_param("scale_D", (width,), start, rules, dtype)
        has_bias = self.is_centred and config.use_bias
        self.bias_D = bias_param(has_bias, "bias_D", (width,), rules, dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the normalised [B, T, D] in the dtype of the input."""
        y_BTD = x_BTD.astype(jnp.float32)
        if self.is_centred:
            y_BTD = y_BTD - jnp.mean(y_BTD, axis=-1, keepdims=True)
        y_BTD = rms_normalise(y_BTD, self.epsilon) * _factor(self.scale_D, self.has_offset)
        if self.bias_D is not None:
            y_BTD = y_BTD + self.bias_D[...]
        return y_BTD.astype(x_BTD.dtype)


def rms_normalise(x: jax.Array, epsilon: float, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Divides `x` by the root of the mean square over its last dimension, or over `axes`."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + epsilon)


def _factor(scale: nnx.Param, has_offset: bool) -> jax.Array:
    return 1.0 + scale[...].astype(jnp.float32) if has_offset else scale[...]


class HeadNorm(nnx.Module):
    """RMSNorm of queries or keys (QK-norm; Dehghani et al. 2023, section 2).

    Over each head with a scale that heads share, or over the whole projection (OLMo 2).
    """

    def __init__(
        self, config: config_lib.ModelConfig, rules: sharding.AxisRules, dims_of_heads: str
    ):
        self.epsilon, self.has_offset = config.norm_epsilon, config.norm_offset
        start, dtype = 0.0 if config.norm_offset else 1.0, config.param_dtype
        sizes = {
            "K": config.kv_heads,
            "G": config.num_heads // config.kv_heads,
            "C": config.head_width,
        }
        self.dims = "C" if config.qk_norm == "head" else f"{dims_of_heads}C"
        shape = tuple(sizes[letter] for letter in self.dims)
        name = f"scale_{self.dims}"  # which says how it is sharded
        setattr(self, name, full_param(name, shape, start, rules, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [B, T, ..., C], in float32, back to the input's dtype."""
        scale = getattr(self, f"scale_{self.dims}")
        axes = tuple(range(x.ndim - len(self.dims), x.ndim))
        y = rms_normalise(x.astype(jnp.float32), self.epsilon, axes)
        return (y * _factor(scale, self.has_offset)).astype(x.dtype)


class LatentNorm(nnx.Module):
    """RMSNorm of a latent (DeepSeek-V2, section 3.1.2)."""

    def __init__(self, width: int, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        self.epsilon, self.has_offset = config.latent_norm_epsilon, config.norm_offset
        start = 0.0 if config.norm_offset else 1.0
        self.scale_Z = full_param("scale_Z", (width,), start, rules, config.param_dtype)

    def __call__(self, x_BTZ: jax.Array) -> jax.Array:
        """Normalises [B, T, Z], in float32, back to the input's dtype."""
        y_BTZ = rms_normalise(x_BTZ.astype(jnp.float32), self.epsilon)
        return (y_BTZ * _factor(self.scale_Z, self.has_offset)).astype(x_BTZ.dtype)


class Embedding(nnx.Module):
    """The token table, read by ids on the way in and, if tied, by hidden states on the way out."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        shape = (config.vocab_size, config.embed_dim)
        self.rules = rules
        width = parametrisation.scaling_width(config)
        self.scale = width**0.5 if config.scale_embeddings else None
        self.table_VD = normal_param(
            key, "table_VD", shape, config.init_stddev, rules, config.param_dtype
        )

    def __call__(self, tokens_BT: jax.Array, dtype: str) -> jax.Array:
        """Returns the embeddings [B, T, D] of int32 ids."""
        x_BTD = look_up(self.table_VD, "VD", tokens_BT, dtype, self.rules)
        return x_BTD if self.scale is None else x_BTD * jnp.asarray(self.scale, dtype)


def look_up(
    table: nnx.Param, dims_of_table: str, ids_BT: jax.Array, dtype: str, rules: sharding.AxisRules
) -> jax.Array:
    """Returns the rows [B, T, D] of a table at int32 ids, in `dtype`.

    The table is gathered over its width first, as every FSDP weight is where it is used: to gather
    rows of a piece and exchange them afterwards makes the partitioner replicate the whole result.
    """
    whole = jax.sharding.reshard(table[...].astype(dtype), rules.act(dims_of_table))
    return whole.at[ids_BT].get(out_sharding=rules.act("BTD"))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns `cap * tanh(x / cap)`, or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dropout(
    x_BTD: jax.Array, rate: float, key: jax.Array | None, places_T: jax.Array | None
) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest; without a key, the identity.

    What is drawn depends on an element's row, place in the sequence and channel, wherever it lies: as
    for attention weights, it is a hash of these. `places_T` are the tokens' places, int32.
    """
    if key is None or rate == 0.0:
        return x_BTD
    row_axes, length_axes, *_ = (*jax.typeof(x_BTD).sharding.spec, *(None,) * 3)
    rows_B11 = jnp.arange(x_BTD.shape[0])[:, None, None]
    places_1T1 = places_T[None, :, None]
    if row_axes or length_axes:
        rows_B11 = jax.sharding.reshard(rows_B11, PartitionSpec(row_axes, None, None))
        places_1T1 = jax.sharding.reshard(places_1T1, PartitionSpec(None, length_axes, None))
    drawn = dropout_lib.Dropout(jax.random.bits(key, (), jnp.uint32), rate)
    factors_BTD = drawn.factors(rows_B11, 0, places_1T1, jnp.arange(x_BTD.shape[2]))
    return (x_BTD * factors_BTD).astype(x_BTD.dtype)
