"""Which operations of a schedule begin, carry on and await collectives."""

import pytest

from llm_jax.aot import collectives
from llm_jax.aot import hlo

_BF16 = "{1,0:T(8,128)(2,1)}"
_GROUPS = "replica_groups=[1,4]<=[4], dimensions={0}"
_HANDLER = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_MEGASCALE = (
    _HANDLER + ',_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
)
_MODULE = f"""
%fused_gather (p: bf16[8,128]) -> bf16[32,128] {{
  %p = bf16[8,128]{_BF16} parameter(0)
  ROOT %all-gather.1 = bf16[32,128]{_BF16} all-gather(%p), channel_id=7, {_GROUPS}
}}

%nested (p.1: bf16[8,128]) -> bf16[32,128] {{
  %p.1 = bf16[8,128]{_BF16} parameter(0)
  ROOT %f = bf16[32,128]{_BF16} fusion(%p.1), kind=kLoop, calls=%fused_gather
}}

%async_collective_fusion.3 (p.2: bf16[8,128]) -> bf16[32,128] {{
  %p.2 = bf16[8,128]{_BF16} parameter(0)
  ROOT %g = bf16[32,128]{_BF16} fusion(%p.2), kind=kLoop, calls=%fused_gather
}}

%summed (p.3: f32[32,128]) -> f32[8,128] {{
  %p.3 = f32[32,128]{{1,0:T(8,128)}} parameter(0)
  %all = f32[32,128]{{1,0:T(8,128)}} all-reduce(%p.3), channel_id=9, replica_groups=[1,4]<=[4]
  ROOT %part = f32[8,128]{{1,0:T(8,128)}} slice(%all), slice={{[0:8], [0:128]}}
}}

%exchanged (p.4: bf16[8,128], p: bf16[32,128]) -> bf16[32,128] {{
  %p.4 = bf16[8,128]{_BF16} parameter(0)
  %p = bf16[32,128]{_BF16} parameter(1)
  ROOT %e = bf16[32,128]{_BF16} ragged-all-to-all(%p.4, %p), channel_id=5, replica_groups=[1,4]<=[4]
}}

%returned (p: bf16[32,128], p.4: bf16[8,128]) -> bf16[8,128] {{
  %p = bf16[32,128]{_BF16} parameter(0)
  %p.4 = bf16[8,128]{_BF16} parameter(1)
  ROOT %e = bf16[8,128]{_BF16} ragged-all-to-all(%p, %p.4), channel_id=6, replica_groups=[1,4]<=[4]
}}

ENTRY %main (x: bf16[8,128], y: f32[32,128]) -> bf16[32,128] {{
  %x = bf16[8,128]{_BF16} parameter(0)
  %y = f32[32,128]{{1,0:T(8,128)}} parameter(1)
  %whole = bf16[32,128]{_BF16} all-gather(%x), channel_id=1, {_GROUPS}
  %start = (bf16[8,128]{_BF16}, bf16[32,128]{_BF16}) all-gather-start(%x), channel_id=2, {_GROUPS}
  %done = bf16[32,128]{_BF16} all-gather-done(%start)
  %sum = (f32[32,128]{{1,0:T(8,128)}}, f32[]{{:T(128)}}) all-reduce(%y, %y), replica_groups=[1,4]<=[4]
  %send = (bf16[8,128]{_BF16}, bf16[8,128]{_BF16}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}
  %async-collective-start.5 = (bf16[8,128]{_BF16}, bf16[32,128]{_BF16}) fusion(%x), kind=kCustom, calls=%nested
  %product = bf16[32,128]{_BF16} fusion(%x), kind=kOutput, calls=%async_collective_fusion.3
  %async-collective-done.5 = bf16[32,128]{_BF16} fusion(%product), kind=kCustom, calls=%nested
  %all-reduce-scatter.2 = f32[8,128]{{1,0:T(8,128)}} fusion(%y), kind=kCustom, calls=%summed
  %scatter = f32[8,128]{{1,0:T(8,128)}} reduce-scatter(%y), replica_groups=[1,4]<=[4], dimensions={{0}}
  %there = bf16[32,128]{_BF16} ragged-all-to-all(%x, %whole), channel_id=3, replica_groups=[1,4]<=[4]
  %back = bf16[8,128]{_BF16} ragged-all-to-all(%there, %x), channel_id=4, replica_groups=[1,4]<=[4]
  %there-start = ((bf16[8,128]{_BF16}, bf16[32,128]{_BF16}), bf16[32,128]{_BF16}, u32[]{{:S(2)}}) async-start(%x, %whole), calls=%exchanged
  %back-start = ((bf16[32,128]{_BF16}, bf16[8,128]{_BF16}), bf16[8,128]{_BF16}, u32[]{{:S(2)}}) async-start(%there, %x), calls=%returned
  %after = token[] after-all()
  %out = (bf16[8,128]{_BF16}, u32[]{{:S(2)}}, token[]) send(%x, %after), is_host_transfer=true, frontend_attributes={{{_MEGASCALE}}}
  %in = (bf16[8,128]{_BF16}, u32[]{{:S(2)}}, token[]) recv(%after), is_host_transfer=true, frontend_attributes={{{_MEGASCALE}}}
  %in-done = (bf16[8,128]{_BF16}, token[]) recv-done(%in), frontend_attributes={{{_HANDLER}}}
  %offload = (bf16[8,128]{_BF16}, u32[]{{:S(2)}}, token[]) recv(%after), is_host_transfer=true
  %plain = bf16[8,128]{_BF16} fusion(%x), kind=kLoop, calls=%nothing
  ROOT %copy = bf16[32,128]{_BF16} copy(%whole)
}}
"""
_GATHERED = 32 * 128 * 2


