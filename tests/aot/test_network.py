"""How long collectives take, over which axes they run, and which links they keep busy."""

import math

import numpy as np
import pytest

from llm_jax.aot import chips
from llm_jax.aot import collectives
from llm_jax.aot import network
from tests.aot import grids

V5E, V5P = chips.by_name("v5e"), chips.by_name("v5p")
_LARGE = 1 << 30  # latency is nothing beside it


def _part(kind, attributes, num_bytes=_LARGE):
    return collectives.Part(kind, "whole", "x", num_bytes, False, attributes)


def _seconds(kind, sides, chip=V5E, num_slices=1, num_bytes=_LARGE):
    """Of a collective over all chips of a grid."""
    axes = {"data": num_slices * math.prod(sides)}
    links = network.Network(grids.mesh(sides, axes, num_slices), chip)
    return links.collective(_part(kind, "", num_bytes)).seconds


def test_a_line_receives_everything_by_one_link_and_a_ring_by_two():
    link = V5E.ici_bandwidth * 0.9
    line, ring = _seconds("all-gather", (8, 1, 1)), _seconds("all-gather", (16, 1, 1))
    assert line == pytest.approx(_LARGE * 7 / 8 / link, rel=1e-3)
    assert ring == pytest.approx(_LARGE * 15 / 16 / (2 * link), rel=1e-3)
    assert _seconds("all-gather", (16, 16, 1)) == pytest.approx(ring / 2, rel=0.1)


def test_sides_of_four_are_rings_where_all_sides_are_multiples_of_it():
    cube, flat = _seconds("all-gather", (4, 4, 4), V5P), _seconds("all-gather", (4, 4, 1), V5P)
    link = V5P.ici_bandwidth * 0.9
    assert cube == pytest.approx(_LARGE * 63 / 64 / (6 * link), rel=1e-2)
    assert flat == pytest.approx(_LARGE * 15 / 16 / (2 * link), rel=1e-2)


def test_a_sum_for_all_is_a_scatter_and_a_gather():
    gather, scatter = (_seconds(kind, (4, 4, 1)) for kind in ("all-gather", "reduce-scatter"))
    assert gather == scatter
    assert _seconds("all-reduce", (4, 4, 1)) == pytest.approx(gather + scatter)


def test_between_slices_each_chip_sends_its_share_by_the_network():
    inside, both = _seconds("all-reduce", (4, 4, 1)), _seconds("all-reduce", (4, 4, 1), V5E, 2)
    share = 2 * _LARGE / 16 / 2 / V5E.dcn_bandwidth
    assert both == pytest.approx(inside + share, rel=1e-2)


def test_what_hosts_exchange_is_over_the_axis_that_runs_across_slices():
    mesh = grids.mesh((4, 1, 1), {"replica": 2, "data": 4}, num_slices=2)
    part = _part("all-reduce", '_xla_megascale_target="{1,2}x{0:3}"')
    found = network.Network(mesh, V5E).collective(part)
    assert (found.axes, found.links) == (("replica",), {network.DCN})
    # There and back, half of it each time.
    assert found.seconds == pytest.approx(_LARGE / V5E.dcn_bandwidth, rel=1e-2)


def test_time_grows_with_bytes_and_never_falls_below_latency():
    times = [_seconds("all-reduce", (4, 4, 1), num_bytes=2**power) for power in range(0, 31, 5)]
    assert times == sorted(times)
    assert times[0] > 1e-6
    assert _seconds("all-gather", (1, 1, 1)) == 0


@pytest.mark.parametrize(
    "attributes",
    [
        "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, x",
        "replica_groups=[4,4]<=[16], x",
        "replica_groups=mesh['data'=4,'tensor'=4] {'tensor'}, x",
        "replica_groups=mesh['axis_0'=16] {'axis_0':(4)4}, x",
    ],
)
def test_groups_in_each_notation_are_one_axis_of_the_mesh(attributes):
    links = network.Network(grids.mesh((4, 4, 1), {"data": 4, "tensor": 4}), V5E)
    found = links.collective(_part("all-gather", attributes))
    assert found.axes == ("tensor",)
    assert {side for side, _ in found.links} == {1}


def test_groups_across_are_the_other_axis_and_other_groups_are_none():
    links = network.Network(grids.mesh((4, 4, 1), {"data": 4, "tensor": 4}), V5E)
    across = links.collective(_part("all-gather", "replica_groups=[4,4]<=[4,4]T(1,0), x"))
    named = links.collective(
        _part("all-gather", "replica_groups=mesh['data'=4,'tensor'=4] {'data'}")
    )
    assert across == named
    assert across.axes == ("data",)
    assert {side for side, _ in across.links} == {0}
    pairs = links.collective(_part("all-gather", "replica_groups=[8,2]<=[16], x"))
    assert pairs.axes == ()


def _shift(links, number, distance, num_bytes=_LARGE):
    pairs = ",".join(f"{{{i},{(i + distance) % number}}}" for i in range(number))
    return links.collective(_part("collective-permute", f"source_target_pairs={{{pairs}}}"))


def test_on_a_ring_both_ways_are_free_of_each_other():
    links = network.Network(grids.mesh((16, 1, 1), {"data": 16}), V5E)
    there, back = _shift(links, 16, 1), _shift(links, 16, -1)
    assert there.seconds == pytest.approx(_LARGE / (V5E.ici_bandwidth * 0.9), rel=1e-3)
    assert there.seconds == back.seconds
    assert not there.links & back.links
    assert _shift(links, 16, 2).seconds == pytest.approx(2 * there.seconds, rel=1e-3)
    assert there.axes == ("data",)


def test_on_a_line_the_last_chip_sends_across_all_others():
    links = network.Network(grids.mesh((8, 1, 1), {"data": 8}), V5E)
    round_trip = _shift(links, 8, 1)
    assert len(round_trip.links) == 2  # back along the whole line
    assert round_trip.seconds == pytest.approx(_LARGE / (V5E.ici_bandwidth * 0.9), rel=1e-3)


def test_groups_whose_chips_are_apart_share_links():
    links = network.Network(grids.mesh((8, 1, 1), {"data": 4, "tensor": 2}), V5E)
    near = links.collective(_part("all-gather", "replica_groups=[4,2]<=[8]"))
    far = links.collective(_part("all-gather", "replica_groups=[2,4]<=[4,2]T(1,0)"))
    alone = _seconds("all-gather", (4, 1, 1))
    assert far.seconds == pytest.approx(alone * 7 / 4, rel=1e-2)
    assert near.seconds < far.seconds


def test_an_exchange_is_bound_by_the_middle_of_the_grid():
    # Of 8 chips on a line the half on the left sends half of what it has to the right.
    seconds = _seconds("all-to-all", (8, 1, 1))
    crossing = 4 * _LARGE / 2
    assert seconds == pytest.approx(crossing / (V5E.ici_bandwidth * 0.9), rel=1e-3)
    assert np.isfinite(_seconds("all-to-all", (4, 4, 1)))
