"""The loss of each token of a text, and what the model expected instead: a page and JSON.

The text is cut into rows and its targets are drawn as the run's evaluation does it, so the mean is what
`evaluate` gives for this text. Of an encoder that learns masked tokens those have a loss that evaluation
masks; of an encoder-decoder the tokens are those that its decoder writes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import math
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.data import objectives
from llm_jax.data import token_cache
from llm_jax.understanding import pages
from llm_jax.understanding import subject as subject_lib

NUM_ALTERNATIVES = 8
MOST_TOKENS = 20_000  # of a page


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
      text, id: of it.
      loss: in nats; None: it is not predicted.
      rank: how many tokens the model held for likelier; None likewise.
      alternatives: texts and probabilities of the likeliest, the first first.
    """

    text: str
    id: int
    loss: float | None = None
    rank: int | None = None
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """A text, token by token; `loss` is the mean of those that are predicted, in nats."""

    loss: float
    tokens: tuple[Token, ...]

    @property
    def num_scored(self) -> int:
        return sum(token.loss is not None for token in self.tokens)


def score(subject: subject_lib.Subject, text: str) -> Scored:
    """Returns the losses of a text, which is one document.

    Raises:
      errors.UserError: a model that is trained on examples, a text without tokens that are predicted, or
        one that a page does not hold.
    """
    config = subject.config
    if config.objective.name not in config_lib.TEXT_OBJECTIVES or config.model.head != "lm":
        raise errors.UserError(
            f"tokens are scored of runs on text (objective.name {', '.join(config_lib.TEXT_OBJECTIVES)},"
            f" model.head 'lm'); this one has {config.objective.name!r} and {config.model.head!r}"
        )
    ids = subject.tokenizer.encode(text)
    if len(ids) > MOST_TOKENS:
        raise errors.UserError(
            f"the text has {len(ids):,} tokens and a page takes {MOST_TOKENS:,}: shorten it"
        )
    if not len(ids):
        raise errors.UserError("the text has no tokens: give it some")
    run, found = jax.jit(functools.partial(_scores, config)), []
    with tempfile.TemporaryDirectory() as folder:
        stage = objectives.make(config, _cache(subject, ids, text, folder), subject.tokenizer)
        for batch in _batches(subject, stage):
            # Of what is predicted one further the first token is an input alone.
            if not found and config.objective.name in ("causal", "prefix"):
                found.append(_plain(subject, batch.tokens[0, 0]))
            with jax.set_mesh(subject.mesh):
                arrays = jax.device_get(run(subject.model, subject.place(batch)))
            found += _tokens(subject, batch, *arrays)
    losses = [token.loss for token in found if token.loss is not None]
    if not losses:
        raise errors.UserError(f"text {text[:40]!r}: none of its tokens is predicted; lengthen it")
    return Scored(math.fsum(losses) / len(losses), tuple(found))


def _cache(
    subject: subject_lib.Subject, ids: np.ndarray, text: str, folder: str
) -> token_cache.TokenCache:
    tokenizer = subject.tokenizer
    return token_cache.write(
        pathlib.Path(folder) / "tokens",
        [(ids, len(text.encode()))],
        source="a text",
        split="text",
        tokenizer=subject.config.data.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def _batches(subject: subject_lib.Subject, stage: objectives.Stage) -> Iterator[batch_lib.Batch]:
    size = subject.mesh.size
    for start in range(0, stage.num_items, size):
        items = np.arange(start, start + size)
        yield stage(np.where(items < stage.num_items, items, -1), items, objectives.EVALUATION)


def _tokens(
    subject: subject_lib.Subject,
    batch: batch_lib.Batch,
    losses_BT: np.ndarray,
    ranks_BT: np.ndarray,
    ids_BTA: np.ndarray,
    probabilities_BTA: np.ndarray,
) -> Iterator[Token]:
    """Yields the tokens that a batch is about, in their order."""
    for at in zip(*np.nonzero(batch.segments), strict=True):
        token = _plain(subject, batch.targets[at])
        if batch.weights[at]:
            named = subject_lib.names(subject.tokenizer, ids_BTA[at])
            alternatives = tuple(zip(named, probabilities_BTA[at].tolist(), strict=True))
            token = dataclasses.replace(
                token,
                loss=float(losses_BT[at]),
                rank=int(ranks_BT[at]),
                alternatives=alternatives,
            )
        yield token


def _plain(subject: subject_lib.Subject, token: int) -> Token:
    (name,) = subject_lib.names(subject.tokenizer, [token])
    return Token(name, int(token))


def _scores(
    config: config_lib.RunConfig, model: Any, batch: batch_lib.Batch
) -> tuple[jax.Array, ...]:
    """Returns losses and ranks of targets, [B, T], and the likeliest ids and their probabilities."""
    x_BTD, _ = train_step.states(config, model, batch)
    logits_BTV = model.vocabulary_logits(x_BTD)
    log_z_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    is_target_BTV = batch.targets[..., None] == jnp.arange(logits_BTV.shape[-1])
    own_BT1 = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1, keepdims=True)
    ranks_BT = jnp.sum(logits_BTV > own_BT1, axis=-1)
    best_BTA, ids_BTA = jax.lax.top_k(logits_BTV, min(NUM_ALTERNATIVES, logits_BTV.shape[-1]))
    return (log_z_BT1 - own_BT1)[..., 0], ranks_BT, ids_BTA, jnp.exp(best_BTA - log_z_BT1)


def write(found: Scored, folder: epath.Path, title: str) -> list[epath.Path]:
    """Writes a text's tokens as a page and as JSON; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "title": title,
        "loss": found.loss,
        "perplexity": math.exp(min(found.loss, 700.0)),
        "num_scored": found.num_scored,
        "tokens": [dataclasses.asdict(token) for token in found.tokens],
    }
    page, values = folder / "tokens.html", folder / "tokens.json"
    page.write_text(pages.render("tokens.html", data))
    values.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    return [page, values]
