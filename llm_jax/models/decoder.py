"""The decoder-only language model: GPT-2, Llama, Gemma and what lies between, as one config."""

import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.flash_attention import masks
from llm_jax.models import heads
from llm_jax.models import layers
from llm_jax.models import trunk
from llm_jax.models.moe import balance


class Decoder(trunk.Trunk, heads.Reader):
    """Embedding, stack, final norm and head."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        embedding_key, position_key, stack_key, head_key = jax.random.split(key, 4)
        self.embedding = layers.Embedding(embedding_key, config, rules)
        super().__init__(
            position_key, stack_key, config, rules, is_causal=True, num_layers=config.num_layers
        )
        self._make_head(head_key, config, rules)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        prefix_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits of the vocabulary, float32 [B, T, V], for whole sequences; arguments as `hidden`."""
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT, key, prefix_BT=prefix_BT)
        return self.vocabulary_logits(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        prefix_BT: jax.Array | None = None,
        numbers_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, balance.Routed]]:
        """Returns what the output head reads, [B, T, D] in the compute dtype, for whole sequences.

        Beside it, what routers did, if layers have experts: by stack, of which the only one is "".

        Under rules with `context` ring, all of these and the result are in the order of `ring.zigzag`.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32, from 0 in each document.
          segments_BT: int32 document numbers of packed sequences; None: one document a row.
          key: of a training step: turns dropout on.
          prefix_BT: Booleans, the tokens at the start of each document that see each other both ways
            (prefix LM; Raffel et al. 2020, section 3.2.1); None: there are none.
          numbers_BT: int32, 0 for padding, which no expert gets; None: as `segments_BT`.
        """
        within = trunk.segments_mask(segments_BT, self.rules)
        beside = None if prefix_BT is None else self._prefix_mask(prefix_BT, segments_BT)
        contexts = self.contexts(positions_BT, within, beside=beside)
        if self.config.moe.is_on:
            numbers_BT = segments_BT if numbers_BT is None else numbers_BT
            contexts = trunk.with_tokens(contexts, tokens_BT, numbers_BT)
        x_BTD, routed = self.run(self.embed(tokens_BT, positions_BT), contexts, key)
        return self.before_head(x_BTD), trunk.by_stack({"": routed})

    def _prefix_mask(self, prefix_BT: jax.Array, segments_BT: jax.Array | None) -> masks.Mask:
        """Returns the pairs within a document's prefix: both have its number, no others have equal ones."""
        numbers_BT = jnp.ones_like(prefix_BT, jnp.int32) if segments_BT is None else segments_BT
        queries_BT = jnp.where(prefix_BT, numbers_BT, -1)
        keys_BS = jnp.where(prefix_BT, numbers_BT, -2)
        return trunk.segments_mask(queries_BT, self.rules, keys_BS)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns what enters the stack, [B, T, D] in the compute dtype."""
        return self.enter(self.embedding(tokens_BT, self.config.dtype), positions_BT)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the next-token logits, float32 [B, T, V], of the last block's output."""
        return self.vocabulary_logits(self.before_head(self.normalise(x_BTD)))
