"""Rows that are written, read, and dropped on resume; rates by a clock that the test turns."""

import io
import json
import math

import pytest

from llm_jax import errors
from llm_jax import metrics


def _write(workdir, resumed_step, rows):
    writer = metrics.Writer(str(workdir), resumed_step)
    for step, scalars in rows:
        writer.write(step, scalars)
    writer.close()


def test_rows_come_back_in_order(tmp_path):
    _write(tmp_path / "new" / "run", 0, [(1, {"train/loss": 2.5}), (2, {"train/loss": 2.25})])
    assert metrics.read(tmp_path / "new" / "run") == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 2.25},
    ]


def test_row_is_on_disk_before_the_next_step(tmp_path):
    writer = metrics.Writer(str(tmp_path), 0)
    writer.write(1, {"a": 1.0})
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1.0}]
    writer.close()


def test_resume_drops_rows_after_the_step(tmp_path):
    _write(tmp_path, 0, [(step, {"a": float(step)}) for step in (1, 2, 3, 4)])
    _write(tmp_path, 2, [(3, {"a": 30.0})])
    assert [(row["step"], row["a"]) for row in metrics.read(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_drops_a_last_row_that_was_cut_off(tmp_path):
    _write(tmp_path, 0, [(1, {"a": 1.0}), (2, {"a": 2.0})])
    path = tmp_path / metrics.FILE_NAME
    path.write_text(path.read_text()[:-6])
    _write(tmp_path, 5, [(6, {"a": 6.0})])
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 6]


def test_resume_keeps_a_whole_last_row_without_a_newline(tmp_path):
    _write(tmp_path, 0, [(1, {"a": 1.0}), (2, {"a": 2.0})])
    path = tmp_path / metrics.FILE_NAME
    path.write_text(path.read_text().rstrip("\n"))
    _write(tmp_path, 5, [(6, {"a": 6.0})])
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 6]


@pytest.mark.parametrize("broken", ['{"ste', "[1]", '{"a": 1}', "7"])
def test_broken_row_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / metrics.FILE_NAME
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(errors.UserError, match="line 2"):
        metrics.Writer(str(tmp_path), 5)
    assert path.read_text().count("\n") == 3  # left as it was


def test_what_is_not_finite_is_a_string(tmp_path):
    _write(tmp_path, 0, [(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / metrics.FILE_NAME).read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1.0}
    assert math.isnan(float(row["a"]))


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator
    import tensorflow as tf

    _write(tmp_path, 0, [(1, {"train/loss": 2.5}), (7, {"train/loss": 1.25, "perf/x": 3.0})])
    events = event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard"), {event_accumulator.TENSORS: 0}
    ).Reload()
    assert set(events.Tags()["tensors"]) == {"train/loss", "perf/x"}
    rows = [(e.step, tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("train/loss")]
    assert rows == [(1, 2.5), (7, 1.25)]


# --- throughput -------------------------------------------------------------------------------


class _Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_rates(clock):
    throughput = metrics.Throughput(num_steps=100, flops_per_token=5.0, peak_flops=1000.0)
    for _ in range(4):
        clock.now += 2.0
        throughput.add(tokens=50, waited=0.5)
    assert throughput.report(step=10) == {
        "perf/tokens_per_second": 25.0,  # 200 tokens in 8 s
        "perf/seconds_per_step": 2.0,
        "perf/input_wait_fraction": 0.25,
        "perf/seconds_left": 180.0,
        "perf/mfu": 0.125,
    }


def test_report_starts_anew(clock):
    throughput = metrics.Throughput(10, 1.0, None)
    clock.now += 100.0
    throughput.add(1.0, 90.0)
    throughput.report(1)
    clock.now += 4.0
    throughput.add(8.0, 1.0)
    assert throughput.report(2) == {
        "perf/tokens_per_second": 2.0,
        "perf/seconds_per_step": 4.0,
        "perf/input_wait_fraction": 0.25,
        "perf/seconds_left": 32.0,
    }


def test_pause_does_not_count(clock):
    throughput = metrics.Throughput(10, 1.0, None)
    throughput.resume()  # without a pause: nothing
    clock.now += 3.0
    throughput.pause()
    clock.now += 1000.0
    throughput.resume()
    clock.now += 1.0
    throughput.add(8.0, 0.0)
    assert throughput.report(1)["perf/tokens_per_second"] == 2.0


def test_report_without_a_step_or_time_is_finite(clock):
    report = metrics.Throughput(10, 1.0, 1.0).report(0)
    assert all(math.isfinite(value) for value in report.values())


# --- the terminal -----------------------------------------------------------------------------

ROW = {
    "train/loss": 3.14159,
    "train/learning_rate": 6e-4,
    "train/num_skipped": 0.0,
    "perf/tokens_per_second": 12345.6,
    "perf/input_wait_fraction": 0.034,
    "perf/seconds_left": 3723.0,
}


def test_progress_line():
    assert metrics.progress_line(7, 1000, ROW) == (
        "step    7/1000  loss 3.1416  lr 6.00e-04  12,346 tokens/s  input wait 3.4%  1:02:03 left"
    )


def test_progress_line_shows_what_is_special():
    line = metrics.progress_line(7, 1000, ROW | {"perf/mfu": 0.412, "train/num_skipped": 2.0})
    assert "MFU 41.2%" in line and "2 updates skipped" in line


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3599, "59:59"), (3600, "1:00:00")],
)
def test_duration(seconds, text):
    assert metrics.format_duration(seconds) == text


class _Tty(io.StringIO):
    def isatty(self):
        return True


def test_terminal_rewrites_its_line():
    stream = _Tty()
    terminal = metrics.Terminal(stream)
    terminal.progress("a long line")
    terminal.progress("short")
    terminal.message("saved")
    terminal.progress("next")
    shown = stream.getvalue()
    assert shown == "\ra long line\rshort      \r     \rsaved\n\rnext"


def test_log_file_gets_a_line_each():
    stream = io.StringIO()
    terminal = metrics.Terminal(stream)
    terminal.progress("one")
    terminal.message("two")
    assert stream.getvalue() == "one\ntwo\n"
