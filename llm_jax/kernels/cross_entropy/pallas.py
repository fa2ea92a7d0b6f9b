"""Cross-entropy by TPU kernels: logits never leave VMEM."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels.cross_entropy import devices
from llm_jax.kernels.cross_entropy import kernels


@dataclasses.dataclass(frozen=True)
class Pallas:
    """Scores by `kernels`; a `devices.Local`.

    Logits are computed twice, for the statistics and for the gradients: four products instead of
    three, and no logits in HBM.

    Attributes:
      blocks: None for what `kernels.fit` gives.
      is_interpreted: run on any platform, slowly.
    """

    head_dims: str
    softcap: float | None
    z_loss: float
    blocks: kernels.Blocks | None
    is_interpreted: bool

    def score(self, x_ND, head, targets_N, axes):
        """As `devices.Local`."""
        arrays = self._whole_blocks(x_ND, head, targets_N)
        return self._score(*arrays, x_ND.shape[0], axes)

    def _score(self, static, x_ND, head_VD, targets_N, num_tokens, axes):
        parts = kernels.statistics(
            x_ND, head_VD, targets_N, static=static, interpret=self.is_interpreted
        )
        max_N, sum_N, target_N = devices.over_vocabulary(*(x[:num_tokens] for x in parts), axes)
        log_z_N = max_N + jnp.log(sum_N)
        return log_z_N - target_N, log_z_N

    def score_and_differentiate(self, x_ND, head, targets_N, weights_N, axes):
        """As `devices.Local`."""
        num_tokens = x_ND.shape[0]
        static, *arrays = self._whole_blocks(x_ND, head, targets_N)
        cross_entropy_N, log_z_N = self._score(static, *arrays, num_tokens, axes)
        scales_N = weights_N * (1.0 + 2.0 * self.z_loss * log_z_N)
        rows = (_padded(row_N, static.blocks.tokens) for row_N in (log_z_N, weights_N, scales_N))
        dx_ND, dhead_VD = kernels.gradients(
            *arrays, *rows, static=static, interpret=self.is_interpreted
        )
        dhead_VD = dhead_VD[: static.num_ids]
        dhead = dhead_VD if self.head_dims == "VD" else dhead_VD.T
        return cross_entropy_N, log_z_N, dx_ND[:num_tokens], dhead

    def _whole_blocks(self, x_ND, head, targets_N):
        """Returns what the kernels are told, and their arrays, padded to whole blocks."""
        head_VD = head if self.head_dims == "VD" else head.T
        num_ids, width = head_VD.shape
        blocks = self.blocks or kernels.fit(x_ND.shape[0], num_ids, width, x_ND.dtype)
        static = kernels.Static(blocks, num_ids, self.softcap)
        head_VD = _padded(head_VD, blocks.ids)
        # Ids of another device may be those of padding here.
        targets_N = jnp.where((targets_N >= 0) & (targets_N < num_ids), targets_N, -1)
        return static, _padded(x_ND, blocks.tokens), head_VD, _padded(targets_N, blocks.tokens)


def _padded(array: jax.Array, multiple: int) -> jax.Array:
    """Returns the array with zeros after it, up to a multiple of rows."""
    missing = -array.shape[0] % multiple
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
