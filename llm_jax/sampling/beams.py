"""Beam search in one device loop: the algorithm of Hugging Face's `generate`, to the same ids and scores.

What a row's beams may become is decided by `advance`, a pure function of arrays; `search` runs a model
around it. The algorithm is that of `GenerationMixin._beam_search` in transformers 5.23: of all
continuations of a row's running beams the 2 Q best by the sum of log-probabilities are candidates. The Q
best of those that do not end go on running. Those among the Q best that end are hypotheses, scored by the
sum over `num_tokens ** length_penalty`, their end counted, and the Q best hypotheses are kept.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from llm_jax import errors
from llm_jax.kernels import few_rows
from llm_jax.kernels.decode_attention import caches
from llm_jax.models import stack
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from llm_jax.sampling import samplers

# Added to sums that are out of the running: far below any, and still finite.
_OUT = -1e9
_NEVER = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class BeamParams:
    """How hypotheses are searched for.

    Attributes:
      num_beams: hypotheses side by side; 1 does not search.
      length_penalty: above 0 favours long hypotheses: scores are divided by length to this power.
      early_stopping: when a row has as many hypotheses as beams: True ends it then, False when the best
        running beam would score no better if it ended now (which is a guess, as scores may rise with
        length), "never" when it cannot at any length up to the longest.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self):
        checks = (
            ("num_beams", self.num_beams >= 1, "at least 1 (1 does not search)"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            (
                "early_stopping",
                self.early_stopping in (True, False, "never"),
                "true, false or never",
            ),
        )
        for name, holds, would_do in checks:
            if not holds:
                raise errors.UserError(f"--{name}={getattr(self, name)} must be {would_do}")

    def rule(self) -> "Rule":
        """Returns what `advance` goes by."""
        is_never, penalty = self.early_stopping == "never", self.length_penalty
        return Rule(penalty, self.early_stopping is True, is_never and penalty > 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """When a row ends and what a hypothesis is worth, as arrays: another rule compiles nothing.

    Attributes:
      length_penalty: as of `BeamParams`.
      ends_when_full: whether as many hypotheses as beams are enough.
      looks_ahead: whether running beams are judged as if they were to have the greatest length.
    """

    length_penalty: jax.Array | float
    ends_when_full: jax.Array | bool
    looks_ahead: jax.Array | bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """Texts of each row, the best first.

    Attributes:
      tokens_BQN: int32, `pad_id` after the end; the end itself is among them.
      lengths_BQ: int32, how many of them count.
      scores_BQ: float32.
      is_finished_BQ: whether there is a text at all.
    """

    tokens_BQN: jax.Array
    lengths_BQ: jax.Array
    scores_BQ: jax.Array
    is_finished_BQ: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """What goes from token to token.

    Attributes:
      tokens_BQN: int32, of running beams; `pad_id` from `num_generated` on.
      sums_BQ: float32, of their log-probabilities.
      finished: the hypotheses so far.
      can_improve_B: whether a row's running beams may still give a better hypothesis.
      num_generated: int32 scalar.
      is_going: whether there is anything left to do.
    """

    tokens_BQN: jax.Array
    sums_BQ: jax.Array
    finished: Hypotheses
    can_improve_B: jax.Array
    num_generated: jax.Array
    is_going: jax.Array

    @property
    def last_BQ(self) -> jax.Array:
        """The newest token of each beam."""
        at_last = jax.lax.dynamic_slice_in_dim(self.tokens_BQN, self.num_generated - 1, 1, axis=2)
        return at_last[..., 0]


def start(like_B: jax.Array, num_beams: int, num_tokens: int, pad_id: int) -> Beams:
    """Returns beams of no tokens, with room for `num_tokens`, on the devices of `like_B`."""
    zeros_BQ = jnp.zeros_like(like_B, jnp.int32)[:, None] + jnp.zeros(num_beams, jnp.int32)
    tokens_BQN = zeros_BQ[..., None] + jnp.full(num_tokens, pad_id, jnp.int32)
    # All beams are the same yet: the others' continuations would only repeat the first one's.
    sums_BQ = zeros_BQ + jnp.where(jnp.arange(num_beams) == 0, 0.0, _OUT)
    nothing = Hypotheses(tokens_BQN, zeros_BQ, zeros_BQ + jnp.float32(_OUT), zeros_BQ > 0)
    return Beams(
        tokens_BQN,
        sums_BQ,
        nothing,
        can_improve_B=jnp.ones_like(like_B, bool),
        num_generated=jnp.zeros((), jnp.int32),
        is_going=jnp.ones((), bool),
    )


def advance(
    beams: Beams,
    log_probs_BQV: jax.Array,
    rule: Rule,
    *,
    eos_id: int,
    max_tokens: jax.Array | int,
) -> tuple[Beams, jax.Array]:
    """Adds a token to each beam.

    Args:
      beams: so far.
      log_probs_BQV: float32, of each beam's next token; the whole vocabulary on each device.
      rule: how to search.
      eos_id: what ends a hypothesis.
      max_tokens: what has so many tokens is a hypothesis, too; at least 1.

    Returns:
      The new beams, and which of its row's beams each of them continues, int32 [B, Q].
    """
    B, Q, V = log_probs_BQV.shape
    num_tokens = beams.num_generated + 1
    sums_BR = (log_probs_BQV + beams.sums_BQ[..., None]).reshape(B, Q * V)
    sums_BA, chosen_BA = jax.lax.top_k(sums_BR, 2 * Q)
    sources_BA, last_BA = chosen_BA // V, chosen_BA % V
    tokens_BAN = jax.lax.dynamic_update_slice_in_dim(
        cache_lib.of_row(beams.tokens_BQN, sources_BA), last_BA[..., None], beams.num_generated, 2
    )
    is_end_BA = (last_BA == eos_id) | (num_tokens >= max_tokens)

    running_BA = sums_BA + jnp.where(is_end_BA, _OUT, 0.0)
    order_BQ = jax.lax.top_k(running_BA, Q)[1]
    running_BQ = cache_lib.of_row(running_BA, order_BQ)
    candidates = Hypotheses(
        tokens_BAN,
        jnp.full_like(last_BA, num_tokens),
        _scores(sums_BA, num_tokens, rule),
        is_end_BA & (jnp.arange(2 * Q) < Q),
    )
    finished = _merged(beams.finished, candidates, beams.can_improve_B, rule)
    best_B = _scores(running_BQ[:, 0], jnp.where(rule.looks_ahead, max_tokens, num_tokens), rule)
    worst_B = jnp.min(finished.scores_BQ, axis=1)
    is_full_B = jnp.all(finished.is_finished_BQ, axis=1)
    can_improve_B = beams.can_improve_B & ((best_B > worst_B) | ~is_full_B)
    is_done = rule.ends_when_full & jnp.all(is_full_B)
    is_going = jnp.any(can_improve_B) & ~jnp.all(is_end_BA) & ~is_done
    new = Beams(
        tokens_BQN=cache_lib.of_row(tokens_BAN, order_BQ),
        sums_BQ=running_BQ,
        finished=finished,
        can_improve_B=can_improve_B,
        num_generated=num_tokens,
        is_going=is_going,
    )
    return new, cache_lib.of_row(sources_BA, order_BQ)


def _scores(sums: jax.Array, num_tokens: jax.Array, rule: Rule) -> jax.Array:
    return sums / num_tokens.astype(jnp.float32) ** rule.length_penalty


def _merged(
    finished: Hypotheses, candidates: Hypotheses, can_improve_B: jax.Array, rule: Rule
) -> Hypotheses:
    """Returns the best of old hypotheses and candidates, of which only those that finished count."""
    is_full_B = jnp.all(finished.is_finished_BQ, axis=1)
    is_closed_B = ~can_improve_B | (rule.ends_when_full & is_full_B)
    is_out_BA = is_closed_B[:, None] | ~candidates.is_finished_BQ
    candidates = dataclasses.replace(
        candidates,
        scores_BQ=candidates.scores_BQ + jnp.where(is_out_BA, _OUT, 0.0),
        is_finished_BQ=~is_out_BA,
    )
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), finished, candidates)
    order_BQ = jax.lax.top_k(both.scores_BQ, finished.scores_BQ.shape[1])[1]
    return jax.tree.map(lambda x: cache_lib.of_row(x, order_BQ), both)


