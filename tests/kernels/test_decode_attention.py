"""One suite that every implementation of attention to a cache passes, against numpy float64."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.decode_attention import caches
from llm_jax.kernels.decode_attention import op
from llm_jax.kernels.flash_attention import biases
from tests import helpers
from tests.kernels import decode_cases
from tests.kernels import decode_oracle

# What a case changes; a row has 12 slots, blocks 4 and pages 2.
CASES = {
    "full_rows": {},
    "ragged": {"lengths": [3, 10]},
    "left_padded": {"lengths": [12, 9], "starts": [5, 8]},
    "few_queries": {"T": 3, "lengths": [12, 7]},
    "more_queries_than_slots": {"T": 3, "lengths": [2, 7], "starts": [0, 6]},
    "window": {"window": 3, "lengths": [12, 7]},
    "window_of_few_queries": {"T": 2, "window": 5, "lengths": [11, 4]},
    "softcap": {"softcap": 0.7, "lengths": [6, 11]},
    "alibi": {"T": 2, "alibi": True, "lengths": [6, 11]},
    "table": {"T": 2, "table": True, "lengths": [12, 7]},
    "table_of_one_query": {"table": True, "lengths": [12, 7], "starts": [2, 0]},
    "table_both_ways": {"table": True, "is_bidirectional": True, "lengths": [12, 7]},
    "encoder": {"is_causal": False, "lengths": [12, 5]},
    "encoder_of_few_queries": {"T": 3, "is_causal": False, "lengths": [12, 2], "sinks": True},
    "sinks": {"sinks": True, "lengths": [0, 11]},
    "multi_query": {"K": 1, "G": 4, "T": 2},
    "multi_head": {"K": 4, "G": 1},
    "three_heads": {"K": 3, "G": 2, "lengths": [12, 5]},
    "wide_heads": {"C": 16, "lengths": [12, 5]},
    "everything": {
        "T": 2,
        "lengths": [12, 8],
        "starts": [4, 7],
        "window": 6,
        "softcap": 0.7,
        "alibi": True,
        "sinks": True,
    },
}
PAIRS = [
    ("slots_last", "single_query"),
    ("slots_last", "few_queries"),
    ("slots_last", "reference"),
    ("contiguous", "reference"),
    ("int8_paged", "reference"),
    ("contiguous", "pallas"),
    ("paged", "pallas"),
    ("int8_contiguous", "pallas"),
    ("int8_paged", "pallas"),
]
NAMES = [f"{layout}-{implementation}" for layout, implementation in PAIRS]
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


# The kernel differs between layouts in its copies alone: two of them go through all cases.
ALL_CASES = [
    (name, layout, implementation)
    for name in CASES
    for layout, implementation in PAIRS
    if (implementation != "single_query" or CASES[name].get("T", 1) == 1)
    and (implementation != "pallas" or "table" not in CASES[name])
    and (
        implementation != "pallas"
        or layout in ("paged", "int8_contiguous")
        or name in ("ragged", "window", "everything")
    )
]


def _assert_oracle(case, layout, implementation, dtype="float32", **how):
    if dtype == "bfloat16":
        kept = {
            name: np.asarray(jnp.asarray(getattr(case, name), dtype), np.float64)
            for name in ("q_BTKGC", "k_BSKC", "v_BSKC")
        }
        case = dataclasses.replace(case, **kept)
    wanted = decode_cases.rounded(case) if layout.startswith("int8") else case
    wanted = decode_oracle.attention(wanted)
    # What the rows do not hold the kernel does not look at; plain products meet zero times it.
    junk = np.nan if implementation == "pallas" else 1e3
    actual = decode_cases.attend(case, layout, implementation, dtype, junk, **how)
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)
    return actual


@pytest.mark.parametrize(
    "name, layout, implementation", ALL_CASES, ids=["-".join(x) for x in ALL_CASES]
)
def test_every_implementation_equals_the_oracle(name, layout, implementation):
    _assert_oracle(decode_cases.make_case(**CASES[name]), layout, implementation)


@pytest.mark.parametrize("layout, implementation", PAIRS, ids=NAMES)
def test_bfloat16(layout, implementation):
    case = decode_cases.make_case(lengths=[12, 7], sinks=True)
    _assert_oracle(case, layout, implementation, "bfloat16")


def _of_beams(case, num_beams, seed=0):
    """Returns a cache of the case's rows as beams, which read slots of any of their row's beams."""
    zeros_B = np.zeros_like(case.lengths_B)
    whole = dataclasses.replace(case, starts_B=zeros_B, lengths_B=zeros_B + 12)
    own = decode_cases.make_cache(whole, "slots_last")
    shape = (len(case.lengths_B) // num_beams, num_beams, case.k_BSKC.shape[1])
    origins_BQS = np.random.default_rng(seed).integers(0, num_beams, shape)
    return caches.OfBeams(own, jnp.asarray(origins_BQS, jnp.int32))


@pytest.mark.parametrize("name", ["ragged", "table_of_one_query", "alibi", "everything"])
def test_beams_read_slots_where_they_are(name):
    changes = CASES[name] | {"B": 6, "T": 1, "lengths": [12, 7, 9, 5, 12, 12]}
    case = decode_cases.make_case(**changes | {"starts": [0, 2, 0, 1, 0, 0]})
    cache = _of_beams(case, num_beams=3)
    # A beam's slots, brought together.
    rows_BQS = np.arange(2)[:, None, None] * 3 + np.asarray(cache.origins_BQS)
    rows_BS, slots_S = rows_BQS.reshape(6, -1), np.arange(12)
    moved = {name: getattr(case, name)[rows_BS, slots_S] for name in ("k_BSKC", "v_BSKC")}
    wanted = decode_oracle.attention(dataclasses.replace(case, **moved))
    how = {name: getattr(case, name) for name in ("scale", "window", "softcap", "is_causal")}
    arrays = decode_cases.arguments(case)
    actual = op.attention(jnp.asarray(case.q_BTKGC, jnp.float32), cache, **arrays, **how)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_a_beam_writes_its_own_slot():
    case = decode_cases.make_case(B=6)
    cache = _of_beams(case, num_beams=3)
    k_BTKC = jnp.full((6, 1, 2, 4), 5.0)
    written = cache.write(k_BTKC, k_BTKC, 3)
    np.testing.assert_array_equal(written.origins_BQS, cache.origins_BQS)
    assert jnp.all(written.own.k_BKCS[..., 3] == 5.0) and written.num_slots == 12


def test_origins_of_other_rows_are_refused():
    case = decode_cases.make_case(B=6)
    cache = _of_beams(case, num_beams=3)
    cache = dataclasses.replace(cache, origins_BQS=cache.origins_BQS[:, :2])
    q_BTKGC = jnp.asarray(case.q_BTKGC)
    with pytest.raises(ValueError, match=r"origins \[B,Q,S\] = \(2, 2, 12\) of a cache of 12"):
        op.attention(q_BTKGC, cache, lengths_B=jnp.asarray(case.lengths_B), scale=1.0)


@pytest.mark.parametrize("layout, implementation", PAIRS, ids=NAMES)
def test_a_row_of_nothing_gives_zeros(layout, implementation):
    case = decode_cases.make_case(lengths=[0, 5], starts=[0, 5])
    actual = _assert_oracle(case, layout, implementation)
    assert np.all(actual == 0.0)


@st.composite
def _rows(draw, num_queries):
    """Lengths, starts, and a seed of two rows; few shapes, so that few programs are compiled."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=2, max_size=2))
    starts = [draw(st.integers(0, 12)) for _ in lengths]
    return {"T": num_queries, "lengths": lengths, "starts": starts, "seed": draw(st.integers(0, 9))}


