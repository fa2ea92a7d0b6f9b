"""Prefill and decode: what a whole forward pass says, whatever the padding, neighbours or mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.kernels import few_rows
from llm_jax.models import decoder as decoder_lib
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from tests import helpers

GREEDY = samplers.SamplingParams(temperature=0.0)
NO_EOS = -1  # no token ends a row

VARIANTS = {
    "gemma3": helpers.GEMMA3,
    "llama_gqa": {},
    "gpt2": helpers.GPT2,
    "window": {"window": 4},
    "alibi": {"positions": "alibi"},
    "softcaps": {"attention_softcap": 2.0, "logit_softcap": 3.0},
    "partial_rope": {"rope_fraction": 0.5, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
    "qk_norm_untied": {"use_qk_norm": True, "tie_embeddings": False},
    "post_norm": {"norm_placement": "post", "norm": "layernorm"},
    "chunked_unrolled": {"attention": "chunked", "attention_chunk": 3, "scan_layers": False},
    "latents": helpers.LATENTS,
    "latents_local": {
        "num_kv_heads": None,
        "kv_latent_dim": 6,
        "rope_interleave": True,
        "window": 4,
        "layer_pattern": "LG",
        "attention_softcap": 2.0,
        "attention": "pallas",  # of prompts; the cache has no kernel
    },
    "experts": helpers.EXPERTS,
    "hashed_experts": {
        "num_layers": 3,
        "moe": config_lib.MoeConfig(num_experts=4, router="hash", every=2),
    },
    "expert_capacity": {
        "moe": config_lib.MoeConfig(num_experts=4, dispatch="capacity", capacity_factor=4.0)
    },
    "kernels": {"attention": "pallas"},
    "kernels_alibi_window": {"attention": "pallas", "positions": "alibi", "window": 4},
    "kernels_softcap": {"attention": "pallas", "attention_softcap": 2.0, "num_kv_heads": 4},
}

TEXT_LENGTH = 14
PROMPT_LENGTHS = (2, 8, 5)  # of the rows; padded on the left to PADDED
PADDED, SLOTS = 9, 24  # no row fills the prompt's slots: each has padding


def _left_padded(model, rows, length, pad_id):
    """Returns tokens [B, T] that all end at the last slot, and where each begins."""
    tokens_BT = np.full((len(rows), length), pad_id, np.int32)
    for index, row in enumerate(rows):
        tokens_BT[index, length - len(row) :] = row
    starts_B = np.asarray([length - len(row) for row in rows], np.int32)
    act = model.rules.act
    return jax.device_put(tokens_BT, act("BS")), jax.device_put(starts_B, act("B"))


def _full_logits(model, tokens_BT):
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return np.asarray(jax.jit(decoder_lib.Decoder.__call__)(model, tokens_BT, positions_BT))


def _prompts(config, seed=0):
    text = np.random.default_rng(seed).integers(1, config.vocab_size, (3, TEXT_LENGTH))
    return text, [row[:length] for row, length in zip(text, PROMPT_LENGTHS)]


def _prefill(model, rows, *, params=GREEDY, eos_id=NO_EOS, pad_id=0):
    tokens_BT, starts_B = _left_padded(model, rows, PADDED, pad_id)
    keys_B = jax.device_put(jax.random.split(jax.random.key(0), len(rows)), model.rules.act("B"))
    return decode.prefill(
        model,
        tokens_BT,
        starts_B,
        keys_B,
        params=params,
        eos_id=eos_id,
        pad_id=pad_id,
        num_slots=SLOTS,
    )


def _generate(model, rows, num_tokens, *, params=GREEDY, eos_id=NO_EOS, pad_id=0):
    """Returns `num_tokens` tokens of each row, [B, N], the first of which is of the prefill."""
    state = _prefill(model, rows, params=params, eos_id=eos_id, pad_id=pad_id)
    first_B = np.asarray(state.last_B)
    _, rest_NB = decode.decode(
        model, state, params=params, eos_id=eos_id, pad_id=pad_id, num_tokens=num_tokens - 1
    )
    return np.concatenate([first_B[:, None], np.asarray(rest_NB).T], axis=1)


@pytest.fixture(scope="module")
def tiny():
    """A tiny Llama on one device: its mesh, the model, and the model made ready to generate."""
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        model = helpers.random_model(helpers.TINY, mesh, rules)
        yield model, decode.prepare_model(model)


# --- one pass at a time -------------------------------------------------------------------------


# Interpreted kernels take long: one is enough for what any change would break first.
_LONG = ("kernels_alibi_window", "kernels_softcap")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.long] if x in _LONG else []) for x in VARIANTS],
)
def test_each_step_gives_the_logits_of_the_full_forward(name, one_device):
    _assert_logits_of_the_full_forward(name, one_device)


@pytest.mark.parametrize("name", ["gpt2", "qk_norm_untied", "latents", "experts"])
def test_products_of_few_rows_give_the_same_logits(name, one_device, float32_of_few_rows):
    ready = _assert_logits_of_the_full_forward(name, one_device)
    turned = [x for x in jax.tree.leaves(ready, is_leaf=_is_turned) if _is_turned(x)]
    assert len(turned) > ready.config.num_layers


def _is_turned(x):
    return isinstance(x, few_rows.OutputsFirst)


def _assert_logits_of_the_full_forward(name, one_device):
    """Asserts it of a variant's prompts and single tokens; returns the model made ready."""
    config = helpers.tiny_model_config(**VARIANTS[name])
    _, rules = helpers.make_mesh()
    model = helpers.random_model(config, one_device, rules)
    text, prompts = _prompts(config)
    expected_BTV = _full_logits(model, text)

    ready = decode.prepare_model(model)
    tokens_BT, starts_B = _left_padded(ready, prompts, PADDED, pad_id=7)
    next_logits = jax.jit(decode.next_logits)
    cache = cache_lib.make_cache(ready.config, rules, len(prompts), SLOTS)
    # Slots that nothing was written to must not be seen, whatever is in them.
    cache = jax.tree.map(lambda x: x + 1e3, cache)
    prefill = jax.jit(lambda m, t, s, c: decode.next_logits(m, t, s, 0, c))
    logits_BV, cache = prefill(ready, tokens_BT, starts_B, cache)

    num_compared = 0
    for step in range(TEXT_LENGTH - min(PROMPT_LENGTHS) + 1):
        fed = []
        for row, length in enumerate(PROMPT_LENGTHS):
            place = length - 1 + step
            if place < TEXT_LENGTH:
                np.testing.assert_allclose(
                    logits_BV[row], expected_BTV[row, place], atol=1e-5, rtol=1e-5
                )
                num_compared += 1
            fed.append(text[row, place + 1] if place + 1 < TEXT_LENGTH else 0)
        logits_BV, cache = next_logits(
            ready, jnp.asarray(fed, jnp.int32)[:, None], starts_B, jnp.int32(PADDED + step), cache
        )
    assert num_compared == sum(TEXT_LENGTH - length + 1 for length in PROMPT_LENGTHS)
    return ready


