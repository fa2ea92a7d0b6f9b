"""Trains a model: `python -m llm_jax.train --config=configs/tiny.py --workdir=runs/tiny`.

Run it again with the same workdir to go on from the latest checkpoint. SIGTERM saves and exits.
"""

from collections.abc import Iterator
import functools
import json
import logging
import math
import signal
import time
import typing

from etils import epath
import jax
import jax.numpy as jnp

from llm_jax import backend
from llm_jax import checkpoint
from llm_jax import command
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import evaluate
from llm_jax import flops
from llm_jax import mesh as mesh_lib
from llm_jax import metrics as metrics_lib
from llm_jax import preferences
from llm_jax import private_gradients
from llm_jax import sharding
from llm_jax import start
from llm_jax import telemetry
from llm_jax import train_step
from llm_jax import trees
from llm_jax import tuning
from llm_jax.data import batch as batch_lib
from llm_jax.data import pipeline
from llm_jax.data import placement
from llm_jax.data import prepare

_LOG = logging.getLogger(__name__)

_PROFILE_FIRST, _PROFILE_STEPS = 5, 5  # past compilation and warm-up


class NonFiniteError(errors.UserError):
    """The loss or the gradient became NaN or infinite."""


class Preemption:
    """Notes a SIGTERM, to this process or to another one, so that all can save before they end."""

    def __init__(self):
        self._is_requested = False
        self._count = 0
        if distributed.is_running():
            distributed.watch_preemption()
        else:
            signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_):
        self._is_requested = True

    def is_requested(self) -> bool:
        """Returns whether to save and stop now; call it once a step. The same on all processes."""
        self._count += 1
        return self._is_requested or distributed.is_preempted(self._count)


def train(config: config_lib.RunConfig, workdir: str) -> train_step.TrainState:
    """Trains from the latest checkpoint in `workdir`, or from the start, to the last step.

    Returns:
      The last state.

    Raises:
      errors.UserError: bad input of any kind; NonFiniteError where training diverged.
    """
    backend.enable_compilation_cache(config.compilation_cache)
    mesh = mesh_lib.make(config.mesh)
    sharding.check(config, mesh)
    distributed.check_shared(workdir)
    distributed.on_loss(functools.partial(_describe_saved, workdir))
    prepared = prepare.prepare(config)
    prepare.check_same(prepared)
    with jax.set_mesh(mesh):
        run = Run(config, workdir, mesh, prepared)
        _write_config(config, workdir)  # not before: a config that is refused leaves the run's own
        return run.train()


def _describe_saved(workdir: str) -> str:
    """Returns what a run can go on from, for the line that ends it when a process is lost."""
    folder = checkpoint.directory(workdir)
    saved = checkpoint.steps(folder)
    if not saved:
        return f"no checkpoint was saved in {folder}: start all processes again to begin anew"
    return (
        f"step {saved[-1]} in {folder} is the last checkpoint: start all processes again with the"
        " same command to go on from it"
    )


def _write_config(config: config_lib.RunConfig, workdir: str) -> None:
    if distributed.is_main():
        path = epath.Path(workdir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config_lib.to_dict(config), indent=2))


