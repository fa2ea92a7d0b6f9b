"""Programs of a few bundles take the cycles that they should."""

import dataclasses

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
import pytest

from llm_jax.aot import bundles
from llm_jax.aot import chips
from llm_jax.aot import machine
from tests.aot import assembly

V5E = chips.by_name("v5e")
BYTES_PER_CYCLE = V5E.hbm_bandwidth * machine.HBM_EFFICIENCY / V5E.clock_hz
LATENCY = machine.HBM_LATENCY * V5E.clock_hz

quick = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs lines on the one core of a v5e."""
    directory = tmp_path_factory.mktemp("programs")

    def run(lines, operands=None, chip=V5E, **options):
        program = assembly.program(directory, lines)
        return machine.execute(program, chip, operands, **options)

    return lambda *arguments, **options: run(*arguments, **options)[0]


@quick
@given(turns=strategies.integers(1, 40), size=strategies.integers(0, 9))
def test_a_loop_costs_its_turns_times_its_body(run, turns, size):
    done = run(assembly.loop(turns, ["%v1_v0 = vadd.f32 %v2_v0, %v2_v0"] * size))
    assert done.cycles == 1 + turns * (7 + size)
    assert done.slots[bundles.Unit.VALU] == turns * size
    assert not done.guesses


@quick
@given(outer=strategies.integers(1, 8), inner=strategies.integers(1, 8))
def test_loops_nest(run, outer, inner):
    within = [
        "%s11_s3 = smov 0",
        "%s12_s3 = sphi %s11_s3, %s13_s3  ;;  %s13_s3 = sadd.s32 1, %s12_s3",
        f"%p14_p1 = scmp.ge.s32.totalorder %s13_s3, {inner}",
        "%15 = sbr.rel (!%p14_p1) target bundleno = 3 (0x3), region = 1",
        *[""] * 4,
    ]
    assert run(assembly.loop(outer, within)).cycles == 1 + outer * (7 + 1 + 7 * inner)


def test_what_stands_in_delay_slots_is_executed_and_what_is_jumped_over_is_not(run):
    add = "%v1_v0 = vadd.f32 %v2_v0, %v2_v0"
    jump = "%1 = sbr.rel target bundleno = 8 (0x8), region = 1"
    for chip, executed in ((V5E, 4), (dataclasses.replace(V5E, delay_slots=6), 6)):
        done = run([jump, *[add] * 7, ""], chip=chip)
        assert done.slots[bundles.Unit.VALU] == executed
        assert done.cycles == 1 + executed + 1


def test_a_branch_is_taken_though_another_leads_into_its_delay_slots(run):
    known = "%p9_p0 = pmov 0"
    never = "%2 = sbr.rel (%p9_p0) target bundleno = 7 (0x7), region = 1"
    jump = "%1 = sbr.rel target bundleno = 16 (0x10), region = 1"
    add = "%v1_v0 = vadd.f32 %v2_v0, %v2_v0"
    done = run([known, never, *[""] * 4, jump, *[add] * 9, ""])
    assert done.slots[bundles.Unit.VALU] == V5E.delay_slots
    assert done.cycles == 7 + V5E.delay_slots + 1


def test_a_bundle_reads_what_was_before_it(run):
    """Two phis that change places, the first turn apart: Fibonacci's numbers."""
    lines = [
        "%s1_s0 = smov 0  ;;  %s2_s1 = smov 1  ;;  %s3_s2 = smov 0",
        "%s4_s0 = sphi %s1_s0, %s5_s1  ;;  %s5_s1 = sphi %s2_s1, %s6_s1"
        "  ;;  %s6_s1 = sadd.s32 %s4_s0, %s5_s1"
        "  ;;  %s7_s2 = sphi %s3_s2, %s8_s2  ;;  %s8_s2 = sadd.s32 1, %s7_s2",
        "%p9_p0 = scmp.lt.s32.totalorder %s5_s1, 21",
        "%10 = sbr.rel (%p9_p0) target bundleno = 1 (0x1), region = 1",
        *[""] * 4,
    ]
    assert run(lines).cycles == 1 + 8 * 7  # 1 1 2 3 5 8 13 21


@quick
@given(granules=strategies.integers(1, 10_000), between=strategies.integers(0, 60))
def test_a_wait_takes_what_is_left_of_a_copy(run, granules, between):
    lines = [
        assembly.OPERAND,
        assembly.copy_from_hbm(granules),
        *[""] * between,
        f"%8 = dma.done.wait [#allocation9], {granules}",
        "",
    ]
    done = run(lines)
    arrival = 1 + LATENCY + granules * machine.GRANULE / BYTES_PER_CYCLE
    assert done.cycles == pytest.approx(max(2 + between, arrival) + 2)
    assert done.stall_cycles == pytest.approx(max(0, arrival - 2 - between))
    assert done.hbm_bytes_read == granules * machine.GRANULE
    assert done.hbm_bytes_written == 0


