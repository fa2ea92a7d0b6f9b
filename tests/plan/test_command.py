"""`python -m llm_jax.plan`, as it is typed; the programs are really compiled."""

import pathlib
import re
import subprocess
import sys

import pytest

from llm_jax.aot import topology

ROOT = pathlib.Path(__file__).parents[2]
_SMALL = ("--config=configs/tiny.py", "--config.model.num_layers=2", "--slice=v5e:2x2")

needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")


def _plan(*arguments, cache=""):
    command = [sys.executable, "-m", "llm_jax.plan", *arguments, f"--cache={cache}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _number(text, pattern):
    return float(re.search(pattern, text)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config=configs/tiny.py",), "config.slice = cpu"),
        ((*_SMALL, "--search", "--batch_sizes=a"), "--batch_sizes=a"),
        ((*_SMALL, "--sampling", "--tensor=3"), "config.mesh"),
        (
            ("--config=configs/tiny_t5.py", "--slice=v5e:2x2", "--sampling"),
            "plans decoders of text, not model.architecture = 'encoder_decoder'",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    done = _plan(*arguments)
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert (done.returncode, line[:7]) == (2, "error: ")
    assert said in line
    assert not done.stdout


@needs_libtpu
@pytest.mark.long
def test_a_plan_adds_up_and_is_kept(tmp_path):
    done = _plan(*_SMALL, cache=str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    parts = [
        _number(text, rf"{part} +([\d.,]+) ms")
        for part in ("attention kernels", "other operations", "waiting for other chips")
    ]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(_number(text, r"  step +([\d.,]+) ms"), abs=0.3)
    held = _number(text, r"headroom +([\d.,]+)") + _number(text, r"peak +([\d.,]+)")
    assert held == pytest.approx(15.75, abs=0.02)
    assert re.search(r"all-gather +data +\d", text)
    kept = sorted(path.name for path in tmp_path.iterdir())
    again = _plan(*_SMALL, cache=str(tmp_path))
    assert again.stdout == text
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@needs_libtpu
@pytest.mark.long
def test_what_does_not_fit_is_explained():
    done = _plan(*_SMALL, "--config.data.batch_size=262144", "--config.model.max_length=512")
    assert done.returncode == 1, done.stderr
    assert "does not fit: needs" in done.stdout
    assert "where a program may have 15.75" in done.stdout
    assert "optim.accumulation_steps=2" in done.stdout


@needs_libtpu
@pytest.mark.long
def test_a_search_ranks_what_it_compiled_and_says_how_to_have_it():
    done = _plan(*_SMALL, "--search", "--compile=2", "--batch_sizes=16")
    assert done.returncode == 0, done.stderr
    times = re.findall(r"^  \d\. +([\d.,]+) ", done.stdout, re.MULTILINE)
    assert len(times) == 2
    assert float(times[0]) <= float(times[1])
    assert len(re.findall(r"--config\.mesh\.data=\d", done.stdout)) == 2


@needs_libtpu
@pytest.mark.long
def test_sampling_is_planned():
    sizes = ("--num_prompts=8", "--prompt_length=64", "--max_tokens=64", "--tensor=2")
    done = _plan(*_SMALL, "--sampling", *sizes)
    assert done.returncode == 0, done.stderr
    prefill, token = re.search(r"time, modelled +([\d.]+) ms +([\d.]+) ms", done.stdout).groups()
    assert 0 < float(token) < float(prefill)