class Run:
    """A run from its first or resumed step to its last: the loop and what it keeps at hand."""

    def __init__(
        self,
        config: config_lib.RunConfig,
        workdir: str,
        mesh: jax.sharding.Mesh,
        prepared: prepare.Prepared,
    ):
        rules = sharding.axis_rules(config.mesh)
        self._config, self._workdir = config, workdir
        self._stage = prepare.training_stage(config, prepared)
        self._batch_sharding = jax.sharding.NamedSharding(mesh, rules.act("BT"))
        self._is_main = distributed.is_main()
        self._is_profiling = False
        self._terminal = metrics_lib.Terminal()
        self._checkpoints = checkpoint.Checkpoints(
            workdir,
            config,
            prepared.tokenizer.to_dict(),
            prepared.labels,
            prepared.chat and prepared.chat.to_dict(),
        )
        self._state = self._first_state(rules, mesh, prepared.tokenizer.to_dict())
        self._first_step = int(self._state.step)
        self._writer = metrics_lib.Writer(workdir, self._first_step) if self._is_main else None
        self._train_step = train_step.make_train_step(config)
        self._telemetry = telemetry.make(config)
        is_compared = config.objective.name == "preference"
        self._reference = preferences.Reference(config, mesh) if is_compared else None
        self._evaluate = evaluate.Evaluator(
            prepared,
            config,
            self._batch_sharding,
            train_step.make_eval_step(config),
            self._reference,
        )
        self._accountant = private_gradients.make_accountant(config, self._stage.num_items)
        lengths = (config.data.sequence_length, config.target_length)
        per_token = flops.train_flops_per_token(config.model, *lengths)
        peak = flops.peak_flops(mesh.devices.flat[0])
        self._throughput = metrics_lib.Throughput(
            config.train.num_steps, per_token, peak and peak * mesh.devices.size
        )

    def _first_state(self, rules, mesh, tokenizer) -> train_step.TrainState:
        def init():
            return train_step.init_state(self._config, rules)

        abstract = train_step.abstract_state(self._config, rules)
        state = self._checkpoints.restore_latest(abstract, mesh)
        if state is not None:
            self._say(f"resumed from the checkpoint of step {int(state.step)}")
            return state
        tuning.check(self._config, trees.by_name(abstract.model))
        if self._config.tune.start:
            state, taken = start.state(self._config, rules, mesh, tokenizer)
            self._say(f"starts from {taken}")
        else:
            state = jax.jit(init)()
        self._say(f"{flops.num_params(state.model):,} parameters, {backend.describe()}")
        learns = tuning.describe(self._config, state.model)
        if learns is not None:
            self._say(learns)
        return state

    def _say(self, line: str) -> None:
        if self._is_main:
            self._terminal.message(line)

    def _batches(self) -> Iterator[batch_lib.Batch]:
        data = self._config.data
        rows = placement.host_rows(self._batch_sharding, (data.batch_size, data.sequence_length))
        host_batches = pipeline.train_batches(
            self._stage,
            data,
            seed=self._config.train.seed,
            start_step=self._first_step,
            rows=rows,
        )
        found = placement.on_mesh(host_batches, self._batch_sharding, data.batch_size, rows)
        return found if self._reference is None else map(self._reference, found)

    # --- the loop -----------------------------------------------------------------------------

    def train(self) -> train_step.TrainState:
        """Runs the remaining steps; see `train`."""
        preemption = Preemption()
        batches = self._batches()
        batch = next(batches)
        pending: tuple[int, train_step.Metrics] | None = None
        num_steps = self._config.train.num_steps
        for step in range(self._first_step + 1, num_steps + 1):
            self._profile(step)
            looked_at = self._look(step, batch)
            # A step never makes the host wait: a stray transfer is an error.
            with (
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=step),
            ):
                self._state, metrics = self._train_step(self._state, batch)
            # While the devices work on this step: fetch its successor's batch, then log the
            # metrics of its predecessor.
            started = time.perf_counter()
            batch = next(batches) if step < num_steps else None
            # A step still running when its successor's batch is there did not wait for it.
            is_idle = metrics["train/loss"].is_ready()
            waited = time.perf_counter() - started if is_idle else 0.0
            self._log(pending, waited)
            pending = step, metrics | looked_at
            is_stopping = preemption.is_requested()
            if self._is_due(step, is_stopping):
                self._log(pending, 0.0)
                pending = None
                self._evaluate_and_save(step, is_stopping)
            if is_stopping and step < num_steps:
                self._say(f"SIGTERM: saved step {step}; run the same command to go on")
                break
        self._stop_profile()
        self._checkpoints.close()
        if self._writer is not None:
            self._writer.close()
        if self._accountant is not None:
            self._say(self._accountant.describe(int(self._state.step)))
        return self._state

    def _look(self, step: int, batch: batch_lib.Batch) -> train_step.Metrics:
        """Returns what goes on inside the step that comes next, where that is asked for."""
        every = self._config.train.telemetry_every
        return self._telemetry(self._state, batch) if every and step % every == 0 else {}

    def _is_due(self, step: int, is_stopping: bool) -> bool:
        return is_stopping or self._is_eval_step(step) or self._is_save_step(step)

    def _is_eval_step(self, step: int) -> bool:
        every = self._config.train.eval_every
        return every > 0 and (step % every == 0 or step == self._config.train.num_steps)

    def _is_save_step(self, step: int) -> bool:
        every = self._config.checkpoint.every
        return step == self._config.train.num_steps or (every > 0 and step % every == 0)

    def _log(self, pending: tuple[int, train_step.Metrics] | None, waited: float) -> None:
        """Fetches the metrics of a step that was dispatched before, checks and writes them."""
        if pending is None:
            return
        step, metrics = pending
        row = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        if self._config.train.on_nonfinite == "stop":
            self._check_finite(step, row)
        self._throughput.add(self._config.tokens_per_step, waited)
        is_last = step == self._config.train.num_steps
        if step % self._config.train.log_every and not is_last:
            return
        row |= self._throughput.report(step)
        if self._accountant is not None:
            row |= self._accountant.metrics(step)
        if self._writer is not None:
            self._writer.write(step, row)
            self._terminal.progress(
                metrics_lib.progress_line(step, self._config.train.num_steps, row)
            )

    def _check_finite(self, step: int, row: dict[str, float]) -> None:
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(row[name]):
                self._raise_nonfinite(step, f"{name} = {row[name]}")

    def _raise_nonfinite(self, step: int, what: str) -> typing.NoReturn:
        self._stop_profile()
        self._checkpoints.close()
        last = self._checkpoints.latest_step()
        if self._writer is not None:
            self._writer.write(step, {"train/diverged": 1.0})
        kept = "no checkpoint was saved before" if last is None else f"step {last} is the last good"
        raise NonFiniteError(
            f"{what} at step {step}; {kept} ({checkpoint.directory(self._workdir)})."
            " Lower config.optim.learning_rate, lengthen config.optim.warmup_steps, or set"
            " config.train.on_nonfinite=skip to leave such updates out, and run again"
        )

    def _evaluate_and_save(self, step: int, is_stopping: bool) -> None:
        self._throughput.pause()
        # Loss and gradient of this step can be finite and its update not: that shows a step later.
        if self._config.train.on_nonfinite == "stop" and not _is_finite(self._state.model):
            self._raise_nonfinite(step, "a parameter is not finite")
        eval_loss = None
        # A machine that is about to be taken away has seconds: they go to the checkpoint.
        if self._is_eval_step(step) and not is_stopping:
            scores = self._evaluate(self._state.model)
            eval_loss = next(iter(scores.values()))
            if self._writer is not None:
                self._writer.write(step, scores)
            self._say(f"step {step}  {evaluate.format_scores(scores)}")
        if self._is_save_step(step) or is_stopping:
            self._checkpoints.save(self._state, eval_loss)
        self._throughput.resume()

    def _profile(self, step: int) -> None:
        # Of several processes the first alone: traces of one machine would take the same names, and
        # the hosts of a pod do the same.
        if not (self._config.profile and self._is_main):
            return
        # Runs that end before are traced from their first step.
        first = self._first_step + 1
        if first + _PROFILE_FIRST <= self._config.train.num_steps:
            first += _PROFILE_FIRST
        if step == first:
            jax.profiler.start_trace(str(epath.Path(self._workdir) / "profile"))
            self._is_profiling = True
        elif step == first + _PROFILE_STEPS:
            self._stop_profile()

    def _stop_profile(self) -> None:
        if not self._is_profiling:
            return
        self._is_profiling = False
        jax.block_until_ready(self._state)
        jax.profiler.stop_trace()
        path = epath.Path(self._workdir) / "profile"
        self._say(f"wrote a trace of up to {_PROFILE_STEPS} steps to {path}; view it with xprof")


@jax.jit
def _is_finite(tree: typing.Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def define_flags() -> None:
    command.define_config()
    command.define_workdir("Folder of the run (checkpoints, metrics, config), local or gs://.")
    command.define_processes()


def main() -> None:
    train(command.config_from_flags(), command.required("workdir"))


if __name__ == "__main__":
    command.run(main, define_flags)