@pytest.mark.parametrize(
    "layout, num_queries, score",
    [
        ("contiguous", 1, {"window": 4, "sinks": True}),
        ("paged", 2, {"alibi": True}),
        ("int8_paged", 3, {"window": 3, "softcap": 0.7}),
    ],
    ids=["one", "two", "three"],
)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_any_rows(layout, num_queries, score, data):
    case = decode_cases.make_case(**data.draw(_rows(num_queries)), **score)
    _assert_oracle(case, layout, "pallas")


@pytest.mark.long
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.data())
def test_any_shapes(data):
    """Of heads, blocks, pages, rings and pipelines."""
    draw = data.draw
    heads = {"K": draw(st.integers(1, 4)), "G": draw(st.integers(1, 3))}
    sizes = dataclasses.replace(
        decode_cases.SIZES,
        block=draw(st.sampled_from([2, 4, 6])),
        ring=draw(st.integers(2, 4)),
        lag=draw(st.integers(1, 3)),
        lanes=draw(st.sampled_from([4, 8, 16])),
        cores=draw(st.integers(1, 2)),
    )
    case = decode_cases.make_case(
        B=3,
        T=draw(st.integers(1, 4)),
        C=draw(st.sampled_from([2, 4, 8])),
        lengths=draw(st.lists(st.integers(0, 12), min_size=3, max_size=3)),
        window=draw(st.none() | st.integers(1, 12)),
        softcap=draw(st.sampled_from([None, 0.7])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        **heads,
    )
    layout = draw(st.sampled_from(decode_cases.LAYOUTS[1:]))
    _assert_oracle(case, layout, "pallas", sizes=sizes)


def test_repeated_runs_give_the_same_bits():
    case = decode_cases.make_case(lengths=[12, 7])
    one, other = (decode_cases.attend(case, "paged", "pallas") for _ in range(2))
    assert one.tobytes() == other.tobytes()


# --- several devices ------------------------------------------------------------------------------


def _placed(cache, rules):
    """Puts a cache where a model would: rows and heads cut, a pool of pages whole for all rows."""
    letters = {
        "k_BKCS": "BKCS",
        "v_BKSC": "BKSC",
        "kv_B2SW": "B_SK",
        "scales_B2KS": "B_KS",
        "kv_pages": "___K",
        "scales_pages": "__K_",
        "table": "B_",
    }

    def put(path, array):
        return jax.device_put(array, rules.act(letters[path[-1].name]))

    return jax.tree_util.tree_map_with_path(put, cache)


ON_DEVICES = {
    "slopes": {"starts": [2, 0], "alibi": True, "sinks": True},
    "table": {"T": 2, "starts": [2, 0], "table": True},
    "encoder": {"T": 2, "is_causal": False, "sinks": True},
}


@pytest.mark.parametrize("kv_heads, tensor", [("sharded", 2), ("replicated", 3)])
@pytest.mark.parametrize(
    "name, layout, implementation",
    [("slopes", *pair) for pair in PAIRS]
    + [("table", "slots_last", "reference"), ("table", "contiguous", "reference")]
    + [("encoder", "slots_last", "reference"), ("encoder", "contiguous", "pallas")],
)
def test_rows_and_heads_may_lie_on_several_devices(name, layout, implementation, kv_heads, tensor):
    """Slopes, tables, sinks and lengths are whole everywhere, as a model makes them."""
    case = decode_cases.make_case(lengths=[7, 12], **ON_DEVICES[name])
    mesh, rules = helpers.make_mesh((1, 2, 1, 1, tensor), "tp", kv_heads=kv_heads)
    arrays = decode_cases.arguments(case)
    how = {"implementation": implementation, "sizes": decode_cases.SIZES}
    how |= {"scale": case.scale, "is_causal": case.is_causal}
    with jax.set_mesh(mesh):
        cache = _placed(decode_cases.make_cache(case, layout), rules)
        q_BTKGC = jax.device_put(jnp.asarray(case.q_BTKGC, jnp.float32), rules.act("BTKGC"))
        actual = jax.jit(lambda q, c: op.attention(q, c, **arrays, **how))(q_BTKGC, cache)
        assert jax.typeof(actual).sharding.spec[0] == jax.typeof(q_BTKGC).sharding.spec[0]
    wanted = decode_cases.rounded(case) if layout.startswith("int8") else case
    helpers.assert_close(actual, decode_oracle.attention(wanted))


# --- what is refused ------------------------------------------------------------------------------


def _attend(layout="contiguous", changes=None, **how):
    case = decode_cases.make_case(T=how.pop("T", 1))
    cache = decode_cases.make_cache(case, layout)
    q_BTKGC = jnp.asarray(case.q_BTKGC, jnp.float32)
    arguments = decode_cases.arguments(case) | {"scale": 1.0} | (changes or {}) | how
    return op.attention(q_BTKGC, cache, **arguments)


@pytest.mark.parametrize(
    "layout, how, message",
    [
        ("paged", {"lengths_B": jnp.zeros(3, jnp.int32)}, r"int32 \(2,\), got int32 \(3,\)"),
        ("paged", {"lengths_B": jnp.zeros(2)}, r"lengths \[B\] must be int32 \(2,\), got float32"),
        ("paged", {"starts_B": jnp.zeros((2, 1), jnp.int32)}, r"starts .* got int32 \(2, 1\)"),
        ("paged", {"sinks_KG": jnp.zeros((3, 2))}, r"\(3, 2\) do not fit heads \[K,G\] = \(2, 3\)"),
        ("paged", {"bias": biases.Alibi(jnp.ones((2, 1)))}, r"slopes \[K,G\] = \(2, 1\)"),
        ("paged", {"bias": biases.Full(jnp.ones((1, 1, 1, 1, 12)))}, "no bias of kind Full"),
        ("paged", {"bias": biases.Relative(jnp.ones((3, 2, 8)))}, r"distance \[K,G\] = \(3, 2\)"),
        (
            "paged",
            {"bias": biases.Relative(jnp.ones((2, 3, 8))), "implementation": "pallas"},
            "'pallas' takes slopes alone, no bias of kind Relative; use 'auto' or 'reference'",
        ),
        ("paged", {"window": 2, "is_causal": False}, "neither window = 2 nor"),
        ("paged", {"bias": biases.Alibi(jnp.ones((2, 3))), "is_causal": False}, "kind Alibi"),
        ("paged", {"window": 0}, "window = 0 must be at least 1"),
        ("paged", {"implementation": "single_query"}, r"\(2, 1, 2, 3, 4\) and Paged"),
        ("slots_last", {"implementation": "single_query", "T": 2}, r"\(2, 2, 2, 3, 4\)"),
        ("paged", {"implementation": "few_queries"}, "one OfBeams, not Paged"),
        ("slots_last", {"implementation": "pallas"}, r"k \[B,K,C,S\] = \(2, 2, 4, 12\)"),
        ("paged", {"implementation": "flash"}, "'flash' is none of auto"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(layout, how, message):
    with pytest.raises(ValueError, match=message):
        _attend(layout, **how)


@pytest.mark.parametrize("layout", decode_cases.LAYOUTS)
def test_caches_of_other_heads_are_refused(layout):
    case = decode_cases.make_case()
    cache = decode_cases.make_cache(case, layout)
    q_BTKGC = jnp.zeros((2, 1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 2, 4\).* do not fit"):
        op.attention(q_BTKGC, cache, lengths_B=jnp.asarray(case.lengths_B), scale=1.0)


def test_a_table_beyond_scalar_memory_is_refused():
    case = decode_cases.make_case()
    cache = decode_cases.make_cache(case, "paged")
    cache = dataclasses.replace(cache, table=jnp.zeros((2, 70_000), jnp.int32))
    how = {"lengths_B": jnp.asarray(case.lengths_B), "scale": 1.0, "implementation": "pallas"}
    with pytest.raises(ValueError, match=r"\(2, 70000\) needs 546 KiB of 512; use larger pages"):
        op.attention(jnp.asarray(case.q_BTKGC), cache, **how)
