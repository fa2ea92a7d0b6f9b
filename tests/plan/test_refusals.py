"""What is said of a program that does not fit: by how much, what takes the memory, what helps."""

import dataclasses

import pytest

from llm_jax.plan import budgets
from llm_jax.plan import estimate as estimate_lib
from llm_jax.plan import refusals

# As libtpu 0.0.50 and before write it.
_SHORT = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (148.23G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)
_LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(train_step)/gradients/dot_general" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 512.00M
     Shape: bf16[64,4096,1024]{2,1,0:T(8,128)(2,1)}
"""


@pytest.fixture(scope="module")
def llama():
    entry = budgets.Entry("llama_7b", "v5e:4x8", {"model.remat": "none"})
    config = entry.config()
    return config, estimate_lib.estimate(config, entry.slice_name)


def test_how_much_is_missing_in_both_forms():
    gib = 1 << 30
    assert refusals.memory_shortage(_SHORT) == (int(148.23 * gib), int(15.75 * gib))
    assert refusals.memory_shortage(_LONG) == (int(63.8 * gib), int(30.75 * gib))
    assert refusals.memory_shortage("INVALID_ARGUMENT: no") is None


def test_allocations_are_named_where_the_compiler_lists_them(llama):
    assert refusals.largest_allocations(_SHORT) == []
    first, second = refusals.largest_allocations(_LONG)
    assert "2.00 GiB" in first and "f32[32,4096,4096]" in first and "dot_general" in first
    assert "512.00 MiB" in second and " in " not in second
    assert first in refusals.explain(_LONG, *llama)


def test_the_largest_part_comes_first_with_what_makes_it_less(llama):
    config, estimate = llama
    assert estimate.saved > estimate.loss
    told = refusals.explain(_SHORT, config, estimate)
    assert "148.23 GiB" in told[0] and "15.75" in told[0]
    assert "activations" in told[1] and "model.remat=dots" in told[1]
    sizes = [float(line.split()[1]) for line in told[1:]]
    assert sizes == sorted(sizes, reverse=True)


def test_advice_follows_the_config(llama):
    config, estimate = llama
    model = dataclasses.replace(config.model, remat="offload")
    strongest = dataclasses.replace(config, model=model)
    told = "\n".join(refusals.explain(_SHORT, strongest, estimate))
    assert "model.remat=" not in told and "accumulation_steps=32" in told
    whole = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules="dp"))
    assert "mesh.rules=fsdp" in "\n".join(refusals.explain(_SHORT, whole, estimate))


def test_slices_without_ragged_exchanges_are_named_with_what_will_do(llama):
    """As the compiler says it of experts over a side of v5e:8x8."""
    text = (
        "INTERNAL: RET_CHECK failure (ragged_all_to_all_emitter.cc:336) Ragged all-to-all is currently not"
        " supported in limited ICI routing settings Error encountered while compiling"
    )
    (told,) = refusals.explain(text, *llama)
    assert "mesh.expert=1" in told and "dispatch=capacity" in told


def test_another_failure_is_not_explained_as_memory(llama):
    assert refusals.explain("INTERNAL: no", *llama) is None
