"""The kernels' tables: every pair that may attend is visited once, and open visits hide nothing."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import blocks
from llm_jax.kernels.flash_attention import forward_visits
from llm_jax.kernels.flash_attention import masks
from tests.kernels import attention_oracle
from tests.kernels import mask_trees

FORWARD = forward_visits.Blocks(q=4, kv=4, tile=2, chunk=2, lead=1, lag=1)
BACKWARD = backward_visits.Blocks(8, 8, 4, 4, 2, 2, 2, 2)

# Both edges cut tiles, never the same one.
BAND = masks.local_window(5, 0)


def _placed(mask, is_traced):
    """Returns the mask with arrays of the program instead of numpy's."""
    return jax.tree.map(jnp.asarray, mask) if is_traced else mask


def _wanted(case):
    mask, num_queries, num_keys, offset, _, _ = case
    return attention_oracle.allowed(mask, mask_trees.B, num_queries, num_keys, offset)


SIZES = [
    FORWARD,
    # A span at a time: of two visits, and of one.
    dataclasses.replace(FORWARD, span=8),
    dataclasses.replace(FORWARD, kv=6, span=6, own=3),
]


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.example((BAND, 9, 9, 0, 1, 1))
@hypothesis.example((masks.causal(), 9, 9, 2, 1, 1))
@hypothesis.given(mask_trees.cases())
def test_forward_visits_cover_the_mask_once(sizes, is_traced, case):
    mask, num_queries, num_keys, offset, _, _ = case
    mask = _placed(mask, is_traced)
    visits = forward_visits.make_visits(mask, num_queries, num_keys, sizes, offset)
    wanted = _wanted(case)
    for b in range(mask_trees.B):
        found = _walked(visits, sizes, b, num_keys)
        assert sorted(found) == list(range(-(-num_queries // sizes.q)))
        for i, (ends, parts) in found.items():
            count = np.zeros((sizes.q, num_keys + visits.span), int)
            is_open = np.zeros_like(count, bool)
            allowed = np.ones_like(is_open)
            for at, part in parts:
                count[at] += 1
                if part == forward_visits.OPEN:
                    is_open[at] = True
                elif visits.part_masks:
                    t, s = (np.arange(x.start, x.stop) for x in at)
                    t = t[:, None] + i * sizes.q + offset
                    allowed[at] = visits.part_masks[part - forward_visits.PART].allowed(t, s)
            assert [first for first, _ in ends] == [True] + [False] * (len(ends) - 1)
            assert [last for _, last in ends] == [False] * (len(ends) - 1) + [True]
            here = wanted[b, i * sizes.q : (i + 1) * sizes.q]
            inside = np.s_[: len(here), :num_keys]
            assert count.max() <= 1
            assert (count[inside] >= here).all()
            assert (here | ~is_open[inside]).all()
            assert not is_open[:, num_keys:].any()
            if visits.part_masks:  # a mask for a part says what the whole one says
                np.testing.assert_array_equal((allowed & (count > 0))[inside], here)


def _walked(visits, sizes, b, num_keys):
    """Returns, by block of queries, the ends of its visits and the parts: where, and which."""
    tables = {
        name: np.asarray(getattr(visits, name))
        for name in ("start", "stop", "kv", "units", "q_block", "first", "flags")
    }
    found, num_kinds, chunk, tile = {}, len(visits.kinds), sizes.chunk, sizes.tile
    for step, i in enumerate(tables["q_block"].tolist()):
        row = (b * len(tables["q_block"]) if visits.is_per_row else 0) + step
        continues = bool(tables["flags"][step] & forward_visits.CONTINUES)
        assert continues == (i in found)
        ends, parts = found.setdefault(i, ([], []))
        origin, previous = tables["first"][step] * chunk, None
        if visits.num_past is not None:
            assert origin + visits.span <= num_keys + visits.num_past
        for n, kind in enumerate(visits.kinds):
            begin, end = (tables[name][row * num_kinds + n] for name in ("start", "stop"))
            ends += [(kind.is_first, kind.is_last)] * (end - begin)
            # The kernel looks up the next visit before this one is over.
            assert previous in (None, begin) or begin == end or kind.is_own
            previous = end if end > begin else previous
            if kind.is_own:
                parts += _own_parts(visits, sizes, tables, origin, kind, range(begin, end))
                continue
            for base in tables["kv"][begin:end] * chunk:
                assert origin <= base and base + sizes.kv <= origin + visits.span
                parts += [
                    (
                        np.s_[r * tile : (r + 1) * tile, base + c * chunk : base + (c + 1) * chunk],
                        part,
                    )
                    for r, of_tile in enumerate(kind.pattern)
                    for c, part in enumerate(of_tile)
                    if part != forward_visits.SKIP
                ]
    return found


def _own_parts(visits, sizes, tables, origin, kind, numbers):
    """Returns the parts of visits in which each tile has its own chunks."""
    number = forward_visits.per_word(visits.span // sizes.chunk)
    words, bits = -(-sizes.own // number), 32 // number
    parts = []
    for n in numbers:
        for r, of_tile in enumerate(kind.pattern):
            for c, part in enumerate(of_tile):
                word = int(tables["units"][(n * len(kind.pattern) + r) * words + c // number])
                index = (word >> (c % number * bits)) & ((1 << bits) - 1)
                base = origin + index * sizes.chunk
                assert base + sizes.chunk <= origin + visits.span
                at_q = slice(r * sizes.tile, (r + 1) * sizes.tile)
                parts.append(((at_q, slice(base, base + sizes.chunk)), part))
    return parts


@pytest.mark.parametrize("is_q_outer", [False, True])
@pytest.mark.parametrize("is_traced", [False, True])
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.example((BAND, 9, 9, 0, 1, 1))
@hypothesis.example((masks.causal(), 9, 9, 2, 1, 1))
@hypothesis.given(mask_trees.cases())
def test_backward_visits_cover_the_mask_once(is_traced, is_q_outer, case):
    mask, num_queries, num_keys, offset, _, _ = case
    mask = _placed(mask, is_traced)
    visits = backward_visits.make_visits(
        mask, num_queries, num_keys, BACKWARD, offset, is_q_outer=is_q_outer
    )
    tiles = np.asarray(visits.tiles)
    wanted = _wanted(case)
    flags = {name: getattr(backward_visits, name) for name in ("FIRST_K", "LAST_K")}
    flags |= {name: getattr(backward_visits, name) for name in ("FIRST_Q", "LAST_Q")}
    for b in range(mask_trees.B):
        base = b * visits.num_visits if visits.is_per_row else 0
        columns = {
            name: np.asarray(x)[base : base + visits.num_visits]
            for name, x in visits.columns.items()
        }
        count = np.zeros((num_queries + 8, num_keys + 8), int)
        is_open = np.zeros_like(count, bool)
        allowed = np.ones_like(is_open)
        for n in range(visits.num_visits):
            column = {name: int(x[n]) for name, x in columns.items()}
            opens = column["open_turns"] * BACKWARD.open_unroll
            lists = [(column["open_start"], opens, BACKWARD.open_q, BACKWARD.open_k, True, None)]
            for m, part_mask in enumerate(visits.part_masks):
                number = column[f"masked_turns_{m}"] * BACKWARD.masked_unroll
                number += column[f"masked_rest_{m}"]
                sizes = BACKWARD.masked_q, BACKWARD.masked_k
                lists.append((column[f"masked_start_{m}"], number, *sizes, False, part_mask))
            for first, number, size_q, size_k, is_open_list, part_mask in lists:
                for tile in tiles[first : first + number]:
                    t = column["q_block"] * BACKWARD.macro_q + (tile & 0xFFFF) * size_q
                    s = column["k_block"] * BACKWARD.macro_k + (tile >> 16) * size_k
                    at = slice(t, t + size_q), slice(s, s + size_k)
                    count[at] += 1
                    is_open[at] |= is_open_list
                    if part_mask is not None:
                        slots = np.arange(t, t + size_q)[:, None] + offset
                        allowed[at] = part_mask.allowed(slots, np.arange(s, s + size_k))
        inside = np.s_[:num_queries, :num_keys]
        assert count.max() <= 1
        assert (count[inside] >= wanted[b]).all()
        assert (wanted[b] | ~is_open[inside]).all()
        if visits.part_masks != (None,):  # a mask for a part says what the whole one says
            np.testing.assert_array_equal((allowed & (count > 0))[inside], wanted[b])
        assert is_open.sum() == is_open[inside].sum()
        # All blocks are begun once, ended once, and the queries' gradients leave in that order.
        for axis, name in (("K", "k_block"), ("Q", "q_block")):
            for end in ("FIRST", "LAST"):
                marked = columns[name][columns["flags"] & flags[f"{end}_{axis}"] != 0]
                length, macro = (
                    (num_keys, BACKWARD.macro_k) if axis == "K" else (num_queries, BACKWARD.macro_q)
                )
                assert sorted(marked) == list(range(-(-length // macro)))
        is_last = columns["flags"] & flags["LAST_Q"] != 0
        np.testing.assert_array_equal(columns["dq_block"][is_last], columns["q_block"][is_last])


def test_work_is_in_proportion_to_what_is_open():
    chosen = blocks.Blocks(backward=backward_visits.Blocks(masked_q=256, masked_k=256))

    def pairs(mask, length):
        sizes = forward_visits.fitted(chosen.forward, mask, length, length)
        forward = forward_visits.make_visits(mask, length, length, sizes)
        parts = sum(
            (stop - start) * np.sum(np.asarray(kind.pattern) != forward_visits.SKIP)
            for start, stop, kind in zip(
                forward.start, forward.stop, forward.kinds * (length // sizes.q)
            )
        )
        columns = backward_visits.make_visits(mask, length, length, chosen.backward).columns
        opens = columns["open_turns"].sum() * chosen.backward.open_unroll
        turns, rest = (
            sum(x.sum() for name, x in columns.items() if name.startswith(f"masked_{what}"))
            for what in ("turns", "rest")
        )
        masked = turns * chosen.backward.masked_unroll + rest
        backward = opens * chosen.backward.open_q**2 + masked * chosen.backward.masked_q**2
        return parts * chosen.forward.tile * chosen.forward.chunk, backward

    length, block = 8192, 256
    diagonal = length * block / 2
    causal = length**2 / 2 + diagonal
    assert pairs(masks.causal(), length) == (causal, causal)
    # Beyond the open pairs, half a block on either side of the band.
    window = 1024
    band = length * window - window**2 / 2
    for work in pairs(masks.local_window(window - 1, 0), length):
        assert work <= (band + 2 * diagonal) * 1.15


def test_packed_documents_cost_what_they_visit():
    """Units of 256 by 256, no more than a third beyond those with an open pair."""
    sizes = blocks.for_device("TPU v6 lite", 128, 4096).forward
    length, document = 4096, 512
    ids = jnp.broadcast_to(jnp.arange(length) // document, (2, length))
    mask = masks.causal() & masks.Segments(ids, ids)
    visits = forward_visits.make_visits(mask, length, length, sizes)
    counts = np.sum((visits.stop - visits.start).reshape(-1, len(visits.kinds)), 0)
    units = sum(
        n * np.size(kind.pattern) for n, kind in zip(counts.tolist(), visits.kinds, strict=True)
    )
    some = masks.block_bounds(mask, length, length, sizes.tile, sizes.chunk).some
    assert units <= some.sum() * 4 / 3


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="kv by chunk"):
        forward_visits.Blocks(kv=1000)
    with pytest.raises(ValueError, match="chunk \\* own"):
        forward_visits.Blocks(own=3)
    with pytest.raises(ValueError, match="span must"):
        forward_visits.Blocks(span=512)
    with pytest.raises(ValueError, match="macro_k, open_k, masked_k"):
        backward_visits.Blocks(masked_k=384)
    with pytest.raises(ValueError, match="'GPU'.*TPU v5 lite"):
        blocks.for_device("GPU", 64, 128)
