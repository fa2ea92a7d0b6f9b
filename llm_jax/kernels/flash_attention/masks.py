"""Who may attend to whom, as small objects that combine with `&`, `|` and `~`.

    causal() & segments                      packed documents
    causal() | KeysBelow(prefix_B)           prefix LM
    local_window(left=1023, right=0)         causal, with a sliding window of 1,024 keys

A mask is a condition on slots: query slot `t`, key slot `s`. Nothing here is a T x S array until
`allowed_BTS` is asked for one; kernels ask for a block, and ask beforehand, by intervals, which blocks
are worth visiting. Masks are pytrees: what a field's name calls `_BT` has a value for each query,
`_BS` for each key, `_B` for each row, and a caller may put any array in its place that broadcasts
against the slots it passes.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_INT32 = np.iinfo(np.int32)


class Interval(NamedTuple):
    """Integers from `lo` to `hi`, both included; ints or arrays of them."""

    lo: Any
    hi: Any


def _lo(x: Any) -> Any:
    return x.lo if isinstance(x, Interval) else x


def _hi(x: Any) -> Any:
    return x.hi if isinstance(x, Interval) else x


# Of an array before it is there.
_UNKNOWN = Interval(int(_INT32.min), int(_INT32.max))


class Bounds(NamedTuple):
    """What intervals tell about a block: whether `some` pair may attend, whether `all` pairs do.

    Both err on the safe side: `some` may be true and `all` false of a block where that is not so.
    """

    some: Any
    all: Any


class Mask:
    """A condition on pairs of slots."""

    def allowed(self, t: Any, s: Any) -> Any:
        """Returns Booleans for query slots `t` and key slots `s`, broadcast against each other."""
        raise NotImplementedError

    def bounds(self, t: Interval, s: Interval) -> Bounds:
        """Returns the bounds of blocks of slots; array fields are `Interval`s as well."""
        raise NotImplementedError

    def within(self, t: Interval, s: Interval) -> "Mask":
        """Returns a mask that says the same of a block of slots, without conditions that hold there."""
        return self

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


def _mask(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def _static(default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@_mask
class Band(Mask):
    """`-right <= t - s <= left`; None for no limit on that side."""

    left: int | None = _static()
    right: int | None = _static()

    def allowed(self, t, s):
        # A limit for each query, so that a pair costs a comparison and no difference.
        sides = [] if self.left is None else [s >= t - self.left]
        if self.right is not None:
            sides.append(s <= t + self.right)
        if not sides:
            return (t == t) & (s == s)  # true, in the shape that the slots broadcast to
        return sides[0] if len(sides) == 1 else sides[0] & sides[1]

    def within(self, t, s):
        lo, hi = t.lo - s.hi, t.hi - s.lo
        is_left_far = self.left is not None and hi <= self.left
        is_right_far = self.right is not None and lo >= -self.right
        return Band(None if is_left_far else self.left, None if is_right_far else self.right)

    def bounds(self, t, s):
        lo, hi = t.lo - s.hi, t.hi - s.lo
        some = every = lo <= hi
        if self.left is not None:
            some, every = some & (lo <= self.left), every & (hi <= self.left)
        if self.right is not None:
            some, every = some & (hi >= -self.right), every & (lo >= -self.right)
        return Bounds(some, every)


def full() -> Mask:
    """Every query attends to every key."""
    return Band()


def causal() -> Mask:
    """A query attends to its own slot and those before."""
    return Band(right=0)


def local_window(left: int | None = None, right: int | None = None) -> Mask:
    """A query attends to `left` slots before its own, its own, and `right` slots after it."""
    return Band(left=left, right=right)


@_mask
class KeysBelow(Mask):
    """`s < length`: the prefix of a prefix LM, or keys that are not padding. int32."""

    lengths_B: Any

    def allowed(self, t, s):
        return s < self.lengths_B

    def bounds(self, t, s):
        return Bounds(s.lo < _hi(self.lengths_B), s.hi < _lo(self.lengths_B))


@_mask
class QueriesBelow(Mask):
    """`t < length`: queries that are not padding. int32."""

    lengths_B: Any

    def allowed(self, t, s):
        return t < self.lengths_B

    def bounds(self, t, s):
        return Bounds(t.lo < _hi(self.lengths_B), t.hi < _lo(self.lengths_B))


@_mask
class Segments(Mask):
    """Equal segment ids, int32: documents of a packed row, or text against padding."""

    q_ids_BT: Any
    k_ids_BS: Any

    def allowed(self, t, s):
        return self.q_ids_BT == self.k_ids_BS

    def bounds(self, t, s):
        q, k = self.q_ids_BT, self.k_ids_BS
        some = (_lo(q) <= _hi(k)) & (_lo(k) <= _hi(q))
        return Bounds(some, (_lo(q) == _hi(k)) & (_lo(k) == _hi(q)))


@_mask
class And(Mask):
    """Both conditions."""

    one: Mask
    other: Mask

    def allowed(self, t, s):
        return self.one.allowed(t, s) & self.other.allowed(t, s)

    def bounds(self, t, s):
        one, other = self.one.bounds(t, s), self.other.bounds(t, s)
        return Bounds(one.some & other.some, one.all & other.all)

    def within(self, t, s):
        one, other = self.one.within(t, s), self.other.within(t, s)
        return one if other == Band() else other if one == Band() else And(one, other)


@_mask
class Or(Mask):
    """Either condition."""

    one: Mask
    other: Mask

    def allowed(self, t, s):
        return self.one.allowed(t, s) | self.other.allowed(t, s)

    def bounds(self, t, s):
        one, other = self.one.bounds(t, s), self.other.bounds(t, s)
        return Bounds(one.some | other.some, one.all | other.all)


@_mask
class Not(Mask):
    """The opposite."""

    one: Mask

    def allowed(self, t, s):
        return ~self.one.allowed(t, s)

    def bounds(self, t, s):
        some, every = self.one.bounds(t, s)
        return Bounds(every ^ True, some ^ True)


# --- a mask's arrays, by the dimensions that their names give -------------------------------------


def map_arrays(function: Any, mask: Mask) -> Mask:
    """Returns the mask with `function(dims, array)` for each array; dims are "BT", "BS" or "B"."""

    def apply(path, leaf):
        return function(path[-1].name.rpartition("_")[2], leaf)

    return jax.tree_util.tree_map_with_path(apply, mask)


def is_static(mask: Mask) -> bool:
    """Returns whether the mask is the same for every batch: it has no arrays."""
    return not jax.tree.leaves(mask)


_SPREAD = {"BT": np.s_[:, :, None], "BS": np.s_[:, None, :], "B": np.s_[:, None, None]}


def allowed_BTS(mask: Mask, t_T: Any, s_S: Any) -> Any:
    """Returns the Booleans [1 or B, T, S] for slots `t_T` of the queries and `s_S` of the keys."""
    spread = map_arrays(lambda dims, array: jnp.asarray(array)[_SPREAD[dims]], mask)
    return spread.allowed(t_T[None, :, None], s_S[None, None, :])


def cut(mask: Mask, queries: slice, keys: slice) -> Mask:
    """Returns the mask for some of the queries and keys."""
    slices = {"BT": np.s_[:, queries], "BS": np.s_[:, keys], "B": np.s_[:]}
    return map_arrays(lambda dims, array: array[slices[dims]], mask)


def _blocks(num: int, block: int, offset: Any = 0) -> Interval:
    """Returns the slots of each block of `num`, the last cut short."""
    starts = np.arange(0, num, block)
    return Interval(offset + starts, offset + np.minimum(starts + block, num) - 1)


def _extremes(array: Any, block: int) -> Interval:
    """Returns the least and the greatest of each block of the last dimension."""
    spare = -array.shape[-1] % block
    padded = jnp.pad(array, ((0, 0), (0, spare)), mode="edge")
    blocks = padded.reshape(array.shape[0], -1, block)
    return Interval(blocks.min(-1), blocks.max(-1))


def block_bounds(
    mask: Mask,
    num_queries: int,
    num_keys: int,
    q_block: int,
    k_block: int,
    q_offset: Any = 0,
) -> Bounds:
    """Returns what is known of each block, [1 or B, num_q_blocks, num_k_blocks].

    Arrays of numpy for a static mask at a known offset, so that a kernel's grid is a constant.
    """
    t, s = _blocks(num_queries, q_block, q_offset), _blocks(num_keys, k_block)

    def interval(dims, array):
        if dims == "B":
            return Interval(array[:, None, None], array[:, None, None])
        lo, hi = _extremes(array, q_block if dims == "BT" else k_block)
        return Interval(lo[_SPREAD[dims]], hi[_SPREAD[dims]])

    shape_t, shape_s = np.s_[None, :, None], np.s_[None, None, :]
    bounds = map_arrays(interval, mask).bounds(
        Interval(t.lo[shape_t], t.hi[shape_t]), Interval(s.lo[shape_s], s.hi[shape_s])
    )
    xp = jnp if any(isinstance(x, jax.Array) for x in bounds) else np
    rows = max((array.shape[0] for array in jax.tree.leaves(mask)), default=1)
    shape = rows, len(t.hi), len(s.hi)
    return Bounds(*(xp.broadcast_to(x, shape) for x in bounds))


def seen_blocks(
    mask: Mask, num_queries: int, num_keys: int, q_block: int, k_block: int, q_offset: int = 0
) -> np.ndarray:
    """Returns whether some pair of a block may attend for all that is known before the arrays.

    Booleans [num_q_blocks, num_k_blocks].
    """
    t, s = _blocks(num_queries, q_block, q_offset), _blocks(num_keys, k_block)
    t = Interval(t.lo[:, None], t.hi[:, None])
    some = map_arrays(lambda dims, array: _UNKNOWN, mask).bounds(t, s).some
    return np.broadcast_to(some, (len(t.hi), len(s.hi)))


def sees_past_alone(mask: Mask) -> bool:
    """Returns whether no query sees a slot after its own, whatever the arrays hold."""
    # Bounds depend on slots through their difference, and through arrays, which are unknown.
    after = Interval(1, int(_INT32.max) // 2)
    some = map_arrays(lambda dims, array: _UNKNOWN, mask).bounds(Interval(0, 0), after).some
    return not np.any(some)


def depends_on_query_slots(mask: Mask) -> bool:
    """Returns whether it matters where queries lie, beside what the arrays say of each."""
    if isinstance(mask, Band):
        return mask != full()
    parts = (getattr(mask, field.name) for field in dataclasses.fields(mask))
    return isinstance(mask, QueriesBelow) or any(
        depends_on_query_slots(part) for part in parts if isinstance(part, Mask)
    )


def moved(mask: Mask, slots: Any) -> Mask:
    """Returns the mask for queries and keys that are counted from `slots` on."""
    return map_arrays(lambda dims, array: array - slots if dims == "B" else array, mask)


def visible_keys(mask: Mask, queries: range, num_keys: int, q_offset: int, block: int) -> range:
    """Returns the keys that some query of `queries` may see for all that is known before the arrays.

    Rounded outwards to blocks of `block` keys; empty where none is seen.
    """
    count, offset = len(queries), q_offset + queries.start
    seen = np.flatnonzero(seen_blocks(mask, count, num_keys, count, block, offset))
    if not len(seen):
        return range(0)
    return range(int(seen[0]) * block, min(int(seen[-1] + 1) * block, num_keys))
