"""Encoders and prefix LMs: who sees whom, packing and padding, and what labels are read from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import losses
from tests import helpers

LENGTH = 12
CUT = 7

VARIANTS = {
    "bert": helpers.BERT,
    "modern": {
        "architecture": "encoder",
        "norm": "layernorm",
        "activation": "gelu",
        "use_embedding_norm": True,
        "is_entry_normalised": True,
        "num_kv_heads": None,
        "num_layers": 3,
        "layer_pattern": "GLL",
        "window": 4,
        "rope_local_theta": 100.0,
    },
    "relative": {"architecture": "encoder", "positions": "relative", "relative_buckets": 8},
    "kernels": helpers.BERT | {"attention": "pallas"},
    "unrolled": helpers.BERT | {"scan_layers": False},
    "experts": helpers.BERT | {"moe": config_lib.MoeConfig(num_experts=4, router="softmax")},
    # In rows of text and of padding alike experts have places for all tokens.
    "expert_choice": helpers.BERT
    | {"moe": config_lib.MoeConfig(num_experts=4, router="expert_choice", capacity_factor=4.0)},
}


@jax.jit
def _jitted(model, tokens_BT, positions_BT, segments_BT, inputs):
    return model(tokens_BT, positions_BT, segments_BT, **inputs)


def _logits(model, tokens_BT, positions_BT=None, segments_BT=None, **inputs):
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = np.ones(tokens_BT.shape, np.int32)
    arrays = jax.tree.map(jnp.asarray, (tokens_BT, positions_BT, segments_BT, inputs))
    with jax.set_mesh(helpers.make_mesh()[0]):
        return np.asarray(_jitted(model, *arrays))


def _model(**changes):
    return helpers.random_model(helpers.tiny_model_config(**changes), *helpers.make_mesh())


def _tokens(rows=4):
    rng = np.random.default_rng(0)
    return rng.integers(0, helpers.TINY.vocab_size, (rows, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return _model(**VARIANTS[request.param])


def _packed():
    """Returns rows of two documents, of each alone, and of the second after padding."""
    tokens_BT = _tokens()
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1))
    segments_BT = np.ones(tokens_BT.shape, np.int32)
    positions_BT[0, CUT:] -= CUT
    segments_BT[0, CUT:] = 2
    tokens_BT[1, :CUT] = tokens_BT[0, :CUT]
    tokens_BT[2, : LENGTH - CUT] = tokens_BT[0, CUT:]
    segments_BT[1, CUT:] = segments_BT[2, LENGTH - CUT :] = 0
    tokens_BT[3, CUT:] = tokens_BT[0, CUT:]
    positions_BT[3] = positions_BT[0]
    segments_BT[3, :CUT] = 0
    return tokens_BT, positions_BT, segments_BT


def test_every_token_reaches_those_before_it_and_those_after(model):
    tokens_BT = np.repeat(_tokens(1), 4, axis=0)
    tokens_BT[1, 5] = (tokens_BT[1, 5] + 7) % helpers.TINY.vocab_size
    logits_BTV = _logits(model, tokens_BT)
    changed_T = np.abs(logits_BTV[0] - logits_BTV[1]).max(-1)
    assert changed_T.min() > 1e-6


def test_packed_and_padded_documents_equal_each_alone(model):
    logits_BTV = _logits(model, *_packed())
    first, second = logits_BTV[0, :CUT], logits_BTV[0, CUT:]
    helpers.assert_close(first, logits_BTV[1, :CUT])
    helpers.assert_close(second, logits_BTV[2, : LENGTH - CUT])
    helpers.assert_close(second, logits_BTV[3, CUT:])


def test_token_types_count_and_are_the_first_by_default():
    model, tokens_BT = _model(**helpers.BERT), _tokens()
    zeros = np.zeros(tokens_BT.shape, np.int32)
    plain = _logits(model, tokens_BT)
    helpers.assert_close(_logits(model, tokens_BT, token_types_BT=zeros), plain)
    assert np.abs(_logits(model, tokens_BT, token_types_BT=zeros + 1) - plain).max() > 1e-2


@pytest.mark.parametrize("attention", ["reference", "chunked", "pallas"])
def test_a_prefix_sees_itself_and_nothing_after_it(attention):
    model = _model(attention=attention, attention_chunk=5)
    tokens_BT, positions_BT, segments_BT = _packed()
    tokens_BT[1:] = tokens_BT[0]
    positions_BT[1:], segments_BT[1:] = positions_BT[0], segments_BT[0]
    # Prefixes of three tokens at the start of each document; a token of row 1's first changes, of row
    # 2's first text after it, of row 3's second prefix.
    prefix_BT = positions_BT < 3
    for row, place in ((1, 2), (2, 4), (3, CUT + 1)):
        tokens_BT[row, place] = (tokens_BT[row, place] + 7) % helpers.TINY.vocab_size
    logits_BTV = _logits(model, tokens_BT, positions_BT, segments_BT, prefix_BT=prefix_BT)
    changed_BT = np.abs(logits_BTV[1:] - logits_BTV[0]).max(-1) > 1e-6
    wanted_BT = np.zeros_like(changed_BT)
    wanted_BT[0, :CUT] = wanted_BT[1, 4:CUT] = wanted_BT[2, CUT:] = True
    np.testing.assert_array_equal(changed_BT, wanted_BT)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_a_sequence_is_read_where_it_has_text(pooling):
    model = _model(**helpers.BERT, head="sequence", num_labels=3, pooling=pooling)
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((2, LENGTH, 16)).astype(np.float32)
    segments_BT = (np.arange(LENGTH)[None] < np.array([[5], [LENGTH]])).astype(np.int32)
    with jax.set_mesh(helpers.make_mesh()[0]):
        pooled_BD = jax.jit(lambda m, x, s: m.pooled(x, s))(model, x_BTD, segments_BT)
    for row, length in enumerate((5, LENGTH)):
        text = x_BTD[row, :length]
        wanted = {"first": text[0], "mean": text.mean(0), "last": text[-1]}[pooling]
        helpers.assert_close(pooled_BD[row], wanted)


def test_losses_of_labels_by_their_definitions():
    rng = np.random.default_rng(0)
    segments_BT = (np.arange(4)[None] < np.array([[3], [4]])).astype(np.int32)

    def cross_entropy(logits, target):
        return np.log(np.exp(logits.astype(np.float64)).sum()) - logits[target]

    logits_BY = rng.standard_normal((2, 3)).astype(np.float32)
    terms_B = losses.label_terms("sequence", logits_BY, np.array([2, 0]), segments_BT)
    wanted = [cross_entropy(logits_BY[0], 2), cross_entropy(logits_BY[1], 0)]
    helpers.assert_close(terms_B, np.array(wanted))
    values_B = np.array([0.5, -1.0], np.float32)
    squares_B = losses.label_terms("sequence", logits_BY[:, :1], values_B, segments_BT)
    helpers.assert_close(squares_B, (logits_BY[:, 0] - values_B) ** 2)
    # The padding of row 0 is no place for an answer, however likely the model finds it.
    logits_BT2 = rng.standard_normal((2, 4, 2)).astype(np.float32)
    logits_BT2[0, 3] = 9.0
    spans_B = losses.label_terms("span", logits_BT2, np.array([[0, 2], [1, 3]]), segments_BT)
    wanted = [
        np.mean([cross_entropy(logits_BT2[0, :3, 0], 0), cross_entropy(logits_BT2[0, :3, 1], 2)]),
        np.mean([cross_entropy(logits_BT2[1, :, 0], 1), cross_entropy(logits_BT2[1, :, 1], 3)]),
    ]
    helpers.assert_close(spans_B, np.array(wanted))
    # What fills up the last batch of an evaluation has no text, and no weight to multiply by NaN.
    empty_B = losses.label_terms("span", logits_BT2, np.array([[0, 0], [0, 0]]), segments_BT * 0)
    assert np.all(np.isfinite(empty_B))
