"""Packages are fetched once, checked, and never taken for whole when they are not."""

import hashlib
import pathlib

import pytest

from llm_jax import errors
from llm_jax.data import packages


def _make(content="text"):
    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / "file").write_text(content)
        return folder / "file"

    return make


def test_what_is_made_once_is_kept(tmp_path):
    assert packages._made(tmp_path / "a" / "kept", _make()).read_text() == "text"
    assert packages._made(tmp_path / "a" / "kept", _make("other")).read_text() == "text"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_what_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "file").write_text("half")
        raise packages.UnavailableError("cut off")

    with pytest.raises(packages.UnavailableError):
        packages._made(tmp_path / "kept", fail)
    assert not list(tmp_path.iterdir())


def test_another_file_than_was_asked_for_is_told(tmp_path):
    command = ["python3", "-c", "open('made', 'w').write('text')"]
    right = hashlib.sha256(b"text").hexdigest()
    kept = packages._fetch(command, "x-1", right, tmp_path)
    kept.write_text("changed")
    with pytest.raises(errors.UserError, match=f"expected {right}"):
        packages._fetch(command, "x-1", right, tmp_path)
    with pytest.raises(errors.UserError, match="has sha256"):
        packages._fetch(command, "x-1", "0" * 64, tmp_path)
    assert [path for path in tmp_path.iterdir() if path != kept] == []


@pytest.mark.parametrize(
    "command, said",
    [
        (["no-such-tool"], "no-such-tool is not installed"),
        (["python3", "-c", "raise SystemExit('refused')"], "refused"),
    ],
)
def test_a_tool_that_is_missing_or_refuses_is_named(tmp_path, command, said):
    with pytest.raises(packages.UnavailableError, match=said):
        packages._fetch(command, "x-1", "0" * 64, tmp_path)
