"""State, loss, gradients and the update: what one `jax.jit` holds."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax import config as config_lib
from llm_jax import losses
from llm_jax import optim
from llm_jax import private_gradients
from llm_jax import sharding
from llm_jax import tuning
from llm_jax.data import batch as batch_lib
from llm_jax.kernels.cross_entropy import op as cross_entropy
from llm_jax.kernels.flash_attention import ring
from llm_jax.models import build
from llm_jax.models import parametrisation
from llm_jax.models.moe import balance

# Objectives whose rows hold two texts that must not see each other, packed or not.
_OF_TWO = ("contrastive", "preference")

Metrics = dict[str, jax.Array]
Routed = dict[str, balance.Routed]  # by stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes.

    Attributes:
      step: int32, updates tried so far, skipped ones included.
      num_skipped: int32, updates skipped because loss or gradient was not finite.
      model: the parameters.
      opt_state: of optax, for the parameters that learn.
    """

    step: jax.Array
    num_skipped: jax.Array
    model: build.Model
    opt_state: Any


def make_optimizer(config: config_lib.RunConfig) -> tuple[optax.GradientTransformation, Callable]:
    """Returns the optimiser of a run and its schedule of learning rates."""
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    return optim.make_optimizer(config.optim, schedule, _rate_factors(config.model)), schedule


def _rate_factors(config: config_lib.ModelConfig) -> Callable | None:
    if parametrisation.width_ratio(config) == 1.0:
        return None
    return functools.partial(parametrisation.rate_factors, config)


def init_state(config: config_lib.RunConfig, rules: sharding.AxisRules) -> TrainState:
    """Returns the state before the first step. Call it under `jax.jit` and a mesh."""
    model = build.make_model(jax.random.key(config.train.seed), config.model, rules)
    optimizer, _ = make_optimizer(config)
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(tuning.split(config, model)[0])
    if config.optim.offload_state:
        opt_state = _moved(opt_state, jax.memory.Space.Host)
    return TrainState(zero, zero, model, opt_state)


def _moved(opt_state: Any, space: jax.memory.Space) -> Any:
    """Returns the arrays of an optimiser in a memory space; its counts stay with the device."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)


def moments(config: config_lib.RunConfig, state: TrainState) -> Any:
    """Returns the optimiser's state where an update reads it: on the devices."""
    if not config.optim.offload_state:
        return state.opt_state
    return _moved(state.opt_state, jax.memory.Space.Device)


def gradient_point(config: config_lib.RunConfig, state: TrainState) -> build.Model:
    """Returns the model that a step takes its gradient at; see `optim.gradient_point`."""
    if not optim.is_averaged(config.optim):
        return state.model
    learned, still = tuning.split(config, state.model)
    point = optim.gradient_point(config.optim, moments(config, state), learned)
    return tuning.join(point, still)


def abstract_state(config: config_lib.RunConfig, rules: sharding.AxisRules) -> TrainState:
    """Returns the state before the first step as shapes with places. Call it under a mesh."""
    state = jax.eval_shape(lambda: init_state(config, rules))
    if not config.optim.offload_state:
        return state

    def in_host_memory(leaf):  # shapes that are traced do not tell
        if not leaf.ndim:
            return leaf
        placed = leaf.sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return dataclasses.replace(state, opt_state=jax.tree.map(in_host_memory, state.opt_state))


def states(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Routed]:
    """Returns what a model's head reads of a batch, [B, T, D], and what its routers did.

    `key` is that of a training step.
    """
    # Rows of `concat` are one segment; their padding comes last, where causal attention hides it.
    is_told = (
        config.data.packing == "packed"
        or config.model.architecture != "decoder"
        or config.objective.name in _OF_TWO
    )
    segments_BT = batch.segments if is_told else None
    inputs = batch_lib.model_inputs(batch)
    if config.model.moe.is_on and not is_told:
        inputs["numbers_BT"] = batch.segments
    return model.hidden(batch.tokens, batch.positions, segments_BT, key, **inputs)


def token_losses(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array | None = None,
) -> tuple[cross_entropy.TokenLosses, Routed]:
    """Returns the losses of a batch's tokens in the vocabulary, and what routers did; `key` as of `states`.

    Tokens are in the order that the model takes, which `_in_order` makes.
    """
    x_BTD, routed = states(config, model, batch, key)
    head_dims, head = model.head()
    tokens = cross_entropy.cross_entropy(
        x_BTD,
        head[...],
        batch.targets,
        batch.weights,
        head_dims=head_dims,
        implementation=config.train.cross_entropy,
        chunk=config.train.cross_entropy_chunk,
        softcap=config.model.logit_softcap,
        z_loss=config.train.z_loss,
        bias_V=None if model.head_bias_V is None else model.head_bias_V[...],
    )
    return tokens, routed


