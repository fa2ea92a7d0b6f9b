"""What kernels cost inside a program, by what they cost alone."""

import dataclasses

import pytest

from llm_jax import config as config_lib
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import of_configs
from llm_jax.kernels.costing import shapes
from llm_jax.plan import planner

# Widths of the latent, of a head's two parts and of its values, all of them others.
_LATENTS = {"kv_latent_dim": 96, "head_dim": 32, "rope_head_dim": 16, "value_head_dim": 24}
_FORWARD, _BACKWARD = "flash_attention_forward", "flash_attention_backward"


def _program(**seconds_and_executions):
    """Returns a program of kernels by name: (seconds, executions)."""
    units = dict.fromkeys(
        ("mxu", "valu", "eup", "xlu", "vector_load", "vector_store", "stall"), 0.0
    )
    rest = {"cycles": 0.0, "hbm_bytes_read": 0, "hbm_bytes_written": 0, "vmem_bytes": 0}
    operations = tuple(
        kernel_cost.KernelCost(
            name, is_kernel=True, num_executions=number, seconds=seconds, **units, **rest
        )
        for name, (seconds, number) in seconds_and_executions.items()
    )
    return kernel_cost.ProgramCost(
        case=kernel_cost.Case("a:b", "v5e:1x1"),
        seconds=0.0,
        exposed_seconds=0.0,
        hbm_bytes_read=0,
        hbm_bytes_written=0,
        memory=kernel_cost.Memory(0, 0, 0, 0, 0, 0),
        mxu=0.0,
        operations=operations,
        collectives=(),
        compile_seconds=0.0,
        not_modelled=(),
        fingerprint="",
    )


_ALONE = _program(**{f"{_FORWARD}.1": (2.0, 1), f"{_BACKWARD}.2": (5.0, 1)})


def _config(num_layers=3, remat="full", context="gather", **mesh):
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(num_layers=num_layers, remat=remat),
        optim=config_lib.OptimConfig(accumulation_steps=2),
        mesh=config_lib.MeshConfig(context=context, **mesh),
    )


def test_kernels_count_as_often_as_the_program_runs_them():
    program = _program(
        **{f"{_FORWARD}.7": (0.1, 6), f"{_FORWARD}.8": (0.2, 6), f"{_BACKWARD}.9": (0.3, 6)}
    )
    exact, guessed = of_configs.step_seconds(_config(), 1, program, _ALONE)
    assert exact == pytest.approx(12 * 2.0 + 6 * 5.0)
    assert guessed == pytest.approx(6 * (0.1 + 0.2 + 0.3))


def test_of_gathered_keys_the_last_part_of_the_queries_sees_most():
    program = _program(**{f"{_FORWARD}.1": (0.1, 6)})
    (whole, _), (part, _) = (of_configs.step_seconds(_config(), n, program, _ALONE) for n in (1, 4))
    # Of 4 x 4 squares, 10 of them in part below the diagonal, it has 3 and a half of 8.
    assert part == pytest.approx(whole * 3.5 / 8)


@pytest.mark.parametrize(("remat", "passes"), [("full", 2), ("attention_output", 1), ("none", 1)])
def test_around_a_ring_passes_count_whatever_the_program_runs(remat, passes):
    config = _config(remat=remat, context="ring")
    program = _program(**{f"{_FORWARD}.{n}": (0.1, 100) for n in range(5)})
    exact, guessed = of_configs.step_seconds(config, 4, program, _ALONE)
    assert exact == pytest.approx(3 * 2 * (passes * 2.0 + 5.0) / 4)
    assert guessed == pytest.approx(50.0)


def test_key_heads_that_do_not_divide_are_held_by_all():
    model = config_lib.ModelConfig(num_heads=8, num_kv_heads=2, embed_dim=64)
    config = dataclasses.replace(config_lib.RunConfig(model=model), slice="v5e:2x2")
    axes = {"replica": 1, "data": 1, "seq": 1, "expert": 1}
    for tensor, heads, key_heads in ((1, 8, 2), (2, 4, 1), (4, 2, 1)):
        case = of_configs.attention(config, "v5e:2x2", axes | {"tensor": tensor})
        shape = case.arguments["shape"]
        assert (shape["heads"], shape["key_heads"]) == (heads, key_heads)
        assert case.slice_name == "v5e:1x1"


@pytest.mark.parametrize("tensor", [1, 4])
def test_latents_are_keys_of_one_head_on_every_device(tensor):
    model = config_lib.ModelConfig(num_heads=8, embed_dim=64, **_LATENTS)
    config = dataclasses.replace(config_lib.RunConfig(model=model), slice="v5e:2x2")
    case = of_configs.decode(config, "v5e:2x2", 3, 256, tensor)
    shape = shapes.Decode(**case.arguments["shape"])
    assert (shape.key_heads, shape.group) == (1, 8 // tensor)
    assert (shape.width, shape.num_values) == (96 + 16, 96)
    # A token is as many bfloat16 numbers, for all heads and for keys and values.
    assert shape.least_bytes == 3 * 256 * (96 + 16) * 2
    axes = {"replica": 1, "data": 1, "seq": 1, "expert": 1, "tensor": tensor}
    expanded = shapes.Attention(**of_configs.attention(config, "v5e:2x2", axes).arguments["shape"])
    assert (expanded.heads, expanded.key_heads) == (8 // tensor, 8 // tensor)
    assert (expanded.width, expanded.value_width) == (32 + 16, 24)


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
def test_latents_on_a_tpu_are_trained_by_the_kernels_and_read_once():
    model = config_lib.ModelConfig(num_heads=8, embed_dim=64, **_LATENTS)
    data = config_lib.DataConfig(batch_size=2, sequence_length=512)
    config = dataclasses.replace(config_lib.RunConfig(model=model, data=data), slice="v5e:1x1")
    axes = dict.fromkeys(("replica", "data", "seq", "expert", "tensor"), 1)
    cases = [
        of_configs.attention(config, "v5e:1x1", axes),
        of_configs.decode(config, "v5e:1x1", 4, 1024, 1),
    ]
    training, generation = kernel_cost.costs(cases, timeout_seconds=planner.TIMEOUT_SECONDS)
    names = " ".join(kernel.name for kernel in training.kernels)
    assert _FORWARD in names and _BACKWARD in names
    assert not generation.kernels
    least = shapes.Decode(**cases[1].arguments["shape"]).least_bytes
    assert least < generation.hbm_bytes_read < 1.1 * least