def test_copies_share_the_bandwidth_and_not_the_latency(run):
    copies = [assembly.copy_from_hbm(1000, f"[#allocation{n}]") for n in (11, 12, 13)]
    waits = [f"%8 = dma.done.wait [#allocation{n}], 1000" for n in (11, 12, 13)]
    done = run([assembly.OPERAND, *copies, *waits])
    transfer = 1000 * machine.GRANULE / BYTES_PER_CYCLE
    assert done.cycles == pytest.approx(1 + 3 * transfer + LATENCY + 1)


def test_copies_count_the_hbm_that_they_cross_both_ways(run):
    general = (
        "%7 = dma.general /*src=*/%s12_s2, /*size_in_granules=*/100, /*dst=*/%s10_s1,"
        " /*dst_syncflagno=*/[#allocation4], /*src_syncflagno=*/0"
    )
    pointer = "%s12_s2 = int_to_ptr.vmem [resolvable:$true] %s11_s2"
    done = run([assembly.OPERAND, "%s11_s2 = sshll.u32 [#allocation3], 4", pointer, general])
    assert (done.hbm_bytes_read, done.hbm_bytes_written) == (0, 100 * machine.GRANULE)
    assert done.cycles == pytest.approx(3 + LATENCY + 100 * machine.GRANULE / BYTES_PER_CYCLE)


@quick
@given(
    a=strategies.integers(0, 2**32 - 1),
    b=strategies.integers(0, 2**32 - 1),
    shift=strategies.integers(0, 31),
)
def test_arithmetic_is_that_of_32_bits(run, a, b, shift):
    def wrapped(x):
        return x % 2**32

    def signed(x):
        return x - 2**32 if x >= 2**31 else x

    expected = {
        "sadd.s32": wrapped(a + b),
        "ssub.s32": wrapped(a - b),
        "smul.u32": wrapped(a * b),
        "sxor.u32": a ^ b,
        "smin.s32": wrapped(min(signed(a), signed(b))),
        "smax.u32": max(a, b),
    }
    shifted = {
        "sshll.u32": wrapped(a << shift),
        "sshrl.u32": a >> shift,
        "sshra.s32": wrapped(signed(a) >> shift),
    }
    lines = [f"%s1_s0 = smov {a}  ;;  %s2_s1 = smov {b}"]
    cases = [(op, b, value) for op, value in expected.items()]
    cases += [(op, shift, value) for op, value in shifted.items()]
    for number, (opcode, second, value) in enumerate(cases):
        lines += [
            f"%s1{number}_s2 = {opcode} {a}, {second}",
            f"%p2{number}_p0 = scmp.ne.s32.totalorder %s1{number}_s2, {value}",
            f"%s3{number}_s3 = scalar_select %p2{number}_p0, {number + 1}, 0",
            f"%4 = sst [smem:[#allocation5]] (%p2{number}_p0), %s3{number}_s3",
        ]
    # A wrong result leaves its number behind, and a loop of so many turns.
    lines += ["%s50_s4 = sld [smem:[#allocation5]]"]
    lines = ["%4 = sst [smem:[#allocation5]] 0", *lines]
    assert run(assembly.loop("%s50_s4", [], lines)).cycles == len(lines) + 1 + 7


def test_divisions_leave_quotient_and_remainder(run):
    divide = [
        "%20 = sdivrem.u32 23, 5 /* kDivAndRem */  ;;  %21 = sdivrem.u32 17, 7 /* kRem */",
        "%s22_s5 = spop.drf %20",
        "%s23_s6 = spop.drf %20",
        "%s24_s7 = spop.drf %21",
        "%s25_s5 = smul.u32 100, %s22_s5",
        "%s26_s6 = smul.u32 10, %s23_s6",
        "%s27_s5 = sadd.s32 %s25_s5, %s26_s6",
        "%s28_s5 = sadd.s32 %s27_s5, %s24_s7",
    ]
    assert run(assembly.loop("%s28_s5", [], divide)).cycles == len(divide) + 1 + 7 * 433


def test_tables_are_read_where_they_are_known(run):
    table = [9, 8, 7, 6, 5]
    lines = [
        "%s10_s1 = inlined_call_operand.vmem [shape: s32[5], index: 3, kind: input]",
        "%s11_s2 = sshll.u32 %s10_s1, 4",
        "%s12_s3 = int_to_ptr.vmem [resolvable:$true] %s11_s2",
        "%7 = dma.vmem_to_smem %s12_s3, 16, [#allocation2], [#allocation1]",
        "%8 = dma.done.wait [#allocation1], 16",
        "%s50_s4 = sld [smem:[#allocation2 + $0x3]]",
    ]
    known = run(assembly.loop("%s50_s4", [], lines), {3: table})
    assert known.cycles - known.stall_cycles == len(lines) + 1 + 7 * 6
    assert not known.guesses
    unknown = run(assembly.loop("%s50_s4", [], lines))
    assert unknown.guesses == ("a condition of sbr.rel, by operand 3",)


