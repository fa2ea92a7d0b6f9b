"""A lock between processes, which the kernel frees with the process that holds it."""

from collections.abc import Iterator
import contextlib
import fcntl
import pathlib

from llm_jax import errors


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
    """Waits for the exclusive lock of a file, made here if need be with its directory.

    Raises:
      errors.UserError: the file cannot be made; names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")
    except OSError as error:
        raise errors.UserError(f"data.cache_dir: cannot write {path}: {error}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
