"""What contradicts private gradients, whose examples are single rows."""

from llm_jax import errors
from llm_jax.config import schema
from llm_jax.config import values


def check(config: schema.RunConfig) -> None:
    """Checks `optim.dp_...`. Raises as `checks.check`."""
    o = config.optim
    values.require_at_least("optim", o, 0, "dp_noise_multiplier", "dp_clip_norm")
    if o.dp_delta is not None:
        values.require(0 < o.dp_delta < 1, "optim.dp_delta", o.dp_delta, "it must lie in (0, 1)")
    if o.dp_clip_norm is None:
        for name in ("dp_noise_multiplier", "dp_delta"):
            value, default = getattr(o, name), getattr(schema.OptimConfig, name)
            would_do = "it is of private gradients: set optim.dp_clip_norm, or leave it alone"
            values.require(value == default, f"optim.{name}", value, would_do)
        return
    values.require(o.dp_clip_norm > 0, "optim.dp_clip_norm", o.dp_clip_norm, "above 0, or None")
    packing = "concat" if config.objective.name in schema.TEXT_OBJECTIVES else "none"
    mesh, moe = config.mesh, config.model.moe
    wanted = {
        "data.mixture": (config.data.mixture, ("",), "rows are drawn from one source"),
        "train.telemetry_every": (config.train.telemetry_every, (0,), "it tells of single batches"),
        "data.packing": (config.data.packing, (packing,), "a row is what is protected"),
        "objective.name": (
            config.objective.name,
            tuple(n for n in schema.OBJECTIVES if n not in ("contrastive", "preference")),
            "a row's loss is the mean over its own tokens or labels",
        ),
        "model.moe.num_experts": (moe.num_experts, (0,), "routers are balanced over rows"),
        "optim.accumulation_steps": (o.accumulation_steps, (1,), "rows are taken one by one"),
        "mesh.seq": (mesh.seq, (1,), "devices share rows alone"),
        "mesh.expert": (mesh.expert, (1,), "devices share rows alone"),
        "mesh.tensor": (mesh.tensor, (1,), "devices share rows alone"),
        "model.attention": (
            config.model.attention,
            ("auto", "reference", "chunked"),
            "rows are mapped over, which kernels are not made for",
        ),
        "train.cross_entropy": (
            config.train.cross_entropy,
            ("auto", "reference"),
            "rows are mapped over, which kernels are not made for",
        ),
        "model.remat": (
            config.model.remat,
            tuple(name for name in schema.REMATS if name != "offload"),
            "activations are of one row",
        ),
    }
    for path, (value, choices, why) in wanted.items():
        if value not in choices:
            raise errors.UserError(
                f"config.{path} = {value!r} does not go with optim.dp_clip_norm = {o.dp_clip_norm}"
                f" ({why}): use {' or '.join(map(repr, choices))}"
            )
