"""Differentially private SGD: gradients of single rows, clipped, summed and noised, and what they reveal.

Abadi et al. 2016, algorithm 1. Of a batch of B rows the step gets

    (sum over rows of g_i * min(1, C / |g_i|) + N(0, (z C)^2)) / B

where g_i is the gradient of a row's mean loss, C is `optim.dp_clip_norm` and z `optim.dp_noise_multiplier`.
What the optimiser makes of it costs no privacy. One example is one row: of examples with `data.packing=none` an
example, of text with `concat` a window of the stream, not a document. `train/loss` and evaluations are of the
data as they are: who publishes them publishes more than epsilon says. Noise comes from JAX's generator and the
run's seed, so that a run resumes exactly: who knows `train.seed`, which `config.json` and checkpoints hold, can
take the noise off. Publish parameters without it (`python -m llm_jax.convert to-hf`).

Each device takes the gradients of its rows one at a time, with all weights at hand: what it holds beside them is
two gradients of the whole model, however the weights and moments are cut.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from llm_jax import config as config_lib
from llm_jax import losses
from llm_jax import sharding
from llm_jax import tuning
from llm_jax.data import batch as batch_lib
from llm_jax.kernels import placement
from llm_jax.models import build

_ORDERS = np.array([*range(2, 64), 72, 96, 128, 256, 512, 1024])  # of Renyi divergences

# What a batch's rows add to: the summed objective of a batch, the sums that are reported, and routers'.
Objective = Callable[
    [config_lib.RunConfig, build.Model, batch_lib.Batch, jax.Array | None],
    tuple[jax.Array, losses.LossSums, dict],
]


def gradients(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array,
    objective: Objective,
) -> tuple[build.Model, losses.LossSums, dict]:
    """Returns the private gradient, the sums of the whole batch, and nothing of routers: there are none.

    Parameters that do not learn have None for a gradient.

    Args:
      config: of the run, as `config.check` lets it pass.
      model, batch: on the mesh that is set.
      key: of the step; noise and dropout follow from it.
      objective: that is minimised.
    """
    learned, _ = tuning.split(config, model)
    row_key, noise_key = jax.random.split(key)
    summed, sums = clipped_sum(config, model, batch, row_key, objective)
    noise = config.optim.dp_noise_multiplier * config.optim.dp_clip_norm
    num_rows = len(batch.tokens)
    leaves, structure = jax.tree.flatten(summed)
    keys = jax.random.split(noise_key, len(leaves))

    def noised(total: jax.Array, parameter: jax.Array, key: jax.Array) -> jax.Array:
        spec = jax.typeof(parameter).sharding.spec
        drawn = jax.random.normal(key, total.shape, jnp.float32, out_sharding=spec)
        return ((total + noise * drawn) / num_rows).astype(parameter.dtype)

    found = map(noised, leaves, jax.tree.leaves(learned), keys)
    return jax.tree.unflatten(structure, found), sums, {}


def clipped_sum(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array,
    objective: Objective,
) -> tuple[build.Model, losses.LossSums]:
    """Returns the sum over rows of their clipped gradients, float32, cut as the parameters, and the batch's sums.

    Arguments as of `gradients`.
    """
    learned, _ = tuning.split(config, model)
    num_parts = placement.num_parts(model.rules.act("B")[0])
    config, whole = _on_each_device(config, model)
    learned_whole, still = tuning.split(config, whole)
    has_dropout = config.model.dropout or config.model.attention_dropout

    def loss(learned, row, key):
        value, sums, _ = objective(
            config, tuning.join(learned, still), row, key if has_dropout else None
        )
        return value / jnp.maximum(jnp.sum(row.weights), 1.0), sums

    def of_row(row, key_data):
        row, key = jax.tree.map(lambda x: x[None], row), jax.random.wrap_key_data(key_data)
        grads, sums = jax.grad(loss, has_aux=True)(learned_whole, row, key)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        norm = optax.global_norm(grads)
        # Of no gradient at all the factor is 1, not 0 / 0.
        factor = config.optim.dp_clip_norm / jnp.maximum(norm, config.optim.dp_clip_norm)
        return jax.tree.map(lambda grad: grad * factor, grads), sums

    def of_rows(rows, key_data):
        """Of a row of each device."""
        return jax.tree.map(lambda x: jnp.sum(x, 0), jax.vmap(of_row)(rows, key_data))

    def accumulate(total, rows_and_keys):
        return jax.tree.map(jnp.add, total, of_rows(*rows_and_keys)), None

    # [B, ...] -> [parts, B / parts, ...] -> [B / parts, parts, ...]: rows stay on their devices.
    def by_device(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(model.rules.act("B")[0], *(None,) * (x.ndim - 1))
        x, shape = jax.sharding.reshard(x, spec), (num_parts, -1, *x.shape[1:])
        spec = PartitionSpec(spec[0], *(None,) * x.ndim)
        return jnp.reshape(x, shape, out_sharding=spec).swapaxes(0, 1)

    # As integers: a reshape of keys forgets an axis of one device.
    keys = jax.random.key_data(jax.random.split(key, len(batch.tokens)))
    rows_and_keys = jax.tree.map(by_device, (batch, keys))
    shapes = jax.eval_shape(of_rows, *jax.tree.map(lambda x: x[0], rows_and_keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (summed, sums), _ = jax.lax.scan(accumulate, zeros, rows_and_keys)
    summed = jax.tree.map(
        lambda total, like: jax.sharding.reshard(total, jax.typeof(like).sharding.spec),
        summed,
        _like(summed, learned),
    )
    return _like(learned, summed), sums


def _like(tree: Any, other: Any) -> Any:
    """Returns the leaves of `other` in the structure of `tree`: rules are a part of that."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(other))


