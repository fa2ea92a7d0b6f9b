"""What is read of a scheduled module: loops and tables."""

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
import numpy as np
import pytest

from llm_jax.aot import hlo
from llm_jax.aot import loops

_LOOP = """HloModule jit_f, is_scheduled=true

%advance (i.1: s32[]) -> s32[] {{
  %i.1 = s32[]{{:T(128)}} parameter(0)
  %step.1 = s32[]{{:T(128)}} constant({step})
  ROOT %next.1 = s32[]{{:T(128)}} {opcode}(%i.1, %step.1)
}}

%body (state.1: (s32[], f32[8], s32[4])) -> (s32[], f32[8], s32[4]) {{
  %state.1 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) parameter(0)
  %i.2 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %x.2 = f32[8]{{0:T(128)}} get-tuple-element(%state.1), index=1
  %table.2 = s32[4]{{0:T(128)}} get-tuple-element(%state.1), index=2
  %copy.2 = s32[4]{{0:T(128)S(1)}} copy(%table.2)
  %next.2 = s32[]{{:T(128)}} fusion(%i.2), kind=kLoop, calls=%advance
  %y.2 = f32[8]{{0:T(128)}} custom-call(%copy.2, %x.2), custom_call_target="tpu_custom_call"
  %other.2 = (f32[8]{{0:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) tuple(%y.2, %x.2, %copy.2)
  %third.2 = s32[4]{{0:T(128)}} get-tuple-element(%other.2), index=2
  ROOT %tuple.2 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) tuple(%next.2, %y.2, {handed_on})
}}

%condition (state.3: (s32[], f32[8], s32[4])) -> pred[] {{
  %state.3 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) parameter(0)
  %i.3 = s32[]{{:T(128)}} get-tuple-element(%state.3), index=0
  %stop.3 = s32[]{{:T(128)}} constant({stop})
  ROOT %goes_on.3 = pred[]{{:T(512)}} compare(%i.3, %stop.3), direction={direction}
}}

ENTRY %main (x.4: f32[8], n.4: s32[], other.4: s32[4]) -> f32[8] {{
  %x.4 = f32[8]{{0:T(128)}} parameter(0)
  %n.4 = s32[]{{:T(128)}} parameter(1)
  %other.4 = s32[4]{{0:T(128)}} parameter(2)
  %start.4 = s32[]{{:T(128)}} constant({start})
  %table.4 = s32[4]{{0:T(128)}} constant({{...}})
  %tuple.4 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) tuple({first}, %x.4, %table.4)
  %while.4 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[4]{{0:T(128)}}) while(%tuple.4), condition=%condition, body=%body
  ROOT %result.4 = f32[8]{{0:T(128)}} get-tuple-element(%while.4), index=1
}}
"""
_LITERALS = "  %table.4 = s32[4]{0:T(128)} constant({7, 1, -1, 5})"


def _module(start=0, stop=9, step=1, opcode="add", direction="LT", **more):
    names = {"first": "%start.4", "handed_on": "%table.2"} | more
    text = _LOOP.format(
        start=start, stop=stop, step=step, opcode=opcode, direction=direction, **names
    )
    return hlo.Module(text, _LITERALS)


def _first_turn(module):
    loop = module.by_name["main"]["while.4"]
    return loops.first_turn(module, loops.entry_scope(module), loop)


@settings(max_examples=30, deadline=None)
@given(
    start=strategies.integers(-20, 20),
    stop=strategies.integers(-20, 20),
    step=strategies.integers(1, 5),
)
def test_turns_are_those_of_the_counter(start, stop, step):
    turns, inside = _first_turn(_module(start, stop, step))
    assert turns == len(range(start, stop, step))
    assert inside.value("i.2") == start
    assert inside.value("x.2") is None
    turns, _ = _first_turn(_module(stop, start, step, "subtract", "GE"))
    assert turns == len(range(stop, start - 1, -step))


def test_turns_that_depend_on_data_are_not_known():
    assert _first_turn(_module(first="%n.4"))[0] is None


def test_constants_are_followed_into_loops_that_hand_them_on():
    module = _module()
    kernel = module.by_name["body"]["y.2"]
    assert kernel.is_kernel
    words = module.constant_operands("body", kernel)
    assert {index: found[:4] for index, found in words.items()} == {0: [7, 1, -1, 5]}
    for other in ("%copy.2", "%third.2"):
        changed = _module(handed_on=other)
        assert not changed.constant_operands("body", changed.by_name["body"]["y.2"])


