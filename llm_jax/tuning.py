"""Which parameters learn, and how fast: all, some by their names, upper layers, layers by their depth.

A parameter that does not learn has neither a gradient nor a moment. Of layers, which lie stacked in one
array, some can stay as they are (`tune.frozen_layers`): those have both, and an update of zero.
"""

from collections.abc import Collection
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import patterns
from llm_jax import trees
from llm_jax.models import lora

# Parameters that a model for another task draws anew: they are not those of what it starts from.
NEW = (f"*/{lora.LORA}/*", "labels/*", "pooler/*", "head_transform/*", "head_*")
# What learns beside low-rank updates.
_BESIDE_LORA = ("labels/*", "pooler/*", "head_transform/*")
_NORMS_AFTER = ("final_norm/*", "*/final_norm/*")


def is_learned(config: config_lib.RunConfig, name: str) -> bool:
    """Returns whether a parameter of this name learns."""
    tune = config.tune
    learn = tune.learn
    if not learn:
        learn = ",".join((f"*/{lora.LORA}/*", *_BESIDE_LORA)) if config.model.lora.is_on else "*"
    return patterns.is_matched(name, learn) and not patterns.is_matched(name, tune.freeze)


def split(config: config_lib.RunConfig, model: Any) -> tuple[Any, Any]:
    """Returns the parameters that learn and those that do not: each the model with None for the others."""
    learned = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_learned(config, trees.name_of(path)) else None, model
    )
    still = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if is_learned(config, trees.name_of(path)) else leaf, model
    )
    return learned, still


def join(learned: Any, still: Any) -> Any:
    """Returns the model of the two parts that `split` makes."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, learned, still, is_leaf=lambda leaf: leaf is None
    )


def rates(config: config_lib.RunConfig, learned: Any) -> Any | None:
    """Returns for each parameter what its learning rate is multiplied by; None where that is 1 for all.

    Of layers it is an array with one factor for each. Layer l of a stack of L has `layer_decay` to the
    power of L - 1 - l, embeddings of L, what follows the layers none (Clark et al. 2020, ELECTRA, appendix
    B; there the last layer is one below the head's).
    """
    tune = config.tune
    if tune.layer_decay == 1.0 and not tune.frozen_layers:
        return None
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _rate(config, trees.name_of(path), leaf.ndim), learned
    )


def _rate(config: config_lib.RunConfig, name: str, num_dims: int) -> jax.Array | float:
    tune = config.tune
    before, _, inside = name.partition("stack/")
    if not inside:
        is_after = patterns.is_matched(name, ",".join((*NEW, *_NORMS_AFTER)))
        if is_after:
            return 1.0
        return 0.0 if tune.frozen_layers else tune.layer_decay ** _num_layers(config, before)
    num_layers = _num_layers(config, before)
    has_experts = inside.startswith("expert_layers/")
    factors = [
        0.0 if layer < tune.frozen_layers else tune.layer_decay ** (num_layers - 1 - layer)
        for layer, own in enumerate(_experts(config, before, num_layers))
        if own == has_experts
    ]
    shape = (len(factors),) + (1,) * (num_dims - 1)
    return jnp.asarray(factors, jnp.float32).reshape(shape)


def _num_layers(config: config_lib.RunConfig, before: str) -> int:
    m = config.model
    return m.decoder_layers if before.startswith("decoder") else m.num_layers


def _experts(config: config_lib.RunConfig, before: str, num_layers: int) -> tuple[bool, ...]:
    """Returns of each layer of a stack whether it has experts."""
    m = config.model
    stack = before.rstrip("/") or m.architecture
    return m.expert_layers(num_layers) if m.has_experts(stack) else (False,) * num_layers


def scaled(updates: Any, factors: Any | None) -> Any:
    """Returns updates times what `rates` gives."""
    if factors is None:
        return updates
    return jax.tree.map(lambda update, factor: update * factor, updates, factors)


def check(config: config_lib.RunConfig, names: Collection[str]) -> None:
    """Checks that each pattern of `tune` and of `model.lora` fits a parameter, and that some learn.

    Args:
      config: of the run.
      names: of all parameters.

    Raises:
      errors.UserError: names the pattern and parameters that are there.
    """
    for setting in ("learn", "freeze", "fresh"):
        for pattern in patterns.split(getattr(config.tune, setting)):
            if not any(patterns.is_matched(name, pattern) for name in names):
                hint = errors.nearest(pattern, names) or f"; there are {_some(names)}"
                raise errors.UserError(
                    f"config.tune.{setting}: {pattern!r} fits no parameter{hint}"
                )
    if config.model.lora.is_on:
        _check_targets(config, names)
    if not any(is_learned(config, name) for name in names):
        raise errors.UserError(
            f"config.tune.learn = {config.tune.learn!r} and freeze = {config.tune.freeze!r} leave"
            " no parameter that learns"
        )


def _check_targets(config: config_lib.RunConfig, names: Collection[str]) -> None:
    updated = {_target_of(name) for name in names if f"/{lora.LORA}/" in name and "_down_" in name}
    for pattern in patterns.split(config.model.lora.targets):
        if not any(patterns.is_matched(target, pattern) for target in updated):
            known = sorted({_target_of(name) for name in names if _is_matrix(name)})
            hint = errors.nearest(pattern, known) or f"; there are {_some(known)}"
            raise errors.UserError(f"config.model.lora.targets: {pattern!r} fits no matrix{hint}")


def _is_matrix(name: str) -> bool:
    *_, module, own = ("", *name.split("/"))
    kinds = ("attention", "cross_attention", "mlp")
    return module in kinds and "bias" not in own and "E" not in own.rpartition("_")[2]


def _target_of(name: str) -> str:
    """Returns what targets call the matrix of a path, or of a path of its update."""
    parts = name.split("/")
    if lora.LORA in parts:
        return f"{parts[-3]}/{parts[-1].rpartition('_down_')[0]}"
    return f"{parts[-2]}/{parts[-1].rpartition('_')[0]}"


def _some(names: Collection[str], most: int = 12) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def describe(config: config_lib.RunConfig, model: Any) -> str | None:
    """Returns a line that says how much learns, or None where all does."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in trees.by_name(model).items()}
    learned = sum(size for name, size in sizes.items() if is_learned(config, name))
    total = sum(sizes.values())
    if learned == total and not config.tune.frozen_layers:
        return None
    layers = f", but for {config.tune.frozen_layers} layers" * bool(config.tune.frozen_layers)
    return f"{learned:,} of {total:,} parameters learn ({learned / total:.2%}){layers}"
