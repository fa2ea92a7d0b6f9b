"""How probable given tokens are to a checkpoint: rows of few shapes, each read once.

Rows end at the same slot, so that what is scored of them lies side by side at the end, and only there are
logits made. Requests that differ in their last token alone, as the letters of a multiple choice, share a row.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import sharding
from llm_jax.kernels import few_rows
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from llm_jax.sampling import load

_SHORTEST = 16  # rows are as long as a power of two
_LOGITS_AT_ONCE = 1 << 26  # float32: 256 MiB


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens to score.

    Attributes:
      tokens: what a decoder reads, and behind it the last token that is scored; two at least.
      num_scored: how many of the last tokens are scored; fewer than there are.
      source: what an encoder reads; empty without one.
    """

    tokens: tuple[int, ...]
    num_scored: int
    source: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The log-probability (nats) of a request's scored tokens, and whether each was the most probable."""

    index: int
    log_probability: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    source: tuple[int, ...]
    tokens: tuple[int, ...]
    indices: list[int]  # of the requests that read it


def score(loaded: load.Loaded, requests: Sequence[Request], batch_size: int) -> Iterator[Answer]:
    """Yields an answer to each request, the longest first.

    Args:
      loaded: from `load.load`.
      requests: of any lengths up to the model's.
      batch_size: rows that are read side by side.
    """
    sharing: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        sharing.setdefault((request.source, request.tokens[:-1]), []).append(index)
    rows = [_Row(source, tokens, indices) for (source, tokens), indices in sharing.items()]
    # Long ones first: what does not fit into memory shows at once.
    rows.sort(key=lambda row: (-len(row.source), -len(row.tokens)))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        with jax.set_mesh(loaded.mesh):  # not across the yield: the caller's mesh is its own
            answers = _answers(loaded, requests, batch, batch_size)
        yield from answers


def _answers(
    loaded: load.Loaded, requests: Sequence[Request], rows: list[_Row], batch_size: int
) -> list[Answer]:
    length = _rounded(max(len(row.tokens) for row in rows), _SHORTEST, 2)
    num_scored = max(requests[index].num_scored for row in rows for index in row.indices)
    num_scored = min(length, _rounded(num_scored, _SHORTEST, 4))
    num_candidates = _rounded(max(len(row.indices) for row in rows), 1, 4)
    num_rows = _num_rows(loaded, len(rows), batch_size)

    tokens_BT = np.full((num_rows, length), loaded.tokenizer.pad_id, np.int32)
    starts_B = np.zeros(num_rows, np.int32)
    candidates_BA = np.zeros((num_rows, num_candidates), np.int32)
    for number in range(num_rows):
        row = rows[min(number, len(rows) - 1)]  # rows that fill up repeat the last
        starts_B[number] = length - len(row.tokens)
        tokens_BT[number, starts_B[number] :] = row.tokens
        candidates_BA[number, : len(row.indices)] = [requests[i].tokens[-1] for i in row.indices]

    encoded = _encoded(loaded, rows, num_rows) if loaded.is_encoder_decoder else None
    next_BT = np.roll(tokens_BT, -1, axis=1)[:, length - num_scored :]
    by_row = [_place(loaded, array, "B") for array in (starts_B, next_BT, candidates_BA)]
    found = _scores(loaded.model, _place(loaded, tokens_BT, "BT"), *by_row, encoded)
    log_probs_BT, is_best_BT, log_probs_BA, is_best_BA = jax.device_get(found)
    answers = []
    for number, row in enumerate(rows):
        for place, index in enumerate(row.indices):
            before = slice(num_scored - requests[index].num_scored, num_scored - 1)
            total = log_probs_BT[number, before].sum(dtype=np.float64) + log_probs_BA[number, place]
            is_greedy = is_best_BT[number, before].all() and is_best_BA[number, place]
            answers.append(Answer(index, float(total), bool(is_greedy)))
    return answers


