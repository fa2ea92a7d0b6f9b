"""Encoder-decoders: who sees whom across the two, packing, padding and implementations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.data import batch as batch_lib
from llm_jax.models import attention
from llm_jax.models import layers
from tests import helpers

T, S = 8, 12

VARIANTS = {
    "t5": helpers.T5,
    "t5_untied": helpers.T5 | {"tie_embeddings": False, "scale_logits": False},
    "transformer_2017": helpers.TRANSFORMER_2017,
    "kernels": helpers.T5 | {"attention": "pallas"},
    "chunked": helpers.T5 | {"attention": "chunked", "attention_chunk": 5},
    "unrolled": helpers.T5 | {"scan_layers": False},
    # Texts of a row share the places of an expert: there is room for all of them.
    "switch": helpers.SWITCH
    | {"moe": dataclasses.replace(helpers.SWITCH["moe"], capacity_factor=4.0)},
    "remat": helpers.T5 | {"remat": "full"},
}


def _model(**changes):
    return helpers.random_model(helpers.tiny_model_config(**changes), *helpers.make_mesh())


@jax.jit
def _jitted(model, batch):
    inputs = batch_lib.model_inputs(batch)
    return model(batch.tokens, batch.positions, batch.segments, **inputs)


def _logits(model, batch):
    with jax.set_mesh(helpers.make_mesh()[0]):
        return np.asarray(_jitted(model, jax.tree.map(jnp.asarray, batch)))


def _batch(rows=4):
    rng = np.random.default_rng(0)

    def side(length):
        tokens = rng.integers(0, helpers.TINY.vocab_size, (rows, length)).astype(np.int32)
        return tokens, np.tile(np.arange(length, dtype=np.int32), (rows, 1))

    (tokens, positions), (encoder_tokens, encoder_positions) = side(T), side(S)
    return batch_lib.Batch(
        tokens,
        tokens,
        np.ones(tokens.shape, np.float32),
        np.ones(tokens.shape, np.int32),
        positions,
        encoder_tokens=encoder_tokens,
        encoder_segments=np.ones(encoder_tokens.shape, np.int32),
        encoder_positions=encoder_positions,
    )


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return _model(**VARIANTS[request.param])


def _other(tokens):
    return (tokens + 7) % helpers.TINY.vocab_size


def test_the_decoder_sees_all_of_the_encoder_and_its_own_past(model):
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), _batch())
    batch.encoder_tokens[1, -1] = _other(batch.encoder_tokens[1, -1])
    batch.tokens[2, 5] = _other(batch.tokens[2, 5])
    logits_BTV = _logits(model, batch)
    changed_BT = np.abs(logits_BTV - logits_BTV[0]).max(-1)
    assert changed_BT[1].min() > 1e-6
    np.testing.assert_array_equal(changed_BT[2] > 1e-6, np.arange(T) >= 5)


def test_packed_and_padded_pairs_equal_each_alone(model):
    batch, cut, encoder_cut = _batch(), 3, 7
    tokens, encoder_tokens = batch.tokens, batch.encoder_tokens
    batch.segments[0, cut:] = 2
    batch.positions[0, cut:] -= cut
    batch.encoder_segments[0, encoder_cut:] = 2
    batch.encoder_positions[0, encoder_cut:] -= encoder_cut
    # Rows 1 and 2: the first pair and the second alone, with padding behind.
    tokens[1, :cut], encoder_tokens[1, :encoder_cut] = (
        tokens[0, :cut],
        encoder_tokens[0, :encoder_cut],
    )
    batch.segments[1, cut:] = batch.encoder_segments[1, encoder_cut:] = 0
    tokens[2, : T - cut] = tokens[0, cut:]
    encoder_tokens[2, : S - encoder_cut] = encoder_tokens[0, encoder_cut:]
    batch.segments[2, T - cut :] = batch.encoder_segments[2, S - encoder_cut :] = 0
    logits_BTV = _logits(model, batch)
    helpers.assert_close(logits_BTV[0, :cut], logits_BTV[1, :cut])
    helpers.assert_close(logits_BTV[0, cut:], logits_BTV[2, : T - cut])


@pytest.mark.parametrize("name", ["kernels", "chunked", "unrolled", "remat"])
def test_implementations_agree(name):
    wanted = _logits(_model(**helpers.T5), _batch())
    helpers.assert_close(_logits(_model(**VARIANTS[name]), _batch()), wanted)


def test_missing_segments_are_one_pair_a_row():
    model, batch = _model(**helpers.T5), _batch()
    without = batch._replace(segments=None, encoder_segments=None)
    helpers.assert_close(_logits(model, without), _logits(model, batch))


def test_an_encoder_and_a_decoder_have_their_own_number_of_layers():
    model = _model(**helpers.T5)
    assert model.encoder.stack.layers.mlp.up_DF.shape[0] == 2
    assert model.decoder.stack.layers.mlp.up_DF.shape[0] == 3
    assert model.encoder.stack.layers.cross_attention is None


def test_no_parameters_begin_alike(one_device):
    config = helpers.tiny_model_config(**helpers.T5 | {"num_layers": 1, "num_decoder_layers": 1})
    config = dataclasses.replace(config, mlp_dim=config.embed_dim)
    model = helpers.make_model(config, helpers.make_mesh()[1])
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(model) if leaf.ndim > 2]
    alike = [
        abs(np.corrcoef(a, b)[0, 1])
        for a, b in itertools.combinations(leaves, 2)
        if a.size == b.size
    ]
    assert len(alike) > 20 and max(alike) < 0.4


def test_each_branch_drops_by_a_key_of_its_own(one_device, monkeypatch):
    seen = []

    def recording(function, place):
        def call(*args, **kwargs):
            key = args[place]
            seen.append(tuple(np.asarray(jax.random.key_data(key))))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(layers, "dropout", recording(layers.dropout, 2))
    for module in (attention.Attention, attention.CrossAttention):
        monkeypatch.setattr(module, "__call__", recording(module.__call__, 3))
    model = _model(**helpers.T5, scan_layers=False, dropout=0.5, attention_dropout=0.5)
    batch = helpers.random_batch(helpers.tiny_run_config(helpers.T5))
    inputs = batch_lib.model_inputs(batch)
    model.hidden(batch.tokens, batch.positions, batch.segments, jax.random.key(0), **inputs)
    # Three branches of a decoder's layers, two of an encoder's, each inside and after; and the ends.
    assert len(seen) >= 3 * (2 * 2 + 1) + 2 * (2 + 1)
    assert len(set(seen)) == len(seen)
