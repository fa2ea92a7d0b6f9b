"""What keeps a checkpoint from fitting: arrays by path, and the settings that are responsible.

A setting is responsible for an array if changing it alone changes that array: found by building the
arrays of such configs, as shapes alone, so there is no table of settings to keep up to date.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import meta as meta_lib

_LOG = logging.getLogger(__name__)

_NUM_SHOWN = 3  # arrays that an error of one line names


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """An array that is not the same in a checkpoint and in what it is held against.

    Attributes:
      path: its name, the part first.
      saved: as the checkpoint has it; None: missing.
      wanted: as it should be; None: unexpected.
      settings: names of those that are responsible, of the ones that differ.
    """

    path: str
    saved: meta_lib.ArrayInfo | None
    wanted: meta_lib.ArrayInfo | None
    settings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Returns missing, unexpected, other shape, other dtype, or the last two in one."""
        if self.saved is None:
            return "missing"
        if self.wanted is None:
            return "unexpected"
        others = [name for name in ("shape", "dtype") if _differs(self.saved, self.wanted, (name,))]
        return f"other {' and '.join(others)}"

    def __str__(self) -> str:
        saved = "not saved" if self.saved is None else f"saved as {self.saved}"
        wanted = "not wanted" if self.wanted is None else f"wanted as {self.wanted}"
        because = f" because of {', '.join(self.settings)}" if self.settings else ""
        return f"{self.path} is {saved}, {wanted}{because}"


def _differs(a: Any, b: Any, names: tuple[str, ...] = ("shape", "dtype")) -> bool:
    return any(getattr(a, name, None) != getattr(b, name, None) for name in names)


def compare(
    saved: contents.Arrays,
    wanted: contents.Arrays,
    saved_config: config_lib.RunConfig,
    wanted_config: config_lib.RunConfig,
) -> list[Mismatch]:
    """Returns each array that differs, with the settings that are responsible; empty if none."""
    paths = [p for p in saved | wanted if _differs(saved.get(p), wanted.get(p))]
    if not paths:
        return []
    blamed = _responsible(paths, saved_config, wanted_config)
    return [Mismatch(p, saved.get(p), wanted.get(p), tuple(blamed[p])) for p in paths]


def _responsible(
    paths: list[str], saved: config_lib.RunConfig, wanted: config_lib.RunConfig
) -> dict[str, list[str]]:
    parts = tuple(sorted({contents.part_of(path) for path in paths}))
    names = [n for n in differing(saved, wanted) if n.startswith(("model.", "optim."))]
    if not names:
        return {path: [] for path in paths}
    forth = {name: _changes(saved, wanted, name, parts) for name in names}
    # Some cannot be changed alone (a count of heads that must divide the new width), and some do
    # nothing alone (biases of norms that have none): those are changed back in the other config.
    explained = frozenset().union(*filter(None, forth.values()))
    is_enough = explained.issuperset(paths)
    found = {}
    for name, changed in forth.items():
        if changed is None or not is_enough:
            back = _changes(wanted, saved, name, parts) or frozenset()
            changed = (changed or frozenset()) | (back if changed is None else back - explained)
        found[name] = changed
    blamed = {path: [f"config.{n}" for n in names if path in found[n]] for path in paths}
    return {path: some or [f"config.{n}" for n in names] for path, some in blamed.items()}


def _changes(
    config: config_lib.RunConfig, other: config_lib.RunConfig, name: str, parts: tuple[str, ...]
) -> frozenset[str] | None:
    """Returns the arrays that differ if `config` takes one setting of `other`; None: it cannot."""
    changed = _with_setting(config, name, _setting(other, name))
    try:
        config_lib.check(changed)
    except errors.UserError:
        return None
    before, after = contents.of_config(config, parts), contents.of_config(changed, parts)
    return frozenset(p for p in before | after if _differs(before.get(p), after.get(p)))


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _with_setting(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    if rest:
        value = _with_setting(getattr(config, first), rest, value)
    return dataclasses.replace(config, **{first: value})


def differing(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ between two frozen configs, by their dotted names."""
    found = {}
    for field in dataclasses.fields(old):
        values = getattr(old, field.name), getattr(new, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(values[0]):
            found |= differing(*values, f"{name}.")
        elif values[0] != values[1]:
            found[name] = values
    return found


def differences(saved: Any, current: Any, prefix: str) -> list[str]:
    """Returns one line for each setting that differs between two frozen configs."""
    return [
        f"{prefix}.{name}: {old!r} in the checkpoint, {new!r} now"
        for name, (old, new) in differing(saved, current).items()
    ]


def refused(
    meta: meta_lib.Meta, config: config_lib.RunConfig, tokenizer: Mapping[str, Any] | None
) -> list[str]:
    """Returns one line for each change that a resuming run may not make.

    Args:
      meta: of the checkpoint.
      config: of the run.
      tokenizer: of the run, as `to_dict` makes it; None: not looked at.
    """
    lines = differences(meta.config.model, config.model, "config.model")
    if meta.config.optim.name != config.optim.name:
        names = f"{meta.config.optim.name!r} in the checkpoint, {config.optim.name!r} now"
        lines.append(f"config.optim.name: {names}")
    if tokenizer is not None and meta.tokenizer != dict(tokenizer):
        lines.append("the tokenizer is another one")
    return lines


def check_resumable(
    meta: meta_lib.Meta,
    config: config_lib.RunConfig,
    tokenizer: Mapping[str, Any],
    mismatches: Iterable[Mismatch] = (),
) -> None:
    """Checks that a run can go on from a checkpoint.

    Raises:
      errors.UserError: model, optimiser or tokenizer differ; lists the differences.
    """
    lines = refused(meta, config, tokenizer)
    named = shown(list(mismatches))
    if lines:
        raise errors.UserError(
            f"the checkpoint of step {meta.step} does not fit this config: "
            + "; ".join(lines + named)
            + ". Use its settings to go on, or a new --workdir to begin anew"
        )
    if named:
        raise errors.UserError(
            f"the checkpoint of step {meta.step} does not fit this code: "
            + "; ".join(named)
            + f". Use the version that saved it{_other_version(meta)}, or a new --workdir to begin"
            " anew"
        )
    for line in differences(meta.config, config, "config"):
        _LOG.info("resuming with a change: %s", line)


def check_params(step_dir: Any, meta: meta_lib.Meta, wanted: contents.Arrays) -> None:
    """Checks that a checkpoint has the parameters that its config calls for.

    Args:
      step_dir: folder of the step.
      meta: of that step.
      wanted: parameters of the model that was built of `meta.config`.

    Raises:
      DamagedError: there is no telling which parameters it has.
      errors.UserError: they are others; lists some.
    """
    saved, _ = contents.read(step_dir, meta, (contents.PARAMS,))
    mismatches = compare(saved, wanted, meta.config, meta.config)
    if mismatches:
        raise errors.UserError(
            f"{step_dir} does not have the model that this code makes of its config: "
            + "; ".join(shown(mismatches))
            + f". Use the version that saved it{_other_version(meta)}"
        )


def shown(mismatches: list[Mismatch]) -> list[str]:
    """Returns the first mismatches as text, and how many there are beside them."""
    lines = [str(mismatch) for mismatch in mismatches[:_NUM_SHOWN]]
    if len(mismatches) > _NUM_SHOWN:
        lines.append(f"and {len(mismatches) - _NUM_SHOWN} arrays more")
    return lines


def _other_version(meta: meta_lib.Meta) -> str:
    theirs = meta_lib.describe_versions(meta.versions)
    ours = meta_lib.describe_versions(meta_lib.code_version())
    return f" ({theirs}; this is {ours})"
