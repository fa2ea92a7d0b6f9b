"""What all layers of one kind share in one forward pass: who attends to whom, and from where."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels import placement
from llm_jax.kernels.flash_attention import biases
from llm_jax.kernels.flash_attention import masks
from llm_jax.kernels.flash_attention import op
from llm_jax.kernels.flash_attention import pallas
from llm_jax.models import positions

LOCAL, GLOBAL = "L", "G"  # letters of `config.layer_pattern`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What the layers of one kind share.

    Attributes:
      mask: who attends to whom among the tokens of this pass, with the kernels' tables if they need
        some; None where a cache precedes them.
      rotary: cosines and sines of `positions.rotary_tables`; None without RoPE.
      bias: added to the scores; None without ALiBi or T5's table.
      slot: of the first token in the cache; the integer 0 where nothing precedes it.
      starts_B: first slot of each row in the cache; None: 0.
      places_T: of the tokens in their sequence, which dropout goes by; None where there is none.
      encoder_BSD: what cross-attention reads; None without.
      cross_mask: who of the decoder attends to whom of the encoder.
      encoder_lengths_B: tokens of each row of a cache of the encoder's keys; rows of the decoder may
        be several times as many, which take turns (beams of a row).
      tokens_BT: int32 ids, which experts may go by; None where no layer has experts.
      is_token_BT: whether there is a token, or padding, which experts do without; None: all are.
      window: slots that a query of a decoder sees; None: all before it.
    """

    mask: masks.Mask | pallas.Prepared | None
    rotary: tuple[jax.Array, jax.Array] | None = None
    bias: biases.Alibi | biases.Relative | None = None
    slot: jax.Array | int = 0
    starts_B: jax.Array | None = None
    places_T: jax.Array | None = None
    encoder_BSD: jax.Array | None = None
    cross_mask: masks.Mask | pallas.Prepared | None = None
    encoder_lengths_B: jax.Array | None = None
    tokens_BT: jax.Array | None = None
    is_token_BT: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})


def kinds(config: config_lib.ModelConfig) -> str:
    """Returns the letters that layers repeat; without a pattern, all are local or all global."""
    return config.layer_pattern or (GLOBAL if config.window is None else LOCAL)


def band(config: config_lib.ModelConfig, kind: str, is_causal: bool) -> masks.Mask:
    """Returns the mask of a layer by distance alone.

    A decoder's window ends at the query; an encoder's has the query in its middle.
    """
    window = config.window if kind == LOCAL else None
    if is_causal:
        return masks.local_window(None if window is None else window - 1, right=0)
    return masks.full() if window is None else masks.local_window(window // 2, window // 2)


def make_contexts(
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
    positions_BT: jax.Array,
    *,
    is_causal: bool = True,
    within: masks.Mask | None = None,
    beside: masks.Mask | None = None,
    relative: biases.Relative | None = None,
    slot: jax.Array | int = 0,
    starts_B: jax.Array | None = None,
) -> tuple[Context, ...]:
    """Returns the contexts of a pass over tokens at `positions_BT`, one for each letter of `kinds`.

    Args:
      config, rules: of the model.
      positions_BT: int32, of each token in its text.
      is_causal: whether queries see the past alone.
      within: pairs that may attend at all, such as those of one document; None: all.
      beside: pairs that attend though the order would not let them, such as those of a prefix.
      relative: T5's bias.
      slot: of the first token in the cache; unless it is the integer 0, there is no mask.
      starts_B: first slot of each row in the cache.
    """
    bias = relative
    if config.positions == "alibi":
        slopes_KG = jnp.asarray(positions.alibi_slopes(config.num_heads))
        bias = biases.Alibi(slopes_KG.reshape(config.kv_heads, -1))

    def of_kind(kind: str) -> Context:
        is_local = kind == LOCAL
        rotary = mask = None
        if config.positions == "rope":
            rotary = positions.rotary_tables(config, positions_BT, is_local)
        if isinstance(slot, int):
            mask = band(config, kind, is_causal)
            mask = mask if within is None else mask & within
            mask = mask if beside is None else mask | beside
            mask = prepare(config, rules, mask, positions_BT, positions_BT.shape[1], bias)
        window = config.window if is_local else None
        return Context(mask, rotary, bias, slot, starts_B, window=window)

    contexts = {kind: of_kind(kind) for kind in sorted(set(kinds(config)))}
    return tuple(contexts[kind] for kind in kinds(config))


def prepare(
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
    mask: masks.Mask,
    like_BT: jax.Array,
    num_keys: int,
    bias: biases.Bias | None = None,
) -> masks.Mask | pallas.Prepared:
    """Returns the mask with the tables that the kernels of all layers want, if they are to run."""
    groups = config.num_heads // config.kv_heads
    return op.prepare(
        mask,
        like_BT,
        num_keys=num_keys,
        widths=(config.key_width, config.value_width),
        group=groups // placement.num_parts(rules.act("G")[0]),
        dtype=config.dtype,
        implementation=config.attention,
        bias=bias,
    )
