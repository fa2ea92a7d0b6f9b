"""Packs the code of a run: `python -m launch.code --output=/tmp/code.tar.gz [--extra=configs/mine.py]`.

What is packed is what git tracks, as it lies in the working tree, and nothing else: a key or a data
set that happens to lie about does not travel. The same files make the same archive, byte for byte.
"""

import argparse
from collections.abc import Sequence
import gzip
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

from launch import shell
from llm_jax import errors

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORIGIN_FILE = "launch_code.json"  # in the archive: which commit it is, and what was changed in it


def files(root: pathlib.Path, extra: Sequence[str] = ()) -> list[str]:
    """Returns the paths to pack, relative to `root`, in order.

    Args:
      extra: files that git need not track: a new config.

    Raises:
      errors.UserError: `root` is not a git repository, or an extra file lies outside of it.
    """
    tracked = _git(root, "ls-files", "-z").split("\0")
    names = {name for name in tracked if name and (root / name).is_file()}
    for path in extra:
        resolved = pathlib.Path(path).resolve()
        if not resolved.is_relative_to(root):
            raise errors.UserError(
                f"{path} lies outside of {root}, which is what is shipped; copy it"
            )
        names.add(str(resolved.relative_to(root)))
    return sorted(names)


def identity(root: pathlib.Path, extra: Sequence[str] = ()) -> str:
    """Returns a name for the content of the files to pack. Raises as `files`."""
    digest = hashlib.sha256()
    for name in files(root, extra):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{_mode(root / name)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def origin(root: pathlib.Path) -> dict:
    """Returns the commit that the working tree is of, and which tracked files differ from it."""
    changed = _git(root, "diff", "--name-only", "HEAD").split()
    return {"commit": _git(root, "rev-parse", "HEAD").strip(), "changed": changed}


def untracked(root: pathlib.Path) -> list[str]:
    """Returns Python files that git neither tracks nor ignores, and that are thus left behind."""
    listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return [name for name in listed if name.endswith(".py")]


def pack(root: pathlib.Path, output: pathlib.Path, extra: Sequence[str] = ()) -> None:
    """Writes the archive. Raises as `files`."""
    content = {name: (root / name).read_bytes() for name in files(root, extra)}
    modes = {name: _mode(root / name) for name in content}
    content[ORIGIN_FILE] = json.dumps(origin(root), indent=2).encode()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(content.items()):
            entry = tarfile.TarInfo(name)  # no owner, no date: they would differ each time
            entry.size, entry.mode = len(data), modes.get(name, 0o644)
            archive.addfile(entry, io.BytesIO(data))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}")
    partial.write_bytes(gzip.compress(raw.getvalue(), compresslevel=1, mtime=0))
    partial.replace(output)


def _mode(path: pathlib.Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise errors.UserError(
            f"what is shipped are the files that git tracks, and git says of {root}:"
            f" {done.stderr.strip() or 'nothing'}; run it in a clone"
        )
    return done.stdout


def run(flags: Sequence[str]) -> None:
    """Packs as the flags of the command say. Raises as `files`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--extra", action="append", default=[])
    arguments = parser.parse_args(flags)
    pack(ROOT, arguments.output, arguments.extra)
    shell.say(f"packed {arguments.output} ({arguments.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