def of_answers(cross_entropy_BT: jax.Array, batch: batch_lib.Batch) -> jax.Array:
    """Returns the log-probabilities of the two answers of each row, in nats, float32 [B, 2]."""
    of_both = [
        -jnp.sum(cross_entropy_BT * batch.weights * (batch.segments == number), axis=1)
        for number in (1, 2)
    ]
    return jnp.stack(of_both, axis=1)


def _in_order(model: build.Model, batch: batch_lib.Batch) -> batch_lib.Batch:
    """Returns the batch in the order that balances a ring, where keys go around; sums do not see it."""
    return jax.tree.map(ring.zigzag, batch) if model.rules.context == "ring" else batch


def _objective(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array | None,
) -> tuple[jax.Array, losses.LossSums, Routed]:
    """Returns what is minimised, summed over a batch, the sums that are reported, and what routers did.

    Losses of routers are not among these sums.
    """
    if config.objective.name == "contrastive":
        x_BTD, routed = states(config, model, batch, key)
        pair = [model.embeddings(x_BTD, batch.segments, number) for number in (1, 2)]
        how = {
            "temperature": config.objective.temperature,
            "is_symmetric": config.objective.is_symmetric,
        }
        sums = losses.contrastive_sums(*pair, batch.weights, **how)
        return sums.cross_entropy, sums, routed
    if config.objective.name == "preference":
        tokens, routed = token_losses(config, model, batch, key)
        policy_B2 = of_answers(tokens.cross_entropy_BT, batch)
        weights_B = jnp.any(batch.weights > 0, axis=1).astype(jnp.float32)
        beta = config.objective.beta
        sums = losses.preference_sums(policy_B2, batch.reference, weights_B, beta=beta)
        return sums.cross_entropy, sums, routed
    if config.model.head == "lm":
        tokens, routed = token_losses(config, model, batch, key)
        terms = (tokens.cross_entropy_BT, tokens.log_z_BT)
        return tokens.objective, losses.weighted_sums(*terms, batch.weights), routed
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    x_BTD, routed = states(config, model, batch, body_key)
    logits = model.label_logits(x_BTD, batch.segments, head_key)
    terms = losses.label_terms(config.model.head, logits, batch.targets, batch.segments)
    sums = losses.weighted_sums(terms, jnp.zeros_like(terms), batch.weights)
    return sums.cross_entropy, sums, routed


def loss_sums(
    config: config_lib.RunConfig,
    model: build.Model,
    batch: batch_lib.Batch,
    key: jax.Array | None = None,
) -> losses.LossSums:
    """Returns the summed losses of a batch; `key` turns dropout on."""
    return _objective(config, model, _in_order(model, batch), key)[1]


def _total_weight(config: config_lib.RunConfig, batch: batch_lib.Batch) -> jax.Array:
    """Returns what losses of a batch are divided by: its tokens, labels or pairs."""
    if config.objective.name == "preference":
        return jnp.sum(jnp.any(batch.weights > 0, axis=1).astype(jnp.float32))
    return jnp.sum(batch.weights)


def gradients(
    config: config_lib.RunConfig, model: build.Model, batch: batch_lib.Batch, key: jax.Array
) -> tuple[build.Model, losses.LossSums, Routed]:
    """Returns the gradient of the mean loss over the whole batch, its sums, and what routers did.

    Parameters that do not learn have None for a gradient. With `optim.dp_clip_norm` it is a private one.

    Microbatches are weighted by their tokens: each adds its summed loss over the weight of the
    whole batch, which is known before, so accumulation equals one large batch however unevenly the
    weights fall. Losses of routers are the mean of the microbatches' own.
    """
    if config.optim.dp_clip_norm is not None:
        return private_gradients.gradients(config, model, batch, key, _objective)
    batch, num_micro = _in_order(model, batch), config.optim.accumulation_steps
    weight = jnp.maximum(_total_weight(config, batch), 1.0)

    learned, still = tuning.split(config, model)

    def loss(learned, batch, key):
        model = tuning.join(learned, still)
        objective, *sums = _objective(config, model, batch, key if needs_key else None)
        of_routers = sum(jnp.sum(routed.loss) for routed in sums[1].values())
        return objective / weight + of_routers / num_micro, tuple(sums)

    m = config.model
    needs_key = m.dropout or m.attention_dropout or m.moe.is_on
    gradient = jax.grad(loss, has_aux=True)
    if num_micro == 1:
        grads, (sums, routed) = gradient(learned, batch, key)
        return grads, sums, routed

    # The sum is float32 whatever the parameters are: many small terms would be lost in bfloat16.
    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, gradient(learned, *micro)), None

    def zero(parameter):
        return jnp.zeros_like(parameter, jnp.float32)

    # [B, ...] -> [B / G, G, ...] -> [G, B / G, ...]: the sharded batch stays where it is.
    micro_batches = jax.tree.map(
        lambda x: x.reshape(-1, num_micro, *x.shape[1:]).swapaxes(0, 1), batch
    )
    keys = jax.random.split(key, num_micro)
    first = jax.tree.map(lambda x: x[0], (micro_batches, keys))
    shapes = jax.eval_shape(loss, learned, *first)[1]
    zeros = jax.tree.map(zero, learned), jax.tree.map(zero, shapes)
    (grads, (sums, routed)), _ = jax.lax.scan(accumulate, zeros, (micro_batches, keys))
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, learned)
    return grads, sums, routed


