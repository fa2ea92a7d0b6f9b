"""One pass over a split, and the command `python -m llm_jax.evaluate --workdir=... [--tasks=...]`.

The command scores a finished or running experiment's checkpoint with the config that the checkpoint carries.
`--config=FILE` scores it on the data and by the objective of another one: what a model knew before it learned
something, or has forgotten since. Tasks are in `llm_jax/evaluation/tasks.py`.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags
from etils import epath
import jax
from ml_collections import config_flags

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import losses
from llm_jax import mesh as mesh_lib
from llm_jax import preferences
from llm_jax import sharding
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.data import chat as chat_lib
from llm_jax.data import objectives
from llm_jax.data import pipeline
from llm_jax.data import placement
from llm_jax.data import prepare
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.evaluation import files
from llm_jax.evaluation import tasks
from llm_jax.models import build


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Scores a model on one split.

    Attributes:
      prepared: data of the run, of which the evaluation split is scored.
      config: of the run.
      batch_sharding: of a global batch.
      eval_step: from `train_step.make_eval_step`.
      reference: of preferences, the model that training started from.
    """

    prepared: prepare.Prepared
    config: config_lib.RunConfig
    batch_sharding: jax.sharding.NamedSharding
    eval_step: Callable[[build.Model, batch_lib.Batch], losses.LossSums]
    reference: Callable[[batch_lib.Batch], batch_lib.Batch] | None = None

    def __call__(self, model: build.Model) -> dict[str, float]:
        """Returns `eval/<split>/loss` (nats a token), `perplexity` and, of text, `bits_per_byte`."""
        total = None
        for batch in self._batches():
            sums = self.eval_step(model, batch)
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        total = jax.device_get(total)
        loss = float(total.cross_entropy) / max(float(total.weight), 1.0)
        cache = self.prepared.eval
        prefix = f"eval/{cache.manifest.split}"
        perplexity = math.exp(min(loss, 700.0))  # exp(710) overflows
        scores = {f"{prefix}/loss": loss, f"{prefix}/perplexity": perplexity}
        if self.config.objective.name == "causal":  # all tokens of a text are predicted
            tokens_per_byte = cache.num_tokens / max(cache.num_bytes, 1)
            scores[f"{prefix}/bits_per_byte"] = loss / math.log(2) * tokens_per_byte
        return scores

    @functools.cached_property
    def _stage(self) -> objectives.Stage:
        return objectives.make(self.config, self.prepared.eval, self.prepared.tokenizer)

    def _batches(self) -> Iterator[batch_lib.Batch]:
        data = self.config.data
        shape = (data.batch_size, data.sequence_length)
        rows = placement.host_rows(self.batch_sharding, shape)
        host_batches = pipeline.eval_batches(
            self._stage, data, rows=rows, num_steps=self.config.train.eval_steps
        )
        found = placement.on_mesh(host_batches, self.batch_sharding, data.batch_size, rows)
        return found if self.reference is None else map(self.reference, found)


def format_scores(scores: dict[str, float]) -> str:
    """Returns the scores of one split as a line for the terminal."""
    named = {name.rpartition("/")[2]: value for name, value in scores.items()}
    split = next(iter(scores)).split("/")[1]
    return f"{split}: " + "  ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in named.items()
    )


