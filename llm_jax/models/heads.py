"""What reads the last states: the vocabulary, or labels of a sequence, of each token, of a span."""

from flax import nnx
import jax
import jax.numpy as jnp

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.models import layers
from llm_jax.models import mlp
from llm_jax.models import parametrisation

_NUM_ENDS = 2  # of a span: its first token and its last


class Transform(nnx.Module):
    """Dense, activation and norm, as BERT has them before the vocabulary (Devlin et al. 2019)."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, dtype = config.embed_dim, config.param_dtype
        std = parametrisation.hidden_stddev(config)
        self.activation, self.rules = config.activation, rules
        self.dense_DM = layers.normal_param(key, "dense_DM", (D, D), std, rules, dtype)
        self.dense_bias_D = layers.bias_param(config.use_bias, "dense_bias_D", (D,), rules, dtype)
        self.norm = layers.Norm(config, rules)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Takes and returns [B, T, D] or [B, D]."""
        h = _project("M", x, self.dense_DM, self.dense_bias_D, self.rules)
        return self.norm(mlp.ACTIVATIONS[self.activation](h))


class Pooler(nnx.Module):
    """BERT's dense and tanh on the state that stands for a sequence (Devlin et al. 2019)."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, dtype = config.embed_dim, config.param_dtype
        std = parametrisation.hidden_stddev(config)
        self.rules = rules
        self.dense_DM = layers.normal_param(key, "dense_DM", (D, D), std, rules, dtype)
        self.dense_bias_D = layers.bias_param(config.use_bias, "dense_bias_D", (D,), rules, dtype)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Returns [B, D]."""
        return jnp.tanh(_project("M", x_BD, self.dense_DM, self.dense_bias_D, self.rules))