def test_one_row_of_few_rows_generates_the_same(one_device, monkeypatch, float32_of_few_rows):
    """A row alone is made two for each product."""
    config = helpers.tiny_model_config(**helpers.GPT2)
    model = helpers.random_model(config, *helpers.make_mesh())
    _, prompts = _prompts(config)
    generated_BN = _generate(decode.prepare_model(model), prompts[1:2], num_tokens=9)
    monkeypatch.setattr(few_rows, "_DTYPES", ())
    expected_BN = _generate(decode.prepare_model(model), prompts[1:2], num_tokens=9)
    np.testing.assert_array_equal(generated_BN, expected_BN)


def test_bfloat16_generation_is_the_bfloat16_model(one_device):
    config = helpers.tiny_model_config(dtype="bfloat16")
    _, rules = helpers.make_mesh()
    model = helpers.random_model(config, one_device, rules)
    text, _ = _prompts(config)
    ready = decode.prepare_model(model)
    cache = cache_lib.make_cache(ready.config, rules, 3, SLOTS)
    assert cache[0].k_BKCS.dtype == jnp.bfloat16
    tokens_BT, starts_B = _left_padded(ready, text, TEXT_LENGTH, 0)
    logits_BV, _ = jax.jit(lambda m, t, s, c: decode.next_logits(m, t, s, 0, c))(
        ready, tokens_BT, starts_B, cache
    )
    expected_BV = _full_logits(model, text)[:, -1]
    np.testing.assert_allclose(logits_BV, expected_BV, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "name",
    ["llama_gqa", "gpt2", "window", pytest.param("kernels", marks=pytest.mark.long), "latents"],
)
def test_greedy_text_is_the_argmax_of_the_full_forward(name, one_device):
    config = helpers.tiny_model_config(**VARIANTS[name])
    _, rules = helpers.make_mesh()
    model = helpers.random_model(config, one_device, rules)
    _, prompts = _prompts(config)
    generated_BN = _generate(decode.prepare_model(model), prompts, num_tokens=9)
    for prompt, generated in zip(prompts, generated_BN):
        logits_TV = _full_logits(model, np.concatenate([prompt, generated])[None])[0]
        expected = np.argmax(logits_TV[len(prompt) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(generated, expected)


def test_a_repetition_penalty_counts_prompt_and_generated_text_but_not_padding(tiny):
    model, ready = tiny
    _, prompts = _prompts(helpers.TINY)
    params = samplers.SamplingParams(temperature=0.0, repetition_penalty=3.0)
    # The padding is the token that the model would choose first if it were not penalised.
    pad_id = int(_generate(ready, prompts[:1], num_tokens=2)[0, 0])
    assert pad_id not in prompts[0]
    generated = _generate(ready, prompts[:1], 9, params=params, pad_id=pad_id)[0]
    text = list(prompts[0])
    for token in generated:
        logits_V = _full_logits(model, [text + [0] * (16 - len(text))])[0, len(text) - 1]
        seen = np.isin(np.arange(len(logits_V)), text)
        penalised = np.where(logits_V > 0, logits_V / 3.0, logits_V * 3.0)
        assert token == np.argmax(np.where(seen, penalised, logits_V))
        text.append(token)


# --- rows among others --------------------------------------------------------------------------


def test_ids_without_text_are_never_chosen(tiny):
    """A vocabulary rounded up for the hardware has more ids than its tokenizer has tokens."""
    _, model = tiny
    tokens_BT, starts_B = _left_padded(model, [[1, 2, 3], [4]], PADDED, 0)
    keys_B = jax.device_put(jax.random.split(jax.random.key(0), 2), model.rules.act("B"))
    hot = samplers.SamplingParams(temperature=100.0)
    chosen = {}
    for num_ids in (None, 5):
        how = {"params": hot, "eos_id": NO_EOS, "pad_id": 0, "num_ids": num_ids}
        state = decode.prefill(model, tokens_BT, starts_B, keys_B, num_slots=SLOTS, **how)
        first = np.asarray(state.last_B)
        _, rest = decode.decode(model, state, num_tokens=12, **how)
        chosen[num_ids] = np.concatenate([first, np.asarray(rest).ravel()])
    assert chosen[None].max() >= 5
    assert chosen[5].max() < 5


def test_eos_ends_a_row_and_the_others_go_on(tiny):
    _, ready = tiny
    _, prompts = _prompts(helpers.TINY)
    free_BN = _generate(ready, prompts, num_tokens=9)
    # A token that comes up at different times, or never, in the rows.
    ends = {t: [list(row).index(t) if t in row else 9 for row in free_BN] for t in range(32)}
    eos_id = next(t for t, at in ends.items() if min(at) < 5 and max(at) == 9)
    pad_id = 31 if eos_id != 31 else 30
    ended_BN = _generate(ready, prompts, 9, eos_id=eos_id, pad_id=pad_id)
    for free, ended, end in zip(free_BN, ended_BN, ends[eos_id]):
        np.testing.assert_array_equal(ended[: end + 1], free[: end + 1])
        np.testing.assert_array_equal(ended[end + 1 :], np.full(9 - len(ended[: end + 1]), pad_id))


def test_the_loop_ends_when_every_row_has(tiny):
    _, ready = tiny
    _, prompts = _prompts(helpers.TINY)
    eos_id = int(_generate(ready, prompts[:1], num_tokens=2)[0, 0])
    state = _prefill(ready, prompts[:1], eos_id=eos_id)
    state, tokens_NB = decode.decode(
        ready, state, params=GREEDY, eos_id=eos_id, pad_id=3, num_tokens=8
    )
    assert int(state.num_generated) == 1
    assert np.asarray(tokens_NB).tolist() == [[3]] * 8


def test_decoding_in_chunks_is_decoding_in_one_go(tiny):
    _, ready = tiny
    _, prompts = _prompts(helpers.TINY)
    params = samplers.SamplingParams(temperature=1.5)
    whole_BN = _generate(ready, prompts, 9, params=params)
    state = _prefill(ready, prompts, params=params)
    pieces = [np.asarray(state.last_B)[None]]
    for _ in range(4):
        state, tokens_NB = decode.decode(
            ready, state, params=params, eos_id=NO_EOS, pad_id=0, num_tokens=2
        )
        pieces.append(np.asarray(tokens_NB))
    np.testing.assert_array_equal(np.concatenate(pieces).T, whole_BN)


def test_the_old_state_is_given_up(tiny):
    _, ready = tiny
    _, prompts = _prompts(helpers.TINY)
    old = _prefill(ready, prompts)
    new, _ = decode.decode(ready, old, params=GREEDY, eos_id=NO_EOS, pad_id=0, num_tokens=2)
    for layer in old.cache:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(layer))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


# --- completions --------------------------------------------------------------------------------


def _loaded(shape=(1, 1, 1, 1, 1), **changes) -> load.Loaded:
    """A tiny byte model, random but the same on every mesh, as if it had been loaded."""
    config = helpers.tiny_model_config(
        **({"vocab_size": 256, "num_kv_heads": 4, "max_length": 128} | changes)
    )
    kv_heads = sharding.fitting_kv_heads(config, shape[-1])
    mesh, rules = helpers.make_mesh(shape, "tp", kv_heads=kv_heads)
    with jax.set_mesh(mesh):
        model = decode.prepare_model(helpers.random_model(config, mesh, rules))
    return load.Loaded(model, tokenizer_lib.load("bytes"), mesh, 0)


@pytest.fixture(scope="module")
def loaded():
    return _loaded()


PROMPTS = [
    generate.Prompt("a", 3),
    generate.Prompt("a somewhat longer prompt than others", 1),
    generate.Prompt("", 2),
    generate.Prompt("middling", 3),
    generate.Prompt("a", 4),
]


def _texts(loaded, prompts, params, max_tokens=12, **kwargs):
    completions = generate.generate(loaded, prompts, params, max_tokens=max_tokens, **kwargs)
    return {(c.prompt, c.seed, c.sample): c.completion for c in completions}


@pytest.mark.parametrize(
    ("params", "batch_size"),
    [
        (GREEDY, 16),
        (samplers.SamplingParams(), 2),
        (samplers.SamplingParams(0.8, 40, 0.9, 0.01, 1.2), 16),
    ],
    ids=["greedy", "sampled_in_pairs", "all_transforms"],
)
def test_a_completion_does_not_depend_on_its_company(loaded, params, batch_size):
    alone = {}
    for prompt in PROMPTS:
        alone |= _texts(loaded, [prompt], params)
    assert len(alone) == len(PROMPTS)
    assert len(set(alone.values())) > 2  # else this would compare nothing
    assert _texts(loaded, PROMPTS, params, batch_size=batch_size) == alone
    assert _texts(loaded, PROMPTS[::-1], params, batch_size=batch_size) == alone


def test_a_seed_decides_the_draws(loaded):
    params = samplers.SamplingParams()
    texts = [
        _texts(loaded, [generate.Prompt("same", seed)], params).popitem()[1] for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 2), (1, 1, 1, 1, 4), (1, 2, 1, 1, 2), (1, 4, 1, 1, 1), (2, 2, 1, 1, 1)],
    ids=["tensor2", "tensor4", "data2_tensor2", "data4", "replica2_data2"],
)
def test_every_mesh_gives_the_tokens_of_one_device(loaded, shape):
    # Five rows: on none of these meshes do they fill the batch evenly.
    assert _texts(_loaded(shape), PROMPTS, GREEDY) == _texts(loaded, PROMPTS, GREEDY)


