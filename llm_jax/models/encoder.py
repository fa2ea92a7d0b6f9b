"""The encoder: BERT (Devlin et al. 2019), or with RoPE, pre-norm and gated blocks a modern one."""

import jax

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import heads
from llm_jax.models import layers
from llm_jax.models import trunk
from llm_jax.models.moe import balance


class Encoder(trunk.Trunk, heads.Reader):
    """Embeddings of tokens and their types, stack, and a head of the vocabulary or of labels."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        embedding_key, position_key, stack_key, head_key = jax.random.split(key, 4)
        self.embedding = layers.Embedding(embedding_key, config, rules)
        type_key, std = jax.random.fold_in(embedding_key, 1), config.init_stddev
        shape = (config.num_token_types, config.embed_dim)
        self.token_type_JD = (
            layers.normal_param(type_key, "token_type_JD", shape, std, rules, config.param_dtype)
            if config.num_token_types
            else None
        )
        super().__init__(
            position_key, stack_key, config, rules, is_causal=False, num_layers=config.num_layers
        )
        self._make_head(head_key, config, rules)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        token_types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits of the vocabulary, float32 [B, T, V]; arguments as `hidden`."""
        x_BTD, _ = self.hidden(
            tokens_BT, positions_BT, segments_BT, key, token_types_BT=token_types_BT
        )
        return self.vocabulary_logits(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        token_types_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, balance.Routed]]:
        """Returns what the output head reads, [B, T, D] in the compute dtype.

        Beside it, what routers did, if layers have experts: by stack, of which the only one is "".

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32, from 0 in each document.
          segments_BT: int32 document numbers, 0 for padding; tokens of one number see each other. None:
            one document a row, without padding.
          key: turns dropout on.
          token_types_BT: int32, which of the texts in a document a token belongs to; None: the first.
        """
        x_BTD = self.embed(tokens_BT, positions_BT, token_types_BT)
        contexts = self.contexts(positions_BT, trunk.segments_mask(segments_BT, self.rules))
        if self.config.moe.is_on:
            contexts = trunk.with_tokens(contexts, tokens_BT, segments_BT)
        x_BTD, routed = self.run(x_BTD, contexts, key)
        return self.before_head(x_BTD), trunk.by_stack({"": routed})

    def embed(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        token_types_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what enters the stack, [B, T, D] in the compute dtype."""
        x_BTD = self.embedding(tokens_BT, self.config.dtype)
        if self.token_type_JD is not None:
            x_BTD = x_BTD + self._types(token_types_BT, x_BTD)
        return self.enter(x_BTD, positions_BT)

    def _types(self, token_types_BT: jax.Array | None, x_BTD: jax.Array) -> jax.Array:
        if token_types_BT is None:
            first_D = self.token_type_JD[...][0].astype(x_BTD.dtype)
            return jax.sharding.reshard(first_D, self.rules.act("D"))
        return layers.look_up(self.token_type_JD, "JD", token_types_BT, x_BTD.dtype, self.rules)
