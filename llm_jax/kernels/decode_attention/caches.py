"""How keys and values lie in memory between the steps of a generation.

`SlotsLast` is what a CPU reads in order, `Contiguous` what a TPU does: there a slot's heads lie side by
side (`W` = K * C), keys before values in one array, so that one copy brings both for all heads, heads
narrower than 128 waste no lanes, and a step writes whole rows. `paged.Paged` is the same in pages.
`ValuesInKeys` is for one head whose values are a part of its keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.kernels.decode_attention import quantize


def cache_type(cls):
    """Makes a class a frozen dataclass and a pytree; fields named `num_` are static."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    static = [name for name in names if name.startswith("num_")]
    arrays = [name for name in names if name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)


@cache_type
class SlotsLast:
    """Slots side by side in the keys, widths in the values: what `single_query` multiplies."""

    k_BKCS: jax.Array
    v_BKSC: jax.Array

    @property
    def num_slots(self) -> int:
        return self.k_BKCS.shape[-1]

    @property
    def num_heads(self) -> int:
        return self.k_BKCS.shape[1]

    def write(self, k_BTKC: jax.Array, v_BTKC: jax.Array, slot: jax.Array | int) -> "SlotsLast":
        """Returns the cache with new keys and values from `slot` on, in all rows."""
        return SlotsLast(
            _put(self.k_BKCS, jnp.transpose(k_BTKC, (0, 2, 3, 1)), slot, axis=3),
            _put(self.v_BKSC, jnp.swapaxes(v_BTKC, 1, 2), slot, axis=2),
        )

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, [B, S, K, C]."""
        return jnp.transpose(self.k_BKCS, (0, 3, 1, 2)), jnp.swapaxes(self.v_BKSC, 1, 2)


@cache_type
class OfBeams:
    """Rows that are beams of a search, which read slots of each other instead of moving them.

    Attributes:
      own: what each beam has written, [B * Q, ...].
      origins_BQS: int32, the beam of its row that holds a slot of each beam's text.
    """

    own: SlotsLast
    origins_BQS: jax.Array

    @property
    def num_slots(self) -> int:
        return self.own.num_slots

    def write(self, k_BTKC: jax.Array, v_BTKC: jax.Array, slot: jax.Array | int) -> "OfBeams":
        """Returns the cache with new keys and values of each beam's own, from `slot` on."""
        return OfBeams(self.own.write(k_BTKC, v_BTKC, slot), self.origins_BQS)


@cache_type
class Contiguous:
    """Keys and values of a slot as rows of all heads.

    Attributes:
      kv_B2SW: keys, then values; W = K * C. Of the compute dtype, or int8.
      scales_B2KS: float32, of int8 keys and values (`quantize.quantized`); else None.
      num_heads: K.
    """

    kv_B2SW: jax.Array
    scales_B2KS: jax.Array | None
    num_heads: int

    @property
    def num_slots(self) -> int:
        return self.kv_B2SW.shape[2]

    def write(self, k_BTKC: jax.Array, v_BTKC: jax.Array, slot: jax.Array | int) -> "Contiguous":
        """Returns the cache with new keys and values from `slot` on, in all rows."""
        kv_B2TW, scales_B2KT = packed(k_BTKC, v_BTKC, self.kv_B2SW.dtype)
        scales_B2KS = self.scales_B2KS
        if scales_B2KS is not None:
            scales_B2KS = _put(scales_B2KS, scales_B2KT, slot, axis=3)
        return Contiguous(_put(self.kv_B2SW, kv_B2TW, slot, axis=2), scales_B2KS, self.num_heads)

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, [B, S, K, C]; float32 where they are int8."""
        return unpacked(self.kv_B2SW, self.scales_B2KS, self.num_heads)


@cache_type
class ValuesInKeys:
    """Keys of one head that all queries share, whose first elements are its values.

    What latent attention remembers (`models.latent_attention`): a slot is read once for both.

    Attributes:
      k_BSC: the keys.
      num_values: width of the values.
    """

    k_BSC: jax.Array
    num_values: int

    @property
    def num_slots(self) -> int:
        return self.k_BSC.shape[1]

    def write(self, k_BTC: jax.Array, slot: jax.Array | int) -> "ValuesInKeys":
        """Returns the cache with new keys from `slot` on, in all rows."""
        return ValuesInKeys(_put(self.k_BSC, k_BTC, slot, axis=1), self.num_values)

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, [B, S, 1, C], of two widths."""
        k_BSKC = self.k_BSC[:, :, None]
        return k_BSKC, k_BSKC[..., : self.num_values]


def make_values_in_keys(
    B: int, S: int, C: int, num_values: int, dtype: jax.typing.DTypeLike, row_axes=None
) -> ValuesInKeys:
    """Returns an empty cache with rows on these axes of the mesh that is set."""
    return ValuesInKeys(_zeros((B, S, C), dtype, (row_axes, None, None)), num_values)


def make_slots_last(
    B: int, K: int, S: int, C: int, dtype: jax.typing.DTypeLike, row_axes=None, head_axes=None
) -> SlotsLast:
    """Returns an empty cache with rows and heads on these axes of the mesh that is set."""
    axes = (row_axes, head_axes, None, None)
    return SlotsLast(_zeros((B, K, C, S), dtype, axes), _zeros((B, K, S, C), dtype, axes))


def make_contiguous(
    B: int, K: int, S: int, C: int, dtype: jax.typing.DTypeLike, row_axes=None, head_axes=None
) -> Contiguous:
    """Returns an empty cache with rows and heads on these axes of the mesh that is set."""
    scales_B2KS = None
    if jnp.dtype(dtype) == jnp.int8:
        scales_B2KS = _zeros((B, 2, K, S), jnp.float32, (row_axes, None, head_axes, None))
    kv_B2SW = _zeros((B, 2, S, K * C), dtype, (row_axes, None, None, head_axes))
    return Contiguous(kv_B2SW, scales_B2KS, K)


def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: tuple) -> jax.Array:
    spec = PartitionSpec(*axes) if any(axes) else None  # without axes no mesh need be set
    return jnp.zeros(shape, dtype, out_sharding=spec)


def _put(cache: jax.Array, new: jax.Array, slot: jax.Array | int, axis: int) -> jax.Array:
    spec = jax.typeof(cache).sharding.spec
    if any(spec):  # a single head side by side with its width has lost its axis of size 1
        new = jax.sharding.reshard(new, spec)
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), slot, axis=axis)


def packed(
    k_BTKC: jax.Array, v_BTKC: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array | None]:
    """Returns keys and values as [B, 2, T, K * C] in `dtype`, and the scales [B, 2, K, T] of int8."""
    kv_B2TKC = jnp.stack([k_BTKC, v_BTKC], axis=1)
    scales_B2KT = None
    if dtype == jnp.int8:
        kv_B2TKC, scales_B2TK = quantize.quantized(kv_B2TKC)
        scales_B2KT = jnp.swapaxes(scales_B2TK, 2, 3)
    kv_B2TW = kv_B2TKC.reshape(*kv_B2TKC.shape[:3], -1)
    return kv_B2TW.astype(dtype), scales_B2KT


def unpacked(
    kv_B2SW: jax.Array, scales_B2KS: jax.Array | None, num_heads: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `packed` took, int8 as float32."""
    kv_B2SKC = kv_B2SW.reshape(*kv_B2SW.shape[:3], num_heads, -1)
    if scales_B2KS is not None:
        kv_B2SKC = quantize.restored(kv_B2SKC, jnp.swapaxes(scales_B2KS, 2, 3))
    return kv_B2SKC[:, 0], kv_B2SKC[:, 1]
