"""Lists of names and patterns in settings: "attention/q, mlp/*", parted by commas."""

import fnmatch


def split(text: str) -> list[str]:
    """Returns what commas part, without the spaces around; empty ones are none."""
    return [part.strip() for part in text.split(",") if part.strip()]


def is_matched(name: str, patterns: str) -> bool:
    """Returns whether a name fits one of some patterns, as of `fnmatch`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in split(patterns))
