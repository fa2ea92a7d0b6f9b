"""What contradicts what in the settings of experts."""

from llm_jax import errors
from llm_jax.config import schema
from llm_jax.config import values

# Settings that only some routers read, and which.
_READERS = {
    "num_groups": ("softmax", "sigmoid"),
    "use_selection_bias": ("softmax", "sigmoid"),
    "jitter": ("switch",),
    "max_experts_per_token": ("relu",),
    "slots_per_expert": ("soft",),
}
_PER_TOKEN = {"switch": 1, "base": 1, "gshard": 2}


def check(m: schema.ModelConfig) -> None:
    """Checks `model.moe`. Raises as `checks.check`."""
    e = m.moe
    values.require_choice("model.moe", e, "router", schema.ROUTERS)
    values.require_choice("model.moe", e, "dispatch", schema.DISPATCHES)
    values.require_choice("model.moe", e, "balance_over", schema.BALANCES)
    values.require_choice("model.moe", e, "stacks", schema.EXPERT_STACKS)
    values.require_at_least("model.moe", e, 0, "num_experts", "num_shared_experts")
    values.require_at_least("model.moe", e, 0, "first_dense_layers", "balance_loss")
    values.require_at_least("model.moe", e, 0, "router_z_loss", "selection_bias_rate", "jitter")
    values.require_at_least("model.moe", e, 1, "experts_per_token", "every", "expert_dim")
    values.require_at_least("model.moe", e, 1, "num_groups", "groups_per_token")
    values.require_at_least("model.moe", e, 1, "max_experts_per_token", "slots_per_expert")
    values.require_at_least("model.moe", e, 1, "sinkhorn_iterations", "relu_penalty_rate")
    for name in ("capacity_factor", "eval_capacity_factor", "buffer_factor", "weight_scale"):
        value = getattr(e, name)
        if value is not None:
            values.require(value > 0, f"model.moe.{name}", value, "it must be above 0")
    if e.is_on:
        _check_layers(m)
        _check_router(m)


def check_run(config: schema.RunConfig) -> None:
    """Checks experts against data and mesh. Raises as `check`."""
    e, packing = config.model.moe, config.data.packing
    if not e.is_on:
        return
    values.require(
        e.router != "soft" or packing != "packed",
        "data.packing",
        packing,
        "model.moe.router = 'soft' mixes all tokens of a row, and documents of 'packed' must not see each"
        " other; use concat for texts, none for examples",
    )
    values.require(
        e.dispatch != "capacity" or config.mesh.context != "ring",
        "model.moe.dispatch",
        e.dispatch,
        "places are given in the order of tokens, which mesh.context = 'ring' changes; use sorted",
    )


def _check_layers(m: schema.ModelConfig) -> None:
    e = m.moe
    values.require(
        e.num_experts >= 2, "model.moe.num_experts", e.num_experts, "use 2 or more, or 0"
    )
    stacks = {"encoder": m.num_layers, "decoder": m.decoder_layers}
    for stack, num_layers in stacks.items():
        is_there = m.architecture in (stack, "encoder_decoder")
        if is_there and m.has_experts(stack) and not any(m.expert_layers(num_layers)):
            raise errors.UserError(
                f"config.model.moe.first_dense_layers = {e.first_dense_layers} and every = {e.every} leave"
                f" none of the {stack}'s {num_layers} layers experts; use smaller ones"
            )


def _check_router(m: schema.ModelConfig) -> None:
    e = m.moe
    wanted = _PER_TOKEN.get(e.router, e.experts_per_token)
    values.require(
        e.experts_per_token == wanted,
        "model.moe.experts_per_token",
        e.experts_per_token,
        f"router = {e.router!r} gives each token {wanted}",
    )
    values.require(
        e.experts_per_token <= e.num_experts,
        "model.moe.experts_per_token",
        e.experts_per_token,
        f"there are num_experts = {e.num_experts}",
    )
    defaults = schema.MoeConfig()
    for name, routers in _READERS.items():
        value = getattr(e, name)
        values.require(
            e.router in routers or value == getattr(defaults, name),
            f"model.moe.{name}",
            value,
            f"it is for router {' or '.join(routers)}, and router = {e.router!r}",
        )
    sees_future = e.router in ("expert_choice", "soft")
    has_decoder = m.architecture == "decoder" or (
        m.architecture == "encoder_decoder" and e.stacks != "encoder"
    )
    would_do = "moe.stacks = 'encoder', or " if m.architecture == "encoder_decoder" else ""
    values.require(
        not (sees_future and has_decoder),
        "model.moe.router",
        e.router,
        "what a token gets depends on those after it, so a decoder would learn from the future and could"
        f" not generate; use {would_do}a router of which each token chooses, such as softmax",
    )
    values.require(
        e.router != "soft" or e.dispatch == "auto",
        "model.moe.dispatch",
        e.dispatch,
        "router = 'soft' mixes tokens and sends none; use auto",
    )
    _check_groups(e)


def _check_groups(e: schema.MoeConfig) -> None:
    values.require(
        e.num_experts % e.num_groups == 0,
        "model.moe.num_groups",
        e.num_groups,
        f"it must divide num_experts = {e.num_experts}",
    )
    in_groups = e.groups_per_token * (e.num_experts // e.num_groups)
    values.require(
        e.groups_per_token <= e.num_groups and in_groups >= e.experts_per_token,
        "model.moe.groups_per_token",
        e.groups_per_token,
        f"of num_groups = {e.num_groups} that many must hold experts_per_token ="
        f" {e.experts_per_token}",
    )
    values.require(
        e.router != "sigmoid" or e.num_groups == 1 or e.num_experts // e.num_groups >= 2,
        "model.moe.num_groups",
        e.num_groups,
        "router = 'sigmoid' judges a group by its two best experts; use fewer groups",
    )
