"""Every config for TPUs compiles for the slice that it names, and attends by the kernels."""

import importlib
import pathlib

import pytest

from llm_jax import config as config_lib
from llm_jax.aot import chips
from llm_jax.aot import steps
from llm_jax.aot import topology


def _config(name):
    return config_lib.from_config_dict(importlib.import_module(f"configs.{name}").get_config())


NAMES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    if path.stem != "__init__" and _config(path.stem).slice != "cpu"
)


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_config_compiles_for_its_slice_with_the_kernels(name):
    config = _config(name)
    devices = topology.devices(config.slice)
    compiled = steps.train_step(devices, config=config_lib.to_dict(config)).compile()
    text = compiled.as_text()
    for kernel in ("flash_attention_forward", "flash_attention_backward"):
        assert kernel in text, kernel
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert needed < chips.by_name(config.slice.partition(":")[0]).hbm_bytes
