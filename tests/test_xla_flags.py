"""The compiler takes every flag of the table, on programs that would make use of them."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from llm_jax import errors
from llm_jax import xla_flags
from llm_jax.aot import chips
from llm_jax.aot import topology

PROGRAM = pathlib.Path(__file__).parent / "aot" / "sharded_product.py"
FOUR_CHIPS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")


def _compile(slice_name: str, flags: tuple[str, ...]) -> subprocess.CompletedProcess:
    environment = os.environ | topology.ENVIRONMENT
    environment |= {"JAX_PLATFORMS": "cpu", xla_flags.VARIABLE: " ".join(flags)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, str(PROGRAM), slice_name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", FOUR_CHIPS)
def test_the_compiler_takes_the_flags_of_each_generation(chip):
    done = _compile(FOUR_CHIPS[chip], xla_flags.for_chip(chip, num_slices=2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["compiled", "all_gather", "reduce_scatter"]


@needs_libtpu
@pytest.mark.slow
def test_an_unknown_name_does_not_pass():
    done = _compile(FOUR_CHIPS["v5p"], ("--xla_tpu_enable_latency_hiding_schedular=true",))
    assert done.returncode != 0
    assert "Unknown command line flag" in done.stderr + done.stdout


@needs_libtpu
@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="older libtpu compiles what it should not"
)
def test_flags_of_another_generation_do_not_pass():
    done = _compile(FOUR_CHIPS["v5p"], xla_flags.for_chip("v5e"))
    assert done.returncode != 0
    assert "not supported/recommended on platforms other than TPU v5e" in done.stderr


def test_there_is_a_row_for_every_chip_and_no_flag_twice():
    assert set(FOUR_CHIPS) == set(chips.CHIPS)
    for chip in chips.CHIPS:
        names = [flag.name for flag in xla_flags.flags(chip, num_slices=2)]
        assert len(names) == len(set(names)) > 2
        assert all(flag.reason for flag in xla_flags.flags(chip, num_slices=2))
    with pytest.raises(errors.UserError, match="did you mean 'v5"):
        xla_flags.for_chip("v5f")


def test_flags_for_the_network_come_with_the_second_slice():
    one, two = xla_flags.for_chip("v5e"), xla_flags.for_chip("v5e", num_slices=2)
    assert two[: len(one)] == one
    assert any("data_parallel" in flag for flag in two[len(one) :])
    assert not any("data_parallel" in flag for flag in one)


def test_flags_that_are_given_have_the_last_word():
    text = xla_flags.init_args("v5e", given=" --xla_enable_async_all_gather=false  --xla_x=1 ")
    assert text.split()[-2:] == ["--xla_enable_async_all_gather=false", "--xla_x=1"]
    assert text.split()[:-2] == list(xla_flags.for_chip("v5e"))