# --- a model around it ------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """What goes from step to step.

    Attributes:
      beams: with a newest token each that is not in the cache yet.
      sources_BQ: of which of its row's beams a beam's part of the cache is.
      num_shared: int32 scalar, generated tokens that have been the same in all beams of each row.
      cache: keys and values, [B * Q, ...].
      origins_BQS: which beam of its row holds a slot; None where slots are moved to their beams.
      is_seen_BQV: ids that beams hold; None without a repetition penalty.
    """

    beams: Beams
    sources_BQ: jax.Array
    num_shared: jax.Array
    cache: stack.Cache
    origins_BQS: jax.Array | None
    is_seen_BQV: jax.Array | None


def search(
    model: decode.CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    encoded: cache_lib.Encoded | None = None,
    *,
    params: BeamParams,
    eos_id: int,
    pad_id: int,
    num_tokens: int,
    max_tokens: int,
    num_ids: int | None = None,
    repetition_penalty: float = 1.0,
) -> Hypotheses:
    """Reads prompts and searches for their best continuations, in one program.

    A prompt is read once, not by each beam, and so are an encoder's tokens, whose keys all beams of a row
    share. The cache is born in the program and changed in place.

    Args:
      model, tokens_BT, starts_B, encoded: as of `decode.prefill`.
      params: how to search; of these the number of beams alone is compiled for.
      eos_id, pad_id: what ends a hypothesis, and what follows it.
      num_tokens: room for what is generated.
      max_tokens: how much may be generated, at most `num_tokens`; another value compiles nothing.
      num_ids: ids that may be chosen, those below; None: all of the vocabulary.
      repetition_penalty: as of `samplers.SamplingParams`, but on log-probabilities.
    """
    return _search(
        model,
        tokens_BT,
        starts_B,
        encoded,
        params.rule(),
        max_tokens,
        num_beams=params.num_beams,
        eos_id=eos_id,
        pad_id=pad_id,
        num_tokens=num_tokens,
        num_ids=num_ids or model.config.vocab_size,
        repetition_penalty=repetition_penalty,
    )


@few_rows.jit(
    decode.is_of_few_rows,
    static_argnames=(
        *("num_beams", "eos_id", "pad_id", "num_tokens", "num_ids", "repetition_penalty"),
    ),
)
def _search(
    model: decode.CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    encoded: cache_lib.Encoded | None,
    rule: Rule,
    max_tokens: jax.Array,
    *,
    num_beams: int,
    eos_id: int,
    pad_id: int,
    num_tokens: int,
    num_ids: int,
    repetition_penalty: float,
) -> Hypotheses:
    Q, (B, T), V = num_beams, tokens_BT.shape, model.config.vocab_size
    size = cache_lib.block_size()
    num_slots = -(-(T + num_tokens) // size) * size
    cache = cache_lib.make_cache(model.config, model.rules, B, num_slots)
    starts_B = jax.sharding.reshard(starts_B, model.rules.act("B"))
    logits_BV, cache = decode.next_logits(model, tokens_BT, starts_B, 0, cache, encoded)
    is_seen_BQV = None
    if repetition_penalty != 1.0:
        is_seen_BV = decode.seen(tokens_BT, starts_B, V)
        is_seen_BQV = jnp.broadcast_to(is_seen_BV[:, None], (B, Q, V))
    advanced = functools.partial(
        _advanced,
        rule=rule,
        eos_id=eos_id,
        max_tokens=max_tokens,
        num_ids=num_ids,
        repetition_penalty=repetition_penalty,
    )

    def step(state: _Search) -> _Search:
        slot = T + state.beams.num_generated - 1  # of the newest tokens
        state = _at_their_beams(state, T + state.num_shared, slot)
        cache = state.cache
        if state.origins_BQS is not None:
            cache = [caches.OfBeams(own, state.origins_BQS) for own in cache]
        last_R1 = cache_lib.joined(state.beams.last_BQ[..., None])
        starts_R = cache_lib.repeated(starts_B, Q)
        logits_RV, cache = decode.next_logits(model, last_R1, starts_R, slot, cache, encoded)
        if state.origins_BQS is not None:
            cache = [of_beams.own for of_beams in cache]
        state = dataclasses.replace(state, cache=cache)
        return advanced(state, cache_lib.by_row(logits_RV, B))

    beams = start(starts_B, Q, num_tokens, pad_id)
    cache = cache_lib.repeated(cache, Q)
    nowhere_BQ = jnp.zeros_like(beams.finished.lengths_BQ)
    origins_BQS = None
    if cache_lib.reads_beams(cache):
        origins_BQS = cache_lib.own_origins(nowhere_BQ, cache[0].num_slots)
    state = _Search(beams, nowhere_BQ, beams.num_generated, cache, origins_BQS, is_seen_BQV)
    # What follows a prompt is the same for all of its beams.
    state = advanced(state, jnp.broadcast_to(logits_BV[:, None], (B, Q, V)))
    return jax.lax.while_loop(lambda state: state.beams.is_going, step, state).beams.finished


def _at_their_beams(state: _Search, first: jax.Array, slot: jax.Array) -> _Search:
    """Returns the search with each beam's text in its slots before `slot`, which it writes next.

    What lies before slot `first` is the same in all beams of a row.
    """
    if state.origins_BQS is None:
        cache = cache_lib.reordered(state.cache, state.sources_BQ, first, slot)
        return dataclasses.replace(state, cache=cache)
    origins_BQS = cache_lib.followed(state.origins_BQS, state.sources_BQ, slot)
    return dataclasses.replace(state, origins_BQS=origins_BQS)


def _advanced(
    state: _Search,
    logits_BQV: jax.Array,
    *,
    rule: Rule,
    eos_id: int,
    max_tokens: jax.Array,
    num_ids: int,
    repetition_penalty: float,
) -> _Search:
    """Adds a token to each beam."""
    ids_V = jnp.arange(logits_BQV.shape[2])
    log_probs_BQV = jax.nn.log_softmax(logits_BQV)
    is_seen_BQV = state.is_seen_BQV
    if is_seen_BQV is not None:
        log_probs_BQV = samplers.penalise_repetition(log_probs_BQV, is_seen_BQV, repetition_penalty)
    # After the softmax: probabilities are those of the whole vocabulary, as in `transformers`.
    log_probs_BQV = jnp.where(ids_V < num_ids, log_probs_BQV, _NEVER)
    beams, sources_BQ = advance(
        state.beams, log_probs_BQV, rule, eos_id=eos_id, max_tokens=max_tokens
    )
    if is_seen_BQV is not None:
        is_seen_BQV = cache_lib.of_row(is_seen_BQV, sources_BQ)
        is_seen_BQV |= beams.last_BQ[..., None] == ids_V
    return dataclasses.replace(
        state,
        beams=beams,
        sources_BQ=sources_BQ,
        num_shared=_num_shared(state.beams),
        is_seen_BQV=is_seen_BQV,
    )


def _num_shared(beams: Beams) -> jax.Array:
    """Returns how many first tokens are the same in all beams of each row that is still of interest.

    Soon after they were chosen tokens are: most beams descend from one of a few steps before.
    """
    is_same_BN = jnp.all(beams.tokens_BQN == beams.tokens_BQN[:, :1], axis=1)
    num_same_B = jnp.sum(jnp.cumprod(is_same_BN, axis=1, dtype=jnp.int32), axis=1)
    return jnp.min(jnp.where(beams.can_improve_B, num_same_B, is_same_BN.shape[1]))