class Labels(nnx.Module):
    """A logit for each label."""

    def __init__(self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules):
        D, std, dtype = config.embed_dim, config.init_stddev, config.param_dtype
        num_labels = _NUM_ENDS if config.head == "span" else config.num_labels
        self.rules = rules
        self.dense_DY = layers.normal_param(key, "dense_DY", (D, num_labels), std, rules, dtype)
        self.dense_bias_Y = layers.full_param("dense_bias_Y", (num_labels,), 0.0, rules, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 logits, [B, T, Y] of [B, T, D], or [B, Y] of [B, D]."""
        return _project("Y", x, self.dense_DY, self.dense_bias_Y, self.rules).astype(jnp.float32)


def _project(
    outputs: str,
    x: jax.Array,
    kernel: nnx.Param,
    bias: nnx.Param | None,
    rules: sharding.AxisRules,
) -> jax.Array:
    """Projects states of tokens, [B, T, D], or of sequences, [B, D], to dimension `outputs`."""
    batch = "BT" if x.ndim == 3 else "B"
    spec = rules.act(batch + outputs)
    return layers.project(f"{batch}D,D{outputs}->{batch}{outputs}", x, kernel, bias, spec)


class Reader(nnx.Module):
    """The head of a model, and what its logits are; a base of the three families."""

    def _make_head(
        self, key: jax.Array, config: config_lib.ModelConfig, rules: sharding.AxisRules
    ) -> None:
        """Makes the parameters that `config.head` asks for."""
        self.config, self.rules = config, rules
        is_lm = config.head == "lm"
        D, V, dtype = config.embed_dim, config.vocab_size, config.param_dtype
        transform_key, pooler_key, labels_key = (jax.random.fold_in(key, i) for i in range(3))
        std = config.init_stddev
        self.head_DV = (
            layers.normal_param(key, "head_DV", (D, V), std, rules, dtype)
            if is_lm and not config.tie_embeddings
            else None
        )
        has_head_bias = is_lm and config.use_head_bias
        self.head_bias_V = layers.bias_param(has_head_bias, "head_bias_V", (V,), rules, dtype)
        has_transform = config.use_head_transform and config.head != "none"
        self.head_transform = Transform(transform_key, config, rules) if has_transform else None
        self.pooler = Pooler(pooler_key, config, rules) if config.use_pooler else None
        has_labels = config.head not in ("lm", "none")
        self.labels = Labels(labels_key, config, rules) if has_labels else None

    def head(self) -> tuple[str, nnx.Param]:
        """Returns the output head and its dimensions: `DV`, or `VD` of a tied embedding."""
        return ("VD", self.embedding.table_VD) if self.head_DV is None else ("DV", self.head_DV)

    def before_head(self, x_BTD: jax.Array) -> jax.Array:
        """Returns what the vocabulary's projection reads of the final states; both [B, T, D]."""
        if self.config.head != "lm":
            return x_BTD
        if self.head_transform is not None:
            x_BTD = self.head_transform(x_BTD)
        if self.config.scale_logits:
            x_BTD = x_BTD * parametrisation.scaling_width(self.config) ** -0.5
        return self._as_at_the_base(x_BTD)

    def _as_at_the_base(self, x: jax.Array) -> jax.Array:
        """Returns states whose logits are as large as at the width that was tuned."""
        multiplier = parametrisation.logit_multiplier(self.config)
        return x if multiplier is None else x * jnp.asarray(multiplier, x.dtype)

    def vocabulary_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits, [B, T, V], of what `before_head` gave."""
        dims_of_head, head = self.head()
        spec = self.rules.act("BTV")
        logits_BTV = layers.project(f"BTD,{dims_of_head}->BTV", x_BTD, head, self.head_bias_V, spec)
        return layers.softcap(logits_BTV.astype(jnp.float32), self.config.logit_softcap)

    def label_logits(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits of labels: [B, Y] of head `sequence`, else [B, T, Y].

        Args:
          x_BTD: final states.
          segments_BT: 0 where a row has no text; None: it has everywhere.
          key: turns dropout on.
        """
        if self.config.head != "sequence":
            x_BTD = x_BTD if self.head_transform is None else self.head_transform(x_BTD)
            places_T = jax.sharding.reshard(jnp.arange(x_BTD.shape[1]), self.rules.act("T"))
            x_BTD = layers.dropout(x_BTD, self.config.dropout, key, places_T)
            return self.labels(self._as_at_the_base(x_BTD))
        x_BD = self.pooled(x_BTD, segments_BT)
        x_BD = x_BD if self.head_transform is None else self.head_transform(x_BD)
        x_B1D = layers.dropout(x_BD[:, None], self.config.dropout, key, jnp.zeros(1, jnp.int32))
        return self.labels(self._as_at_the_base(x_B1D[:, 0]))

    def embeddings(self, x_BTD: jax.Array, segments_BT: jax.Array, segment: int) -> jax.Array:
        """Returns a vector of unit length for the text of each row that is one segment, float32 [B, D]."""
        is_own_BT = jnp.where(segments_BT == segment, segments_BT, 0)
        x_BD = self.pooled(x_BTD, is_own_BT).astype(jnp.float32)
        return x_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_BD * x_BD, 1, keepdims=True), 1e-12))

    def pooled(self, x_BTD: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """Returns the state that stands for a sequence, [B, D], by `config.pooling`.

        Of each row, those of its text: where `segments_BT` is above 0.
        """
        num_tokens = x_BTD.shape[1]
        places_1T = jnp.arange(num_tokens)[None]
        if segments_BT is None:
            is_text_BT = jnp.ones((1, num_tokens), bool)
        else:
            is_text_BT = jax.sharding.reshard(segments_BT, self.rules.act("B")) > 0
        if self.config.pooling == "mean":
            share_BT = is_text_BT / jnp.maximum(jnp.sum(is_text_BT, 1, keepdims=True), 1)
        else:
            if self.config.pooling == "first":
                wanted_B1 = jnp.argmax(is_text_BT, axis=1, keepdims=True)
            else:
                places_BT = jnp.where(is_text_BT, places_1T, 0)
                wanted_B1 = jnp.max(places_BT, axis=1, keepdims=True)
            share_BT = places_1T == wanted_B1
        # A product instead of an index: it works wherever the sequence lies.
        spec = self.rules.act("BD")
        share_BT = jnp.broadcast_to(share_BT, x_BTD.shape[:2]).astype(jnp.float32)
        share_BT = jax.sharding.reshard(share_BT, self.rules.act("BT"))
        pooled_BD = jnp.einsum(
            "BTD,BT->BD", x_BTD.astype(jnp.float32), share_BT, out_sharding=spec
        ).astype(x_BTD.dtype)
        return pooled_BD if self.pooler is None else self.pooler(pooled_BD)