@settings(max_examples=30, deadline=None)
@given(
    shape=strategies.lists(strategies.integers(1, 9), min_size=2, max_size=3),
    tile=strategies.tuples(strategies.integers(1, 4), strategies.integers(1, 4)),
)
def test_tables_lie_in_tiles(shape, tile):
    values = np.arange(1, math.prod(shape) + 1).reshape(shape)
    order = ",".join(str(dim) for dim in reversed(range(len(shape))))
    size = ",".join(map(str, shape))
    kind = f"s32[{size}]{{{order}:T({tile[0]},{tile[1]})}}"
    operation = hlo.parse_operation(
        f"  %t = {kind} constant({{{', '.join(map(str, values.reshape(-1)))}}})"
    )
    words = hlo.words(operation.literal, operation.types[0])
    rows, columns = (-(-n // t) for n, t in zip(shape[-2:], tile))
    assert len(words) == math.prod(shape[:-2]) * rows * columns * math.prod(tile)
    for place in np.ndindex(*shape):
        page = np.ravel_multi_index(place[:-2], shape[:-2]) if shape[:-2] else 0
        (row, below), (column, across) = (divmod(x, t) for x, t in zip(place[-2:], tile))
        at = (((page * rows + row) * columns + column) * tile[0] + below) * tile[1] + across
        assert words[at] == values[place]


_KERNEL = """HloModule jit_f, is_scheduled=true

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0:T(128)}} parameter(0)
  %two.1 = s32[2]{{0:T(128)}} constant({{3, 4}})
  %one.1 = s32[]{{:T(128)}} constant(5)
  %table.1 = {table}
  ROOT %y.1 = f32[8]{{0:T(128)}} custom-call(%table.1, %x.1), custom_call_target="tpu_custom_call"
}}
"""


@pytest.mark.parametrize(
    "table, wanted",
    [
        ("s32[4]{0:T(4)} iota(), iota_dimension=0", [0, 1, 2, 3]),
        ("s32[2,2]{1,0:T(2,2)} iota(), iota_dimension=1", [0, 1, 0, 1]),
        ("s32[2,2]{1,0:T(2,2)} iota(), iota_dimension=0", [0, 0, 1, 1]),
        ("s32[4]{0:T(4)} broadcast(%one.1), dimensions={}", [5, 5, 5, 5]),
        ("s32[2,2]{1,0:T(2,2)} broadcast(%two.1), dimensions={1}", None),
    ],
)
def test_tables_that_the_compiler_counts_or_repeats_are_known(table, wanted):
    module = hlo.Module(_KERNEL.format(table=table))
    call = module.by_name["main"]["y.1"]
    assert module.constant_operands("main", call).get(0) == wanted


@pytest.mark.parametrize(
    ("kind", "num_bytes", "space"),
    [
        ("bf16[4,16,4096,128]{3,2,1,0:T(8,128)(2,1)}", 1 << 26, hlo.HBM),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, hlo.VMEM),
        ("s4[8,128]{1,0}", 512, hlo.HBM),
        ("pred[]{:T(512)}", 1, hlo.HBM),
    ],
)
def test_arrays_have_a_size_and_a_place(kind, num_bytes, space):
    (array,) = hlo.parse_operation(f"  ROOT %a.1 = {kind} add(%b, %c)").types
    assert (array.num_bytes, array.memory_space) == (num_bytes, space)


def test_operations_are_taken_apart():
    operation = hlo.parse_operation(
        "  %start.1 = ((f32[8,2]{1,0}), f32[1,2]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x.1, /*index=1*/%y),"
        ' slice={[0:1]}, backend_config={"window_config":{"estimated_cycles":"604704"},'
        '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}'
    )
    assert (operation.name, operation.opcode) == ("start.1", "slice-start")
    assert operation.operands == ("x.1", "y")
    assert [array.num_bytes for array in operation.types] == [64, 8, 4]
    assert (operation.estimated_cycles, operation.scoped_vmem_bytes) == (604704, 4096)
    assert not operation.is_kernel and operation.trip_count is None
