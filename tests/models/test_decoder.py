"""The decoder, for every option of its config: who sees whom, and what may not change the result."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import flops
from llm_jax import train_step
from llm_jax.models import layers
from llm_jax.models import mlp
from tests import helpers
from tests.models import oracle
from tests.models import variants

LENGTH = 12
ROWS = LENGTH + 1

# What other tests of this file turn, or what nothing but the size or the start depends on.
ELSEWHERE = {"dropout", "attention_dropout", "remat", "lora"}
ELSEWHERE |= {"embed_dim", "vocab_size", "max_length", "init_stddev"}
# Of other families, and of labels.
ELSEWHERE |= {"architecture", "num_decoder_layers", "num_token_types", "decoder_start_id"}
ELSEWHERE |= {"head", "pooling", "use_pooler", "num_labels"}
# Of `test_parametrisation`.
ELSEWHERE |= {"parametrisation", "base_width", "base_depth", "base_head_dim"}


def _config(name, **changes):
    return helpers.tiny_model_config(**(variants.VARIANTS[name] | changes))


def _model(config, seed=0):
    return helpers.random_model(config, *helpers.make_mesh(), seed=seed)


@jax.jit
def _jitted(model, tokens_BT, positions_BT, segments_BT, key):
    return model(tokens_BT, positions_BT, segments_BT, key)


def _forward(model, tokens_BT, positions_BT=None, segments_BT=None, key=None):
    """Returns float32 logits as numpy; every call has the same shape, so that it compiles once."""
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
    if segments_BT is None:
        segments_BT = np.ones(tokens_BT.shape, np.int32)
    with jax.set_mesh(helpers.make_mesh()[0]):
        place = jnp.asarray
        return np.asarray(
            _jitted(model, place(tokens_BT), place(positions_BT), place(segments_BT), key)
        )


def _tokens(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, helpers.TINY.vocab_size, (rows, LENGTH)).astype(np.int32)


def _tolerance(config):
    return 2e-2 if config.dtype == "bfloat16" else 1e-5


def _differ(a_TV, b_TV, scale):
    """Returns for each position the largest difference of its logits, relative to `scale`."""
    return np.abs(a_TV - b_TV).max(-1) / scale


@pytest.fixture(scope="module", params=variants.VARIANTS)
def variant(request):
    """A config, a random model of it, and the tokens and logits of a batch whose rows are equal
    but that row t + 1 has another token at t."""
    config = _config(request.param)
    config_lib.check(
        config_lib.RunConfig(model=config, data=config_lib.DataConfig(sequence_length=LENGTH))
    )
    model = _model(config)
    tokens_BT = np.repeat(_tokens(1), ROWS, axis=0)
    for t in range(LENGTH):
        tokens_BT[t + 1, t] = (tokens_BT[t + 1, t] + 7) % config.vocab_size
    return config, model, tokens_BT, _forward(model, tokens_BT)


def test_variants_cover_every_option():
    configs = [_config(name) for name in variants.VARIANTS]
    seen = {
        field.name: {getattr(config, field.name) for config in configs}
        for field in dataclasses.fields(config_lib.ModelConfig)
    }
    constant = {name for name, values in seen.items() if len(values) == 1}
    assert constant == ELSEWHERE
    for name, choices in {
        "positions": config_lib.POSITIONS,
        "rope_scaling": config_lib.ROPE_SCALINGS,
        "norm": config_lib.NORMS,
        "norm_placement": config_lib.NORM_PLACEMENTS,
        "qk_norm": config_lib.QK_NORMS,
        "activation": config_lib.ACTIVATIONS,
        "attention": config_lib.ATTENTIONS,
    }.items():
        assert seen[name] == set(choices)


# --- who sees whom ----------------------------------------------------------------------------


def test_token_reaches_itself_and_later_ones_within_the_window(variant):
    config, _, _, logits_BTV = variant
    scale = np.abs(logits_BTV).max()
    has_global = config.window is None or "G" in config.layer_pattern
    reach = LENGTH if has_global else config.num_layers * (config.window - 1)
    for t in range(LENGTH):
        changed_T = _differ(logits_BTV[0], logits_BTV[t + 1], scale)
        seen = np.zeros(LENGTH, bool)
        seen[t : t + reach + 1] = True
        assert changed_T[~seen].max(initial=0.0) <= _tolerance(config) / 10
        # Bfloat16 logits that hardly move may round to the same number.
        assert changed_T[t] > 1e-2
        if config.dtype == "float32":
            assert changed_T[seen].min() > 1e-6


def test_packed_documents_equal_each_alone(variant):
    config, model, _, _ = variant
    tokens_BT = _tokens()
    cut = 7
    positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape).copy()
    segments_BT = np.ones(tokens_BT.shape, np.int32)
    # Row 0: two documents. Rows 1, 2: each alone, with padding behind.
    positions_BT[0, cut:] -= cut
    segments_BT[0, cut:] = 2
    tokens_BT[1, :cut] = tokens_BT[0, :cut]
    tokens_BT[2, : LENGTH - cut] = tokens_BT[0, cut:]
    segments_BT[1, cut:] = segments_BT[2, LENGTH - cut :] = 0
    # Row 3: the second document with padding in front, which causality does not hide.
    tokens_BT[3, cut:] = tokens_BT[0, cut:]
    positions_BT[3] = positions_BT[0]
    segments_BT[3, :cut] = 0
    segments_BT[3, cut:] = 1
    logits_BTV = _forward(model, tokens_BT, positions_BT, segments_BT)
    first, second = logits_BTV[0, :cut], logits_BTV[0, cut:]
    helpers.assert_close(first, logits_BTV[1, :cut], _tolerance(config))
    helpers.assert_close(second, logits_BTV[2, : LENGTH - cut], _tolerance(config))
    helpers.assert_close(second, logits_BTV[3, cut:], _tolerance(config))
    # Without segments the second document does see the first.
    merged_BTV = _forward(model, tokens_BT, positions_BT)
    if config.window is None:
        assert np.abs(merged_BTV[0, -1] - logits_BTV[0, -1]).max() > 1e-3


def test_padding_tail_does_not_matter(variant):
    config, model, _, _ = variant
    tokens_BT = np.repeat(_tokens(1), ROWS, axis=0)
    positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape).copy()
    segments_BT = np.ones(tokens_BT.shape, np.int32)
    tail = slice(8, None)
    segments_BT[1:, tail] = 0
    tokens_BT[2:, tail] = _tokens(ROWS - 2, seed=1)[:, tail]
    positions_BT[3:, tail] = 0
    logits_BTV = _forward(model, tokens_BT, positions_BT, segments_BT)
    for row in range(1, ROWS):
        helpers.assert_close(logits_BTV[row, :8], logits_BTV[0, :8], _tolerance(config))


def test_missing_segments_are_one_document(one_device):
    config = _config("gpt2")
    model, tokens_BT = _model(config), _tokens()
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape)
    without_BTV = jax.jit(lambda m, t, p: m(t, p))(model, tokens_BT, positions_BT)
    helpers.assert_close(without_BTV, _forward(model, tokens_BT))


# --- what must not change the result ----------------------------------------------------------

MIXED = {"use_qk_norm": True, "use_bias": True, "norm": "layernorm", "dropout": 0.2}
_SMALL = {"batch_size": 4, "sequence_length": LENGTH}


@functools.cache
def _gradients(**changes):
    """Returns loss and gradients of a mixed model that has dropout on."""
    run = helpers.tiny_run_config(MIXED | changes, data=_SMALL)
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(run.model, mesh, rules)
    batch = helpers.place(helpers.random_batch(run), mesh, rules)

    def loss(model, batch, key):
        sums = train_step.loss_sums(run, model, batch, key)
        return sums.cross_entropy / sums.weight

    with jax.set_mesh(mesh):
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        value, grads = jax.device_get(value_and_grad(model, batch, jax.random.key(3)))
    return value, jax.tree.leaves(grads)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "attention_output"},
        {"remat": "qkv"},
        {"remat": "offload"},
        {"remat": "full", "scan_layers": False},
        {"remat": "offload", "scan_layers": False},
        {"attention": "chunked", "attention_chunk": 5},
        {"attention": "pallas"},
        {"attention": "pallas", "remat": "attention_output"},
    ],
    ids=str,
)
def test_same_loss_and_gradients(changes):
    loss, grads = _gradients(**changes)
    plain_loss, plain_grads = _gradients(attention="reference")
    helpers.assert_close(loss, plain_loss)
    helpers.assert_close(grads, plain_grads, 2e-5)


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, {}),
        ({"tie_embeddings": False, "rope_theta": 100.0}, {"theta": 100.0}),
        ({"use_qk_norm": True}, {}),
        ({"window": 3, "attention_softcap": 0.5}, {"window": 3, "softcap": 0.5}),
        ({"head_dim": 8, "rope_fraction": 0.5}, {"rotated": 4}),
        (
            {"positions": "alibi", "num_heads": 8},
            {"rotated": 0, "slopes": [2.0**-i for i in range(1, 9)]},
        ),
        ({"positions": "none", "norm_placement": "post"}, {"rotated": 0}),
    ],
    ids=str,
)
def test_llama_equals_oracle(changes, options):
    config = _config("llama", **changes)
    model, tokens_BT = _model(config), _tokens()
    logits_BTV = _forward(model, tokens_BT)
    weights = oracle.weights_of(model)
    for row in range(2):
        wanted_TV = oracle.llama(weights, tokens_BT[row], config.num_layers, **options)
        helpers.assert_close(logits_BTV[row], wanted_TV)


def test_gpt2_equals_oracle():
    config = _config("gpt2")
    model, tokens_BT = _model(config), _tokens()
    logits_BTV = _forward(model, tokens_BT)
    weights = oracle.weights_of(model)
    for row in range(2):
        wanted_TV = oracle.gpt2(weights, tokens_BT[row], config.num_layers)
        helpers.assert_close(logits_BTV[row], wanted_TV)


def test_activations_by_their_definitions():
    x = np.linspace(-3, 3, 25)
    normal = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
    wanted = {
        "gelu": x * normal,
        "gelu_tanh": x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "silu": x / (1 + np.exp(-x)),
        "relu": np.maximum(x, 0),
        "relu_squared": np.maximum(x, 0) ** 2,
    }
    assert set(mlp.ACTIVATIONS) == set(config_lib.ACTIVATIONS) == set(wanted)
    for name, values in wanted.items():
        helpers.assert_close(mlp.ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), values)


def test_logit_softcap_bounds_and_bends():
    cap = 1.5
    plain, capped = _config("llama"), _config("logit_softcap", logit_softcap=cap)
    raw_BTV = _forward(_model(plain), _tokens()).astype(np.float64)
    logits_BTV = _forward(_model(capped), _tokens())
    assert np.abs(raw_BTV).max() > cap > np.abs(logits_BTV).max() > 0.9 * cap
    helpers.assert_close(logits_BTV, cap * np.tanh(raw_BTV / cap))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_needs_a_key_and_follows_it(name):
    dropped, plain = _config(name, dropout=0.3), _config(name)
    model, tokens_BT = _model(dropped), _tokens()
    keys = jax.random.key(0), jax.random.key(1)
    first, again, other = (_forward(model, tokens_BT, key=key) for key in (*keys[:1], *keys))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    without = _forward(model, tokens_BT)
    np.testing.assert_array_equal(without, _forward(_model(plain), tokens_BT))
    assert np.abs(first - without).max() > 0.1


def test_dropout_keeps_the_mean(one_device):
    rate, shape = 0.3, (200, 50, 100)
    y = np.asarray(layers.dropout(jnp.ones(shape), rate, jax.random.key(0), jnp.arange(50)))
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / (1 - rate)], rtol=1e-6)
    deviation = math.sqrt(rate / (1 - rate) / y.size)
    assert abs(y.mean() - 1.0) < 5 * deviation


def _num_params(m):
    """Counted from the shapes that a paper would list."""
    norm = m.embed_dim * (2 if m.norm == "layernorm" and m.use_bias else 1)
    heads = m.num_heads * m.head_width
    kv_heads = m.kv_heads * m.head_width
    attention = 2 * m.embed_dim * heads + 2 * m.embed_dim * kv_heads
    if m.kv_latent_dim is not None:
        rotated, keys = m.rope_head_width, m.num_heads * (m.head_width + m.rope_head_width)
        attention = m.embed_dim * (m.kv_latent_dim + rotated) + m.kv_latent_dim  # a norm's
        attention += m.kv_latent_dim * m.num_heads * (m.head_width + m.value_width)
        attention += m.num_heads * m.value_width * m.embed_dim
        own = m.q_latent_dim
        attention += m.embed_dim * keys if own is None else (m.embed_dim + keys + 1) * own
    mlp = (3 if m.is_gated else 2) * m.embed_dim * m.mlp_width
    if m.use_bias:
        attention += heads + 2 * kv_heads + m.embed_dim
        mlp += (2 if m.is_gated else 1) * m.mlp_width + m.embed_dim
    elif m.use_qkv_bias:
        attention += heads + 2 * kv_heads
    if m.use_qk_norm:
        attention += 2 * m.head_width if m.qk_norm == "head" else heads + kv_heads
    norms = 4 if m.norm_placement == "sandwich" else 2
    total = m.num_layers * (attention + mlp + norms * norm) + m.vocab_size * m.embed_dim
    if m.moe.is_on:
        first, every = m.moe.first_dense_layers, m.moe.every
        num_expert_layers = (m.num_layers - first) // every
        one = (3 if m.is_gated else 2) * m.embed_dim * m.expert_width
        router = 0 if m.moe.router == "hash" else m.embed_dim * m.moe.num_experts
        router += m.moe.num_experts if m.moe.use_selection_bias else 0
        router += 1 if m.moe.router == "relu" else 0
        num_experts = m.moe.num_experts + m.moe.num_shared_experts
        total += num_expert_layers * (num_experts * one + router - mlp)
    total += norm if m.norm_placement != "post" else 0
    total += norm if m.use_embedding_norm else 0
    total += m.max_length * m.embed_dim if m.positions == "learned" else 0
    total += m.num_heads * m.relative_buckets if m.positions == "relative" else 0
    if m.use_head_transform:
        total += m.embed_dim**2 + norm + (m.embed_dim if m.use_bias else 0)
    total += m.vocab_size if m.use_head_bias else 0
    return total + (0 if m.tie_embeddings else m.vocab_size * m.embed_dim)


def test_number_of_parameters(variant):
    config, model, _, _ = variant
    assert flops.num_params(model) == _num_params(config)


def test_gpt2_small_has_its_published_size(one_device):
    config = helpers.tiny_model_config(
        **helpers.GPT2,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        vocab_size=50257,
        max_length=1024,
    )
    abstract = jax.eval_shape(lambda: helpers.make_model(config, helpers.make_mesh()[1]))
    assert flops.num_params(abstract) == 124_439_808


def test_parameters_start_with_the_stated_deviation(one_device):
    config = helpers.tiny_model_config(embed_dim=64, mlp_dim=128, use_bias=True, norm="layernorm")
    weights = oracle.weights_of(helpers.make_model(config, helpers.make_mesh()[1]))
    small = config.init_stddev / math.sqrt(2 * config.num_layers)
    for name, weight in weights.items():
        if "scale" in name:
            np.testing.assert_array_equal(weight, 1.0)
        elif "bias" in name:
            np.testing.assert_array_equal(weight, 0.0)
        else:
            wanted = small if ".out_" in name else config.init_stddev
            # The deviation of n draws is known to 1 / sqrt(2 n); the fewest are 2048.
            assert weight.std() == pytest.approx(wanted, rel=5 / math.sqrt(2 * weight.size)), name
        if name.startswith("stack.layers") and "_norm" not in name and "bias" not in name:
            assert np.abs(weight[0] - weight[1]).max() > small, f"layers start equal: {name}"


def test_grouped_heads_equal_repeated_keys_and_values():
    grouped, full = _config("llama", num_kv_heads=2), _config("llama", num_kv_heads=4)
    grouped_model = _model(grouped)
    full_model = _model(full)

    named, tree = jax.tree_util.tree_flatten_with_path(full_model)
    wide = []
    for (path, target), weight in zip(named, jax.tree.leaves(jax.device_get(grouped_model))):
        name = jax.tree_util.keystr(path)
        if "k_DKC" in name or "v_DKC" in name:
            weight = np.repeat(weight, 2, axis=2)  # [L, D, K, C]
        wide.append(jax.device_put(weight.reshape(target.shape), target.sharding))
    repeated = jax.tree.unflatten(tree, wide)
    tokens_BT = _tokens()
    helpers.assert_close(_forward(repeated, tokens_BT), _forward(grouped_model, tokens_BT))


def test_rope_shifts_with_the_document():
    """A model with RoPE sees no absolute position; one with a learned table does."""
    tokens_BT = _tokens()
    shifted_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32) + 9, tokens_BT.shape)
    rope, learned = _model(_config("llama")), _model(_config("gpt2"))
    helpers.assert_close(_forward(rope, tokens_BT, shifted_BT), _forward(rope, tokens_BT))
    moved = _forward(learned, tokens_BT, shifted_BT) - _forward(learned, tokens_BT)
    assert np.abs(moved).max() > 0.1


def test_order_matters_only_with_positions():
    """Without positions, attention takes what came before as a set."""
    tokens_BT = _tokens()
    swapped_BT = tokens_BT[:, [1, 0, *range(2, LENGTH)]]
    one_layer = {"num_layers": 1}
    for name, is_ordered in [("no_positions", False), ("llama", True), ("alibi", True)]:
        model = _model(_config(name, **one_layer))
        change = _forward(model, tokens_BT) - _forward(model, swapped_BT)
        assert (np.abs(change[:, 2:]).max() > 1e-3) == is_ordered, name