def clipped(config: config_lib.RunConfig, grads: build.Model, norm: jax.Array) -> build.Model:
    """Returns gradients of a global norm of `optim.clip_norm` at the most."""
    if config.optim.clip_norm is None:
        return grads
    scale = jnp.minimum(1.0, config.optim.clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)


def train_step(
    config: config_lib.RunConfig, state: TrainState, batch: batch_lib.Batch
) -> tuple[TrainState, Metrics]:
    """Runs one update; pure in its arguments.

    The randomness of a step comes from the seed and the step's number alone, so a resumed run draws
    what the uninterrupted one would have drawn.
    """
    optimizer, schedule = make_optimizer(config)
    key = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
    with jax.named_scope("gradients"):
        grads, sums, routed = gradients(config, gradient_point(config, state), batch, key)
    with jax.named_scope("update"):
        grad_norm = optax.global_norm(grads)
        grads = clipped(config, grads, grad_norm)
        before = moments(config, state)
        learned, still = tuning.split(config, state.model)
        updates, opt_state = optimizer.update(grads, before, learned)
        updates = tuning.scaled(updates, tuning.rates(config, learned))
        model = tuning.join(optax.apply_updates(learned, updates), still)
        model = balance.moved(model, _moves(config.model.moe), routed)
        # What moves without a gradient stays with the rest where it is told not to learn.
        model = tuning.join(tuning.split(config, model)[0], still)
    loss = sums.cross_entropy / jnp.maximum(sums.weight, 1.0)
    num_skipped = state.num_skipped
    if config.train.on_nonfinite == "skip":
        # The update is looked at as well: a finite gradient can overflow a parameter.
        are_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(model)]
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.all(jnp.stack(are_finite))
        keep = functools.partial(jnp.where, is_finite)
        model = jax.tree.map(keep, model, state.model)
        opt_state = jax.tree.map(keep, opt_state, before)
        num_skipped = num_skipped + (~is_finite).astype(jnp.int32)
    if config.optim.offload_state:
        opt_state = _moved(opt_state, jax.memory.Space.Host)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": jnp.asarray(schedule(_update_count(state)), jnp.float32),
        "train/z_squared": sums.z_squared / jnp.maximum(sums.weight, 1.0),
        "train/tokens": sums.weight,
        "train/num_skipped": num_skipped,
    }
    for stack, of_stack in routed.items():
        metrics |= balance.metrics(of_stack, stack, config.optim.accumulation_steps)
    return TrainState(state.step + 1, num_skipped, model, opt_state), metrics


def _moves(moe: config_lib.MoeConfig) -> balance.Moves:
    """Returns how parameters of routers move that have no gradient, by name."""
    if not moe.is_on:
        return {}
    return {
        "selection_bias_E": lambda bias, routed: balance.next_bias(
            bias, routed.load_E, moe.selection_bias_rate
        ),
        "penalty_": lambda penalty, routed: balance.next_penalty(
            penalty,
            routed.load_E,
            routed.num_tokens,
            moe.experts_per_token,
            moe.relu_penalty_rate,
        ),
    }


def _update_count(state: TrainState) -> jax.Array:
    # A skipped update leaves the optimiser's own count, and so its schedule, where it was.
    return state.step - state.num_skipped


def make_train_step(config: config_lib.RunConfig) -> Callable:
    """Returns the jitted `train_step`; the old state's memory is reused for the new one."""
    return jax.jit(functools.partial(train_step, config), donate_argnums=0)


def make_eval_step(config: config_lib.RunConfig) -> Callable:
    """Returns the jitted `(model, batch) -> losses.LossSums`, without dropout."""
    return jax.jit(functools.partial(loss_sums, config))
