"""What travels to the machines: what git tracks, as it lies there, and nothing else."""

import json
import subprocess
import tarfile

import pytest

from launch import code
from llm_jax import errors


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "configs").mkdir(parents=True)
    (root / "a.py").write_text("a = 1\n")
    (root / "run.sh").write_text("true\n")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("ignored/\n")
    _git(root, "init", "-q")
    _git(root, "add", ".")
    _git(root, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "first")
    (root / "key.json").write_text("secret")
    (root / "configs" / "mine.py").write_text("mine = 1\n")
    (root / "ignored").mkdir()
    (root / "ignored" / "x.py").touch()
    return root


def _git(root, *arguments):
    subprocess.run(["git", "-C", str(root), *arguments], check=True)


def test_the_archive_holds_tracked_files_and_the_config(repository, tmp_path):
    (repository / "a.py").write_text("a = 2\n")  # not committed
    output = tmp_path / "out" / "code.tar.gz"
    code.pack(repository, output, [str(repository / "configs" / "mine.py")])
    with tarfile.open(output) as archive:
        names = archive.getnames()
        assert names == [".gitignore", "a.py", "configs/mine.py", "launch_code.json", "run.sh"]
        assert archive.extractfile("a.py").read() == b"a = 2\n"
        assert archive.getmember("run.sh").mode == 0o755
        origin = json.load(archive.extractfile("launch_code.json"))
    assert origin["changed"] == ["a.py"]
    assert len(origin["commit"]) == 40
    assert [path.name for path in output.parent.iterdir()] == ["code.tar.gz"]


def test_the_same_content_is_the_same_archive_and_other_content_another(repository, tmp_path):
    first, second = tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"
    code.pack(repository, first)
    name = code.identity(repository)
    (repository / "a.py").touch()
    code.pack(repository, second)
    assert first.read_bytes() == second.read_bytes()
    assert code.identity(repository) == name
    (repository / "a.py").write_text("a = 3\n")
    changed = code.identity(repository)
    (repository / "a.py").chmod(0o755)
    assert len({name, changed, code.identity(repository)}) == 3


def test_what_is_left_behind_is_known(repository):
    assert code.untracked(repository) == ["configs/mine.py"]


def test_a_deleted_file_is_left_out(repository):
    (repository / "a.py").unlink()
    assert "a.py" not in code.files(repository)


def test_outside_of_a_clone_it_is_said_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(errors.UserError, match="run it in a clone"):
        code.files(tmp_path)
    with pytest.raises(errors.UserError, match="lies outside of"):
        code.files(code.ROOT, ["/etc/hostname"])