def _on_each_device(
    config: config_lib.RunConfig, model: build.Model
) -> tuple[config_lib.RunConfig, build.Model]:
    """Returns the model with all weights on each device and no axis of the mesh in it, and its config."""
    own = config.model
    attention = "chunked" if own.attention == "auto" else own.attention
    own = dataclasses.replace(own, attention=attention)
    # Of a single row all logits fit.
    train = dataclasses.replace(config.train, cross_entropy="reference")
    abstract = build.abstract_model(own, sharding.AxisRules((), ()))
    whole = [
        jax.sharding.reshard(leaf, PartitionSpec(*(None,) * leaf.ndim))
        for leaf in jax.tree.leaves(model)
    ]
    config = dataclasses.replace(config, model=own, train=train)
    return config, jax.tree.unflatten(jax.tree.structure(abstract), whole)


# --- what it reveals --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accountant:
    """What the steps of a run reveal.

    Attributes:
      noise_multiplier: z.
      sampling_rate: rows of a batch over rows of an epoch.
      delta: of (epsilon, delta).
    """

    noise_multiplier: float
    sampling_rate: float
    delta: float

    def epsilon(self, num_steps: int) -> float:
        """Returns epsilon after so many steps; infinite without noise."""
        return epsilon(self.noise_multiplier, self.sampling_rate, num_steps, self.delta)

    def metrics(self, num_steps: int) -> dict[str, float]:
        """Returns what a row of metrics says of it."""
        return {"privacy/epsilon": self.epsilon(num_steps), "privacy/delta": self.delta}

    def describe(self, num_steps: int) -> str:
        """Returns a line for the terminal."""
        return (
            f"differential privacy of rows: epsilon {self.epsilon(num_steps):.4g} at delta"
            f" {self.delta:.3g}, if rows had been drawn independently (Poisson); batches are"
            " shuffled, for which there is no such bound"
        )


def make_accountant(config: config_lib.RunConfig, num_rows: int) -> Accountant | None:
    """Returns the accountant of a run on a split of `num_rows` rows; None where gradients are not private."""
    optim = config.optim
    if optim.dp_clip_norm is None:
        return None
    delta = 1.0 / num_rows if optim.dp_delta is None else optim.dp_delta
    rate = min(1.0, config.data.batch_size / num_rows)
    return Accountant(optim.dp_noise_multiplier, rate, delta)


def epsilon(noise_multiplier: float, sampling_rate: float, num_steps: int, delta: float) -> float:
    """Returns epsilon of the subsampled Gaussian mechanism, for adding or removing one row.

    By Renyi divergences (Mironov et al. 2019, section 3.3, whole orders) and their conversion (Canonne et al.
    2020, proposition 12). An upper bound that holds where each step has each row with probability
    `sampling_rate`, whatever the others. Of shuffled batches, which have each row once an epoch, it is what is
    commonly told, and can be too low (Chua et al. 2024).

    Args:
      noise_multiplier: standard deviation of the noise over the clipping norm.
      sampling_rate: in (0, 1].
      num_steps: so far.
      delta: in (0, 1).
    """
    if num_steps == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    divergences = num_steps * np.array(
        [_divergence(noise_multiplier, sampling_rate, int(order)) for order in _ORDERS]
    )
    converted = (
        divergences + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    )
    return max(0.0, float(converted.min()))


def _divergence(noise_multiplier: float, sampling_rate: float, order: int) -> float:
    """Returns the Renyi divergence of one step of a whole order above 1."""
    if sampling_rate == 1.0:
        return order / (2 * noise_multiplier**2)
    k = np.arange(order + 1)
    binomials = np.array([math.lgamma(order + 1) - math.lgamma(i + 1) for i in k])
    binomials -= np.array([math.lgamma(order - i + 1) for i in k])
    logs = binomials + k * math.log(sampling_rate) + (order - k) * math.log1p(-sampling_rate)
    logs += (k * k - k) / (2 * noise_multiplier**2)
    return float(np.logaddexp.reduce(logs)) / (order - 1)
