"""A cache in pages: rows of any length share one pool, each with a table of its pages.

After PagedAttention (Kwon et al. 2023, section 4.1). Which page is whose is the caller's to decide; a
page may stand in several rows' tables (a shared prompt).
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.kernels.decode_attention import caches


@caches.cache_type
class Paged:
    """Keys and values by page.

    Attributes:
      kv_pages: [pages, 2, slots of a page, K * C]: keys, then values, a slot's heads side by side.
      scales_pages: float32 [pages, 2, K, slots of a page], of int8 keys and values; else None.
      table: int32 [B, pages of a row]: slot s of row b is in page `table[b, s // size]`. Entries past a
        row's length may be anything.
      num_heads: K.
    """

    kv_pages: jax.Array
    scales_pages: jax.Array | None
    table: jax.Array
    num_heads: int

    @property
    def num_slots(self) -> int:
        """Slots that a row has room for."""
        return self.table.shape[1] * self.kv_pages.shape[2]

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of each row, [B, S, K, C]; float32 where they are int8."""

        def rows(pages, axis):
            joined = jnp.moveaxis(self._gathered(pages), 1, axis)
            shape = joined.shape[:axis] + (self.num_slots,) + joined.shape[axis + 2 :]
            return joined.reshape(shape)

        scales = None if self.scales_pages is None else rows(self.scales_pages, 3)
        return caches.unpacked(rows(self.kv_pages, 2), scales, self.num_heads)

    def _gathered(self, pages: jax.Array) -> jax.Array:
        """Returns the pages of each row, [B, pages of a row, ...]."""
        spec = None
        if not jax.sharding.get_abstract_mesh().empty:
            row_axes, _ = (*jax.typeof(self.table).sharding.spec, None, None)[:2]
            own_axes = jax.typeof(pages).sharding.spec[1:]
            spec = PartitionSpec(row_axes, None, *own_axes)
        return pages.at[self.table].get(mode="clip", out_sharding=spec)


def make_cache(
    table: jax.Array,
    *,
    num_pages: int,
    page_size: int,
    num_heads: int,
    width: int,
    dtype: jax.typing.DTypeLike,
) -> Paged:
    """Returns an empty cache of `num_pages` pages for K = `num_heads` of C = `width`.

    Args:
      table: int32 [B, pages of a row].
      dtype: of keys and values; int8 rounds them as they are written.
    """
    kv_pages = jnp.zeros((num_pages, 2, page_size, num_heads * width), dtype)
    scales_pages = None
    if kv_pages.dtype == jnp.int8:
        scales_pages = jnp.zeros((num_pages, 2, num_heads, page_size), jnp.float32)
    return Paged(kv_pages, scales_pages, table, num_heads)


def write(cache: Paged, k_BTKC: jax.Array, v_BTKC: jax.Array, lengths_B: jax.Array) -> Paged:
    """Returns the cache with the newest T keys and values of each row in it.

    Row b's go to the slots from `lengths_B[b] - T` up to `lengths_B[b]`, its length with them; those of
    negative slots, and those past the table, are left out. Donate the cache to write in place. On a
    mesh the pool is whole for all rows, so what is written is gathered from them.
    """
    size = cache.kv_pages.shape[2]
    slots_BT = lengths_B[:, None] + jnp.arange(-k_BTKC.shape[1], 0)
    is_inside_BT = (slots_BT >= 0) & (slots_BT < cache.num_slots)
    pages_BT = jnp.take_along_axis(cache.table, slots_BT // size, axis=1, mode="clip")
    # Past the last page: dropped.
    pages_BT = jnp.where(is_inside_BT, pages_BT, cache.kv_pages.shape[0])
    places_BT = slots_BT % size
    kv_B2TW, scales_B2KT = caches.packed(k_BTKC, v_BTKC, cache.kv_pages.dtype)
    pages_BT, places_BT = _like_pool(pages_BT), _like_pool(places_BT)
    kv_BT2W = _like_pool(jnp.swapaxes(kv_B2TW, 1, 2), cache.kv_pages, 3)
    kv_pages = cache.kv_pages.at[pages_BT, :, places_BT].set(kv_BT2W, mode="drop")
    scales_pages = cache.scales_pages
    if scales_pages is not None:
        scales_BT2K = _like_pool(jnp.moveaxis(scales_B2KT, 3, 1), scales_pages, 2)
        scales_pages = scales_pages.at[pages_BT, :, :, places_BT].set(scales_BT2K, mode="drop")
    return Paged(kv_pages, scales_pages, cache.table, cache.num_heads)


def _like_pool(x: jax.Array, pages: jax.Array | None = None, heads_dim: int = 0) -> jax.Array:
    """Returns an array whole on every device, but for heads in its last dimension as the pool's."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = [None] * x.ndim
    if pages is not None:
        axes[-1] = jax.typeof(pages).sharding.spec[heads_dim]
    return jax.sharding.reshard(x, PartitionSpec(*axes))
