"""What is required of a single setting: each raises `errors.UserError`, naming the field and what would do."""

import math
from typing import Any

from llm_jax import errors


def require(holds: bool, path: str, value: Any, would_do: str) -> None:
    """Requires what `holds` says of the value at `path`."""
    if not holds:
        raise errors.UserError(f"config.{path} = {value!r} will not do: {would_do}")


def require_choice(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Requires one of the choices of the setting `name` in a section."""
    value = getattr(config, name)
    hint = errors.nearest(value, choices)
    require(value in choices, f"{section}.{name}", value, f"choose from {', '.join(choices)}{hint}")


def require_at_least(section: str, config: Any, minimum: float, *names: str) -> None:
    """Requires finite numbers from `minimum` on; None is let pass."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            holds = math.isfinite(value) and value >= minimum
            require(holds, f"{section}.{name}", value, f"it must be at least {minimum}")


def require_fraction(section: str, config: Any, *names: str) -> None:
    """Requires numbers in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value <= 1.0, f"{section}.{name}", value, "it must lie in [0, 1]")
