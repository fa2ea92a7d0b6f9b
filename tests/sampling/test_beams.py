"""Beam search: what its definition gives, for any penalty and end, model, row, layout and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.decode_attention import caches
from llm_jax.sampling import beams as beams_lib
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from tests import helpers
from tests.sampling import beam_oracle
from tests.sampling import whole_forward

EOS, PAD = 3, 0

# --- the search alone, of tables instead of models ------------------------------------------------

VOCAB, ROWS, ROOM = 11, 12, 9


def _table(seed, eos_bonus=0.0):
    """Logits by length and the last two tokens, of each row: what a model could say."""
    table = 2.0 * np.random.default_rng(seed).standard_normal((ROWS, ROOM, VOCAB, VOCAB, VOCAB))
    table[..., EOS] += eos_bonus
    return np.asarray(jax.nn.log_softmax(jnp.asarray(table, jnp.float32)))


def _look_up(table, row, tokens):
    last = (0, 0, *tokens)[-2:]
    return table[row, len(tokens), last[0], last[1]]


_advance = jax.jit(beams_lib.advance)


def _search_table(table, params, max_tokens):
    """Runs `advance` as long as it says."""
    beams = beams_lib.start(jnp.zeros(len(table), jnp.int32), params.num_beams, ROOM, PAD)
    while bool(beams.is_going):
        tokens_BQN = np.asarray(beams.tokens_BQN)[..., : int(beams.num_generated)]
        rows = range(len(table))
        log_probs_BQV = [[_look_up(table, b, tokens) for tokens in tokens_BQN[b]] for b in rows]
        log_probs_BQV = jnp.asarray(log_probs_BQV)
        beams, _ = _advance(beams, log_probs_BQV, params.rule(), eos_id=EOS, max_tokens=max_tokens)
    return beams


def _assert_hypotheses(found, row, wanted):
    """Compares a row with the oracle's list."""
    assert len(wanted) == found.scores_BQ.shape[1]
    assert np.all(found.is_finished_BQ[row])
    for q, (score, tokens) in enumerate(wanted):
        length = int(found.lengths_BQ[row, q])
        assert tuple(np.asarray(found.tokens_BQN[row, q, :length])) == tokens
        assert np.all(np.asarray(found.tokens_BQN[row, q, length:]) == PAD)
        np.testing.assert_allclose(found.scores_BQ[row, q], score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    "num_beams, length_penalty, eos_bonus, max_tokens",
    [(2, 1.0, 2.0, 9), (3, 0.6, 4.0, 9), (4, 1.7, 3.0, 8), (3, 0.0, 2.0, 5), (2, -0.7, 3.0, 9)],
)
def test_a_search_gives_what_its_definition_does(
    num_beams, length_penalty, eos_bonus, max_tokens, early_stopping
):
    table = _table(num_beams, eos_bonus)
    params = beams_lib.BeamParams(num_beams, length_penalty, early_stopping)
    found = _search_table(table, params, max_tokens).finished
    lengths = set()
    for row in range(ROWS):
        wanted = beam_oracle.search(
            functools.partial(_look_up, table, row),
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_id=EOS,
            max_tokens=max_tokens,
        )
        _assert_hypotheses(found, row, wanted)
        lengths |= {len(tokens) for _, tokens in wanted}
    assert len(lengths) > 2  # else nothing ended, or all at once


def test_as_many_beams_as_texts_find_the_most_probable_text():
    table, max_tokens = _table(0)[:2, :, :3, :3, :3], 3
    params = beams_lib.BeamParams(num_beams=9, length_penalty=0.0)
    table = np.concatenate([table, np.full((*table.shape[:4], 8), -1e30, np.float32)], axis=-1)
    table[..., EOS] = -1e30
    found = _search_table(table, params, max_tokens).finished
    for row in range(2):
        best = beam_oracle.best_of_all(
            functools.partial(_look_up, table, row), num_ids=3, max_tokens=max_tokens
        )
        _assert_hypotheses(jax.tree.map(lambda x: x[:, :1], found), row, [best])


def test_stopping_rules_differ():
    """Else the tests above could not tell one from another; and a search ends when all rows have."""
    table = _table(3, 3.0)
    found = {
        early: _search_table(table, beams_lib.BeamParams(3, 1.5, early), 9)
        for early in (False, True, "never")
    }
    scores = {early: np.asarray(beams.finished.scores_BQ) for early, beams in found.items()}
    assert not np.allclose(scores[False], scores[True])
    assert not np.allclose(scores[False], scores["never"])
    num_full = max(int(jnp.max(found[True].finished.lengths_BQ)), 1)
    assert int(found[True].num_generated) == num_full < int(found["never"].num_generated)


