"""Programs compiled for real: their modelled times, their traffic and the compiler's refusals."""

import dataclasses
import json

import pytest

from llm_jax import errors
from llm_jax.aot import kernel_cost
from llm_jax.aot import topology
from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import shapes

pytestmark = pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")

PAGES = [1, 5, 5, 5, 2, 0, 7]  # five blocks are fetched: the same one twice is not


def _case(name, slice_name="v5e:1x1", **arguments):
    return kernel_cost.Case(f"tests.aot.programs:{name}", slice_name, arguments)


SMALL = {
    "once": _case("lower_pallas_matmul", size=1024, rows=8192, block=[512, 512], depth=512),
    "twice": _case("lower_pallas_matmul", size=1024, rows=16384, block=[512, 512], depth=512),
    "known": _case("lower_gather", pages=PAGES, is_known=True),
    "unknown": _case("lower_gather", pages=PAGES, is_known=False),
    "few rows": _case("lower_ragged_dot", sizes=[300, 0, 212, 0]),
    "all rows": _case("lower_ragged_dot", sizes=[300, 400, 812, 536]),
    "misshapen": _case("lower_misshapen"),
    "too large": _case("lower_pallas_matmul", size=4096, block=[4096, 2048], depth=512),
    "loop": _case("lower_matmuls", size=1024, turns=5),
    "longer loop": _case("lower_matmuls", size=1024, turns=10),
}


@pytest.fixture(scope="module")
def small():
    """Costs of the small programs, by name; one process compiles them all."""
    return dict(zip(SMALL, kernel_cost.costs(list(SMALL.values()))))


@pytest.mark.long
def test_a_grid_twice_as_long_takes_twice_the_time(small):
    (once,), (twice,) = small["once"].kernels, small["twice"].kernels
    assert twice.cycles == pytest.approx(2 * once.cycles, rel=0.03)
    assert once.is_exact and 0.3 < once.mxu < 1
    assert twice.mxu == pytest.approx(once.mxu, rel=0.03)
    assert once.vmem_bytes == twice.vmem_bytes > 2 * 512 * 512 * 2


@pytest.mark.long
def test_traffic_is_that_of_the_blocks(small):
    (kernel,) = small["once"].kernels
    blocks = 16 * 2 * 2  # of either operand, one for each step
    assert kernel.hbm_bytes_read == blocks * 2 * 512 * 512 * 2
    assert kernel.hbm_bytes_written == 8192 * 1024 * 2
    assert kernel.seconds > (kernel.hbm_bytes_read + kernel.hbm_bytes_written) / 819e9


@pytest.mark.long
def test_tables_decide_what_is_fetched_and_unknown_ones_are_said(small):
    (known,), (unknown,) = small["known"].kernels, small["unknown"].kernels
    assert known.is_exact and small["known"].is_exact
    assert known.hbm_bytes_read == 5 * 256 * 256 * 4 + 512  # and the table
    assert not unknown.is_exact and not small["unknown"].is_exact
    assert all("operand 0" in guess for guess in unknown.guesses)


@pytest.mark.long
def test_tables_that_one_kernel_makes_for_another_are_known(small):
    few, all_rows = small["few rows"], small["all rows"]
    assert few.is_exact and all_rows.is_exact and len(few.kernels) == 2
    # Tiles of 128 rows, and one more for each group that begins within one.
    shares = [result.mxu * result.seconds for result in (few, all_rows)]
    assert shares[1] / shares[0] == pytest.approx((16 + 3) / (4 + 1), rel=0.03)


@pytest.mark.long
def test_a_loop_costs_its_turns(small):
    short, long = small["loop"], small["longer loop"]
    turn = sum(o.seconds * o.num_executions for o in short.operations) / 5
    assert long.seconds - short.seconds == pytest.approx(5 * turn, rel=0.03)
    assert short.is_exact and not short.not_modelled
    assert turn > 2 * 1024**3 / 197e12


@pytest.mark.long
def test_a_cube_gathers_around_its_rings():
    case = dataclasses.replace(_case("lower_gathered_product", "v5p:4x4x4"), is_executed=False)
    (cost,) = kernel_cost.costs([case])
    # Lines it would gather over by a sum, at twice the bytes.
    assert [(found.kind, found.num_executions) for found in cost.collectives] == [("all-gather", 1)]
    assert cost.collectives[0].num_bytes == 2 * 2048 * 2048


