"""Schedules and optimisers, put together from optax.

Every optimiser here is `update = -learning_rate * (direction + weight_decay * parameter)`, so
`optim.weight_decay` means the same for all of them.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax
from optax import contrib

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import soap

_WEIGHT_POWER = 2  # of the learning rate, as the weight of a step in schedule-free's average


def make_schedule(config: config_lib.OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: a linear warmup, then the named decay to the last step.

    `wsd` holds the peak and decays linearly over the last `cooldown_fraction` of the run (Hu et
    al. 2024, section 4); `inverse_sqrt` falls with 1 / sqrt(step / warmup_steps) (Vaswani et al.
    2017, section 5.3) and ignores `final_lr_fraction`.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_fraction
    warmup = config.warmup_steps
    # The last update, at step num_steps - 1, runs at the final rate.
    decay_steps = max(1, num_steps - 1 - warmup)
    if config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, config.final_lr_fraction)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, final, decay_steps)
    elif config.schedule == "wsd":
        cooldown = min(decay_steps, max(1, round(config.cooldown_fraction * num_steps)))
        decay = optax.linear_schedule(peak, final, cooldown, decay_steps - cooldown)
    else:
        start = max(1, warmup)
        decay = lambda step: peak * (start / (start + step)) ** 0.5  # noqa: E731
    if warmup == 0:
        return decay
    # Step 0 already learns: the ramp ends at the peak, `warmup` steps in.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(
    config: config_lib.OptimConfig,
    schedule: optax.Schedule,
    factors: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Returns the optimiser; clip the gradient before (train_step does, for its norm is logged).

    `factors` gives, of the parameters, what each one's update is multiplied by, before weight decay.

    Sources: AdamW Loshchilov and Hutter 2019; Lion Chen et al. 2023; Adafactor Shazeer and Stern
    2018; Muon Jordan et al. 2024, with the RMS matching of Liu et al. 2025 (section 2.2) so that it
    takes AdamW's learning rate and weight decay, and AdamW for embeddings, head and vectors; SOAP Vyas et al. 2024, with
    AdamW for the same; schedule-free AdamW Defazio et al. 2024.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    if config.name == "adamw":
        direction = adam
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, config.b2)
    elif config.name == "adafactor":
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    elif config.name == "muon":
        direction = optax.partition({"muon": _muon(config), "adam": adam}, muon_labels)
    elif config.name == "soap":
        own = soap.scale_by_soap(
            config.b1, config.b2, config.epsilon, config.soap_every, config.soap_max_width
        )
        direction = optax.partition({"soap": own, "adam": adam}, soap_labels)
    elif config.name == "schedule_free":
        # Adam without a first moment, whose place the average takes.
        direction = optax.scale_by_rms(
            config.b2, config.epsilon, eps_in_sqrt=False, bias_correction=True
        )
    else:
        direction = optax.trace(config.b1)
    if factors is not None:
        direction = optax.chain(direction, _scaled_by(factors))
    optimizer = optax.chain(
        direction,
        optax.add_decayed_weights(_decay(config), mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return _averaged(optimizer, schedule, config.b1) if is_averaged(config) else optimizer


def is_averaged(config: config_lib.OptimConfig) -> bool:
    """Returns whether parameters are an average of those that the optimiser moves."""
    return config.name == "schedule_free"


def gradient_point(config: config_lib.OptimConfig, opt_state: Any, params: Any) -> Any:
    """Returns the parameters that an averaging optimiser wants the gradient of.

    Between the average x and what moves, z: y = (1 - b1) z + b1 x (Defazio et al. 2024, equation 3).
    """
    return _between(config.b1, opt_state.z, params)


def _between(b1: float, moving: Any, average: Any) -> Any:
    # As a difference, which is nothing where both are the same.
    return jax.tree.map(lambda z, x: x + (1 - b1) * (z - x), moving, average)


def _averaged(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, b1: float
) -> optax.GradientTransformation:
    """Returns optax's schedule-free, whose parameters are y, for those of the model to be x.

    So what is evaluated, saved and sampled from is what the method is about, and no one else has to know.
    """
    inner = contrib.schedule_free(optimizer, schedule, b1, _WEIGHT_POWER)

    def update(updates, state, params):
        _, state = inner.update(updates, state, _between(b1, state.z, params))
        # The share of what moves in the average, as `inner` has it.
        share = state.max_lr**_WEIGHT_POWER / jnp.maximum(state.weight_sum, 1e-38)
        return jax.tree.map(lambda z, x: share * (z - x), state.z, params), state

    return optax.GradientTransformation(inner.init, update)


def _scaled_by(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(jnp.multiply, updates, factors(params))
    )


def _decay(config: config_lib.OptimConfig) -> float:
    """Returns what weights are decayed by, before the learning rate multiplies it.

    Independent decay (Loshchilov and Hutter 2019; Wortsman et al. 2023, section 3.2.2) follows the schedule, not its
    peak: weights lose the same share in a step whatever the peak.
    """
    if not config.is_decay_independent:
        return config.weight_decay
    return config.weight_decay / config.learning_rate


def _muon(config: config_lib.OptimConfig) -> optax.GradientTransformation:
    """Muon under an Explicit mesh: the compiler, not the types, shards its matrix products."""
    inner = contrib.scale_by_muon(
        beta=config.muon_momentum, weight_dimension_numbers=muon_dimension_numbers
    )

    def init(params):
        state = inner.init(params)
        # A constant is on no mesh: placed as `update` returns it, it lets a step compile once.
        coefficients = jax.sharding.reshard(state.ns_coeffs, PartitionSpec(None))
        return state._replace(ns_coeffs=coefficients)

    def update(updates, state, params=None):
        del params
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        run = jax.sharding.auto_axes(inner.update, out_sharding=shardings)
        updates, state = run(updates, state)
        return jax.tree_util.tree_map_with_path(_match_adam_rms, updates), state

    return optax.GradientTransformation(init, update)


def _match_adam_rms(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
    """Scales an orthogonal update to the root mean square of AdamW's, 0.2 an element."""
    inputs, outputs = dims.MATRICES[dims.of_path(path)]
    sizes = dict(zip(reversed(inputs + outputs), reversed(update.shape)))
    fan_in = math.prod(sizes[letter] for letter in inputs)
    fan_out = math.prod(sizes[letter] for letter in outputs)
    return update * 0.2 * max(fan_in, fan_out) ** 0.5