def test_kernels_on_a_mesh_give_the_tokens_of_one_device_without(loaded):
    on_mesh = _loaded((1, 2, 1, 1, 2), attention="pallas")
    assert _texts(on_mesh, PROMPTS, GREEDY) == _texts(loaded, PROMPTS, GREEDY)


@pytest.mark.parametrize("kv_heads, tensor", [(1, 4), (2, 4)], ids=["multi_query", "grouped"])
@pytest.mark.parametrize("attention", ["auto", pytest.param("pallas", marks=pytest.mark.long)])
def test_key_heads_fewer_than_devices_are_held_by_each(kv_heads, tensor, attention):
    changes = {"num_heads": 8, "num_kv_heads": kv_heads, "attention": attention}
    on_mesh = _loaded((1, 2, 1, 1, tensor), **changes)
    assert on_mesh.model.rules.act("BSKGC")[2:4] == (None, "tensor")
    assert _texts(on_mesh, PROMPTS, GREEDY) == _texts(_loaded(**changes), PROMPTS, GREEDY)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4), (1, 2, 1, 1, 2)], ids=str)
def test_latents_are_shared_by_the_heads_of_all_devices(shape):
    one, on_mesh = (_loaded(s, **helpers.LATENTS) for s in ((1, 1, 1, 1, 1), shape))
    with jax.set_mesh(on_mesh.mesh):
        (cache, *_) = cache_lib.make_cache(on_mesh.model.config, on_mesh.model.rules, 4, SLOTS)
    assert cache.k_BSC.sharding.shard_shape(cache.k_BSC.shape)[1:] == (SLOTS, 8 + 4)
    texts = _texts(one, PROMPTS, GREEDY)
    assert len(set(texts.values())) > 2
    assert _texts(on_mesh, PROMPTS, GREEDY) == texts