# --- models ---------------------------------------------------------------------------------------

VARIANTS = {
    "gpt2": helpers.GPT2,
    "gemma3": helpers.GEMMA3,
    "latents": helpers.LATENTS,
    "t5": helpers.T5,
    "transformer_2017": helpers.TRANSFORMER_2017,
    "experts": helpers.EXPERTS,
}
KERNELS = {
    "llama_kernels": {"attention": "pallas"},
    "t5_kernels": helpers.T5 | {"attention": "pallas"},
    "transformer_2017_kernels": helpers.TRANSFORMER_2017 | {"attention": "pallas"},
}
MAX_TOKENS = 7
PARAMS = beams_lib.BeamParams(num_beams=3, length_penalty=0.6)


def _search(model, rows, params=PARAMS, max_tokens=MAX_TOKENS, num_tokens=8, **how):
    """Searches with what `whole_forward.inputs` makes of the rows."""
    ready = decode.prepare_model(model)
    tokens_BT, starts_B, encoded = whole_forward.inputs(ready, rows, length=7)
    ids = {"eos_id": EOS, "pad_id": PAD}
    how |= {"params": params, "num_tokens": num_tokens, "max_tokens": max_tokens}
    return beams_lib.search(ready, tokens_BT, starts_B, encoded, **ids, **how)


def _wanted(model, row, params=PARAMS, max_tokens=MAX_TOKENS, **how):
    log_probs = whole_forward.next_log_probs(model, row, **how)
    return beam_oracle.search(
        log_probs,
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_id=EOS,
        max_tokens=max_tokens,
    )


def _rows(seed=0, lengths=(2, 7, 4)):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, helpers.TINY.vocab_size, length) for length in lengths]


