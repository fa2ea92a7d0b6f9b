"""What every command shares: flags in, one-line errors out, and the backend set up first.

    def define_flags():
        command.define_workdir("Folder of the run.")

    def main():
        train(command.config_from_flags(), command.required("workdir"))

    if __name__ == "__main__":
        command.run(main, define_flags)

Flags are defined when a module runs as a command, not when it is imported by another one.
"""

from collections.abc import Callable
from collections.abc import Sequence
import os
import pathlib
import re
import sys
import traceback
import typing

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

from llm_jax import backend
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import peers

USAGE_ERROR = peers.USAGE_ERROR  # the exit code of a command that was called wrongly


def define_config() -> None:
    """Defines `--config=FILE[:arg]` and its overrides `--config.x.y=z`."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/tiny.py.")


def define_workdir(help_text: str) -> None:
    """Defines `--workdir`, the folder that holds everything of one run."""
    flags.DEFINE_string("workdir", None, help_text)


_arguments: dict[str, str] = {}
_argument_helps: dict[str, str] = {}


def define_argument(name: str, help_text: str) -> None:
    """Defines the next argument that the command takes without a flag, e.g. `PATH`."""
    _argument_helps[name] = help_text


def argument(name: str) -> str:
    """Returns the value of an argument, or raises UserError that says what it is for."""
    if name not in _arguments:
        raise errors.UserError(f"{name} is missing: {_argument_helps[name]}")
    return _arguments[name]


def required(name: str) -> str:
    """Returns the value of a flag, or raises UserError that says what it is for."""
    flag = flags.FLAGS[name]
    if not (flag.value or flag.present):
        raise errors.UserError(f"--{name} is missing: {flag.help}")
    return flag.value


def config_from_flags() -> config_lib.RunConfig:
    """Returns the checked config of `--config=FILE[:arg]` and its `--config.x.y=z` overrides."""
    return _checked(required("config"))


def load_config(path: str, overrides: Sequence[str] = ()) -> config_lib.RunConfig:
    """Returns the checked config of a file and of overrides `--config.x.y=z`, without the flags of
    this process: for commands that hand them on to another machine.

    Raises:
      errors.UserError: as `config_from_flags`, for an override that is none, and for mistakes in the file.
    """
    arguments = [f"--config={path}", *overrides]
    file = _config_file(arguments)
    _none_overrides.clear()
    argv = ["load_config", *_take_none_overrides(arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=argv
    )
    try:
        rest = values(argv)
        if len(rest) > 1:
            raise errors.UserError(f"{rest[1]!r} is not a setting; those are --config.x.y=value")
        return _checked(values["config"].value)
    except errors.UserError:
        raise
    except (flags.Error, *_CONFIG_MISTAKES) as error:
        mistake = _config_mistake(file, error)
        if mistake is None and not isinstance(error, flags.Error):
            raise
        raise mistake or errors.UserError(str(error)) from error


def _checked(raw: object) -> config_lib.RunConfig:
    if not isinstance(raw, ml_collections.ConfigDict):
        raise errors.UserError("--config: get_config() must return a ConfigDict (config.new())")
    raw = ml_collections.ConfigDict(raw)
    for path, value in _none_overrides.items():
        section, _, name = path.rpartition(".")
        target = raw
        for part in filter(None, section.split(".")):
            target = target[part]
        target[name] = value
    return config_lib.from_config_dict(raw)


_none_overrides: dict[str, None] = {}


def _field_type(path: str) -> type:
    """Returns the type of setting `path` ("optim.name"); UserError if there is none."""
    kind, walked = config_lib.RunConfig, "config"
    for part in path.split("."):
        fields = typing.get_type_hints(kind) if hasattr(kind, "__dataclass_fields__") else {}
        if part not in fields:
            known = f"; {walked} has {', '.join(fields)}" if fields else ""
            hint = errors.nearest(part, fields) or known
            raise errors.UserError(f"--config.{path}: {walked}.{part} is not a setting{hint}")
        kind, walked = fields[part], f"{walked}.{part}"
    return kind


def _take_none_overrides(argv: Sequence[str]) -> list[str]:
    """Checks the names of all overrides and takes out `--config.x=None`, which ml_collections
    cannot parse for a setting that is a number otherwise."""
    kept = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        prefix, dot, path = name.lstrip("-").partition(".")
        # absl turns a Boolean setting off by `--noconfig.x`.
        if not (name.startswith("-") and dot and prefix in ("config", "noconfig")):
            kept.append(arg)
            continue
        kind = _field_type(path)
        if equals and value in ("None", "none") and type(None) in typing.get_args(kind):
            _none_overrides[path] = None
        else:
            _none_overrides.pop(path, None)  # the last override of a setting counts
            kept.append(arg)
    return kept


def config_name() -> str:
    """Returns the name of the file of `--config`, without its folder and suffix."""
    path = _config_file(sys.argv)
    return "" if path is None else path.stem


def _config_file(argv: Sequence[str]) -> pathlib.Path | None:
    """Returns the file that `--config=FILE[:arg]` names, or None.

    Raises:
      errors.UserError: there is no such file; names the nearest one.
    """
    for arg, successor in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-config"):
            continue
        path = pathlib.Path((value if equals else successor).partition(":")[0])
        if not path.is_file():
            siblings = [p.stem for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            hint = errors.nearest(path.stem, siblings)
            raise errors.UserError(f"--config: there is no file {path}{hint}")
        return path
    return None


# What a config file raises that names a setting which is not there, or gives it a wrong type.
_CONFIG_MISTAKES = (AttributeError, KeyError, TypeError, ValueError, NameError, SyntaxError)


def _config_mistake(path: pathlib.Path | None, error: BaseException) -> errors.UserError | None:
    """Returns a mistake made in the config file as one line, or None if it came from elsewhere."""
    if path is None:
        return None
    if isinstance(error, SyntaxError):
        return errors.UserError(f"{path} line {error.lineno}: {error.msg}")
    if isinstance(error, AttributeError) and error.name == "get_config":
        return errors.UserError(f"{path} has no get_config()")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if pathlib.Path(f.filename).resolve() == path.resolve()]
    if not lines:
        # ml_collections and absl wrap some of them, traceback and all.
        cause = error.__cause__ or error.__context__
        return None if cause is None else _config_mistake(path, cause)
    return errors.UserError(f"{path} line {lines[-1]}: {_shortened(str(error))}")


def _shortened(message: str) -> str:
    """Keeps of ml_collections' message on an unknown key the key and the nearest one."""
    unknown = re.search(r'Key "(\w+)" does not exist', message)
    if unknown is None:
        return message
    nearest = re.search(r'Did you mean "(\w+)"', message)
    hint = f" (did you mean '{nearest[1]}'?)" if nearest else ""
    return f"'{unknown[1]}' is not a setting{hint}"


