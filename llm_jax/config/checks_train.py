"""What contradicts itself in how a run trains: optimiser, schedule, cadence."""

from llm_jax.config import schema
from llm_jax.config import values


def check(config: schema.RunConfig) -> None:
    """Checks `optim`, `train` and `checkpoint`. Raises as `checks.check`."""
    o, t = config.optim, config.train
    values.require_choice("optim", o, "name", schema.OPTIMIZERS)
    values.require_choice("optim", o, "schedule", schema.SCHEDULES)
    values.require_fraction("optim", o, "final_lr_fraction", "cooldown_fraction", "b1", "b2")
    values.require_fraction("optim", o, "muon_momentum")
    values.require_at_least(
        "optim", o, 0, "learning_rate", "weight_decay", "warmup_steps", "epsilon"
    )
    values.require_at_least("optim", o, 1, "accumulation_steps", "soap_every", "soap_max_width")
    _check_schedule_free(config)
    values.require(
        config.model.parametrisation == "standard" or o.name in ("adamw", "lion"),
        "optim.name",
        o.name,
        f"model.parametrisation = {config.model.parametrisation!r} is of adamw, and holds for lion",
    )
    for name in ("b1", "b2"):
        values.require(getattr(o, name) < 1.0, f"optim.{name}", getattr(o, name), "use [0, 1)")
    values.require(
        o.learning_rate > 0 or not o.is_decay_independent,
        "optim.learning_rate",
        o.learning_rate,
        "above 0: independent decay is relative to it",
    )
    if o.clip_norm is not None:
        values.require(o.clip_norm > 0, "optim.clip_norm", o.clip_norm, "above 0, or None for none")
    values.require_at_least("train", t, 1, "num_steps", "log_every", "cross_entropy_chunk")
    values.require_at_least("train", t, 0, "eval_every", "eval_steps", "z_loss", "seed")
    values.require_at_least("train", t, 0, "telemetry_every")
    is_logged = t.telemetry_every % max(t.log_every, 1) == 0
    values.require(is_logged, "train.telemetry_every", t.telemetry_every, "a multiple of log_every")
    values.require(
        not t.telemetry_every or config.mesh.context != "ring",
        "train.telemetry_every",
        t.telemetry_every,
        "layers are looked at with all keys at hand, which mesh.context = 'ring' has not: use 0",
    )
    values.require_choice("train", t, "on_nonfinite", schema.NONFINITE)
    values.require_choice("train", t, "cross_entropy", schema.CROSS_ENTROPIES)
    values.require_at_least("checkpoint", config.checkpoint, 0, "every")
    values.require_at_least("checkpoint", config.checkpoint, 1, "max_to_keep")
    values.require(
        o.warmup_steps <= t.num_steps,
        "optim.warmup_steps",
        o.warmup_steps,
        f"the run has train.num_steps = {t.num_steps}",
    )
    values.require(
        config.data.batch_size % o.accumulation_steps == 0,
        "optim.accumulation_steps",
        o.accumulation_steps,
        f"it must divide data.batch_size = {config.data.batch_size}",
    )


def _check_schedule_free(config: schema.RunConfig) -> None:
    o = config.optim
    if o.name != "schedule_free":
        return
    rule = "schedule_free averages instead of a decay: use 'constant'"
    values.require(o.schedule == "constant", "optim.schedule", o.schedule, rule)
    rule = "above 0: the gradient is taken between the average and what moves"
    values.require(o.b1 > 0, "optim.b1", o.b1, rule)
    rule = "schedule_free moves an average, whose steps cannot be scaled"
    layer_decay, frozen = config.tune.layer_decay, config.tune.frozen_layers
    values.require(layer_decay == 1.0, "tune.layer_decay", layer_decay, f"{rule}: use 1.0")
    values.require(not frozen, "tune.frozen_layers", frozen, f"{rule}: use tune.freeze")
    rule = "what routers move without a gradient schedule_free would take back: use a dense model"
    values.require(not config.model.moe.is_on, "optim.name", o.name, rule)
