"""Each kernel keeps to its committed budget of modelled time, HBM traffic and VMEM."""

import pytest

from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import budgets

# Compiled each time, whether their programs changed or not: so that what reads figures out of them is held
# to the committed ones as well.
_ALWAYS = ("attention, v5e", "decode, int8, v6e")


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is optional")
def test_kernels_keep_to_their_budgets():
    known = budgets.load()
    version = budgets.compiler_version()
    assert version in known, f"no budgets for {version}: python -m llm_jax.kernels.costing.budgets"
    cases = budgets.cases()
    assert known[version].keys() == cases.keys()
    unchanged = {
        budget["program"]
        for name, budget in known[version].items()
        if "program" in budget and name not in _ALWAYS
    }
    results = kernel_cost.costs(list(cases.values()), known=unchanged)
    lines = []
    for (name, budget), result in zip(
        ((name, known[version][name]) for name in cases), results, strict=True
    ):
        if not isinstance(result, kernel_cost.Known):
            lines += budgets.overruns(name, budgets.figures(result), budget)
    assert not lines, "\n".join(lines)


def test_a_slower_and_a_much_faster_kernel_are_both_noticed():
    budget = {"milliseconds": 1.0, "hbm_bytes": 1000, "vmem_bytes": 1000}
    assert budgets.overruns("x", budget, budget) == []
    slower = budgets.overruns("x", budget | {"milliseconds": 1.03}, budget)
    assert len(slower) == 1 and "x: milliseconds 1.03 is 1.030 of 1.0" in slower[0]
    faster = budgets.overruns("x", budget | {"milliseconds": 0.8}, budget)
    assert len(faster) == 1 and "better" in faster[0]
    assert "hbm_bytes" in budgets.overruns("x", budget | {"hbm_bytes": 1020}, budget)[0]
