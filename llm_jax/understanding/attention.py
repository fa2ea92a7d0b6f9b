"""Maps of attention: which tokens each head of each layer reads, as a page and as pictures.

    attention.html          layers and heads to choose from; a token shows what it attends to
    attention_KIND.png      all layers and heads side by side, for each kind of attention
    attention.npz           the weights, float32 [L, H, T, S] for each kind

A weight says how much of a key's value a head takes; what that value is, and what the layers before have mixed
into it, it does not say (Jain and Wallace 2019).
"""

import base64
from collections.abc import Sequence
import dataclasses
import functools
import io
from typing import Any

from etils import epath
import jax
import numpy as np

from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.understanding import pages
from llm_jax.understanding import recording
from llm_jax.understanding import subject as subject_lib

_STEPS = 65535  # of a weight in the page: 16 bits
MOST_WEIGHTS = 16_000_000  # in a page, which has 2.7 bytes for each


@dataclasses.dataclass(frozen=True)
class Map:
    """The weights of one kind of attention.

    Attributes:
      kind: as `recording.Recorded.kind`.
      weights_LHTS: float32; H = K * G query heads, those of a key-value head side by side.
      layers: numbers of the layers, from 0.
      queries, keys: the tokens, as they are shown.
    """

    kind: str
    weights_LHTS: np.ndarray
    layers: tuple[int, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]


def maps(
    subject: subject_lib.Subject,
    text: str,
    target: str | None = None,
    layers: Sequence[int] | None = None,
) -> list[Map]:
    """Returns the maps of a text.

    Args:
      subject: any model.
      text: that the model reads; an encoder's, if it has one beside a decoder.
      target: that the decoder of an encoder-decoder reads, behind its start; None for other models.
      layers: of each stack, that are kept; None: all.

    Raises:
      errors.UserError: no text where one is needed, too long a text, or a layer that is not there.
    """
    row_T, source_S = _rows(subject, text, target)
    config = subject.config.model
    num_layers = {recording.SELF: config.num_layers, recording.ENCODER: config.num_layers}
    num_layers |= dict.fromkeys((recording.DECODER, recording.CROSS), config.decoder_layers)
    kinds = [recording.SELF]
    if source_S is not None:
        kinds = [recording.ENCODER, recording.DECODER, recording.CROSS]
    chosen = {kind: _chosen(layers, num_layers[kind]) for kind in kinds}
    sizes = {recording.ENCODER: (source_S, source_S), recording.CROSS: (row_T, source_S)}
    rows = {kind: sizes.get(kind, (row_T, row_T)) for kind in kinds}
    count = config.num_heads * sum(
        len(chosen[kind]) * len(queries) * len(keys) for kind, (queries, keys) in rows.items()
    )
    if count > MOST_WEIGHTS:
        raise errors.UserError(
            f"--text has {count:,} attention weights in these layers, and a page takes"
            f" {MOST_WEIGHTS:,}: shorten it, or name fewer layers by --layers=0,5"
        )
    found = _weights(subject, _batch(subject, row_T, source_S), chosen)
    return [
        Map(
            kind,
            found[kind],
            chosen[kind],
            *(tuple(subject_lib.names(subject.tokenizer, ids)) for ids in rows[kind]),
        )
        for kind in kinds
    ]


