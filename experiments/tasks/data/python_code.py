"""Python's standard library, to be completed: whole files, and files with a hole (`fill`).

Source: the library of the Python that runs (PSF licence). Split by the top-level module or package; tests and files
that are data stay out.

    python_code   text: a file
    python_fill   before, after, middle: a file cut at line ends around some lines; path, start, end: of the lines
"""

import pathlib
import random
import sys
import sysconfig

from experiments.tasks.data import splits

_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "encodings",
)
_LONGEST = 100_000  # bytes of a file


def files_of(folder: pathlib.Path) -> list[splits.Example]:
    """Returns the files of a library, each with the module that it is of."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        is_kept = not any(part in _LEFT_OUT for part in parts) and path.stat().st_size <= _LONGEST
        text = path.read_text(encoding="utf-8", errors="ignore") if is_kept else ""
        if text.strip():
            module = parts[0].removesuffix(".py")
            found.append({"text": text, "module": module, "path": str(path.relative_to(folder))})
    return found


def holes_of(files: list[splits.Example], seed: str, most: int = 600) -> list[splits.Example]:
    """Returns files with some lines in the middle cut out (Bavarian et al. 2022, section 3).

    Args:
      files: with their text.
      seed: of what is cut.
      most: characters before the hole, and after it.
    """
    drawn, found = random.Random(seed), []
    for file in files:
        lines = file["text"].splitlines(keepends=True)
        for _ in range(max(1, len(lines) // 120)):
            if len(lines) < 20:
                continue
            start = drawn.randrange(5, len(lines) - 6)
            end = start + drawn.randint(1, 5)
            middle = "".join(lines[start:end])
            if not middle.strip():
                continue
            before, after = "".join(lines[:start])[-most:], "".join(lines[end:])[:most]
            hole = {"before": before, "after": after, "middle": middle, "module": file["module"]}
            found.append(hole | {"path": file["path"], "start": start, "end": end})
    return found


def _split() -> dict[str, list[splits.Example]]:
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    shares = {"validation": 0.08, "test": 0.08}
    return splits.by_key(files_of(folder), lambda example: example["module"], shares)


def _about() -> dict[str, str]:
    return {
        "source": f"the standard library of Python {sys.version.split()[0]}",
        "licence": "PSF",
        "split": "by top-level module: 84% train, 8% validation, 8% test",
    }


def code() -> splits.DataSet:
    """Returns whole files."""
    return splits.DataSet(_split(), _about(), lambda example: example["text"])


def fill() -> splits.DataSet:
    """Returns files with a hole."""
    examples = {name: holes_of(rows, name) for name, rows in _split().items()}
    return splits.DataSet(examples, _about(), lambda example: example["middle"] + example["before"])
