"""Tells what a checkpoint holds, without a TPU and without room for its arrays.

    python -m llm_jax.checkpoint inspect runs/tiny
    python -m llm_jax.checkpoint inspect gs://bucket/run/checkpoints/600 --verify
    python -m llm_jax.checkpoint inspect runs/tiny --against=configs/char.py

Exit code: 0; 1 if the checkpoint is damaged or does not fit; 2 if the command was called wrongly.
"""

from absl import flags
import jax

from llm_jax import command
from llm_jax import errors
from llm_jax.checkpoint import folder
from llm_jax.checkpoint import inspection
from llm_jax.checkpoint import tables

_MISMATCH = 1  # the exit code

_COMMANDS = ("inspect",)


def define_flags() -> None:
    command.define_argument("COMMAND", f"What to do: {', '.join(_COMMANDS)}.")
    command.define_argument("PATH", "A workdir, its checkpoints folder, or the folder of one step.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_bool("training", False, "List the arrays of the optimiser's state as well.")
    flags.DEFINE_bool("config", False, "Print all settings, those left at their defaults too.")
    flags.DEFINE_bool("verify", False, "Read every array, one by one, and check its fingerprint.")
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_string(
        "against", None, "Config file (FILE.py[:arg]) or other checkpoint that it should fit."
    )


def main() -> int:
    given = flags.FLAGS
    name = command.argument("COMMAND")
    if name not in _COMMANDS:
        hint = errors.nearest(name, _COMMANDS)
        raise errors.UserError(f"{name!r} is no command{hint}: use one of {', '.join(_COMMANDS)}")
    # An accelerator belongs to the run that trains on it, and is not needed here.
    jax.config.update("jax_platforms", "cpu")
    step_dir = inspection.find(command.argument("PATH"), folder.parse_step(given.step))
    found = inspection.inspect(step_dir, given.verify)
    comparison = None
    if given.against is not None and found.meta is not None:
        comparison = inspection.compare(found, given.against, command.load_config)
    options = tables.Options(given.training, given.config)
    print((tables.as_json if given.json else tables.text)(found, comparison, options))
    fits = comparison is None or comparison.fits
    return 0 if fits and not found.damage else _MISMATCH


if __name__ == "__main__":
    command.run(main, define_flags)
