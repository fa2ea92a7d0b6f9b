"""How a model's numbers grow with its width and depth, so that what is tuned small holds large.

    standard    as models are commonly trained: optima move as they grow
    mup         maximal updates (Yang et al. 2022, table 8, for Adam): learning rates hold over widths
    completep   and over depths (Dey et al. 2025, table 1, alpha = 1)

`model.base_width` and `base_depth` are those of the model that was tuned, at which all three are the same but for
scores of attention. With w the width over the base's, and d the depth:

    matrices of layers      start with init_stddev / sqrt(w), learn at 1 / w of the rate; decay as before
    logits                  are multiplied by 1 / w
    scores of attention     by sqrt(base head width) / head width
    residual branches       by 1 / d with completep, whose last matrices start as at the base depth
    all else                as at the base: tables, biases, norms

Adam's epsilon, which completep would shrink too, is left alone: it is far below gradients here.
"""

from typing import Any

import jax

from llm_jax import config as config_lib
from llm_jax import dims

STANDARD, MUP, COMPLETEP = config_lib.PARAMETRISATIONS

_SQUARE = "DM"  # a matrix from the width to itself, outside of the layers


def width_ratio(config: config_lib.ModelConfig) -> float:
    """Returns the width over the base's; 1 of the standard parametrisation."""
    is_standard = config.parametrisation == STANDARD
    return 1.0 if is_standard else config.embed_dim / config.base_width


def scaling_width(config: config_lib.ModelConfig) -> int:
    """Returns the width whose root embeddings or logits are scaled by, where a model does so: the base's."""
    return config.embed_dim if config.parametrisation == STANDARD else config.base_width


def hidden_stddev(config: config_lib.ModelConfig) -> float:
    """Returns the standard deviation that matrices of layers start with."""
    if config.parametrisation == STANDARD:
        return config.init_stddev
    return config.init_stddev / width_ratio(config) ** 0.5


def branch_stddev(config: config_lib.ModelConfig) -> float:
    """Returns that of the last matrix of each residual branch.

    Branches start smaller by the square root of their number (GPT-2, section 2.3).
    """
    depth = config.base_depth if config.parametrisation == COMPLETEP else config.num_layers
    return hidden_stddev(config) / (2 * depth) ** 0.5


def branch_multiplier(config: config_lib.ModelConfig, num_layers: int) -> float | None:
    """Returns what residual branches of a stack are multiplied by; None: by nothing."""
    if config.parametrisation != COMPLETEP or num_layers == config.base_depth:
        return None
    return config.base_depth / num_layers


def logit_multiplier(config: config_lib.ModelConfig) -> float | None:
    """Returns what the states are multiplied by that logits are made of; None: by nothing."""
    ratio = width_ratio(config)
    return None if ratio == 1.0 else 1.0 / ratio


def attention_scale(config: config_lib.ModelConfig) -> float:
    """Returns what scores of attention are multiplied by, where the config does not say."""
    base = config.base_head_dim
    if config.parametrisation == STANDARD or base is None:
        return config.key_width**-0.5
    return base**0.5 / config.key_width


def rate_factors(config: config_lib.ModelConfig, params: Any) -> Any:
    """Returns a tree of what each parameter's updates, before weight decay, are multiplied by."""
    factor = 1.0 / width_ratio(config)

    def of(path: tuple[Any, ...], leaf: Any) -> float:
        del leaf
        name = jax.tree_util.keystr(path)
        is_vector = "bias_" in name or "scale_" in name
        letters = dims.of_path(path)
        is_hidden = not is_vector and (letters in dims.MATRICES or letters == _SQUARE)
        return factor if is_hidden else 1.0

    return jax.tree_util.tree_map_with_path(of, params)