def test_what_scalar_code_writes_is_told(run):
    lines = [
        "%s10_s1 = inlined_call_operand.vmem [shape: s32[3], index: 2, kind: output]",
        "%s11_s2 = sshll.u32 %s10_s1, 4",
        "%s12_s3 = int_to_ptr.vmem [resolvable:$true] %s11_s2",
        "%s13_s4 = smov 1",
        "%s14_s5 = scalar_lea.smem [#allocation2], %s13_s4",
        "%s15_s6 = scalar_lea.smem %s14_s5, 1 [#allocation2]",
        "%4 = sst [smem:[#allocation2]] 7",
        "%5 = sst [smem:[%s14_s5]] 8",
        "%6 = sst [smem:[%s15_s6]] 9",
        "%7 = dma.smem_to_vmem [#allocation2], 16, %s12_s3, [#allocation1]",
        "%8 = dma.done.wait [#allocation1], 16",
    ]
    done = run(lines)
    assert done.written == {2: [7, 8, 9]} and not done.guesses
    unknown = [
        *lines[:8],
        "%s16_s7 = sld [smem:[#allocation3]]",
        "%6 = sst [smem:[%s15_s6]] %s16_s7",
    ]
    assert run([*unknown, *lines[9:]]).written == {}


def test_what_nobody_knows_and_nothing_depends_on_is_no_guess(run):
    lines = [
        "%s10_s1 = sld [smem:[#allocation2]]",
        "%s11_s2 = sadd.s32 %s10_s1, %s10_s1",
        "%p12_p1 = scmp.lt.s32.totalorder %s11_s2, 5",
        "%p13_p2 = pmov 0",
        "%p14_p3 = pand %p12_p1, %p13_p2",
    ]
    branch = "%1 = sbr.rel (%p14_p3) target bundleno = 10 (0xa), region = 1"
    assert not run([*lines, branch, *[""] * 5]).guesses
    guessed = run([*lines, branch.replace("p14_p3", "p12_p1"), *[""] * 5])
    assert guessed.guesses == ("a condition of sbr.rel, by SMEM",)
    combined = [
        *lines[:3],
        "%p13_p2 = scmp.eq.s32.totalorder 1, 1",
        "%p14_p3 = pand %p13_p2, %p12_p1",
    ]
    assert run([*combined, branch, *[""] * 5]).guesses == guessed.guesses


def test_guessed_sizes_and_flags_leave_plain_numbers(run):
    lines = [
        assembly.OPERAND,
        "%s11_s2 = sld [smem:[#allocation2]]",
        assembly.copy_from_hbm("%s11_s2", "%s11_s2"),
        "%8 = dma.done.wait %s11_s2, %s11_s2",
    ]
    done = run(lines)
    assert len(done.guesses) == 4
    for field in dataclasses.astuple(done)[:4]:
        assert type(field) in (int, float)


def test_a_store_that_may_not_happen_matters_where_it_is_read(run):
    lines = [
        "%s10_s1 = spop %9",
        "%p11_p1 = scmp.lt.s32.totalorder %s10_s1, 5",
        "%12 = sst [smem:[#allocation2]] 4",
        "%13 = sst [smem:[#allocation2]] (%p11_p1), 6",
    ]
    assert not run(lines).guesses
    read = run(assembly.loop("%s14_s2", [], [*lines, "%s14_s2 = sld [smem:[#allocation2]]"]))
    assert read.guesses == ("a condition of sbr.rel, by spop",)
    assert read.cycles == 6 + 7 * 6


def test_cores_share_the_memory_and_know_their_number(run, tmp_path):
    lines = [
        assembly.OPERAND,
        "%s11_s2 = sld [smem:[#allocation7]] /* megacore core id :: core id */",
        "%s12_s3 = sshll.u32 %s11_s2, 10",
        "%s13_s4 = sadd.s32 1000, %s12_s3",
        assembly.copy_from_hbm("%s13_s4"),
        "%8 = dma.done.wait [#allocation9], %s13_s4",
    ]
    chip = dataclasses.replace(V5E, num_cores=2)
    first, second = machine.execute(assembly.program(tmp_path, lines), chip)
    assert (first.hbm_bytes_read, second.hbm_bytes_read) == (32_000, 64_768)
    for core in (first, second):
        transfer = core.hbm_bytes_read / (BYTES_PER_CYCLE / 2)
        assert core.cycles == pytest.approx(4 + transfer + LATENCY + 1)


def test_an_endless_program_is_given_up(run):
    forever = ["%1 = sbr.rel target bundleno = 0 (0x0), region = 1", *[""] * 4]
    with pytest.raises(machine.TooLongError, match="1000 traces"):
        run(forever, max_traces=1000)
