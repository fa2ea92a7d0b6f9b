"""What TPU kernels do to a block of scores, and how the arrays for it reach them.

Kernels hold scores transposed, [keys, queries]: what belongs to a query lies along the lanes, what
belongs to a key along the sublanes. The arrays of mask, bias and dropout enter a kernel as operands;
inside, the same objects are put together again around the pieces that a block needs.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import diagonals
from llm_jax.kernels.flash_attention import dropout as dropout_lib
from llm_jax.kernels.flash_attention import masks

LOG2E = diagonals.LOG2E
# Maximum of a query that has seen no key: finite, so that differences of maxima stay finite.
EMPTY = -1e30
# Score of a masked pair, so much lower that exp2(MASKED - EMPTY) is 0: such a query sums to 0.
MASKED = -3e38


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a device's part begins among all rows, heads, queries and keys: dropout goes by place.

    Attributes:
      row, head, query, key: of the first here, int32 scalars; None for a key means 0.
      group, all_groups: query heads of a key head here and on all devices.
    """

    row: Any
    head: Any
    query: Any
    key: Any
    group: int = dataclasses.field(metadata={"static": True})
    all_groups: int = dataclasses.field(metadata={"static": True})

    def factors(
        self, dropout: dropout_lib.Dropout, row: Any, head: Any, query: Any, key: Any
    ) -> jax.Array:
        """Returns the factors of weights by their indices here, broadcast together."""
        if self.group != self.all_groups:
            head += lax.div(head, jnp.int32(self.group)) * (self.all_groups - self.group)
        key = key if self.key is None else key + self.key
        return dropout.factors(row + self.row, head + self.head, query + self.query, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """All of an attention that is neither queries, keys nor values.

    Attributes:
      mask, dropout: as in `reference.attention`.
      bias: as there; inside a kernel, what `diagonals` makes of it for each shape of tiles.
      q_offset: slot of the first query, int32 scalar; None where it is `static_offset`.
      origin: what dropout counts from; None without it.
      scale, softcap, static_offset: known when the kernel is compiled.
    """

    mask: masks.Mask
    bias: biases.Bias | tuple[diagonals.Diagonals, ...] | None
    dropout: dropout_lib.Dropout | None
    q_offset: Any
    origin: Origin | None
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})
    static_offset: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def query_factor(self) -> float:
        """Folded into the queries: with the base-2 exponent too, unless scores are capped after.

        Both kernels round the queries after it, so that the backward pass meets the same scores.
        """
        return self.scale * (LOG2E if self.softcap is None else 1.0)

    def slots(self, q_index: jax.Array) -> jax.Array:
        """Returns the slots of queries by their place in the array."""
        return q_index + (self.static_offset if self.q_offset is None else self.q_offset)

    def capped(self, scores: jax.Array) -> tuple[jax.Array, Any]:
        """Returns scores to the base 2 after the soft-cap, and the derivative of the cap or None."""
        if self.softcap is None:
            return scores, None
        capped = jnp.tanh(scores * (1.0 / self.softcap))
        return capped * (self.softcap * LOG2E), 1.0 - capped * capped


@dataclasses.dataclass(frozen=True)
class Operand:
    """One array of `Parts` on its way into a kernel.

    Attributes:
      name: its own among the operands.
      dims: "BT" for each query, "BS" for each key, "B" a row, "H" a head, "HNX" tables of a head,
        "" a scalar.
      array: None where only the shape is known.
    """

    name: str
    dims: str
    array: Any
    shape: tuple[int, ...]


def operands(parts: Parts) -> list[Operand]:
    """Returns the arrays of `parts` in the order of its leaves."""
    found = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(parts)):
        field = path[-1].name
        suffix = field.rpartition("_")[2]
        dims = suffix if suffix.isupper() else ""
        found.append(Operand(f"{field}_{index}", dims, jnp.asarray(leaf), jnp.shape(leaf)))
    return found


def rebuilt(parts: Parts, given: list[Operand], piece: Callable[[Operand], Any]) -> Parts:
    """Returns `parts` with `piece(operand)` in the place of each array."""
    return jax.tree.unflatten(jax.tree.structure(parts), [piece(operand) for operand in given])


def dot(a: jax.Array, b: jax.Array, contracting: tuple[tuple[int, ...], tuple[int, ...]]):
    """Returns a product accumulated in float32, exact for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def column(row_1N: jax.Array, width: int) -> jax.Array:
    """Returns [1, N] as the columns of [N, width].

    The transpose of as many equal rows as a register has lanes: that of one row would leave a column in
    one lane, to be spread over the others register by register.
    """
    lanes = math.gcd(width, 128)
    column_NL = jnp.broadcast_to(row_1N, (lanes, row_1N.shape[1])).T
    return jnp.concatenate([column_NL] * (width // lanes), axis=1)
