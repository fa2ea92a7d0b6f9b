"""Turns Hugging Face models into workdirs, and checkpoints into Hugging Face models.

    python -m llm_jax.convert from-hf DIR WORKDIR
    python -m llm_jax.convert from-gguf FILE WORKDIR
    python -m llm_jax.convert to-hf WORKDIR DIR
    python -m llm_jax.convert to-peft WORKDIR DIR       # low-rank updates alone, as PEFT has them
    python -m llm_jax.convert merge WORKDIR WORKDIR     # adds them to their matrices

Nothing is downloaded, and pickles are never read.
"""

import pathlib
import re

from absl import flags
import jax

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import adapters
from llm_jax.convert import exporting
from llm_jax.convert import gguf_file
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from llm_jax.convert import tokenizer_files

_COMMANDS = ("from-hf", "from-gguf", "to-hf", "to-peft", "merge")
_TOKENIZERS = ("auto", tokenizer_files.NONE)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def define_flags() -> None:
    command.define_argument("COMMAND", f"What to do: {', '.join(_COMMANDS)}.")
    command.define_argument("SOURCE", "A model's folder or file, or the workdir to export.")
    command.define_argument("TARGET", "The workdir, or the folder, to write.")
    flags.DEFINE_string("param_dtype", None, "Of an imported model; as its file's if not given.")
    flags.DEFINE_string("tokenizer", "auto", "auto, or none: an imported model's texts are ids.")
    flags.DEFINE_multi_string("skip", [], "Pattern of names of tensors to leave out on import.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_string("family", None, "Of an exported model; found out if not given.")
    flags.DEFINE_string("dtype", None, "Of an exported model; as it came if not given.")
    flags.DEFINE_string("max_shard_size", "5GB", "Of an exported model's files.")


def main() -> None:
    name = command.argument("COMMAND")
    if name not in _COMMANDS:
        hint = errors.nearest(name, _COMMANDS)
        raise errors.UserError(f"{name!r} is no command{hint}: use one of {', '.join(_COMMANDS)}")
    # The parameters of a checkpoint restore on any mesh, so that an accelerator is of no use here.
    jax.config.update("jax_platforms", "cpu")
    origin, target = command.argument("SOURCE"), command.argument("TARGET")
    if name == "to-hf":
        print(_export(origin, target))
    elif name == "to-peft":
        step = checkpoint.parse_step(flags.FLAGS.step)
        folder = _local(target)
        print(adapters.export_adapter(origin, folder, step, flags.FLAGS.family))
    elif name == "merge":
        print(adapters.merge(origin, target, checkpoint.parse_step(flags.FLAGS.step)))
    else:
        print(_import(name, origin, target))


def _import(name: str, origin: str, target: str) -> str:
    given = flags.FLAGS
    _choice("tokenizer", given.tokenizer, _TOKENIZERS)
    if given.param_dtype is not None:
        _choice("param_dtype", given.param_dtype, config_lib.DTYPES[1:])
    has_tokenizer = given.tokenizer != tokenizer_files.NONE
    options = importing.Options(given.param_dtype, has_tokenizer, tuple(given.skip))
    path = pathlib.Path(origin).expanduser().absolute()
    if name == "from-gguf" or path.suffix == ".gguf":
        opened = gguf_file.open_file(path, has_tokenizer)
    else:
        opened = source_lib.open_folder(path, has_tokenizer)
    return importing.import_model(opened, target, options)


def _export(source: str, target: str) -> str:
    given = flags.FLAGS
    if given.dtype is not None:
        _choice("dtype", given.dtype, exporting.DTYPES)
    size = re.fullmatch(r"(\d+)(KB|MB|GB)?", given.max_shard_size)
    if size is None or int(size[1]) == 0:
        raise errors.UserError(f"--max_shard_size={given.max_shard_size}: use a size such as 5GB")
    num_bytes = int(size[1]) * _UNITS[size[2] or ""]
    options = exporting.Options(given.family, given.dtype, num_bytes)
    step = checkpoint.parse_step(given.step)
    return exporting.export_model(source, _local(target), step, options)


def _local(target: str) -> pathlib.Path:
    if "://" in target:
        raise errors.UserError(f"{target}: models are written to local folders; copy it from there")
    return pathlib.Path(target).expanduser().absolute()


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = errors.nearest(value, choices)
        raise errors.UserError(f"--{flag}={value}{hint}: choose from {', '.join(choices)}")


if __name__ == "__main__":
    command.run(main, define_flags)
