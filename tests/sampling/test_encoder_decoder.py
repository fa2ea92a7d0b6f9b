"""Generation with an encoder: what a whole forward pass says, whatever the padding, neighbours or mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import errors
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.sampling import beams as beams_lib
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from tests import helpers
from tests.sampling import whole_forward

GREEDY = samplers.SamplingParams(temperature=0.0)
VARIANTS = {
    "t5": helpers.T5,
    "transformer_2017": helpers.TRANSFORMER_2017,
    "switch": helpers.SWITCH
    | {"moe": dataclasses.replace(helpers.SWITCH["moe"], capacity_factor=4.0)},
    "grouped_rope": helpers.T5
    | {"positions": "rope", "num_kv_heads": 2, "norm_placement": "sandwich"},
}
KERNELS = {
    "t5_kernels": helpers.T5 | {"attention": "pallas"},
    "transformer_2017_kernels": helpers.TRANSFORMER_2017 | {"attention": "pallas"},
}
SOURCE_LENGTHS, FORCED, TEXT = (7, 2, 5), 4, 9


def _assert_logits(changes):
    """Reads a forced beginning, then token by token, and compares with the whole each time."""
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(helpers.tiny_model_config(**changes), mesh, rules)
    plain = helpers.tiny_model_config(**changes | {"attention": "auto"})
    plain = helpers.random_model(plain, mesh, rules)
    rng = np.random.default_rng(0)
    sources = [rng.integers(2, helpers.TINY.vocab_size, n) for n in SOURCE_LENGTHS]
    text_BT = rng.integers(0, helpers.TINY.vocab_size, (len(sources), TEXT))
    expected = [whole_forward.logits(plain, text, row) for text, row in zip(text_BT, sources)]

    ready = decode.prepare_model(model)
    forced_BT, starts_B, encoded = whole_forward.inputs(
        ready, sources, length=8, forced=text_BT[:, :FORCED]
    )
    cache = cache_lib.make_cache(ready.config, ready.rules, len(sources), 16)
    # Slots that nothing was written to must not be seen, whatever is in them.
    cache = jax.tree.map(lambda x: x + 1e3, cache)
    prefill = jax.jit(lambda m, t, s, c, e: decode.next_logits(m, t, s, 0, c, e))
    logits_BV, cache = prefill(ready, forced_BT, starts_B, cache, encoded)
    step = jax.jit(decode.next_logits)
    for place in range(FORCED - 1, TEXT):
        wanted_BV = np.stack([logits_TV[place] for logits_TV in expected])
        np.testing.assert_allclose(logits_BV, wanted_BV, rtol=1e-5, atol=1e-5)
        if place + 1 < TEXT:
            fed_B1 = jnp.asarray(text_BT[:, place + 1 : place + 2], jnp.int32)
            logits_BV, cache = step(ready, fed_B1, starts_B, jnp.int32(place + 1), cache, encoded)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_step_gives_the_logits_of_the_whole_forward(name, one_device):
    _assert_logits(VARIANTS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_logits_of_the_whole_forward(name, one_device):
    _assert_logits(KERNELS[name])


def test_what_is_computed_in_float32_stays_in_float32(one_device):
    config = helpers.tiny_model_config(**helpers.T5, dtype="bfloat16", use_qk_norm=True)
    ready = decode.prepare_model(helpers.random_model(config, *helpers.make_mesh()))
    assert ready.blocks[0].cross_attention.k_DKC.dtype == jnp.bfloat16
    assert ready.model.encoder.stack.layers.attention.k_DKC.dtype == jnp.bfloat16
    assert ready.model.decoder.stack.layers.attention.k_DKC.shape[0] == 0  # taken apart
    for trunk in (ready.model.decoder, ready.model.encoder):
        assert trunk.relative.table_KGU.dtype == jnp.float32
    assert ready.blocks[0].attention.q_norm.scale_C.dtype == jnp.float32


# --- completions ----------------------------------------------------------------------------------


def _loaded(shape=(1, 1, 1, 1, 1), **changes) -> load.Loaded:
    """A tiny byte model, random but the same on every mesh, as if it had been loaded."""
    sizes = {"vocab_size": 256, "max_length": 64, "decoder_start_id": 5}
    config = helpers.tiny_model_config(**helpers.T5 | sizes | changes)
    mesh, rules = helpers.make_mesh(shape, "tp")
    with jax.set_mesh(mesh):
        model = decode.prepare_model(helpers.random_model(config, mesh, rules))
    return load.Loaded(model, tokenizer_lib.load("bytes"), mesh, 0)


@pytest.fixture(scope="module")
def loaded():
    return _loaded()


PROMPTS = [
    generate.Prompt("a", 3),
    generate.Prompt("a somewhat longer source than others", 1),
    generate.Prompt("", 2),
    generate.Prompt("a", 4),
]
BEAMS = beams_lib.BeamParams(num_beams=3, length_penalty=0.6)


def _texts(loaded, prompts, params=GREEDY, **how):
    completions = generate.generate(loaded, prompts, params, **{"max_tokens": 10} | how)
    return {(c.prompt, c.seed, c.sample): c for c in completions}


def test_a_source_ends_and_a_target_begins_as_in_training(loaded):
    """With the tokenizer's end, and with the config's start, which is not part of the text."""
    (one,) = _texts(loaded, PROMPTS[:1]).values()
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        model = helpers.random_model(loaded.model.config, mesh, rules)
        source = [ord("a"), loaded.tokenizer.eos_id]
        text = [5]
        for _ in range(10):
            text.append(int(np.argmax(whole_forward.logits(model, text, source)[-1])))
    wanted = loaded.tokenizer.decode(text[1:])
    assert one.completion == wanted
    assert (one.finish_reason, one.num_tokens) == ("length", 10)


@pytest.mark.parametrize(
    "params, how",
    [(GREEDY, {}), (samplers.SamplingParams(), {"batch_size": 2}), (GREEDY, {"beams": BEAMS})],
    ids=["greedy", "sampled_in_pairs", "beams"],
)
def test_a_completion_does_not_depend_on_its_company(loaded, params, how):
    together = _texts(loaded, PROMPTS, params, **how)
    for prompt in PROMPTS:
        ((name, alone),) = _texts(loaded, [prompt], params, **how).items()
        if alone.score is not None:
            assert together[name].score == pytest.approx(alone.score, rel=1e-5)
        assert together[name].completion == alone.completion
    assert len({c.completion for c in together.values()}) > 1


@pytest.mark.slow
def test_a_mesh_gives_the_texts_of_one_device(loaded):
    on_mesh = _loaded((1, 2, 1, 1, 2))
    assert _texts(on_mesh, PROMPTS[:3]) == _texts(loaded, PROMPTS[:3])


def test_targets_are_streamed(loaded):
    pieces = []
    (one,) = _texts(loaded, PROMPTS[:1], on_text=pieces.append).values()
    assert "".join(pieces) == one.completion and len(pieces) > 1


def test_sources_and_targets_need_room(loaded):
    with pytest.raises(
        errors.UserError, match="has 65 tokens, the end among them: .*max_length = 64"
    ):
        _texts(loaded, [generate.Prompt("x" * 64)])
    with pytest.raises(
        errors.UserError, match="max_tokens=64 and the decoder's start .*=63 at most"
    ):
        _texts(loaded, PROMPTS, max_tokens=64)
    _texts(loaded, [generate.Prompt("x" * 63)], max_tokens=63)
