"""What the report and the budgets compile is what it says, and keeps what a chip has busy."""

import dataclasses

import pytest

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import programs
from llm_jax.kernels.costing import shapes


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is optional")
def test_documents_cost_less_than_a_causal_row_and_nothing_is_guessed():
    causal = shapes.Attention(batch=1, length=2048, heads=2)
    packed = dataclasses.replace(causal, mask="packed 256")
    decode = shapes.Decode((200, 1000), key_heads=2)
    cases = [
        kernel_cost.Case(programs.target(name), "v6e:1x1", {"shape": dataclasses.asdict(shape)})
        for name, shape in (("attention", causal), ("attention", packed), ("decode", decode))
    ]
    whole, documents, step = kernel_cost.costs(cases)
    assert whole.is_exact and documents.is_exact and step.is_exact
    assert documents.seconds < whole.seconds
    (kernel,) = step.kernels
    assert decode.least_bytes <= kernel.hbm_bytes_read < 1.2 * decode.least_bytes


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is optional")
def test_a_single_row_occupies_both_cores_of_a_chip():
    row = shapes.Attention(batch=1, length=1024, heads=4, key_heads=2)
    rows = dataclasses.replace(row, batch=2)
    cases = [
        kernel_cost.Case(
            programs.target("attention"), "v5p:1x1x1", {"shape": dataclasses.asdict(shape)}
        )
        for shape in (row, rows)
    ]
    one, two = kernel_cost.costs(cases)
    assert one.seconds < 0.7 * two.seconds
