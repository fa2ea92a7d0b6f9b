"""Cross-entropy by chunks of tokens: logits never exist whole, forward or backward."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels.cross_entropy import devices


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Scores `chunk` tokens at a time; a `devices.Local`.

    A chunk's logits serve its loss and both gradients: three products, where a chunk that is
    recomputed in the backward pass takes four.
    """

    head_dims: str
    softcap: float | None
    z_loss: float
    chunk: int

    def score(self, x_ND, head, targets_N, axes):
        """As `devices.Local`."""

        def step(_, tokens):
            _, _, _, *terms = self._terms(head, *tokens, axes)
            return None, tuple(terms)

        _, terms = jax.lax.scan(step, None, self._chunks(x_ND, targets_N))
        return tuple(_join(term, targets_N.shape) for term in terms)

    def score_and_differentiate(self, x_ND, head, targets_N, weights_N, axes):
        """As `devices.Local`."""
        V_and_D = self.head_dims

        def step(dhead, tokens):
            x_ND, targets_N, weights_N = tokens
            logits_NV, is_target_NV, stats, *terms = self._terms(head, x_ND, targets_N, axes)
            slopes_NV = self._slopes(logits_NV, is_target_NV, *stats, terms[1]).astype(x_ND.dtype)
            scale_N1 = (weights_N / stats[1])[:, None]
            dx_ND = scale_N1 * _product(f"NV,{V_and_D}->ND", slopes_NV, head)
            scaled_ND = (scale_N1 * x_ND).astype(x_ND.dtype)
            dhead = dhead + _product(f"NV,ND->{V_and_D}", slopes_NV, scaled_ND)
            return dhead, (*terms, dx_ND.astype(x_ND.dtype))

        zeros = jnp.zeros(head.shape, jnp.float32)
        dhead, (*terms, dx) = jax.lax.scan(step, zeros, self._chunks(x_ND, targets_N, weights_N))
        return *(_join(term, targets_N.shape) for term in terms), _join(dx, x_ND.shape), dhead

    def _terms(self, head, x_ND, targets_N, axes):
        """Returns a chunk's logits, where its targets are, row statistics, and losses.

        The statistics are the largest logit of a row and the sum of exponentials below it, over the
        whole vocabulary; the losses are cross-entropy and logsumexp.
        """
        logits_NV = _product(f"ND,{self.head_dims}->NV", x_ND, head)
        if self.softcap is not None:
            logits_NV = self.softcap * jnp.tanh(logits_NV / self.softcap)
        is_target_NV = targets_N[:, None] == jnp.arange(logits_NV.shape[1])
        max_N = jnp.max(logits_NV, axis=-1)
        sum_N = jnp.sum(jnp.exp(logits_NV - max_N[:, None]), axis=-1)
        target_N = jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
        max_N, sum_N, target_N = devices.over_vocabulary(max_N, sum_N, target_N, axes)
        log_z_N = max_N + jnp.log(sum_N)
        return logits_NV, is_target_NV, (max_N, sum_N), log_z_N - target_N, log_z_N

    def _slopes(self, logits_NV, is_target_NV, max_N, sum_N, log_z_N):
        """Returns the gradient of a row's loss by its logits, times the row's `sum`.

        With `p = exp(logit - max) / sum` it is `p * (1 + 2 z_loss log_z) - is_target`. The division and
        the weight, of rows, wait until after the products: only what differs within a row is rounded.
        The difference is taken before rounding, so that a target near certainty loses nothing.
        """
        slopes_NV = jnp.exp(logits_NV - max_N[:, None])
        if self.z_loss:
            slopes_NV = slopes_NV * (1.0 + 2.0 * self.z_loss * log_z_N)[:, None]
        slopes_NV = slopes_NV - jnp.where(is_target_NV, sum_N[:, None], 0.0)
        if self.softcap is not None:
            slopes_NV = slopes_NV * (1.0 - jnp.square(logits_NV / self.softcap))
        return slopes_NV

    def _chunks(self, *arrays):
        """Cuts [N, ...] into [chunks, tokens, ...] of equal length, the last ones padded by zeros."""
        num_tokens = arrays[0].shape[0]
        num_chunks = -(-num_tokens // self.chunk)
        length = -(-num_tokens // num_chunks)

        def cut(array):
            missing = num_chunks * length - num_tokens
            array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            return array.reshape(num_chunks, length, *array.shape[1:])

        return tuple(cut(array) for array in arrays)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_chunks`."""
    return chunks.reshape(-1, *chunks.shape[2:])[: shape[0]]
