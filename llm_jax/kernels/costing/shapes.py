"""An attention as numbers and words: what reports, budgets and tuning have in common."""

import dataclasses

import numpy as np

from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes and scores of a self-attention.

    Attributes:
      batch, length, heads, width: B, T = S, H, C.
      key_heads, value_width: None where they are as many and as wide.
      dtype: of queries, keys and values.
      mask: "causal", "full", "window 1024" (a causal window) or "packed 512" (causal documents of that
        many tokens).
      bias: None, "alibi", "t5" (one table of 32 buckets a head) or "array".
      softcap, has_sinks: of the scores.
      has_gradient: whether the backward pass is part of it; of the bias' arrays too where
        `has_bias_gradient`.
    """

    batch: int
    length: int
    heads: int = 16
    width: int = 128
    key_heads: int | None = None
    value_width: int | None = None
    dtype: str = "bfloat16"
    mask: str = "causal"
    bias: str | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_gradient: bool = False
    has_bias_gradient: bool = False

    @property
    def num_pairs(self) -> int:
        """Pairs of slots that attend, of all rows and heads."""
        place = np.arange(self.length)
        name, number = self._mask_words()
        seen = {
            "full": np.full_like(place, self.length),
            "causal": place + 1,
            "window": np.minimum(place + 1, number),
            "packed": place % number + 1,
        }[name]
        return int(seen.sum()) * self.batch * self.heads

    @property
    def num_tiles(self) -> int:
        """Tiles of 256 queries by 256 keys with a pair that attends, of all rows and heads."""
        one_row = dataclasses.replace(self, batch=1).make_mask()
        some, _ = masks.block_bounds(one_row, self.length, self.length, 256, 256)
        return int(some.sum()) * self.batch * self.heads

    @property
    def flops(self) -> int:
        """Of the products that the maths needs: two forward; five backward."""
        widths = self.width + (self.value_width or self.width)
        backward = 3 * self.width + 2 * (self.value_width or self.width)
        return 2 * self.num_pairs * (widths + (backward if self.has_gradient else 0))

    @property
    def least_bytes(self) -> int:
        """Bytes that must pass to and from HBM: each operand and result once.

        Forward: queries, keys, values, result, logsumexp. Backward: these and the result's gradient
        read, three gradients written.
        """
        size = np.dtype("float32" if self.dtype == "float32" else "float16").itemsize
        C, Cv = self.width, self.value_width or self.width
        K = self.key_heads or self.heads
        tokens = self.batch * self.length
        qkv = tokens * size * (self.heads * C + K * (C + Cv))
        result = tokens * self.heads * Cv * size
        statistic = tokens * self.heads * 4
        forward = qkv + result + statistic
        backward = 2 * qkv + 2 * result + statistic
        return forward + (backward if self.has_gradient else 0)

    def _mask_words(self) -> tuple[str, int]:
        name, _, number = self.mask.partition(" ")
        is_known = name in ("causal", "full") and not number
        is_known |= name in ("window", "packed") and number.isdecimal() and int(number) > 0
        if not is_known:
            raise ValueError(f"mask {self.mask!r} is none of causal, full, window N, packed N")
        return name, int(number or 1)

    def make_mask(self) -> masks.Mask:
        """Returns the mask, its arrays of numpy."""
        name, number = self._mask_words()
        if name == "full":
            return masks.full()
        if name == "window":
            return masks.local_window(left=number - 1, right=0)
        if name == "causal":
            return masks.causal()
        ids_T = np.arange(self.length, dtype=np.int32) // number
        ids_BT = np.broadcast_to(ids_T, (self.batch, self.length))
        return masks.causal() & masks.Segments(ids_BT, ids_BT)

    def bias_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns shape and dtype of the bias' array by the name of its kind, if there is one."""
        K = self.key_heads or self.heads
        G = self.heads // K
        shapes = {
            None: {},
            "alibi": {"alibi": ((K, G), "float32")},
            "t5": {"t5": ((K, G, 32), "float32")},
            "array": {"array": ((1, K, G, self.length, self.length), self.dtype)},
        }
        if self.bias not in shapes:
            raise ValueError(f"bias {self.bias!r} is none of alibi, t5, array")
        return shapes[self.bias]

    def make_bias(self, arrays: dict) -> biases.Bias | None:
        """Returns the bias around its array."""
        if "alibi" in arrays:
            return biases.Alibi(arrays["alibi"])
        if "t5" in arrays:
            return biases.Relative(arrays["t5"], is_bidirectional=self.mask == "full")
        if "array" in arrays:
            return biases.Full(arrays["array"])
        return None