def decay_mask(params: Any) -> Any:
    """Returns a tree of Booleans: True for matrices, by the letters of their names."""
    return jax.tree_util.tree_map_with_path(lambda p, _: len(_weight_dims(p)) > 1, params)


def _weight_dims(path: tuple[Any, ...]) -> str:
    """Returns the letters of a weight, and none for a bias or a norm, which are vectors of outputs."""
    name = jax.tree_util.keystr(path)
    return "" if "bias_" in name or "scale_" in name else dims.of_path(path)


def muon_labels(params: Any) -> Any:
    """Returns a tree of labels, `muon` or `adam`, one for each parameter."""
    return _matrix_labels(params, "muon")


def soap_labels(params: Any) -> Any:
    """Returns a tree of labels, `soap` or `adam`, one for each parameter."""
    return _matrix_labels(params, "soap")


def _matrix_labels(params: Any, name: str) -> Any:
    def label(path, _):
        return name if _weight_dims(path) in dims.MATRICES else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def muon_dimension_numbers(params: Any) -> Any:
    """Returns for each matrix which dimensions are inputs and which outputs; layers are a batch."""

    def numbers(path, leaf):
        letters = dims.of_path(path)
        offset = leaf.ndim - len(letters)
        inputs, outputs = dims.MATRICES[letters]
        return contrib.MuonDimensionNumbers(
            reduction_axis=tuple(offset + letters.index(letter) for letter in inputs),
            output_axis=tuple(offset + letters.index(letter) for letter in outputs),
        )

    return jax.tree_util.tree_map_with_path(numbers, params)
