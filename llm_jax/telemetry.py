"""What goes on inside a run: sizes of logits, activations, gradients and updates, and how noisy gradients are.

Written every `train.telemetry_every` steps, of the batch that the step then learns from, by a program of its own: a
run without it is the same, and one with it pays for the steps that are looked at. Layers are looked at one by one,
without kernels and without dropout.

    telemetry/max_attention_logit     of each layer: the largest score, scaled and capped, that a query sees
    telemetry/output_logit_norm       root mean square of the vocabulary's logits, over tokens that count
    telemetry/log_z                   mean of the logits' logsumexp
    telemetry/activation_rms          of what each attention is given, a layer each
    telemetry/gradient_rms            of each dense layer, over all of its parameters
    telemetry/update_ratio            of each dense layer: norm of the update over norm of the parameters
    telemetry/gradient_noise_scale    of McCandlish et al. 2018, appendix A.1, in rows: of the batch's halves
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax import config as config_lib
from llm_jax import train_step
from llm_jax import trees
from llm_jax import tuning
from llm_jax.data import batch as batch_lib
from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import op
from llm_jax.understanding import recording

_STACK = "stack/layers/"


def make(config: config_lib.RunConfig):
    """Returns the jitted function from a state and the batch it learns from next to metrics, by name."""
    return jax.jit(functools.partial(observe, config))


def observe(
    config: config_lib.RunConfig, state: train_step.TrainState, batch: batch_lib.Batch
) -> dict[str, jax.Array]:
    """Returns the metrics of a step that is not taken; see above. Lists are of layers."""
    # A copy: its attentions are watched in place.
    found = _of_forward(config, jax.tree.map(lambda x: x, state.model), batch)
    key = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
    point = train_step.gradient_point(config, state)
    grads, _, _ = train_step.gradients(config, point, batch, key)
    found |= _of_update(config, state, grads)
    noise = _noise_scale(config, point, batch, key)
    return found if noise is None else found | {"telemetry/gradient_noise_scale": noise}


def _of_forward(
    config: config_lib.RunConfig, model: Any, batch: batch_lib.Batch
) -> dict[str, jax.Array]:
    x_BTD, recorded = recording.record(config, model, batch)
    own = [one for one in recorded if one.kind != recording.CROSS]
    found = {
        "telemetry/max_attention_logit": jnp.stack([_largest_score(one) for one in own]),
        "telemetry/activation_rms": jnp.stack([_rms(one.x_BTD) for one in own]),
    }
    if config.model.head != "lm":
        return found
    logits_BTV = model.vocabulary_logits(x_BTD)
    counts_BT = batch.weights > 0
    total = jnp.maximum(jnp.sum(counts_BT), 1)
    squares_BT = jnp.mean(jnp.square(logits_BTV), axis=-1)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return found | {
        "telemetry/output_logit_norm": jnp.sqrt(jnp.sum(squares_BT * counts_BT) / total),
        "telemetry/log_z": jnp.sum(log_z_BT * counts_BT) / total,
    }


def _largest_score(one: recording.Recorded) -> jax.Array:
    """Returns the largest score of keys that queries see."""
    return one.module.inspected(one.x_BTD, one.context, op.largest_score)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _of_update(
    config: config_lib.RunConfig, state: train_step.TrainState, grads: Any
) -> dict[str, jax.Array]:
    optimizer, _ = train_step.make_optimizer(config)
    learned, _ = tuning.split(config, state.model)
    updates, _ = optimizer.update(
        train_step.clipped(config, grads, optax.global_norm(grads)),
        train_step.moments(config, state),
        learned,
    )
    updates = tuning.scaled(updates, tuning.rates(config, learned))
    squares = [_squares_of_layers(trees.by_name(tree)) for tree in (grads, updates, learned)]
    if not squares[0]:
        return {}
    counts: dict[str, int] = {}
    for name, leaf in trees.by_name(grads).items():
        if _STACK in name:
            stack = name.partition(_STACK)[0]
            counts[stack] = counts.get(stack, 0) + leaf.size // leaf.shape[0]
    sizes, changes, parameters = squares
    return {
        "telemetry/gradient_rms": jnp.concatenate(
            [jnp.sqrt(sizes[stack] / counts[stack]) for stack in sizes]
        ),
        "telemetry/update_ratio": jnp.concatenate(
            [jnp.sqrt(changes[stack] / jnp.maximum(parameters[stack], 1e-30)) for stack in sizes]
        ),
    }


def _squares_of_layers(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the squared norm of each layer, [L], by its stack."""
    found: dict[str, jax.Array] = {}
    for name, leaf in leaves.items():
        stack, layers, _ = name.partition(_STACK)
        if layers:
            axes = tuple(range(1, leaf.ndim))
            own = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
            found[stack] = found[stack] + own if stack in found else own
    return found


def _noise_scale(
    config: config_lib.RunConfig, model: Any, batch: batch_lib.Batch, key: jax.Array
) -> jax.Array | None:
    """Returns the noise scale in rows, of the gradients of the halves of a batch; None if devices cannot halve it."""
    num_rows = len(batch.tokens)
    # Each half is split into microbatches as the whole is.
    pieces = placement.num_parts(model.rules.act("B")[0]) * config.optim.accumulation_steps
    if num_rows % (2 * pieces):
        return None
    # Every second row: halves stay on their devices.
    halves = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]).swapaxes(0, 1), batch)
    squares, total = [], None
    for number in (0, 1):
        half = jax.tree.map(lambda x, number=number: x[number], halves)
        grads, _, _ = train_step.gradients(config, model, half, key)
        squares.append(jnp.square(optax.global_norm(grads)))
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    small, big = sum(squares) / 2, jnp.square(optax.global_norm(total)) / 4
    # Unbiased estimates of |G|^2 and of the trace of the covariance, of B / 2 and B rows.
    signal = 2 * big - small
    noise = (small - big) * num_rows
    return noise / jnp.maximum(signal, 1e-30)
