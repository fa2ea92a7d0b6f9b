"""Operations counted by formula, against the matrix products of the traced model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import dims
from llm_jax import flops
from llm_jax import train_step
from tests import helpers

LENGTH = 8


def _dot_flops(jaxpr) -> int:
    """Returns two operations for each multiply-add of every `dot_general` of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        for value in equation.params.values():
            jaxpr_of = getattr(value, "jaxpr", value)
            if hasattr(jaxpr_of, "eqns"):
                total += _dot_flops(jaxpr_of)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        helpers.GPT2,
        {"tie_embeddings": False, "head_dim": 6, "num_kv_heads": 1, "mlp_dim": 40},
        helpers.LATENTS,
        helpers.LATENTS | {"q_latent_dim": None},
        # All experts run in the dense dispatch, so that all are those of a token.
        helpers.EXPERTS
        | {
            "moe": dataclasses.replace(
                helpers.EXPERTS["moe"], dispatch="dense", experts_per_token=4, groups_per_token=2
            )
        },
    ],
    ids=["llama", "gpt2", "untied", "latents", "one_latent", "experts"],
)
def test_matches_the_products_of_the_model(one_device, changes):
    config = helpers.tiny_model_config(scan_layers=False, attention="reference", **changes)
    model = helpers.random_model(config, *helpers.make_mesh())
    tokens_BT = jnp.zeros((3, LENGTH), jnp.int32)
    counted = _dot_flops(jax.make_jaxpr(lambda m: m(tokens_BT, tokens_BT))(model).jaxpr)
    # The reference scores every key; the formula counts those that a causal query sees.
    square = 2 * config.num_heads * (config.key_width + config.value_width) * LENGTH
    seen = square * (LENGTH + 1) / 2 / LENGTH
    unseen = config.num_layers * (square - seen) * tokens_BT.size
    formula = flops.forward_flops_per_token(config, LENGTH) * tokens_BT.size
    assert counted - unseen == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        helpers.BERT,
        helpers.BERT | {"head": "sequence", "use_pooler": True, "num_labels": 3},
        helpers.BERT | {"head": "token", "use_head_transform": False},
        helpers.T5,
        helpers.TRANSFORMER_2017,
    ],
    ids=["bert", "classifier", "token_labels", "t5", "transformer_2017"],
)
def test_other_families_match_the_products_of_their_models(one_device, changes):
    config = helpers.tiny_run_config(changes | {"scan_layers": False, "attention": "reference"})
    model = helpers.random_model(config.model, *helpers.make_mesh())
    batch = helpers.random_batch(config)

    def run(model, batch):
        x_BTD, _ = train_step.states(config, model, batch)
        if config.model.head == "lm":
            return model.vocabulary_logits(x_BTD)
        return model.label_logits(x_BTD, batch.segments)

    counted = _dot_flops(jax.make_jaxpr(run)(model, jax.tree.map(jnp.asarray, batch)).jaxpr)
    m, rows = config.model, config.data.batch_size
    if m.architecture == "encoder_decoder":
        lengths = batch.encoder_tokens.shape[1], batch.tokens.shape[1]
        # The reference scores every key of a decoder; the formula those that a causal query sees.
        unseen = lengths[1] ** 2 - lengths[1] * (lengths[1] + 1) / 2
        counted -= rows * m.decoder_layers * 4 * m.num_heads * m.head_width * unseen
    else:
        lengths = (batch.tokens.shape[1],)
        # A sequence's state is a weighted sum of those of its tokens.
        pooled = 2 * m.embed_dim * lengths[0]
        counted -= rows * pooled if m.head == "sequence" else 0
    formula = rows * flops.forward_flops_per_row(m, *lengths)
    assert counted == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 8, 20])
def test_an_encoders_window_has_the_query_in_its_middle(window):
    config = helpers.tiny_model_config(
        architecture="encoder", num_layers=3, layer_pattern="LG", window=window
    )
    distance = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
    near = (distance <= (LENGTH if window is None else window // 2)).sum()
    wanted = 2 * flops.matmul_params(config) * LENGTH
    wanted += 4 * config.num_heads * config.head_width * (2 * near + LENGTH**2)
    assert flops.forward_flops_per_row(config, LENGTH) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
def test_attention_counts_the_keys_that_are_seen(window):
    config = helpers.tiny_model_config(window=window)
    t, s = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    seen = (s <= t) & (t - s < (window or LENGTH))
    one_pair = 4 * config.num_heads * config.head_width * config.num_layers
    wanted = 2 * flops.matmul_params(config) + one_pair * seen.sum() / LENGTH
    assert flops.forward_flops_per_token(config, LENGTH) == pytest.approx(wanted, rel=1e-12)


def test_training_is_three_forward_passes():
    config = helpers.tiny_model_config()
    ratio = flops.train_flops_per_token(config, 8) / flops.forward_flops_per_token(config, 8)
    assert ratio == 3.0


def test_gpt2_small_comes_to_six_operations_a_weight():
    config = helpers.tiny_model_config(
        **helpers.GPT2, num_layers=12, embed_dim=768, num_heads=12, vocab_size=50257
    )
    # 85M in the layers and 39M in the tied head; Kaplan et al. 2020, table 1.
    assert flops.matmul_params(config) == 12 * 12 * 768**2 + 50257 * 768
    attention = 3 * 12 * 4 * 768 * 512.5
    wanted = 6 * flops.matmul_params(config) + attention
    assert flops.train_flops_per_token(config, 1024) == pytest.approx(wanted)


def test_weights_of_products_are_those_of_the_model(one_device):
    config = helpers.tiny_model_config(tie_embeddings=False, use_bias=True, norm="layernorm")
    model = helpers.random_model(config, *helpers.make_mesh())
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        is_product = "bias" not in jax.tree_util.keystr(path) and len(dims.of_path(path)) > 1
        total += leaf.size if is_product else 0
    table = config.vocab_size * config.embed_dim
    assert flops.matmul_params(config) == total - table


class _Device:
    def __init__(self, kind):
        self.device_kind = kind


def test_peak_is_known_for_tpus_alone():
    assert flops.peak_flops(_Device("TPU v5 lite")) == 197e12
    assert flops.peak_flops(_Device("TPU v4")) == 275e12
    assert flops.peak_flops(_Device("cpu")) is None
