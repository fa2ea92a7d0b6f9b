"""Texts to vectors of unit length, by a checkpoint of an encoder or a decoder.

A text is read as in training ([cls] text [sep], or with bos and eos), its states are pooled as
`model.pooling` says, and the result is divided by its length: a dot product of two is their cosine (Reimers and
Gurevych 2019, section 3).
"""

from collections.abc import Sequence
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build
from llm_jax.models import lora

_LOG = logging.getLogger(__name__)

# Rows are as long as a power of two: few programs, and at most half of a row is padding.
_SHORTEST = 16
_TOKENS_PER_BATCH = 8192  # of all devices


@dataclasses.dataclass(frozen=True)
class Embedder:
    """What makes vectors.

    Attributes:
      model: an encoder or a decoder, on `mesh`.
      tokenizer: that it was trained with.
      mesh: whose devices share the rows of a batch.
      max_length: of a text, in tokens; what is longer loses its end.
      name: of the checkpoint, for indexes: which vectors belong together.
      step: of the checkpoint.
    """

    model: build.Model
    tokenizer: tokenizer_lib.Tokenizer
    mesh: jax.sharding.Mesh
    max_length: int
    name: str
    step: int

    @property
    def num_dims(self) -> int:
        """Elements of a vector."""
        return self.model.config.embed_dim

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 [N, D], a vector of unit length for each text, in their order."""
        rows = self._rows(texts)
        vectors = np.zeros((len(rows), self.num_dims), np.float32)
        # Long ones first: what does not fit into memory shows at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        start = 0
        while start < len(order):
            length = _rounded(len(rows[order[start]]), self.max_length)
            size = max(1, _TOKENS_PER_BATCH // length // self.mesh.size) * self.mesh.size
            chosen = order[start : start + size]
            vectors[chosen] = self._embed([rows[index] for index in chosen], length, size)
            start += size
        return vectors

    def _rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        is_encoder = self.model.config.architecture == "encoder"
        first = self.tokenizer.cls_id if is_encoder else self.tokenizer.bos_id
        last = self.tokenizer.sep_id if is_encoder else self.tokenizer.eos_id
        before = [] if first is None else [first]
        room = self.max_length - len(before) - 1
        encoded = self.tokenizer.encode_batch(list(texts))
        num_cut = sum(len(ids) > room for ids in encoded)
        if num_cut:
            _LOG.warning("%d of %d texts lose their ends: %d tokens fit", num_cut, len(texts), room)
        return [np.asarray([*before, *ids[:room], last], np.int32) for ids in encoded]

    def _embed(self, rows: list[np.ndarray], length: int, size: int) -> np.ndarray:
        tokens, segments = (np.zeros((size, length), np.int32) for _ in range(2))
        for index, row in enumerate(rows):
            tokens[index, : len(row)], segments[index, : len(row)] = row, 1
        spec = jax.sharding.NamedSharding(self.mesh, self.model.rules.act("BT"))
        with jax.set_mesh(self.mesh):
            placed = jax.device_put((tokens, segments), spec)
            return np.asarray(_embedded(self.model, *placed))[: len(rows)]


@jax.jit
def _embedded(model: build.Model, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns vectors, float32 [B, D]."""
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    places_BT = jax.sharding.reshard(places_BT, jax.typeof(tokens_BT).sharding.spec)
    inputs = {}
    if model.config.num_token_types:
        inputs["token_types_BT"] = jnp.zeros_like(tokens_BT)
    x_BTD, _ = model.hidden(tokens_BT, places_BT, segments_BT, **inputs)
    return model.embeddings(x_BTD, segments_BT, 1)


def _rounded(length: int, longest: int) -> int:
    rounded = _SHORTEST
    while rounded < length:
        rounded *= 2
    return min(rounded, longest)


def load(
    workdir: str,
    step: int | str | None = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
) -> Embedder:
    """Loads a checkpoint for embedding.

    Args:
      workdir: of the run, or of a converted model.
      step: which checkpoint, as `checkpoint.parse_step` gives it; None: the latest that is whole.
      pooling: instead of the checkpoint's `model.pooling`; converted models do not always know theirs.
      max_length: of a text, in tokens; None: as long as the model has positions.

    Raises:
      errors.UserError: no such checkpoint, or a model of another kind, or a length that it has not.
    """
    if pooling is not None and pooling not in config_lib.POOLINGS:
        hint = errors.nearest(pooling, config_lib.POOLINGS)
        choices = ", ".join(config_lib.POOLINGS)
        raise errors.UserError(f"--pooling={pooling}{hint}: choose from {choices}")
    mesh = mesh_lib.make(config_lib.MeshConfig(rules="dp"))
    rules = sharding.axis_rules(config_lib.MeshConfig(rules="dp"))

    def read(step_dir, meta: checkpoint.Meta) -> Embedder:
        config = meta.config.model
        if config.architecture == "encoder_decoder":
            raise errors.UserError(
                f"--workdir={workdir} holds an encoder_decoder: embedding takes an encoder or a decoder"
            )
        if max_length is not None and not 3 <= max_length <= config.max_length:
            raise errors.UserError(
                f"--max_length={max_length}: the model takes 3 to {config.max_length} tokens"
            )
        with jax.set_mesh(mesh):
            model = checkpoint.restore_params(
                step_dir, meta, build.abstract_model(config, rules), mesh
            )
            if config.lora.is_on:
                model = lora.merge(model, config, rules)
        if pooling is not None:
            model.config = dataclasses.replace(model.config, pooling=pooling)
        tokenizer = tokenizer_lib.from_dict(meta.tokenizer)
        name = f"{workdir}@{meta.step} {model.config.pooling}"
        longest = max_length or config.max_length
        return Embedder(model, tokenizer, mesh, longest, name, meta.step)

    return checkpoint.read_latest(workdir, step, read)
