"""What a fine-tuning run starts from: the parameters of another run, or of a converted model.

    config = start.config_of("runs/minilm")     # in a config: its model, its tokenizer, and `tune.start`
    config.model.update(head="sequence", num_labels=20, use_pooler=False)

Parameters that both models have are taken, those that the new one has beside them are drawn: heads and
low-rank updates as a matter of course, others where `tune.fresh` says so.
"""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import jax
import ml_collections

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import patterns
from llm_jax import train_step
from llm_jax import trees
from llm_jax import tuning

_LOG = logging.getLogger(__name__)

_NUM_SHOWN = 6  # names in a message


@dataclasses.dataclass(frozen=True)
class Taken:
    """Which parameters a run takes, by name.

    Attributes:
      arrays: those taken, as they were saved.
      drawn: those that its own model has beside them.
      left: those that its own model has not.
    """

    arrays: Mapping[str, jax.Array]
    drawn: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        drawn = f"; drawn anew: {_listed(self.drawn)}" if self.drawn else ""
        left = f"; left there: {_listed(self.left)}" if self.left else ""
        return f"{len(self.arrays)} arrays taken{drawn}{left}"


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def parse(spec: str) -> tuple[str, int | str | None]:
    """Returns the workdir and the step of "WORKDIR", "WORKDIR@STEP" or "WORKDIR@best"."""
    workdir, at, step = spec.rpartition("@")
    is_step = at and (step == checkpoint.BEST or step.isdigit())
    return (workdir, checkpoint.parse_step(step)) if is_step else (spec, None)


def config_of(spec: str) -> ml_collections.ConfigDict:
    """Returns a config with the model and the tokenizer of a run, that starts from it.

    Raises:
      errors.UserError: there is no such checkpoint.
    """
    workdir, step = parse(spec)
    saved = checkpoint.read_latest(workdir, step, lambda _, meta: meta.config)
    model = dataclasses.replace(
        saved.model, dtype="auto", attention="auto", scan_layers=None, remat="none"
    )
    config = config_lib.new()
    # One by one: an update would not take None where there was a number.
    for name, value in config_lib.to_dict(model).items():
        if isinstance(value, dict):
            config.model[name].update(value)
        else:
            config.model[name] = value
    config.data.tokenizer = f"workdir:{workdir}"
    config.tune.start = spec
    return config


def state(
    config: config_lib.RunConfig,
    rules: Any,
    mesh: jax.sharding.Mesh,
    tokenizer: Mapping[str, Any],
) -> tuple[train_step.TrainState, str]:
    """Returns the state before the first step of a run with `tune.start`, and a line on what it took.

    Args:
      config: of the run.
      rules: of its mesh, which must be set.
      mesh: as it is set.
      tokenizer: of the run, as `to_dict` makes it.

    Raises:
      errors.UserError: there is no such checkpoint, or its parameters or its tokenizer do not fit; says
        which.
    """
    abstract = train_step.abstract_state(config, rules)
    targets = checkpoint.on_mesh(trees.by_name(abstract.model), mesh)
    workdir, step = parse(config.tune.start)

    def read(step_dir: Any, meta: checkpoint.Meta) -> tuple[Taken, int]:
        _check_tokenizer(config, meta, tokenizer)
        return _take(config, step_dir, meta, targets), meta.step

    taken, step = checkpoint.read_latest(workdir, step, read)

    def init() -> tuple[train_step.TrainState, dict[str, jax.Array]]:
        state = train_step.init_state(config, rules)
        drawn = trees.by_name(state.model)
        state = dataclasses.replace(state, model=None)
        return state, {name: drawn[name] for name in taken.drawn}

    # What is taken is not drawn: the compiler leaves out what nothing asks for.
    state, drawn = jax.jit(init)()
    arrays = jax.jit(
        lambda arrays: {name: arrays[name].astype(targets[name].dtype) for name in arrays},
        donate_argnums=0,
    )(dict(taken.arrays))
    model = trees.from_nested(abstract.model, trees.nested(drawn | arrays))
    return dataclasses.replace(state, model=model), f"{workdir}, step {step}: {taken}"


def _check_tokenizer(
    config: config_lib.RunConfig, meta: checkpoint.Meta, tokenizer: Mapping[str, Any]
) -> None:
    is_same = meta.tokenizer == dict(tokenizer)
    if not is_same and not patterns.is_matched("embedding/table_VD", config.tune.fresh):
        raise errors.UserError(
            f"config.tune.start = {config.tune.start!r} was trained with another tokenizer than"
            f" data.tokenizer = {config.data.tokenizer!r}: set it to"
            f" 'workdir:{parse(config.tune.start)[0]}', or draw the table of tokens anew by"
            " tune.fresh = 'embedding/*'"
        )


def _take(
    config: config_lib.RunConfig,
    step_dir: Any,
    meta: checkpoint.Meta,
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> Taken:
    saved = checkpoint.params_of(step_dir, meta)
    if meta.config.model.lora.is_on and not config.model.lora.is_on:
        raise errors.UserError(
            f"config.tune.start = {config.tune.start!r} has low-rank updates beside its matrices: add"
            " them up by python -m llm_jax.convert merge, and start from the result"
        )
    drawn = [
        name
        for name in targets
        if patterns.is_matched(name, config.tune.fresh)
        or (name not in saved and patterns.is_matched(name, ",".join(tuning.NEW)))
    ]
    wrong = []
    for name, target in targets.items():
        if name in drawn:
            continue
        if name not in saved:
            wrong.append(f"{name} is missing there")
        elif saved[name].shape != target.shape:
            wrong.append(
                f"{name} is {saved[name]} there, {target.dtype.name}{[*target.shape]} here"
            )
    if wrong:
        more = f" and {len(wrong) - _NUM_SHOWN} more" if len(wrong) > _NUM_SHOWN else ""
        raise errors.UserError(
            f"config.tune.start = {config.tune.start!r} does not fit the model:"
            f" {'; '.join(wrong[:_NUM_SHOWN])}{more}. Take the model's settings from it"
            " (start.config_of in a config), or name in tune.fresh what is to be drawn"
        )
    for line in checkpoint.differences(meta.config.model, config.model, "config.model"):
        _LOG.info("starting with a change: %s", line)
    wanted = {
        name: jax.ShapeDtypeStruct(target.shape, saved[name].dtype, sharding=target.sharding)
        for name, target in targets.items()
        if name not in drawn
    }
    left = tuple(name for name in saved if name not in wanted)
    return Taken(checkpoint.read_params(step_dir, meta, wanted), tuple(drawn), left)