def _assert_whole_forward(changes):
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(helpers.tiny_model_config(**changes), mesh, rules)
    # Kernels compute the same, but here they are interpreted.
    plain = helpers.tiny_model_config(**changes | {"attention": "auto"})
    plain = helpers.random_model(plain, mesh, rules)
    rows = _rows()
    found = _search(model, rows)
    for index, row in enumerate(rows):
        _assert_hypotheses(found, index, _wanted(plain, row))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_models_beams_are_those_of_its_whole_forward(name, one_device):
    """Of prompts, or sources, of unequal lengths; so the cache follows its beams."""
    _assert_whole_forward(VARIANTS[name])


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "experts"])
def test_beams_that_read_each_others_slots_find_the_same(name, one_device, float32_of_few_rows):
    _assert_whole_forward(VARIANTS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_serve_beams_that_share_an_encoder(name, one_device):
    _assert_whole_forward(KERNELS[name])


@pytest.fixture(scope="module")
def tiny():
    """A tiny T5 on one device."""
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        yield helpers.random_model(helpers.tiny_model_config(**helpers.T5), mesh, rules)


def test_a_repetition_penalty_is_on_log_probabilities(tiny):
    rows = _rows()
    found = _search(tiny, rows, repetition_penalty=1.4)
    for index, row in enumerate(rows):
        _assert_hypotheses(found, index, _wanted(tiny, row, repetition_penalty=1.4))


def test_ids_without_text_are_not_chosen_but_count(tiny):
    rows = _rows()
    found = _search(tiny, rows, num_ids=8)
    for index, row in enumerate(rows):
        _assert_hypotheses(found, index, _wanted(tiny, row, num_ids=8))


def test_one_beam_that_stops_early_is_greedy(tiny):
    rows = _rows()
    found = _search(tiny, rows, beams_lib.BeamParams(1, early_stopping=True))
    for index, row in enumerate(rows):
        tokens, total = [], 0.0
        log_probs = whole_forward.next_log_probs(tiny, row)
        while len(tokens) < MAX_TOKENS and EOS not in tokens:
            log_probs_V = log_probs(tuple(tokens))
            tokens.append(int(np.argmax(log_probs_V)))
            total += float(log_probs_V[tokens[-1]])
        _assert_hypotheses(found, index, [(total / len(tokens), tuple(tokens))])


def test_a_rows_beams_do_not_depend_on_its_company(tiny):
    rows = _rows()
    together = _search(tiny, rows)
    for index, row in enumerate(rows):
        alone = _search(tiny, [row])
        np.testing.assert_array_equal(alone.tokens_BQN[0], together.tokens_BQN[index])
        np.testing.assert_allclose(alone.scores_BQ[0], together.scores_BQ[index], rtol=1e-5)


def test_other_rules_and_numbers_of_tokens_compile_nothing(tiny):
    long = _search(tiny, _rows(), max_tokens=8)
    count = beams_lib._search.num_programs()
    short = _search(tiny, _rows(), beams_lib.BeamParams(3, -1.0, "never"), max_tokens=2)
    assert beams_lib._search.num_programs() == count
    assert short.lengths_BQ.max() == 2 and long.lengths_BQ.max() == 8


def _assert_mesh(changes, shape):
    config = helpers.tiny_model_config(**changes)
    rows, found = _rows(lengths=(2, 7, 4, 5)), []
    for sizes in (shape, (1, 1, 1, 1, 1)):
        mesh, rules = helpers.make_mesh(sizes, "tp")
        with jax.set_mesh(mesh):
            found.append(jax.device_get(_search(helpers.random_model(config, mesh, rules), rows)))
    np.testing.assert_array_equal(found[0].tokens_BQN, found[1].tokens_BQN)
    np.testing.assert_allclose(found[0].scores_BQ, found[1].scores_BQ, rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_finds_what_one_device_finds():
    _assert_mesh(helpers.T5, (1, 2, 1, 1, 2))


@pytest.mark.long
@pytest.mark.parametrize(
    "changes, shape",
    [(helpers.GEMMA3, (1, 1, 1, 1, 2)), (helpers.TRANSFORMER_2017, (1, 4, 1, 1, 1))]
    + [(helpers.LATENTS, (1, 2, 1, 1, 2))]
    + [(changes, (1, 2, 1, 1, 2)) for changes in KERNELS.values()],
    ids=["gemma3", "transformer_2017", "latents", *KERNELS],
)
def test_every_mesh_finds_what_one_device_finds(changes, shape):
    _assert_mesh(changes, shape)


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slots_last", "contiguous", "int8", "values_in_keys"])
@pytest.mark.parametrize("first, end", [(0, 0), (3, 96), (40, 41), (64, 65), (0, 33), (95, 96)])
def test_beams_take_over_the_blocks_in_between(layout, first, end):
    B, Q, K, S, C = 2, 3, 2, 96, 4
    if layout == "slots_last":
        cache = caches.make_slots_last(B * Q, K, S, C, "float32")
    elif layout == "values_in_keys":
        cache = caches.make_values_in_keys(B * Q, S, C, 3, "float32")
    else:
        dtype = "int8" if layout == "int8" else "float32"
        cache = caches.make_contiguous(B * Q, K, S, C, dtype)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype), cache)
    sources_BQ = jnp.asarray([[2, 0, 0], [1, 1, 2]], jnp.int32)
    moved = jax.jit(cache_lib.reordered)([cache], sources_BQ, first, end)[0]
    size = cache_lib.block_size()
    inside = slice(first // size * size, -(-end // size) * size)
    for old, new in zip(cache.dense(), moved.dense()):
        old = np.asarray(old).reshape(B, Q, S, *old.shape[2:])
        wanted = old.copy()
        for b, q in np.ndindex(B, Q):
            source = int(sources_BQ[b, q])
            wanted[b, q, inside] = old[b, source, inside]
        np.testing.assert_array_equal(np.asarray(new).reshape(wanted.shape), wanted)


def test_what_all_beams_share_is_left_where_it_is():
    beams = beams_lib.start(jnp.zeros(2, jnp.int32), 2, 4, PAD)

    def shared(tokens_BQN, can_improve_B=(True, True)):
        changed = {"tokens_BQN": jnp.asarray(tokens_BQN)}
        changed["can_improve_B"] = jnp.asarray(can_improve_B)
        return int(beams_lib._num_shared(dataclasses.replace(beams, **changed)))

    same, early, late = (
        [[5, 6, 7, 0], [5, 6, 8, 0]],
        [[5, 6, 7, 0], [5, 9, 7, 0]],
        [[1, 2, 3, 4]] * 2,
    )
    late[1] = [1, 2, 3, 5]
    assert shared([same, early]) == 1
    assert shared([same, late]) == 2
    assert shared([same, early], (True, False)) == 2
