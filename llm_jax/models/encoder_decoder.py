"""The encoder-decoder: T5 (Raffel et al. 2020), and the Transformer of Vaswani et al. 2017."""

import dataclasses

import jax

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.kernels.flash_attention import masks
from llm_jax.models import context as context_lib
from llm_jax.models import heads
from llm_jax.models import layers
from llm_jax.models import trunk
from llm_jax.models.moe import balance


class EncoderDecoder(heads.Reader):
    """One table of tokens, an encoder, a decoder that attends to it, and a head."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        embedding_key, encoder_key, decoder_key, head_key = jax.random.split(key, 4)
        self.embedding = layers.Embedding(embedding_key, config, rules)
        self.encoder = trunk.Trunk(
            *jax.random.split(encoder_key),
            config,
            rules,
            is_causal=False,
            num_layers=config.num_layers,
        )
        self.decoder = trunk.Trunk(
            *jax.random.split(decoder_key),
            config,
            rules,
            is_causal=True,
            num_layers=config.decoder_layers,
            has_cross=True,
        )
        self._make_head(head_key, config, rules)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        **encoder_inputs: jax.Array | None,
    ) -> jax.Array:
        """Returns logits of the vocabulary, float32 [B, T, V]; arguments as `hidden`."""
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, segments_BT, key, **encoder_inputs)
        return self.vocabulary_logits(x_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        encoder_tokens_BS: jax.Array,
        encoder_positions_BS: jax.Array,
        encoder_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, balance.Routed]]:
        """Returns what the output head reads, [B, T, D] in the compute dtype.

        Beside it, what routers did, if layers have experts: of `encoder` and `decoder`.

        Args:
          tokens_BT: int32 ids that the decoder reads: each text begins with `config.decoder_start_id`.
          positions_BT: int32, from 0 in each text.
          segments_BT: int32 numbers of packed texts; None: one a row.
          key: turns dropout on.
          encoder_tokens_BS: int32 ids that the encoder reads.
          encoder_positions_BS: int32, from 0 in each text.
          encoder_segments_BS: int32 numbers, 0 for padding; the decoder's text of a number attends to the
            encoder's of the same. None: one a row, without padding.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        encoded_BSD, routed = self.encode(
            encoder_tokens_BS, encoder_positions_BS, encoder_segments_BS, encoder_key
        )
        contexts = self.decoder.contexts(positions_BT, trunk.segments_mask(segments_BT, self.rules))
        mask = self.cross_mask(encoder_segments_BS, tokens_BT, segments_BT)
        contexts = self.with_encoder(contexts, encoded_BSD, mask, positions_BT)
        if self.config.has_experts("decoder"):
            contexts = trunk.with_tokens(contexts, tokens_BT, segments_BT)
        x_BTD, own = self.decoder.run(self.embed(tokens_BT, positions_BT), contexts, decoder_key)
        return self.before_head(x_BTD), routed | trunk.by_stack({"decoder": own})

    def encode(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        segments_BS: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, balance.Routed]]:
        """Returns the encoder's final states, [B, S, D] in the compute dtype, and what its routers did.

        Arguments as of `hidden`.
        """
        x_BSD = self.encoder.enter(self.embedding(tokens_BS, self.config.dtype), positions_BS)
        within = trunk.segments_mask(segments_BS, self.rules)
        contexts = self.encoder.contexts(positions_BS, within)
        if self.config.has_experts("encoder"):
            contexts = trunk.with_tokens(contexts, tokens_BS, segments_BS)
        x_BSD, routed = self.encoder.run(x_BSD, contexts, key)
        return x_BSD, trunk.by_stack({"encoder": routed})

    def cross_mask(
        self,
        encoder_segments_BS: jax.Array | None,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None,
    ) -> masks.Mask:
        """Returns which of the encoder's tokens each of the decoder's attends to."""
        if encoder_segments_BS is None:
            return masks.full()
        if segments_BT is None:
            segments_BT = jax.numpy.ones_like(tokens_BT)
        return trunk.segments_mask(segments_BT, self.rules, encoder_segments_BS)

    def with_encoder(
        self,
        contexts: tuple[context_lib.Context, ...],
        encoded_BSD: jax.Array,
        mask: masks.Mask,
        positions_BT: jax.Array,
    ) -> tuple[context_lib.Context, ...]:
        """Returns the decoder's contexts with what cross-attention reads."""
        num_keys = encoded_BSD.shape[1]
        mask = context_lib.prepare(self.config, self.rules, mask, positions_BT, num_keys)
        return tuple(
            dataclasses.replace(context, encoder_BSD=encoded_BSD, cross_mask=mask)
            for context in contexts
        )

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns what enters the decoder's stack, [B, T, D] in the compute dtype."""
        return self.decoder.enter(self.embedding(tokens_BT, self.config.dtype), positions_BT)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the next-token logits, float32 [B, T, V], of the last block's output."""
        return self.vocabulary_logits(self.before_head(self.decoder.normalise(x_BTD)))
