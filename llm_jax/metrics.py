"""What a run tells: metrics.jsonl, TensorBoard, and a line on the terminal."""

from collections.abc import Iterator
from collections.abc import Mapping
import json
import math
import os
import sys
import time

from etils import epath

from llm_jax import errors

Value = float | list  # of a metric, of each layer, or of each expert of each layer

FILE_NAME = "metrics.jsonl"


class Writer:
    """Writes scalars of the first process of a run to its workdir.

    A run that resumes at step n drops the rows after n that the interrupted one had written: it
    will write them again.
    """

    def __init__(self, workdir: str, resumed_step: int):
        import tensorflow as tf  # several seconds: not for those who only read metrics

        self._tf = tf
        path = tf.io.gfile.join(workdir, FILE_NAME)
        tf.io.gfile.makedirs(workdir)
        _truncate(tf.io.gfile, path, resumed_step)
        self._file = tf.io.gfile.GFile(path, "a")
        self._board = tf.summary.create_file_writer(tf.io.gfile.join(workdir, "tensorboard"))

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Appends one row. JSON has no NaN: what is not finite is written as a string.

        Of lists TensorBoard gets each number by its place in them; lists of lists are in the file alone.
        """
        row = {"step": step} | {name: _json(value) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        with self._board.as_default():
            for name, value in _scalars(values):
                self._tf.summary.scalar(name, value, step=step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._board.close()


def _json(value: Value) -> float | str | list:
    if isinstance(value, list):
        return [_json(one) for one in value]
    return value if math.isfinite(value) else str(value)


def _scalars(values: Mapping[str, Value]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if not isinstance(value, list):
            yield name, value
        elif value and not isinstance(value[0], list):
            yield from ((f"{name}/{index:02}", one) for index, one in enumerate(value))


def _truncate(gfile, path: str, last_step: int) -> None:
    """Drops the rows after `last_step`, and a last row that was cut off while it was written."""
    if not gfile.exists(path):
        return
    with gfile.GFile(path) as file:
        lines = file.read().splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise errors.UserError(f"{path} line {number} is not a row of metrics") from error
        if is_kept:
            kept.append(line)
    temporary = path + ".tmp"
    with gfile.GFile(temporary, "w") as file:
        file.write("".join(line + "\n" for line in kept))
    gfile.rename(temporary, path, overwrite=True)


def read(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """Returns the rows of a run's `metrics.jsonl`, in order; raises FileNotFoundError."""
    text = (epath.Path(workdir) / FILE_NAME).read_text()
    return [json.loads(line) for line in text.splitlines()]


def steps_left(workdir: str | os.PathLike) -> int:
    """Returns how many steps a run has still to take: a run that was stopped by SIGTERM ends well, too.

    Raises:
      FileNotFoundError: nothing ran there.
    """
    config = json.loads((epath.Path(workdir) / "config.json").read_text())
    last = max((row["step"] for row in read(workdir)), default=0)
    return config["train"]["num_steps"] - last


class Throughput:
    """Tokens a second, share of time spent waiting for input, and time left.

    Time between `pause` and `resume` (evaluation, saving) does not count.
    """

    def __init__(self, num_steps: int, flops_per_token: float, peak_flops: float | None):
        self._num_steps = num_steps
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._start = time.perf_counter()
        self._tokens = 0.0
        self._steps = 0
        self._waited = 0.0
        self._paused_at: float | None = None

    def add(self, tokens: float, waited: float) -> None:
        """Counts one finished step: its tokens, and the seconds that devices waited for a batch."""
        self._tokens += tokens
        self._steps += 1
        self._waited += waited

    def pause(self) -> None:
        """Stops the clock."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock again."""
        if self._paused_at is not None:
            self._start += time.perf_counter() - self._paused_at
            self._paused_at = None

    def report(self, step: int) -> dict[str, float]:
        """Returns the rates since the last report, and starts counting anew."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        report = {
            "perf/tokens_per_second": rate,
            "perf/seconds_per_step": seconds / max(self._steps, 1),
            "perf/input_wait_fraction": self._waited / seconds,
            "perf/seconds_left": seconds / max(self._steps, 1) * (self._num_steps - step),
        }
        if self._peak_flops is not None:
            report["perf/mfu"] = rate * self._flops_per_token / self._peak_flops
        self._start, self._tokens, self._steps, self._waited = now, 0.0, 0, 0.0
        return report


def format_duration(seconds: float) -> str:
    """Returns `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_line(step: int, num_steps: int, row: Mapping[str, float]) -> str:
    """Returns the terminal's line on a step of training."""
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"loss {row['train/loss']:.4f}",
        f"lr {row['train/learning_rate']:.2e}",
        f"{row['perf/tokens_per_second']:,.0f} tokens/s",
        f"input wait {row['perf/input_wait_fraction']:.1%}",
    ]
    if "perf/mfu" in row:
        parts.append(f"MFU {row['perf/mfu']:.1%}")
    if row["train/num_skipped"]:
        parts.append(f"{row['train/num_skipped']:.0f} updates skipped")
    parts.append(f"{format_duration(row['perf/seconds_left'])} left")
    return "  ".join(parts)


class Terminal:
    """Shows progress: one line rewritten in place on a terminal, a line each otherwise."""

    def __init__(self, stream=None):
        self._stream = sys.stderr if stream is None else stream
        self._is_rewriting = self._stream.isatty()
        self._width = 0

    def progress(self, line: str) -> None:
        """Shows a line that the next one may replace."""
        if self._is_rewriting:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, line: str) -> None:
        """Shows a line that stays."""
        if self._is_rewriting and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(line + "\n")
        self._stream.flush()
