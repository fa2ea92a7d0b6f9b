"""What each attention of a forward pass was given, and the weights that it used.

The model runs as always; of its stacks the layers run one by one, and each attention is watched. Its weights
are computed from what it was given, by its own projections, mask, window, soft-cap and bias, as the reference
of attention has them: no implementation keeps them.
"""

import dataclasses
from typing import Any

import jax

from llm_jax import config as config_lib
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.models import build
from llm_jax.models import context as context_lib
from llm_jax.models import stack as stack_lib

SELF, ENCODER, DECODER, CROSS = "self", "encoder", "decoder", "cross"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One attention of one forward pass.

    Attributes:
      kind: `self`, or of an encoder-decoder `encoder`, `decoder` and `cross`.
      module: the attention.
      x_BTD: what it was given, with `context`.
      y_BTD: what it gave.
      weights_BKGTS: float32.
    """

    kind: str
    module: Any
    x_BTD: jax.Array
    context: context_lib.Context
    y_BTD: jax.Array
    weights_BKGTS: jax.Array


class _Watched:
    """An attention, and a list that grows with what it does."""

    def __init__(self, module: Any, kind: str, found: list[Recorded]):
        self._module, self._kind, self._found = module, kind, found

    def __call__(self, x_BTD: jax.Array, context: context_lib.Context, *rest: Any) -> Any:
        y = self._module(x_BTD, context, *rest)
        y_BTD = y[0] if isinstance(y, tuple) else y
        weights_BKGTS = self._module.inspected(x_BTD, context)
        self._found.append(Recorded(self._kind, self._module, x_BTD, context, y_BTD, weights_BKGTS))
        return y


class _WatchedStack:
    """A stack whose layers run one by one, their attentions watched."""

    def __init__(self, stack: stack_lib.Stack, kind: str, found: list[Recorded]):
        self._blocks = stack.unstacked()
        self._is_entry_normalised = stack.is_entry_normalised
        for block in self._blocks:
            block.attention = _Watched(block.attention, kind, found)
            if block.cross_attention is not None:
                block.cross_attention = _Watched(block.cross_attention, CROSS, found)

    def __call__(
        self, x_BTD: jax.Array, contexts: tuple[context_lib.Context, ...], key: None = None
    ) -> tuple[jax.Array, None]:
        del key  # nothing is dropped
        x_BTD, _ = stack_lib.run_cached(
            self._blocks,
            x_BTD,
            contexts,
            [None] * len(self._blocks),
            is_entry_normalised=self._is_entry_normalised,
        )
        return x_BTD, None


def record(
    config: config_lib.RunConfig, model: build.Model, batch: batch_lib.Batch
) -> tuple[jax.Array, list[Recorded]]:
    """Returns what the model's head reads, [B, T, D], and its attentions in the order of their kinds' layers.

    Call it under `jax.jit`, with the model as an argument: it changes the copy that it is given.
    """
    found: list[Recorded] = []
    if config.model.architecture == "encoder_decoder":
        model.encoder.stack = _WatchedStack(model.encoder.stack, ENCODER, found)
        model.decoder.stack = _WatchedStack(model.decoder.stack, DECODER, found)
    else:
        model.stack = _WatchedStack(model.stack, SELF, found)
    x_BTD, _ = train_step.states(config, model, batch)
    return x_BTD, found
