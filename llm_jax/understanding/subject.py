"""A checkpoint as something to look at, and the rows that it reads of a text."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.data import placement
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build

# Rows are as long as a power of two: few programs, and at most half of a row is padding.
_SHORTEST = 16
_TOKENS_PER_DEVICE = 4096


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
      step: of the checkpoint.
      config: of the run, on the mesh below.
      model: parameters, on `mesh`.
      tokenizer: that it was trained with.
      mesh, rules: of all devices, which share rows and weights.
    """

    step: int
    config: config_lib.RunConfig
    model: build.Model
    tokenizer: tokenizer_lib.Tokenizer
    mesh: jax.sharding.Mesh
    rules: sharding.AxisRules

    @property
    def architecture(self) -> str:
        return self.config.model.architecture

    def place(self, batch: batch_lib.Batch) -> batch_lib.Batch:
        """Returns a batch of numpy arrays on the mesh; its rows must be a multiple of the devices."""
        target = jax.sharding.NamedSharding(self.mesh, self.rules.act("BT"))
        rows = np.arange(len(batch.tokens))
        return placement.to_mesh(batch, target, len(rows), rows)


def load(workdir: str, step: int | str | None = None) -> Subject:
    """Loads a checkpoint; it lies on all devices, cut as `evaluate` cuts it.

    Args:
      workdir: of the run, or of a converted model.
      step: which checkpoint, as `checkpoint.parse_step` gives it; None: the latest that is whole.

    Raises:
      errors.UserError: no such checkpoint, or none that is whole.
    """

    def read(step_dir, meta: checkpoint.Meta) -> Subject:
        config = dataclasses.replace(meta.config, mesh=config_lib.MeshConfig(rules="fsdp"))
        mesh = mesh_lib.make(config.mesh)
        data = dataclasses.replace(config.data, batch_size=mesh.size)
        config = dataclasses.replace(
            config, data=data, optim=dataclasses.replace(config.optim, accumulation_steps=1)
        )
        sharding.check(config, mesh)
        rules = sharding.axis_rules(config.mesh)
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(config.model, rules)
            model = checkpoint.restore_params(step_dir, meta, abstract, mesh)
        tokenizer = tokenizer_lib.from_dict(meta.tokenizer)
        return Subject(meta.step, config, model, tokenizer, mesh, rules)

    return checkpoint.read_latest(workdir, step, read)


def encode(subject: Subject, text: str, *, is_source: bool = False) -> np.ndarray:
    """Returns what a model reads of a text, int32 [T], with the special tokens around it.

    [cls] text [sep] for an encoder; bos, if the tokenizer has one, before all others, and eos behind what
    the encoder of an encoder-decoder reads (`is_source`).

    Raises:
      errors.UserError: the text has no token, or more than the model has positions.
    """
    tokenizer = subject.tokenizer
    is_encoder = subject.architecture == "encoder"
    ids = tokenizer.encode(text)
    if not len(ids):
        raise errors.UserError(f"text {text!r} has no tokens: give it some")
    first = tokenizer.cls_id if is_encoder else tokenizer.bos_id
    last = [tokenizer.sep_id] if is_encoder else [tokenizer.eos_id] * is_source
    row = np.asarray([*([] if first is None else [first]), *ids, *last], np.int32)
    longest = subject.config.model.max_length
    if len(row) > longest:
        raise errors.UserError(
            f"text {text[:40]!r} has {len(row)} tokens, the model {longest} positions: shorten it"
        )
    return row


def names(tokenizer: tokenizer_lib.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns how ids are shown: special tokens by name, others as their text."""
    special = {number: name for name, number in tokenizer.special_tokens.items()}
    special.setdefault(tokenizer.eos_id, "<eos>")
    return [
        special[token]
        if token in special
        else tokenizer.decode([token])
        if token < tokenizer.vocab_size
        else f"<{token}>"
        for token in map(int, ids)
    ]


def token_losses(
    subject: Subject, rows: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns the loss of each target, in nats, float32 [T] of each row.

    Args:
      subject: a decoder or an encoder.
      rows: int32 [T], ids that the model reads, of any lengths.
      targets: int32 [T], what is to be predicted at each.
    """
    run = jax.jit(functools.partial(_losses, subject.config))
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    # Long ones first: what does not fit into memory shows at once.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    start = 0
    while start < len(order):
        length = _rounded(len(rows[order[start]]), subject.config.model.max_length)
        size = max(1, _TOKENS_PER_DEVICE // length) * subject.mesh.size
        chosen = order[start : start + size]
        batch = batch_lib.empty(size, length, subject.tokenizer.pad_id)
        for place, index in enumerate(chosen):
            fill(batch, place, rows[index], targets[index])
        batch = with_types(subject, batch)
        with jax.set_mesh(subject.mesh):
            losses_BT = np.asarray(run(subject.model, subject.place(batch)))
        for place, index in enumerate(chosen):
            found[index] = losses_BT[place, : len(rows[index])]
        start += size
    return found


def fill(batch: batch_lib.Batch, place: int, row_T: np.ndarray, targets_T: np.ndarray) -> None:
    """Writes a text into a row of a batch of padding."""
    size = len(row_T)
    batch.tokens[place, :size], batch.targets[place, :size] = row_T, targets_T
    batch.weights[place, :size] = batch.segments[place, :size] = 1
    batch.positions[place, :size] = np.arange(size)


def with_types(subject: Subject, batch: batch_lib.Batch) -> batch_lib.Batch:
    """Returns the batch with types of tokens, if the model reads some: all are of the first text."""
    if not subject.config.model.num_token_types:
        return batch
    return batch._replace(token_types=np.zeros_like(batch.tokens))


def _losses(config: config_lib.RunConfig, model: Any, batch: batch_lib.Batch) -> jax.Array:
    tokens, _ = train_step.token_losses(config, model, batch)
    return tokens.cross_entropy_BT


def _rounded(length: int, longest: int) -> int:
    rounded = _SHORTEST
    while rounded < length:
        rounded *= 2
    return max(length, min(rounded, longest))
