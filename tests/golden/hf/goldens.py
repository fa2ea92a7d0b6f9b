"""Reads the goldens of Hugging Face models; `make.py` wrote them."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

FOLDER = pathlib.Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/outputs.safetensors")))

ENCODERS = ("bert", "bert_classifier", "modernbert")
ENCODER_DECODERS = ("marian", "t5_v1_0", "t5_v1_1")
DECODERS = tuple(name for name in NAMES if name not in ENCODERS + ENCODER_DECODERS)
NUM_NEW_TOKENS = 12  # of generated text, at the most
WITH_BEAMS = ("gpt2", "llama3", "deepseek_v3", *ENCODER_DECODERS)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A tiny model, and what Hugging Face's implementation makes of three ragged rows.

    Attributes:
      name: of the variant.
      folder: `config.json` and `model.safetensors`, as `save_pretrained` writes them.
      config: the settings.
      outputs: arrays by name; `right/` and `left/` say where rows are padded:
        SIDE/input_ids, SIDE/attention_mask, int32 [B, T], and what else the model takes;
        SIDE/logits, float32; what stands at padding is not to be compared.
        targets: int32 [B, T]; loss: the mean cross-entropy of rows padded on the right, of the next
          token for a decoder, else of the targets.
        gradient/NAME: of the loss, for each tensor by its name.
        hidden/N, or encoder/N and decoder/N: states before each layer, and the last, after the
          final norm; padded on the right.
        greedy_free, greedy, eos_id: ids that follow rows padded on the left (an encoder-decoder's:
          on the right), without an end and with one.
        beams/STOPPING/PENALTY/ids and scores: of two sequences a row by four beams; what follows the
          end of one is padding.
    """

    name: str
    folder: pathlib.Path
    config: dict[str, Any]
    outputs: dict[str, np.ndarray]


@functools.cache
def load(name: str) -> Golden:
    """Returns a variant's golden."""
    return read(name, FOLDER / name)


def read(name: str, folder: pathlib.Path) -> Golden:
    """Returns the golden of a variant that a folder holds."""
    outputs = safetensors_numpy.load_file(folder / "outputs.safetensors")
    return Golden(name, folder, json.loads((folder / "config.json").read_text()), outputs)
