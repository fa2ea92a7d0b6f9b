"""The one exception that a user's mistake raises.

A command catches `UserError` and prints it as one line; anything else is a bug and keeps its
traceback. The message names what is wrong, where, and what would do.
"""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
    """Bad input from outside: a config, a flag, a file, a checkpoint or a prompt."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the candidate closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