def define_flags() -> None:
    command.define_workdir("Folder of the run to score.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_list("tasks", ["loss"], "What to score; see llm_jax.evaluation.tasks.")
    flags.DEFINE_string("split", None, "Of a TFDS source; data.eval_split if not given.")
    flags.DEFINE_string(
        "source", None, "Instead of data.eval_source, all of it: a test split, say."
    )
    flags.DEFINE_integer("num_beams", 1, "Of generation: 1 is greedy.", 1)
    flags.DEFINE_integer("max_tokens", None, "Of generation: of a text; 128 if they fit.", 1)
    flags.DEFINE_integer("stride", None, "Of perplexity: tokens between windows; half of one.", 1)
    command.define_config()
    command.define_processes()


def main() -> None:
    given = flags.FLAGS
    other = command.config_from_flags() if given.config is not None else None
    step = checkpoint.parse_step(given.step)
    options = tasks.Options(given.num_beams, given.max_tokens, given.stride)
    names = [name.strip() for name in given.tasks]

    def read(step_dir: epath.Path, meta: checkpoint.Meta) -> list[dict[str, Any]]:
        changed = meta.config if other is None else scored_like(meta.config, other)
        changed = dataclasses.replace(changed, data=_data(changed.data))
        for name in names:
            if name != "loss":
                tasks.check(name, changed)
        meta = dataclasses.replace(meta, config=changed)
        return run(step_dir, meta, command.required("workdir"), names, options, _name_of_data())

    for found in checkpoint.read_latest(command.required("workdir"), step, read):
        if not distributed.is_main():
            continue
        if "task" in found:
            print(tasks.table(found), file=sys.stderr)
        print(json.dumps(found))


def scored_like(config: config_lib.RunConfig, other: config_lib.RunConfig) -> config_lib.RunConfig:
    """Returns the config of a run with the data and the objective of another one."""
    return dataclasses.replace(config, data=other.data, objective=other.objective, tune=other.tune)


def _data(data: config_lib.DataConfig) -> config_lib.DataConfig:
    """Returns where the flags say that what is scored comes from."""
    split, source = flags.FLAGS.split, flags.FLAGS.source
    if source is not None:
        data = dataclasses.replace(data, eval_source=source)
    if split is not None and not (data.eval_source or data.source).startswith("tfds:"):
        raise errors.UserError(
            f"--split={split}: files have no splits but what the run held out; name files of their own"
            " by --source"
        )
    return data if split is None else dataclasses.replace(data, eval_split=split)


def _name_of_data() -> str:
    """Returns how files of scores tell what the flags ask for from what the run has."""
    given, name = flags.FLAGS, ""
    if given.source is not None:
        name = files.name_of(given.source)
    elif given.config is not None:
        path, _, _ = config_flags.get_config_filename(given["config"]).partition(":")
        name = pathlib.PurePath(path).stem
    return "-".join(filter(None, [name, given.split]))


def score(step_dir: epath.Path, meta: checkpoint.Meta) -> dict[str, float]:
    """Returns the scores of a checkpoint on the evaluation split of its own config."""
    (found,) = run(step_dir, meta, "", ["loss"], tasks.Options())
    return found


def run(
    step_dir: epath.Path,
    meta: checkpoint.Meta,
    workdir: str,
    names: Sequence[str],
    options: tasks.Options,
    of: str = "",
) -> list[dict[str, Any]]:
    """Returns what tasks found of a checkpoint, in their order; all but `loss` write it to the workdir too."""
    config = dataclasses.replace(meta.config, mesh=config_lib.MeshConfig(rules="fsdp"))
    mesh = mesh_lib.make(config.mesh)
    sharding.check(config, mesh)
    rules = sharding.axis_rules(config.mesh)
    with jax.set_mesh(mesh):
        abstract = build.abstract_model(config.model, rules)
        model = checkpoint.restore_params(step_dir, meta, abstract, mesh)
    # As the checkpoint has them: what it was trained on need not be here.
    tokenizer = tokenizer_lib.from_dict(meta.tokenizer)
    chat = chat_lib.of_checkpoint(meta)
    cache = prepare.prepare_split(config, config.data.eval_split, tokenizer, meta.labels, chat)
    prepare.check_same(prepare.Prepared(cache, cache, tokenizer))
    given = tasks.Checkpoint(workdir, meta, config, model, mesh, rules, cache, tokenizer, of)
    return [_loss(given) if name == "loss" else tasks.run(name, given, options) for name in names]


def _loss(given: tasks.Checkpoint) -> dict[str, float]:
    evaluator = Evaluator(
        prepare.Prepared(given.cache, given.cache, given.tokenizer),
        given.config,
        jax.sharding.NamedSharding(given.mesh, given.rules.act("BT")),
        train_step.make_eval_step(given.config),
    )
    with jax.set_mesh(given.mesh):
        if given.config.objective.name == "preference":
            reference = preferences.Reference(given.config, given.mesh)
            evaluator = dataclasses.replace(evaluator, reference=reference)
        return {"step": given.meta.step} | evaluator(given.model)


if __name__ == "__main__":
    command.run(main, define_flags)
