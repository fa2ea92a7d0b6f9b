"""From what a user writes to frozen dataclasses: strictly, and once."""

import dataclasses
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from llm_jax import errors
from llm_jax.config import checks
from llm_jax.config import schema


def new() -> ml_collections.ConfigDict:
    """Returns the defaults as a ConfigDict that takes new values but no new keys."""
    return _to_config_dict(schema.RunConfig())


def _to_config_dict(section: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        elif value is None or type(None) in typing.get_args(field.type):
            (kind,) = set(typing.get_args(field.type)) - {type(None)}
            result[field.name] = config_dict.placeholder(kind)
            result[field.name] = value
        else:
            result[field.name] = value
    return result.lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a frozen config as nested plain dicts, for JSON."""
    return dataclasses.asdict(config)


def from_config_dict(raw: ml_collections.ConfigDict) -> schema.RunConfig:
    """Converts and checks a ConfigDict.

    Raises:
      errors.UserError: an unknown key, a wrong type or a contradiction; one line that names the
        field, its value and what would do.
    """
    return from_dict(raw.to_dict())


def from_dict(raw: dict[str, Any]) -> schema.RunConfig:
    """Converts and checks nested dicts, such as those of `config.json`. Raises as above."""
    config = _build(schema.RunConfig, raw, "config")
    checks.check(config)
    return config


def _build(kind: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise errors.UserError(f"{path} is {raw!r}; it takes a section of settings")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in fields:
            hint = errors.nearest(name, fields) or f"; {path} has {', '.join(fields)}"
            raise errors.UserError(f"{path}.{name} is not a setting{hint}")
    values = {}
    for name, value in raw.items():
        target = fields[name].type
        if dataclasses.is_dataclass(target):
            values[name] = _build(target, value, f"{path}.{name}")
        else:
            values[name] = _typed(value, target, f"{path}.{name}")
    return kind(**values)


def _typed(value: Any, target: Any, path: str) -> Any:
    allowed = typing.get_args(target) if isinstance(target, types.UnionType) else (target,)
    if value is None and type(None) in allowed:
        return None
    (kind,) = [k for k in allowed if k is not type(None)]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and float(value).is_integer():
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    optional = " or None" if type(None) in allowed else ""
    raise errors.UserError(
        f"{path} = {value!r} is a {type(value).__name__}; it takes a {kind.__name__}{optional}"
    )
