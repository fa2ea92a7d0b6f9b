"""Shipped configs compile for their slices, attend by the kernels, fit, and keep to what was committed."""

import copy
import importlib
import pathlib

import pytest

from llm_jax import config as config_lib
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.plan import budgets
from llm_jax.plan import planner

# Compiled each time, whether their programs changed or not: so that what reads figures out of them is held
# to the committed ones as well.
_ALWAYS = ("gpt2_124m on v5e:2x2", "bert_base on v5e:4x4")


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
@pytest.mark.parametrize("entry", budgets.ENTRIES, ids=lambda entry: entry.name)
def test_step_compiles_with_the_kernels_and_keeps_to_its_budget(entry):
    version = budgets.compiler_version()
    known = budgets.load()
    assert version in known, f"no budgets for {version}: python -m llm_jax.plan.budgets"
    budget = known[version][entry.name]
    (result,) = kernel_cost.costs(
        [entry.case()],
        known=() if entry.name in _ALWAYS else {budget["program"]},
        timeout_seconds=planner.TIMEOUT_SECONDS,
    )
    if isinstance(result, kernel_cost.Known):
        return
    figures = budgets.figures(entry, result)
    names = " ".join(kernel.name for kernel in result.kernels)
    for kernel in ("flash_attention_forward", "flash_attention_backward"):
        assert kernel in names
    assert figures["hbm_bytes"] < topology.chip_of(entry.slice_name).hbm_bytes
    lines = budgets.differences(entry.name, figures, budget)
    assert not lines, "\n".join([*lines, "intended? python -m llm_jax.plan.budgets rewrites them"])


def _committed():
    """Returns the figures of the newest compiler that has some."""
    return list(budgets.load().values())[-1]


def test_every_config_for_tpus_has_a_budget_on_its_slice():
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py"):
        module = importlib.import_module(f"configs.{path.stem}")
        config = config_lib.from_config_dict(module.get_config())
        if config.slice != "cpu":
            assert f"{path.stem} on {config.slice}" in _committed()


def test_budgets_are_those_of_the_entries_and_fit():
    committed = _committed()
    assert list(committed) == [entry.name for entry in budgets.ENTRIES]
    for entry in budgets.ENTRIES:
        assert committed[entry.name]["hbm_bytes"] < topology.chip_of(entry.slice_name).hbm_bytes


@pytest.mark.parametrize("entry", budgets.ENTRIES, ids=lambda entry: entry.name)
def test_parameters_lie_as_committed(entry):
    assert (
        budgets.shardings(entry.config(), entry.slice_name)
        == (_committed()[entry.name]["shardings"])
    )


def test_gradients_between_slices_are_reduced_where_they_are_scattered():
    """Only what a chip keeps of a gradient crosses the network: the hierarchical sum."""
    (entry,) = (entry for entry in budgets.ENTRIES if "*" in entry.slice_name)
    collectives = _committed()[entry.name]["collectives"]
    inside, between = collectives["all-reduce over data"], collectives["all-reduce over replica"]
    assert not any("replica," in name for name in collectives)
    num_chips = topology.parse(entry.slice_name).num_chips // 2
    assert 0 < between["MiB"] < 1.1 * inside["MiB"] / num_chips


def test_each_kind_of_difference_is_told():
    name, budget = next(iter(_committed().items()))
    assert budgets.differences(name, budget, budget) == []
    changed = copy.deepcopy(budget)
    changed["hbm_bytes"] = int(1.02 * budget["hbm_bytes"])
    kind = next(iter(changed["collectives"]))
    changed["collectives"][kind]["times"] += 1
    changed["collectives"]["all-to-all over expert"] = {"times": 1, "MiB": 2.0}
    del changed["shardings"]["embedding/table_VD"]
    told = budgets.differences(name, changed, budget)
    assert len(told) == 4
    assert "1.020 of" in told[0]
    assert any(kind in line for line in told)
    assert any("all-to-all over expert: None became" in line for line in told)
    assert any("embedding/table_VD" in line and "became None" in line for line in told)