def test_every_mesh_draws_what_one_device_draws(loaded):
    params = samplers.SamplingParams(0.9, 20, 0.95, 0.0, 1.1)
    assert _texts(_loaded((1, 2, 1, 1, 2)), PROMPTS, params) == _texts(loaded, PROMPTS, params)


@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17, 33, 40])
def test_nothing_comes_beyond_max_tokens(loaded, max_tokens):
    (one,) = generate.generate(
        loaded, [generate.Prompt("abc")], samplers.SamplingParams(), max_tokens=max_tokens
    )
    if one.finish_reason == "length":
        assert one.num_tokens == max_tokens
    assert one.num_tokens <= max_tokens
    (longest,) = generate.generate(
        loaded, [generate.Prompt("abc")], samplers.SamplingParams(), max_tokens=64
    )
    # What fits is the beginning of what would have come.
    assert longest.completion.startswith(one.completion.rstrip("\ufffd"))
    assert longest.num_tokens > 40


def test_few_programs_serve_all_lengths():
    loaded = _loaded(embed_dim=8, num_heads=2, num_kv_heads=2)  # a shape of its own
    before = decode.prefill.num_programs(), decode.decode.num_programs()
    for length in (1, 3, 7, 12, 15, 16):
        for max_tokens in (2, 5, 16):
            _texts(loaded, [generate.Prompt("x" * length)], GREEDY, max_tokens=max_tokens)
    assert decode.prefill.num_programs() - before[0] == 1
    assert decode.decode.num_programs() - before[1] == 1
    for length in (17, 20, 32):
        _texts(loaded, [generate.Prompt("x" * length)], GREEDY, max_tokens=5)
    assert decode.prefill.num_programs() - before[0] == 2
