"""What is read of a program's text."""

import pytest

from llm_jax.aot import bundles
from tests.aot import assembly


def test_scalars_are_read_in_full_and_vectors_counted(tmp_path):
    (bundle,) = assembly.program(
        tmp_path,
        [
            "%s9_s2 = sadd.s32 4294967295, %s8_s1 /* a; comment }, ;; in full */"
            "  ;;  %v1_v0 = vld [vmem:[%s9_s2 + $0x8] sm:$0xff]"
            "  ;;  %v2_v1 = vexp2.f32 %v1_v0  ;;  %v3_v2 = vadd.f32 %v1_v0, %v2_v1"
            "  ;;  %4 = vmatmul.bf16.gmra.mxu0 %v3_v2  ;;  %v5_v1 = vpop.f32.mrf.mxu1"
            "  ;;  %6 = vst [vmem:[#allocation2 + %s9_s2]] %v3_v2 (%p1_p0)"
        ],
    )
    (added,) = bundle.scalars
    assert (added.result, added.opcode) == ("s9_s2", "sadd.s32")
    assert added.operands == (
        bundles.Operand(4294967295),
        bundles.Operand(registers=("s8_s1",)),
    )
    counts = dict(zip(bundles.Unit, bundle.slots))
    assert counts.pop(bundles.Unit.XLU) == 0
    assert set(counts.values()) == {1}
    assert bundle.matmul_rows == 16


@pytest.mark.parametrize(
    ("opcode", "rows"),
    [("vmatmul.bf16.gmra.mxu0", 16), ("vmatmul.f32.gmra.mxu0", 8), ("vmatprep.mubr.bf16.mxu0", 0)],
)
def test_rows_of_products_go_by_their_type(tmp_path, opcode, rows):
    (bundle,) = assembly.program(tmp_path, [f"%1 = {opcode} %v2_v0"])
    assert bundle.matmul_rows == rows


def test_predicates_targets_and_addresses(tmp_path):
    first, second, third = assembly.program(
        tmp_path,
        [
            "%1 = sbr.rel (!%p2_p1) target bundleno = 2 (0x2), region = 4",
            "%3 = sst [smem:[#allocation6 + $0x2]] (%p2_p1), %s4_s0  ;;  "
            "%s5_s1 = smov (!%p2_p1, %s4_s0), 7",
            "%s6_s2 = sld [smem:[#allocation6 + %s5_s1]] /* core id */",
        ],
    )
    (branch,) = first.scalars
    assert branch.target == 2
    assert branch.predicate == bundles.Operand(registers=("p2_p1",), is_negated=True)
    store, selection = second.scalars
    assert store.operands[0] == bundles.Operand(2, allocation="allocation6")
    assert store.predicate == bundles.Operand(registers=("p2_p1",))
    assert selection.operands == (bundles.Operand(7), bundles.Operand(registers=("s4_s0",)))
    (load,) = third.scalars
    assert load.operands == (bundles.Operand(registers=("s5_s1",), allocation="allocation6"),)
    assert "core id" in load.comment


def test_what_a_sum_points_into_is_no_part_of_it(tmp_path):
    (bundle,) = assembly.program(
        tmp_path,
        ["%s3_s1 = scalar_lea.smem %s2_s0, 1 [#allocation5]  ;;  %s4_s2 = smov [#allocation6]"],
    )
    address, base = bundle.scalars
    assert address.operands == (bundles.Operand(registers=("s2_s0",)), bundles.Operand(1))
    assert base.operands == (bundles.Operand(allocation="allocation6"),)


def test_a_missing_bundle_is_an_error(tmp_path):
    path = tmp_path / "program.txt"
    path.write_text("     0   :  { }\n   0x2   :  { }\n")
    with pytest.raises(bundles.FormatError, match="bundle 2 follows 0"):
        bundles.parse(path)
    path.write_text("nothing")
    with pytest.raises(bundles.FormatError, match="no bundles"):
        bundles.parse(path)