@pytest.mark.long
def test_refusals_are_results_with_a_reason(small):
    assert small["misshapen"].stage == "lowering"
    assert small["misshapen"].reason.startswith("TypeError: dot_general requires")
    assert small["too large"].stage == "compilation"
    assert "vmem" in small["too large"].reason
    with pytest.raises(errors.UserError, match="lower_misshapen for v5e:1x1: TypeError"):
        kernel_cost.kernel_costs(SMALL["misshapen"])


@pytest.mark.long
def test_what_takes_too_long_is_refused():
    (result,) = kernel_cost.costs([_case("lower_endless")], timeout_seconds=6)
    assert "6 s" in result.reason


@pytest.mark.long
def test_what_ends_the_compiler_is_refused_and_the_rest_goes_on():
    dead, known = kernel_cost.costs([_case("lower_and_die"), SMALL["known"]])
    assert "signal 6" in dead.reason
    assert isinstance(known, kernel_cost.ProgramCost)


@pytest.mark.long
def test_the_cache_answers_for_the_same_program_alone(tmp_path):
    cache = str(tmp_path / "cache")
    cases = [SMALL["known"], SMALL["unknown"]]
    first = kernel_cost.costs(cases, cache_directory=cache, num_processes=2)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 2
    for path in kept:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1.0}))
    again = kernel_cost.costs(cases, cache_directory=cache)
    assert again == [dataclasses.replace(result, seconds=1.0) for result in first]


@pytest.mark.long
def test_a_program_that_is_known_is_not_compiled_again(small):
    known = small["known"].fingerprint
    cases = [SMALL["known"], SMALL["unknown"]]
    same, other = kernel_cost.costs(cases, known={known})
    assert same == kernel_cost.Known(SMALL["known"], known)
    assert isinstance(other, kernel_cost.ProgramCost) and other.fingerprint != known
    for change in (
        {"slice_name": "v5p:1x1x1"},
        {"flags": ("--xla_tpu_enable_latency_hiding_scheduler=false",)},
    ):
        case = dataclasses.replace(SMALL["known"], **change)
        (changed,) = kernel_cost.costs([case], known={known})
        assert isinstance(changed, kernel_cost.ProgramCost)


@pytest.mark.parametrize(
    ("target", "said"),
    [("tests.aot.programs:lower_nothing", "lower_nothing"), ("no_such_module:f", "no_such_module")],
)
def test_a_target_that_is_not_there_is_a_mistake(target, said):
    with pytest.raises(errors.UserError, match=said):
        kernel_cost.costs([kernel_cost.Case(target, "v5e:1x1")])


# Milliseconds on a v5e as JAX's documentation measured them (docs, pallas/tpu/matmul), less 0.105 of
# dispatch (its product of 1,024 took that longer than the arithmetic); and by how much the model is off.
# The last case is no test of the latency of DMAs, which was chosen by it.
PUBLISHED = [
    (_case("lower_matmul", size=8192), 5.94, 0.03),
    (_case("lower_matmul", size=4096), 0.722, 0.07),
    (_case("lower_pallas_matmul", size=8192, block=[512, 1024], depth=1024), 5.99, 0.03),
    (_case("lower_pallas_matmul", size=4096, block=[512, 1024], depth=1024), 0.784, 0.055),
    (_case("lower_pallas_matmul", size=4096, block=[128, 128], depth=128), 11.77, 0.12),
]


@pytest.mark.long
def test_published_times_are_met():
    results = kernel_cost.costs([case for case, _, _ in PUBLISHED])
    for result, (case, milliseconds, error) in zip(results, PUBLISHED):
        assert result.is_exact
        assert result.seconds * 1e3 == pytest.approx(milliseconds, rel=error), case


# Milliseconds of JAX's splash attention in blocks of 1,024 by 1,024 in steps of 512, causal, 4 x 16 heads
# x 4,096 x 128, forward and with gradients, as a simulator written before this one has them.
OTHER_MODEL = {"v5e:1x1": (2.44, 8.22), "v6e:1x1": (1.49, 4.45)}


@pytest.mark.long
def test_another_model_of_attention_agrees():
    setting = peers.Setting("jax splash", (1024, 1024, 512))
    cases = [
        peers.case(setting, shapes.Attention(4, 4096, has_gradient=has_gradient), slice_name)
        for slice_name in OTHER_MODEL
        for has_gradient in (False, True)
    ]
    found = kernel_cost.costs(cases)
    for result, milliseconds in zip(found, sum(OTHER_MODEL.values(), ()), strict=True):
        assert result.seconds * 1e3 == pytest.approx(milliseconds, rel=0.03)
        assert result.is_exact
