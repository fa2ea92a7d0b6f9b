"""A conversion's memory stays below the model and two tensors, counted by the kernel in a process of its own."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.convert import tensors
from tests import commands
from tests.convert import folders

_MIB = 1 << 20
# Programs that are compiled, and what the allocator keeps: measured 10 to 35 MiB.
_BESIDE = 64 * _MIB

_CHILD = """
import json, pathlib, sys
from llm_jax.convert import exporting, importing, source

def resident(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def peak_of(work):
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    work()
    return resident("VmHWM") - before

def there(folder):
    opened = source.open_folder(pathlib.Path(folder), has_tokenizer=False)
    importing.import_model(opened, folder + "_run", importing.Options(has_tokenizer=False))

def back(folder):
    out = pathlib.Path(folder + "_back")
    exporting.export_model(folder + "_run", out, None, exporting.Options())

small, large = sys.argv[1:]
for convert in (there, back):  # loads all code
    convert(small)
print(json.dumps([peak_of(lambda: convert(large)) for convert in (there, back)]))
"""


def _write_llama(folder: pathlib.Path) -> dict[str, tensors.TensorInfo]:
    """Writes a random model of 330 MB, most of it in layers."""
    width, mlp_width, vocab_size, num_layers = 512, 2048, 32_000, 12
    shapes = {"model.embed_tokens": (vocab_size, width), "model.norm": (width,)}
    shapes |= {"lm_head": (vocab_size, width)}
    for layer in (f"model.layers.{i}" for i in range(num_layers)):
        shapes |= {f"{layer}.self_attn.{x}_proj": (width, width) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj": (mlp_width, width) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (width, mlp_width)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{layer}.{norm}": (width,) for norm in norms}
    dtype = np.dtype(np.float32)
    infos = {f"{name}.weight": tensors.TensorInfo(s, dtype) for name, s in sorted(shapes.items())}
    writer = tensors.Writer(folder, infos, {"format": "pt"}, 10**9)
    rng = np.random.default_rng(0)
    for name, info in infos.items():
        writer.put(name, rng.standard_normal(info.shape, dtype))
    writer.close()
    settings = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return infos


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_the_host_holds_the_model_and_two_tensors(tmp_path):
    small = folders.copy("llama2", tmp_path / "small")
    large = tmp_path / "large"
    large.mkdir()
    sizes = sorted(info.num_bytes for info in _write_llama(large).values())
    # Freed memory is given back at once, so that it is not counted.
    environment = commands.child_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, str(small), str(large)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    there, back = json.loads(ran.stdout)
    bound = sum(sizes) + sum(sizes[-2:]) + _BESIDE
    assert sum(sizes) < there < bound, f"{there / _MIB:.0f} MiB of {bound / _MIB:.0f}"
    assert back < bound, f"{back / _MIB:.0f} MiB of {bound / _MIB:.0f}"
    print(f"{there / _MIB:.0f} and {back / _MIB:.0f} of {bound / _MIB:.0f} MiB")
