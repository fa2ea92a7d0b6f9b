"""Attention of some queries to some keys on one device, by its logsumexp: what a ring is made of.

The backward pass of a part needs the logsumexp and delta of the whole (Dao 2023, section 3.1), so that
gradients of parts simply add up.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp

from llm_jax.kernels.flash_attention import backward
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import blocks as blocks_lib
from llm_jax.kernels.flash_attention import devices
from llm_jax.kernels.flash_attention import forward
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import scores as scores_lib


class Piece(Protocol):
    """An implementation. Hashable.

    Keys begin at slot 0, queries where the parts say.
    """

    def forward(self, q_BTKGC, k_BSKC, v_BSKC, parts: scores_lib.Parts) -> tuple[Any, Any]:
        """Returns the result, [B, T, K, G, C of the values], and the logsumexp, float32 [B, K, G, T]:
        `scores.EMPTY` for a query that sees no key, whose result is zeros."""
        ...

    def backward(
        self, q_BTKGC, k_BSKC, v_BSKC, dy_BTKGC, lse_BKGT, delta_BKGT, parts: scores_lib.Parts
    ) -> tuple[Any, Any, Any, biases.Bias | None]:
        """Returns the gradients of queries, keys, values and, if it `has_gradient`, of the bias."""
        ...

    def has_gradient(self, bias: biases.Bias | None) -> bool:
        """Returns whether `backward` makes the gradient of a bias."""
        ...


def _offset(parts: scores_lib.Parts) -> jax.Array | int:
    return parts.static_offset if parts.q_offset is None else parts.q_offset


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels for TPUs."""

    blocks: blocks_lib.Blocks
    is_interpreted: bool

    def forward(self, q_BTKGC, k_BSKC, v_BSKC, parts):
        B, T, K, G, C = q_BTKGC.shape
        S, widths, offset = k_BSKC.shape[1], (C, v_BSKC.shape[-1]), _offset(parts)
        sizes, dtype = self.blocks.forward, q_BTKGC.dtype
        blocks = forward.fitted(sizes, parts.mask, (T, S), widths, dtype, offset, parts.bias)
        y_BHTC, lse_BHT = forward.attention(
            *(devices.heads_first(x) for x in (q_BTKGC, k_BSKC, v_BSKC)),
            parts=parts,
            visits=forward_visits.make_visits(parts.mask, T, S, blocks, offset),
            blocks=blocks,
            q_offset=offset,
            interpret=self.is_interpreted,
        )
        y_BTKGC = jnp.swapaxes(y_BHTC, 1, 2).reshape(B, T, K, G, -1)
        return y_BTKGC, lse_BHT.reshape(B, K, G, T)

    def backward(self, q_BTKGC, k_BSKC, v_BSKC, dy_BTKGC, lse_BKGT, delta_BKGT, parts):
        B, T, K, G, _ = q_BTKGC.shape
        dq, dk, dv, dbias = backward.attention(
            *(devices.heads_first(x) for x in (q_BTKGC, k_BSKC, v_BSKC, dy_BTKGC)),
            lse_BKGT.reshape(B, K * G, T),
            delta_BKGT.reshape(B, K * G, T),
            parts=parts,
            q_offset=_offset(parts),
            blocks=self.blocks.backward.fit(T, k_BSKC.shape[1]),
            interpret=self.is_interpreted,
        )
        dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
        return dq.reshape(q_BTKGC.shape), dk, dv, dbias

    def has_gradient(self, bias):
        return isinstance(bias, biases.Relative)


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Plain jnp, `chunk` queries scored at a time."""

    chunk: int

    def forward(self, q_BTKGC, k_BSKC, v_BSKC, parts):
        found = []
        for at, of_chunk in self._cut(q_BTKGC, parts):
            scores_BKGTS, allowed_B11TS, factors = _scores(q_BTKGC[:, at], k_BSKC, of_chunk)
            top_BKGT = jnp.max(scores_BKGTS, -1, where=allowed_B11TS, initial=scores_lib.EMPTY)
            weights_BKGTS = jnp.exp(jnp.where(allowed_B11TS, scores_BKGTS - top_BKGT[..., None], 0))
            weights_BKGTS = jnp.where(allowed_B11TS, weights_BKGTS, 0.0)
            sum_BKGT = jnp.sum(weights_BKGTS, -1)
            is_seen_BKGT = sum_BKGT > 0.0
            sum_BKGT = jnp.where(is_seen_BKGT, sum_BKGT, 1.0)
            lse_BKGT = jnp.where(is_seen_BKGT, top_BKGT + jnp.log(sum_BKGT), scores_lib.EMPTY)
            weights_BKGTS = (weights_BKGTS / sum_BKGT[..., None] * factors).astype(v_BSKC.dtype)
            found.append((_sum("BKGTS,BSKC->BTKGC", weights_BKGTS, v_BSKC), lse_BKGT))
        ys_BTKGC, lses_BKGT = zip(*found)
        return jnp.concatenate(ys_BTKGC, 1), jnp.concatenate(lses_BKGT, 3)

    def backward(self, q_BTKGC, k_BSKC, v_BSKC, dy_BTKGC, lse_BKGT, delta_BKGT, parts):
        dqs, totals = [], None
        for at, of_chunk in self._cut(q_BTKGC, parts):

            def scored(q_BTKGC, k_BSKC, bias, of_chunk=of_chunk):
                found = _scores(q_BTKGC, k_BSKC, dataclasses.replace(of_chunk, bias=bias))
                return found[0], found[1:]

            scores_BKGTS, pull, (allowed_B11TS, factors) = jax.vjp(
                scored, q_BTKGC[:, at], k_BSKC, parts.bias, has_aux=True
            )
            dy = dy_BTKGC[:, at]
            scores_BKGTS = scores_BKGTS - lse_BKGT[..., at, None]
            weights_BKGTS = jnp.where(allowed_B11TS, jnp.exp(scores_BKGTS), 0.0)
            dweights_BKGTS = _sum("BTKGC,BSKC->BKGTS", dy, v_BSKC) * factors
            dq, dk, dbias = pull(weights_BKGTS * (dweights_BKGTS - delta_BKGT[..., at, None]))
            dv = _sum("BKGTS,BTKGC->BSKC", (weights_BKGTS * factors).astype(dy.dtype), dy)
            dqs.append(dq)
            found = jax.tree.map(lambda x: x.astype(jnp.float32), (dk, dv, dbias))
            totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        return jnp.concatenate(dqs, 1), *totals

    def has_gradient(self, bias):
        return bias is not None

    def _cut(self, q_BTKGC, parts) -> Iterator[tuple[slice, scores_lib.Parts]]:
        for start in range(0, q_BTKGC.shape[1], self.chunk):
            at = slice(start, min(start + self.chunk, q_BTKGC.shape[1]))
            origin = parts.origin
            if origin is not None:
                origin = dataclasses.replace(origin, query=origin.query + start)
            mask = masks.cut(parts.mask, at, slice(None))
            offset = _offset(parts) + start
            yield at, dataclasses.replace(parts, mask=mask, origin=origin, q_offset=offset)


def _scores(
    q_BTKGC: jax.Array, k_BSKC: jax.Array, parts: scores_lib.Parts
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """Returns scores, float32, which of them count, and the factors of dropout."""
    (B, T, K, G, _), S = q_BTKGC.shape, k_BSKC.shape[1]
    t_T, s_S = parts.q_offset + jnp.arange(T), jnp.arange(S)
    scores_BKGTS = _sum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC) * parts.scale
    if parts.softcap is not None:
        scores_BKGTS = parts.softcap * jnp.tanh(scores_BKGTS / parts.softcap)
    if parts.bias is not None:
        scores_BKGTS = scores_BKGTS + parts.bias.scores_BKGTS(t_T, s_S)
    allowed_B11TS = masks.allowed_BTS(parts.mask, t_T, s_S)[:, None, None]
    factors = 1.0
    if parts.dropout is not None:
        row = jnp.arange(B)[:, None, None, None, None]
        head = (jnp.arange(K)[:, None] * G + jnp.arange(G))[:, :, None, None]
        query, key = jnp.arange(T)[:, None], s_S[None, :]
        factors = parts.origin.factors(parts.dropout, row, head, query, key)
    return scores_BKGTS, allowed_B11TS, factors


def _sum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