def _num_rows(loaded: load.Loaded, num_rows: int, batch_size: int) -> int:
    """Returns how many rows a batch is filled up to: few sizes, which the mesh divides."""
    ways = sharding.axis_size(loaded.mesh, loaded.model.rules.act("B")[0])
    return -(-min(_rounded(num_rows, 1, 2), batch_size) // ways) * ways


def _encoded(loaded: load.Loaded, rows: list[_Row], num_rows: int) -> cache_lib.Encoded:
    """Runs the encoder on the rows' sources, padded on the right."""
    length = _rounded(max(len(row.source) for row in rows), _SHORTEST, 2)
    tokens_BS = np.full((num_rows, length), loaded.tokenizer.pad_id, np.int32)
    lengths_B = np.zeros(num_rows, np.int32)
    for number in range(num_rows):
        source = rows[min(number, len(rows) - 1)].source
        tokens_BS[number, : len(source)], lengths_B[number] = source, len(source)
    return decode.encode(
        loaded.model, _place(loaded, tokens_BS, "BS"), _place(loaded, lengths_B, "B")
    )


@few_rows.jit(decode.is_of_few_rows)
def _scores(
    model: decode.CachedModel,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    next_BT: jax.Array,
    candidates_BA: jax.Array,
    encoded: cache_lib.Encoded | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns what the model says of the tokens that follow the last ones of each row.

    Args:
      model: from `decode.prepare_model`.
      tokens_BT: int32, padded on the left.
      starts_B: int32, where each row's text begins.
      next_BT: int32, what follows each of a row's last tokens; of the very last nothing is read.
      candidates_BA: int32, tokens of which each may follow the row; they do not follow each other.
      encoded: of an encoder; None without.

    Returns:
      Log-probabilities of `next_BT`, float32, and whether each is the most probable token, both
      [B, T]; and the same of `candidates_BA`, [B, A].
    """
    (batch_size, length), num_scored = tokens_BT.shape, next_BT.shape[1]
    cache = cache_lib.make_cache(model.config, model.rules, batch_size, length)
    x_BTD, _ = decode.states(model, tokens_BT, starts_B, 0, cache, encoded)
    # What follows goes over the tokens piece by piece: they must not be cut over devices.
    x_BTD = jax.sharding.reshard(x_BTD[:, length - num_scored :], model.rules.act("B"))

    # Few logits at a time; what is scored is a power of two, and so is the size.
    at_once = max(1, _LOGITS_AT_ONCE // (batch_size * model.config.vocab_size))
    size = min(num_scored, 1 << (at_once.bit_length() - 1))

    def scored(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = [jax.lax.dynamic_slice_in_dim(x, index * size, size, 1) for x in (x_BTD, next_BT)]
        return _of_tokens(decode.whole_logits(model, own[0]), own[1])

    pieces = jax.lax.map(scored, jnp.arange(num_scored // size))
    log_probs_BT, is_best_BT = (
        jnp.swapaxes(piece, 0, 1).reshape(batch_size, num_scored) for piece in pieces
    )
    logits_BV = decode.whole_logits(model, x_BTD[:, -1:])[:, 0]
    log_probs_BA = _at(jax.nn.log_softmax(logits_BV), candidates_BA)
    is_best_BA = jnp.argmax(logits_BV, axis=-1)[:, None] == candidates_BA
    return log_probs_BT, is_best_BT, log_probs_BA, is_best_BA


def _of_tokens(logits_BTV: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens' log-probabilities, and whether none is more probable; both [B, T]."""
    chosen_BT = jax.vmap(_at)(logits_BTV, tokens_BT[..., None])[..., 0]
    log_probs_BT = chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_probs_BT, jnp.argmax(logits_BTV, axis=-1) == tokens_BT


def _at(values_BV: jax.Array, index_BA: jax.Array) -> jax.Array:
    """Returns [B, A] of each row of [B, V]."""
    return jax.vmap(lambda values_V, index_A: values_V[index_A])(values_BV, index_BA)


def _place(loaded: load.Loaded, array: np.ndarray, dims: str) -> jax.Array:
    spec = loaded.model.rules.act(dims)
    return jax.device_put(array, jax.sharding.NamedSharding(loaded.mesh, spec))


def _rounded(count: int, least: int, factor: int) -> int:
    """Returns `least` times a power of `factor` that is at least `count`."""
    rounded = least
    while rounded < count:
        rounded *= factor
    return rounded