def _parse_flags(argv: Sequence[str]) -> list[str]:
    path = None
    has_config = "config" in flags.FLAGS and not flags.FLAGS["config"].boolean
    try:
        path = _config_file(argv) if has_config else None
        rest = flags.FLAGS(_take_none_overrides(argv))
        _arguments.update(zip(_argument_helps, rest[1:]))
        if len(rest) > 1 + len(_argument_helps):
            hint = "; settings are --config.x.y=value" if has_config else ""
            raise errors.UserError(f"{rest[1 + len(_argument_helps)]!r} is not a flag{hint}")
        return rest
    except errors.UserError as error:
        exit_with(error)
    except flags.Error as error:
        exit_with(_config_mistake(path, error) or error)
    except _CONFIG_MISTAKES as error:
        mistake = _config_mistake(path, error)
        if mistake is None:
            raise
        exit_with(mistake)


def exit_with(error: Exception) -> typing.NoReturn:
    """Prints one line to stderr and exits with the usage-error code."""
    peers.say(f"error: {error}")
    sys.exit(peers.USAGE_ERROR)


def define_processes() -> None:
    """Defines the flags of a command that several processes may run together."""
    distributed.define_flags()


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> None:
    """Parses the flags and runs `main`. A UserError ends the process with one line and code 2.

    Where `define_flags` has called `define_processes`, the processes of the run are joined first;
    then they end together (`peers`).
    """
    define_flags()
    # Third-party start-up chatter (TensorFlow's CPU feature notes, gRPC's fork warnings).
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    backend.set_flags()
    backend.skip_absent_tpu()
    backend.keep_freed_memory()

    def guarded(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.INFO)
        logging.use_python_logging(quiet=True)
        _log_to_stderr()
        try:
            if "coordinator_address" in flags.FLAGS:
                distributed.start()
                _log_to_stderr()
            code = main() or 0
            distributed.finish()
        except BaseException as error:
            if distributed.is_running():
                distributed.fail(error)
            if isinstance(error, errors.UserError):
                exit_with(error)
            raise
        sys.exit(code)

    app.run(guarded, flags_parser=_parse_flags)


def _log_to_stderr() -> None:
    """Lines of our own, short; of others (Orbax logs each file), warnings alone.

    Of several processes the first one logs; the others warn, with their number in front.
    """
    import logging as std_logging

    root = std_logging.getLogger()
    root.setLevel(std_logging.WARNING)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = std_logging.StreamHandler(sys.stderr)
    is_main = distributed.is_main()
    who = "" if is_main else f"process {distributed.process_id()}: "
    handler.setFormatter(std_logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    std_logging.getLogger("absl").setLevel(std_logging.WARNING)
    level = std_logging.INFO if is_main else std_logging.WARNING
    std_logging.getLogger("llm_jax").setLevel(level)