def _rows(
    subject: subject_lib.Subject, text: str, target: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns what a decoder or an encoder alone reads, and what an encoder reads beside a decoder."""
    if subject.architecture != "encoder_decoder":
        if target is not None:
            raise errors.UserError(
                f"--target is what the decoder of an encoder_decoder writes; this is a model of"
                f" architecture {subject.architecture!r}: leave it out"
            )
        return subject_lib.encode(subject, text), None
    if target is None:
        raise errors.UserError(
            "--target is missing: the text that the decoder writes for --text (sampling gives one)"
        )
    start, limit = subject.config.model.decoder_start_id, subject.config.model.max_length
    row_T = np.append(np.int32(start), subject.tokenizer.encode(target))
    if len(row_T) > limit:
        raise errors.UserError(
            f"--target has {len(row_T)} tokens, its start among them, and the model {limit} positions"
        )
    return row_T, subject_lib.encode(subject, text, is_source=True)


def _chosen(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(num_layers))
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise errors.UserError(
                f"--layers={layer}: a stack has the layers 0 to {num_layers - 1}"
            )
    return tuple(dict.fromkeys(layers))


def _batch(
    subject: subject_lib.Subject, row_T: np.ndarray, source_S: np.ndarray | None
) -> batch_lib.Batch:
    """Returns a batch of a row for each device, all the same."""
    size, pad_id = subject.mesh.size, subject.tokenizer.pad_id
    batch = batch_lib.empty(size, len(row_T), pad_id)
    for place in range(size):
        subject_lib.fill(batch, place, row_T, row_T)
    if source_S is None:
        return subject_lib.with_types(subject, batch)
    shape = (size, len(source_S))
    return batch._replace(
        encoder_tokens=np.broadcast_to(source_S, shape),
        encoder_segments=np.ones(shape, np.int32),
        encoder_positions=np.broadcast_to(np.arange(len(source_S), dtype=np.int32), shape),
    )


def _weights(
    subject: subject_lib.Subject, batch: batch_lib.Batch, chosen: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Returns the weights of the layers that were chosen of each kind, float32 [L, H, T, S]."""

    @functools.partial(jax.jit)
    def run(model: Any, batch: batch_lib.Batch) -> dict[str, list[jax.Array]]:
        _, found = recording.record(subject.config, model, batch)
        by_kind = {kind: [one for one in found if one.kind == kind] for kind in chosen}
        return {
            kind: [by_kind[kind][layer].weights_BKGTS for layer in own]
            for kind, own in chosen.items()
        }

    with jax.set_mesh(subject.mesh):
        found = run(subject.model, subject.place(batch))
    return {
        kind: np.stack([_first_row(weights).reshape(-1, *weights.shape[-2:]) for weights in own])
        for kind, own in found.items()
    }


def _first_row(weights_BKGTS: jax.Array) -> np.ndarray:
    """Returns [K, G, T, S] of the first row, which lies on this process's first device."""
    return np.asarray(weights_BKGTS.addressable_shards[0].data)[0]


def write(found: Sequence[Map], folder: epath.Path, title: str) -> list[epath.Path]:
    """Writes maps as a page, pictures and arrays; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "title": title,
        "steps": _STEPS,
        "maps": [
            {
                "kind": one.kind,
                "layers": one.layers,
                "heads": one.weights_LHTS.shape[1],
                "queries": one.queries,
                "keys": one.keys,
                "weights": _packed(one.weights_LHTS),
            }
            for one in found
        ],
    }
    page = folder / "attention.html"
    page.write_text(pages.render("attention.html", data))
    arrays, buffer = folder / "attention.npz", io.BytesIO()
    np.savez_compressed(buffer, **{one.kind: one.weights_LHTS for one in found})
    arrays.write_bytes(buffer.getvalue())
    return [page, arrays, *(_draw(one, folder / f"attention_{one.kind}.png") for one in found)]


def _packed(weights_LHTS: np.ndarray) -> str:
    """Returns weights as little-endian uint16 in base64: within 1 / (2 * 65535) of what they are."""
    rounded = np.round(weights_LHTS * _STEPS).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()


def _draw(one: Map, path: epath.Path) -> epath.Path:
    """Draws all heads, a row of pictures for each layer, each from 0 to 1."""
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    num_layers, num_heads = one.weights_LHTS.shape[:2]
    drawn = figure.Figure(
        figsize=(1.2 * num_heads + 1, 1.2 * num_layers + 0.6), layout="constrained"
    )
    backend_agg.FigureCanvasAgg(drawn)
    grid = drawn.subplots(num_layers, num_heads, squeeze=False)
    for row, layer in enumerate(one.layers):
        for head in range(num_heads):
            axes = grid[row, head]
            axes.imshow(one.weights_LHTS[row, head], cmap="viridis", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(f"head {head}", fontsize=7)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=7)
    drawn.suptitle(f"{one.kind} attention: queries down, keys to the right", fontsize=8)
    with path.open("wb") as file:
        drawn.savefig(file, format="png", dpi=100)
    return path