@pytest.fixture(scope="module")
def part():
    module = hlo.Module(_MODULE)
    return lambda name: collectives.part_of(module, module.by_name["main"][name])


@pytest.mark.parametrize(
    ("name", "kind", "phase", "num_bytes"),
    [
        ("whole", "all-gather", "whole", _GATHERED),
        # Of eight rows, in a buffer for four times as many, there and back.
        ("there", "ragged-all-to-all", "whole", _GATHERED // 4),
        ("back", "ragged-all-to-all", "whole", _GATHERED // 4),
        ("back-start", "ragged-all-to-all", "start", _GATHERED // 4),
        ("there-start", "ragged-all-to-all", "start", _GATHERED // 4),
        ("start", "all-gather", "start", _GATHERED),
        ("sum", "all-reduce", "whole", 32 * 128 * 4 + 4),
        ("send", "collective-permute", "start", 8 * 128 * 2),
        ("async-collective-start.5", "all-gather", "start", _GATHERED),
        ("all-reduce-scatter.2", "reduce-scatter", "whole", 32 * 128 * 4),
        ("scatter", "reduce-scatter", "whole", 8 * 128 * 4),
    ],
)
def test_kind_phase_and_size(part, name, kind, phase, num_bytes):
    found = part(name)
    assert (found.kind, found.phase, found.num_bytes) == (kind, phase, num_bytes)
    assert "replica_groups" in found.attributes or "source_target_pairs" in found.attributes
    assert found.is_scattered_size == (name == "scatter")


def test_a_start_and_its_done_have_one_key(part):
    assert part("done").key == part("start").key
    start, done = part("async-collective-start.5"), part("async-collective-done.5")
    assert (start.phase, done.phase) == ("start", "done")
    assert start.key == done.key


def test_between_slices_what_comes_back_is_the_collective(part):
    start, done = part("in"), part("in-done")
    assert (start.kind, start.phase, start.num_bytes) == ("all-reduce", "start", 8 * 128 * 2)
    assert (done.phase, done.key) == ("done", start.key)


@pytest.mark.parametrize("name", ["product", "plain", "copy", "x", "out", "offload"])
def test_others_have_nothing_to_do_with_collectives(part, name):
    assert part(name) is None
