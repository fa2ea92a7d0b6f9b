"""What keeps a checkpoint from fitting a run, by name."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.checkpoint import meta as meta_lib

_LOG = logging.getLogger(__name__)


def differences(saved: Any, current: Any, prefix: str) -> list[str]:
    """Returns one line for each setting that differs between two frozen configs."""
    lines = []
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(current, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(old):
            lines += differences(old, new, name)
        elif old != new:
            lines.append(f"{name}: {old!r} in the checkpoint, {new!r} now")
    return lines


def check_resumable(
    meta: meta_lib.Meta, config: config_lib.RunConfig, tokenizer: Mapping[str, Any]
) -> None:
    """Checks that a run can go on from a checkpoint.

    Raises:
      errors.UserError: model, optimiser or tokenizer differ; lists the differences.
    """
    refused = differences(meta.config.model, config.model, "config.model")
    if meta.config.optim.name != config.optim.name:
        names = f"{meta.config.optim.name!r} in the checkpoint, {config.optim.name!r} now"
        refused.append(f"config.optim.name: {names}")
    if meta.tokenizer != dict(tokenizer):
        refused.append("the tokenizer is another one")
    if refused:
        raise errors.UserError(
            f"the checkpoint of step {meta.step} does not fit this config: "
            + "; ".join(refused)
            + ". Use its settings to go on, or a new --workdir to begin anew"
        )
    for line in differences(meta.config, config, "config"):
        _LOG.info("resuming with a change: %s", line)