@dataclasses.dataclass(frozen=True)
class Decode:
    """A step of generation: new queries of each row against its cache.

    Attributes:
      lengths: slots of each row; so many rows.
      key_heads, group, width: K, G, C.
      queries: T.
      page: slots of a page; None for a contiguous cache.
      dtype: of keys and values; queries are bfloat16.
      window: slots that a query sees; None: all.
      num_values: of a key's elements, those that are its value; None: values are beside keys.
    """

    lengths: tuple[int, ...]
    key_heads: int = 8
    group: int = 4
    width: int = 128
    queries: int = 1
    page: int | None = 128
    dtype: str = "bfloat16"
    window: int | None = None
    num_values: int | None = None

    @property
    def num_slots(self) -> int:
        """Of the longest row, in whole pages."""
        page = self.page or 128
        return -(-max(self.lengths) // page) * page

    def page_table(self) -> np.ndarray:
        """Returns which page is whose, int32 [rows, pages of a row], in no order."""
        pages = self.num_slots // (self.page or self.num_slots)
        shape = len(self.lengths), pages
        order = np.random.default_rng(0).permutation(shape[0] * pages)
        return order.astype(np.int32).reshape(shape)

    @property
    def least_bytes(self) -> int:
        """Bytes of the keys and values that some query sees, with their scales."""
        seen = self.lengths
        if self.window is not None:
            seen = [min(length, self.window + self.queries - 1) for length in self.lengths]
        num_parts = 2 if self.num_values is None else 1
        slot = num_parts * (self.width * (1 if self.dtype == "int8" else 2))
        slot += 2 * 4 if self.dtype == "int8" else 0
        return int(sum(seen)) * self.key_heads * slot


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The loss of tokens and its gradients.

    Attributes:
      tokens, ids, width: N, V, D.
      implementation: as `cross_entropy.op` takes it.
    """

    tokens: int
    ids: int
    width: int
    implementation: str

    @property
    def flops(self) -> int:
        """Of three products: logits and two gradients."""
        return 6 * self.tokens * self.ids * self.width


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """Rows of groups times the groups' matrices, or a gradient of that; bfloat16.

    Attributes:
      rows, depth, width, groups: R, D, F, E.
      load: "balanced", where groups have as many rows each, or "ragged", where some have many times as
        many as others.
      of: "product", or whose gradient: "rows", "matrices".
    """

    rows: int
    depth: int
    width: int
    groups: int
    load: str
    of: str

    def sizes(self) -> np.ndarray:
        """Returns the rows of each group, int32 [groups]; the sum is `rows`."""
        if self.load not in ("balanced", "ragged"):
            raise ValueError(f"load {self.load!r} is none of balanced, ragged")
        shares = np.full(self.groups, 1.0)
        if self.load == "ragged":
            shares = np.random.default_rng(0).gamma(2.0, size=self.groups)
        ends = np.round(np.cumsum(shares) / shares.sum() * self.rows).astype(np.int32)
        return np.diff(ends, prepend=np.int32(0))

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.depth * self.width

    @property
    def least_bytes(self) -> int:
        """Bytes of both operands and the result, each once; of groups without rows nothing is read."""
        matrices = self.groups if self.of == "matrices" else np.count_nonzero(self.sizes())
        rows = self.rows * (self.depth + self.width)
        return 2 * (rows + int(matrices) * self.depth * self.width)

    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of both: rows and matrices, the result's gradient and them, or both rows."""
        x_RD, y_RF = (self.rows, self.depth), (self.rows, self.width)
        w_EDF = (self.groups, self.depth, self.width)
        return {"product": (x_RD, w_EDF), "rows": (y_RF, w_EDF), "matrices": (x_RD, y_RF)}[self.of]
