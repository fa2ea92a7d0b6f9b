"""Where scores go: WORKDIR/evaluation/STEP/NAME.json, and NAME.jsonl with what was given, wanted and said."""

from collections.abc import Iterable
from collections.abc import Mapping
import json
import re
from typing import Any

from etils import epath


def folder_of(workdir: str, step: int) -> epath.Path:
    """Returns the folder of a checkpoint's scores, which there is from now on."""
    folder = epath.Path(workdir).expanduser() / "evaluation" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def name_of(source: str) -> str:
    """Returns what names tell a source by: of files the name and its folder's, as many folders have a `test.jsonl`.

    >>> name_of("jsonl:~/data/french/test.jsonl:text")
    'french-test'
    """
    *_, folder, file = ["", *source.partition(":")[2].split("/")]
    return re.sub(r"[^\w-]+", "_", f"{folder}-{file.partition('.')[0]}".removeprefix("-"))


def write(
    workdir: str,
    step: int,
    name: str,
    found: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
) -> epath.Path:
    """Writes scores and a row of each example; returns their folder."""
    folder = folder_of(workdir, step)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return folder
