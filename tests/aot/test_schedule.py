"""What a schedule makes of the times of its operations."""

import pytest

from llm_jax.aot import chips
from llm_jax.aot import hlo
from llm_jax.aot import machine
from llm_jax.aot import network
from llm_jax.aot import schedule
from tests.aot import assembly
from tests.aot import grids

V5E = chips.by_name("v5e")
BANDWIDTH = V5E.hbm_bandwidth * machine.HBM_EFFICIENCY

_ARRAY = "f32[256,128]{1,0:T(8,128)}"
_IN_VMEM = "f32[256,128]{1,0:T(8,128)S(1)}"
_NUM_BYTES = 256 * 128 * 4

# Bundles of the operations that the modules below may have.
_LENGTHS = {"short": 30, "long": 3000}


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Replays the lines of an entry computation, after those of others."""
    dump = tmp_path_factory.mktemp("dump")
    for number, (name, length) in enumerate(_LENGTHS.items()):
        path = dump / f"{number}-{name}-01-packed-bundles-post-ra.txt"
        path.write_text(assembly.text([""] * length))
    (dump / "7-TLP-00-deduplication-map.txt").write_text(
        "key:long\nordinal:0\nequivalent_hlos[size=2]:\n  long\n  long.twin\n"
    )

    def run(lines, others="", links=None):
        head = f"ENTRY %main (x: f32[256,128], n: s32[]) -> f32[256,128] {{\n  %x = {_ARRAY} parameter(0)\n"
        text = others + head + "  %n = s32[]{:T(128)} parameter(1)\n" + "\n".join(lines) + "\n}\n"
        replayed = schedule.Replay(hlo.Module(text), dump, V5E, links)
        totals, operations = replayed.run()
        return totals, {o.name: o for o in operations}, replayed.not_modelled

    return run


def _operation(name, operand="x", kind=_IN_VMEM):
    return f"  %{name} = {kind} fusion(%{operand}), kind=kLoop, calls=%nothing"


_START = f"  %start = ({_IN_VMEM}, {_ARRAY}, u32[]{{:S(2)}}) copy-start(%x)"
_DONE = f"  %done = {_IN_VMEM} copy-done(%start)"


def test_operations_take_turns_and_twins_share_a_program(replay):
    totals, operations, _ = replay([_operation("long"), _operation("long.twin", "long")])
    assert totals.seconds * V5E.clock_hz == pytest.approx(2 * 3000)
    assert operations["long.twin"].cycles == 3000
    assert all(operation.is_exact for operation in operations.values())


@pytest.mark.parametrize("name", _LENGTHS)
def test_copies_go_on_behind_operations(replay, name):
    totals, _, _ = replay([_START, _operation(name), _DONE])
    copy = (_NUM_BYTES / BANDWIDTH + machine.HBM_LATENCY) * V5E.clock_hz
    assert totals.seconds * V5E.clock_hz == pytest.approx(max(copy, _LENGTHS[name]))
    assert 30 < copy < 3000
    assert (totals.bytes_read, totals.bytes_written) == (_NUM_BYTES, 0)


def test_slices_read_what_they_take(replay):
    part = "f32[64,128]{1,0:T(8,128)S(1)}"
    start = f"  %start = (({_ARRAY}), {part}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:64]}}"
    totals, _, _ = replay([start, f"  %done = {part} slice-done(%start)"])
    assert (totals.bytes_read, totals.bytes_written) == (_NUM_BYTES // 4, 0)


def test_nothing_moves_faster_than_the_memory(replay):
    totals, _, _ = replay([_START] * 9)  # which nobody waits for
    assert totals.seconds == pytest.approx(9 * _NUM_BYTES / BANDWIDTH)


def test_of_a_conditional_the_costliest_branch_counts_and_that_is_said(replay):
    branches = "".join(
        f"%take_{name} (y: f32[256,128]) -> f32[256,128] {{\n  %y.{name} = {_ARRAY} parameter(0)\n"
        f"{_operation(name, f'y.{name}').replace('  %', '  ROOT %')}\n}}\n\n"
        for name in _LENGTHS
    )
    choice = (
        f"  ROOT %choice = {_IN_VMEM} conditional(%n, %x, %x),"
        " branch_computations={%take_short, %take_long}"
    )
    totals, _, not_modelled = replay([choice], branches)
    assert totals.seconds * V5E.clock_hz == pytest.approx(3000)
    assert any("choice" in what for what in not_modelled)


_GATHER = f"  %gather = {_ARRAY} all-gather(%x), replica_groups={{{{0,1}}}}, dimensions={{0}}"
_BEGIN = f"  %begin = ({_ARRAY}, {_ARRAY}) all-gather-start(%x), replica_groups={{{{0,1}}}}"
_END = f"  %end = {_ARRAY} all-gather-done(%begin)"


def test_without_a_mesh_collectives_are_named_and_cost_nothing(replay):
    totals, _, not_modelled = replay([_GATHER])
    assert (totals.seconds, not_modelled) == (0, {"all-gather"})


@pytest.fixture(scope="module")
def pair():
    """What connects two chips."""
    return network.Network(grids.mesh((2, 1, 1), {"data": 2}), V5E)


def test_a_collective_is_waited_for_and_that_is_told(replay, pair):
    totals, _, not_modelled = replay([_operation("short"), _GATHER], links=pair)
    alone = totals.seconds - 30 / V5E.clock_hz
    assert totals.exposed_seconds == pytest.approx(alone)
    assert alone > 1e-6
    assert not not_modelled


@pytest.mark.parametrize("name", _LENGTHS)
def test_a_collective_goes_on_behind_operations(replay, pair, name):
    blocking, _, _ = replay([_GATHER], links=pair)
    totals, _, _ = replay([_BEGIN, _operation(name), _END], links=pair)
    gather, length = blocking.seconds * V5E.clock_hz, _LENGTHS[name]
    assert totals.seconds * V5E.clock_hz == pytest.approx(max(gather, length))
    assert totals.exposed_seconds * V5E.clock_hz == pytest.approx(max(0, gather - length))
    assert 30 < gather


def test_collectives_on_the_same_links_wait_for_each_other(replay, pair):
    one, _, _ = replay([_BEGIN, _END], links=pair)
    again = [line.replace("begin", "begin2").replace("%end", "%end2") for line in (_BEGIN, _END)]
    two, _, _ = replay([_BEGIN, again[0], _END, again[1]], links=pair)
    assert two.seconds == pytest.approx(2 * one.seconds)


def test_without_bundles_an_operation_takes_the_compilers_estimate(replay):
    estimated = _operation("other") + ', backend_config={"estimated_cycles":"1234"}'
    totals, operations, _ = replay([estimated])
    assert totals.seconds * V5E.clock_hz == pytest.approx(1234)
    assert not operations["other"].is_executed and not operations["other"].is_exact
