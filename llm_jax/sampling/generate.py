"""Prompts to completions: tokenise, batch, decode in chunks or search, stop, hand out text as it comes."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import distributed
from llm_jax import errors
from llm_jax import sharding
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.sampling import beams as beams_lib
from llm_jax.sampling import cache as cache_lib
from llm_jax.sampling import decode
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from llm_jax.sampling import stops as stops_lib

_SMALLEST_BUCKET = 16
_CHUNK = 32  # tokens between looks at stop strings
_STREAM_CHUNK = 4  # tokens between looks at the terminal
_NO_SEARCH = beams_lib.BeamParams()

OnText = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or what an encoder reads, and the seed of its own draws.

    Attributes:
      text: as it is tokenised.
      seed: of what is drawn for it.
      ids: what the model reads instead, special tokens included; the text names it alone. What it writes is
        then decoded by itself, without special tokens.
      ends: tokens that end what is written, as eos does.
    """

    text: str
    seed: int = 0
    ids: tuple[int, ...] | None = None
    ends: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    `finish_reason` is `eos` (the model ended the text), `stop` (a stop string came up; it is cut
    off) or `length` (the number of tokens asked for). `score` is of a beam search, whose best text
    is sample 0.
    """

    prompt: str
    seed: int
    sample: int
    completion: str
    finish_reason: str
    num_tokens: int
    score: float | None = None


class _Row:
    """One completion in the making."""

    def __init__(
        self,
        prompt: Prompt,
        sample: int,
        tokenizer: tokenizer_lib.Tokenizer,
        stops: Sequence[str],
        on_text: OnText | None,
        is_source: bool = False,
    ):
        has_ids = prompt.ids is not None
        ids = np.asarray(prompt.ids, np.int32) if has_ids else tokenizer.encode(prompt.text)
        end = np.asarray([tokenizer.eos_id], np.int32)
        if has_ids:
            self.ids, ids = ids, ids[:0]
        elif is_source:
            # A source ends as a document does, and its text is no part of what is written.
            self.ids, ids = np.concatenate([ids, end]), ids[:0]
            if tokenizer.bos_id is not None:
                self.ids = np.insert(self.ids, 0, tokenizer.bos_id)
        elif tokenizer.bos_id is not None:
            self.ids = np.insert(ids, 0, tokenizer.bos_id)
        else:
            # Documents of the training data follow an end of text; so does an empty prompt.
            self.ids = ids if len(ids) else end
        self.prompt, self.sample = prompt, sample
        self.score: float | None = None
        self._eos_id = tokenizer.eos_id
        self._is_silent_V = tokenizer.is_special_V if has_ids else None
        self._decoder = tokenizer_lib.StreamDecoder(tokenizer)
        # The text of a token may depend on those before it. What the decoder still holds back of
        # the prompt's own text comes first later, and is no part of the completion.
        passed = sum(len(self._decoder.feed(int(token))) for token in ids)
        self._num_prompt_chars = len(tokenizer.decode(ids)) - passed
        self._scanner = stops_lib.StopScanner(stops)
        self._on_text = on_text
        self._pieces: list[str] = []
        self._num_tokens = 0
        self.finish_reason: str | None = None

    def key(self) -> jax.Array:
        """Returns the key of this row's draws: of its seed, text and sample, not of its batch.

        The text goes in so that prompts of one seed do not all draw alike.
        """
        of_prompt = zlib.crc32(self.prompt.text.encode())
        key = jax.random.fold_in(jax.random.key(self.prompt.seed), of_prompt)
        return jax.random.fold_in(key, self.sample)

    def feed(self, token: int) -> None:
        """Takes the next token, unless the row has ended."""
        if self.finish_reason is not None:
            return
        self._num_tokens += 1
        if token == self._eos_id or token in self.prompt.ends:
            self.finish("eos")
            return
        if self._is_silent_V is not None and self._is_silent_V[token]:
            return
        self._emit(self._scanner.feed(self._without_prompt(self._decoder.feed(token))))
        if self._scanner.is_stopped:
            self.finish("stop")

    def finish(self, reason: str) -> None:
        """Ends the row, if nothing has ended it before."""
        if self.finish_reason is None:
            self.finish_reason = reason
            rest = self._without_prompt(self._decoder.flush())
            self._emit(self._scanner.feed(rest) + self._scanner.flush())

    def _without_prompt(self, text: str) -> str:
        kept = text[self._num_prompt_chars :]
        self._num_prompt_chars -= len(text) - len(kept)
        return kept

    def _emit(self, text: str) -> None:
        self._pieces.append(text)
        if self._on_text is not None and text:
            self._on_text(text)

    def completion(self) -> Completion:
        return Completion(
            prompt=self.prompt.text,
            seed=self.prompt.seed,
            sample=self.sample,
            completion="".join(self._pieces),
            finish_reason=self.finish_reason,
            num_tokens=self._num_tokens,
            score=self.score,
        )


def generate(
    loaded: load.Loaded,
    prompts: Sequence[Prompt],
    params: samplers.SamplingParams,
    *,
    max_tokens: int,
    num_samples: int = 1,
    stops: Sequence[str] = (),
    batch_size: int = 16,
    on_text: OnText | None = None,
    beams: beams_lib.BeamParams = _NO_SEARCH,
) -> Iterator[Completion]:
    """Returns an iterator over `num_samples` completions of each prompt, in their order.

    Arguments are checked at once, text is generated as the iterator is read.

    Args:
      loaded: from `load.load`.
      prompts: texts, of any lengths.
      params: how tokens are chosen.
      max_tokens: of each completion.
      num_samples: completions a prompt; sample i draws with the seed's i-th stream, or is the i-th best
        of the beams.
      stops: a completion ends before the first of these that comes up.
      batch_size: rows generated side by side; each beam is one.
      on_text: called with text as it comes; for a single prompt and sample.
      beams: searches for the most probable completions, if there are several.

    Raises:
      errors.UserError: a prompt that leaves no room for `max_tokens`, or arguments that make no
        sense.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("num_samples", num_samples),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise errors.UserError(f"--{name}={value} must be at least 1")
    for prompt in prompts:
        if not 0 <= prompt.seed < 1 << 32:
            raise errors.UserError(f"seed {prompt.seed} must be in [0, 2^32)")
    if on_text is not None and len(prompts) * num_samples != 1:
        raise errors.UserError("streaming takes one prompt and one sample")
    _check_beams(beams, params, num_samples, stops, on_text, loaded.tokenizer.vocab_size)
    rows = [
        _Row(prompt, sample, loaded.tokenizer, stops, on_text, loaded.reads_sources)
        for prompt in prompts
        for sample in range(num_samples)
    ]
    for row in rows:
        _check_length(row, loaded, max_tokens)
    if beams.num_beams > 1:
        size = max(1, batch_size // beams.num_beams) * num_samples
        search = functools.partial(_search, params=params, beams=beams, num_samples=num_samples)
        return _completions(loaded, rows, max_tokens, size, search)
    chunk = _CHUNK if on_text is None else _STREAM_CHUNK
    return _completions(
        loaded, rows, max_tokens, batch_size, functools.partial(_run, params=params, chunk=chunk)
    )


def _check_beams(
    beams: beams_lib.BeamParams,
    params: samplers.SamplingParams,
    num_samples: int,
    stops: Sequence[str],
    on_text: OnText | None,
    num_ids: int,
) -> None:
    """Raises UserError for what contradicts a search, or its absence."""
    if beams.num_beams == 1:
        for name in ("length_penalty", "early_stopping"):
            value = getattr(beams, name)
            if value != getattr(_NO_SEARCH, name):
                raise errors.UserError(f"--{name}={value} is for a search: give --num_beams=4, say")
        return
    search = f"--num_beams={beams.num_beams} searches"
    drawing = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    neutral = dataclasses.asdict(samplers.SamplingParams())
    for name, value in drawing.items():
        if value != neutral[name] and (name, value) != ("temperature", 0.0):
            raise errors.UserError(f"{search} and draws nothing: leave out --{name}={value}, or it")
    if stops:
        raise errors.UserError(f"{search} for texts that the model ends: leave out --stop, or it")
    if on_text is not None:
        raise errors.UserError(f"{search}: the best text is known at the end, and not streamed")
    if num_samples > beams.num_beams:
        raise errors.UserError(
            f"--num_samples={num_samples}: {search} for {beams.num_beams} texts of a prompt; ask for"
            " that many at most"
        )
    if 2 * beams.num_beams > num_ids:
        raise errors.UserError(
            f"{search} among twice as many tokens, and the tokenizer has {num_ids}; use"
            f" --num_beams={num_ids // 2} at most"
        )


def _check_length(row: _Row, loaded: load.Loaded, max_tokens: int) -> None:
    """Raises UserError for a row that the model has no positions, or no embeddings, for."""
    vocab_size = loaded.model.config.vocab_size
    if max(row.ids, default=0) >= vocab_size:
        raise errors.UserError(
            f"prompt {row.prompt.text[:40]!r} has token {max(row.ids)}, of which the model's vocabulary of"
            f" {vocab_size} knows nothing: the tokenizer is not the model's"
        )
    max_length = loaded.model.config.max_length
    what = f"prompt {row.prompt.text[:40]!r} has {len(row.ids)} tokens"
    if loaded.is_encoder_decoder:
        if len(row.ids) > max_length:
            raise errors.UserError(
                f"{what}, the end among them: more than the model's max_length = {max_length};"
                " shorten it"
            )
        if 1 + max_tokens > max_length:
            raise errors.UserError(
                f"--max_tokens={max_tokens} and the decoder's start are more than the model's"
                f" max_length = {max_length}; use --max_tokens={max_length - 1} at most"
            )
    elif len(row.ids) + max_tokens > max_length:
        raise errors.UserError(
            f"{what}: with --max_tokens={max_tokens} that is more than the model's max_length ="
            f" {max_length}; shorten one of them"
        )


def _completions(
    loaded: load.Loaded,
    rows: list[_Row],
    max_tokens: int,
    batch_size: int,
    run: Callable[[load.Loaded, list[_Row], int], None],
) -> Iterator[Completion]:
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        with jax.set_mesh(loaded.mesh):  # not across the yield: the caller's mesh is its own
            run(loaded, batch, max_tokens)
        yield from (row.completion() for row in batch)


def _bucket(length: int) -> int:
    """Rounds a length up to a power of two, so that few programs are compiled."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size


def _ids(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, int]:
    return {
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "num_ids": tokenizer.vocab_size,
    }


def _run(
    loaded: load.Loaded,
    rows: list[_Row],
    max_tokens: int,
    *,
    params: samplers.SamplingParams,
    chunk: int,
) -> None:
    """Generates for a batch of rows until each has ended."""
    model, ids = loaded.model, _ids(loaded.tokenizer)
    tokens_BT, starts_B, encoded = _inputs(loaded, rows)
    keys_B = _keys(loaded, rows, len(starts_B))
    num_slots = tokens_BT.shape[1] + _bucket(max_tokens)
    state = decode.prefill(
        model, tokens_BT, starts_B, keys_B, encoded, params=params, num_slots=num_slots, **ids
    )
    for row, token in zip(rows, distributed.fetch(state.last_B)):
        row.feed(int(token))
    remaining = max_tokens - 1
    while remaining > 0 and any(row.finish_reason is None for row in rows):
        state, tokens_NB = decode.decode(model, state, params=params, num_tokens=chunk, **ids)
        for tokens_B in distributed.fetch(tokens_NB)[:remaining]:
            for row, token in zip(rows, tokens_B):
                row.feed(int(token))
        remaining -= chunk
    for row in rows:
        row.finish("length")


def _search(
    loaded: load.Loaded,
    rows: list[_Row],
    max_tokens: int,
    *,
    params: samplers.SamplingParams,
    beams: beams_lib.BeamParams,
    num_samples: int,
) -> None:
    """Searches for the best texts of a batch, of which each prompt has `num_samples` rows."""
    tokens_BT, starts_B, encoded = _inputs(loaded, rows[::num_samples])
    found = beams_lib.search(
        loaded.model,
        tokens_BT,
        starts_B,
        encoded,
        params=beams,
        num_tokens=_bucket(max_tokens),
        max_tokens=max_tokens,
        repetition_penalty=params.repetition_penalty,
        **_ids(loaded.tokenizer),
    )
    tokens_BQN, lengths_BQ, scores_BQ = map(
        distributed.fetch, (found.tokens_BQN, found.lengths_BQ, found.scores_BQ)
    )
    for index, row in enumerate(rows):
        of_row = divmod(index, num_samples)
        row.score = float(scores_BQ[of_row])
        for token in tokens_BQN[of_row][: lengths_BQ[of_row]]:
            row.feed(int(token))
        row.finish("length")


def _inputs(
    loaded: load.Loaded, rows: list[_Row]
) -> tuple[jax.Array, jax.Array, cache_lib.Encoded | None]:
    """Returns what a decoder reads first, [B, T], where it begins, [B], and what its encoder has read.

    A decoder's prompts are padded on the left, an encoder's on the right. Rows that fill the mesh up
    repeat the last.
    """
    ways = sharding.axis_size(loaded.mesh, loaded.model.rules.act("B")[0])
    batch_size = -(-len(rows) // ways) * ways
    ids = [row.ids for row in rows] + [rows[-1].ids] * (batch_size - len(rows))
    lengths_B = np.asarray([len(own) for own in ids], np.int32)
    length = _bucket(lengths_B.max())
    tokens_BS = np.full((batch_size, length), loaded.tokenizer.pad_id, np.int32)
    for index, own in enumerate(ids):
        start = 0 if loaded.is_encoder_decoder else length - len(own)
        tokens_BS[index, start : start + len(own)] = own
    tokens_BS = _place(loaded, tokens_BS, "BS")
    if not loaded.is_encoder_decoder:
        return tokens_BS, _place(loaded, length - lengths_B, "B"), None
    encoded = decode.encode(loaded.model, tokens_BS, _place(loaded, lengths_B, "B"))
    first_B1 = np.full((batch_size, 1), loaded.model.config.decoder_start_id, np.int32)
    return _place(loaded, first_B1, "BS"), _place(loaded, np.zeros_like(lengths_B), "B"), encoded


def _keys(loaded: load.Loaded, rows: list[_Row], batch_size: int) -> jax.Array:
    """Returns a key for each row of a batch, [B]."""
    keys = [row.key() for row in rows]
    keys += keys[-1:] * (batch_size - len(rows))
    # Through the host, as every process can put a numpy array on a mesh of all.
    key_data_B2 = _place(loaded, np.asarray(jax.random.key_data(jnp.stack(keys))), "B")
    return jax.random.wrap_key_data(key_data_B2)


def _place(loaded: load.Loaded, array: np.ndarray, dims: str) -> jax.Array:
    spec = loaded.model.rules.act(dims)
    return jax.device_put(array, jax.sharding.NamedSharding(loaded.mesh, spec))
