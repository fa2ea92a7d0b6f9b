"""Best learning rates by size, of planted losses."""

import numpy as np
import pytest

from llm_jax.lab import optima


@pytest.mark.parametrize("place", [2.2, 3.0, 3.7])
def test_the_vertex_of_a_parabola_is_found(place):
    x = np.arange(6.0)
    assert optima.vertex(x, 0.3 * (x - place) ** 2 + 1.0) == pytest.approx(place)


def test_an_edge_and_a_neighbour_that_diverged_give_the_point_itself():
    x = np.arange(4.0)
    assert optima.vertex(x, np.array([1.0, 2.0, 3.0, 4.0])) == 0
    assert optima.vertex(x, np.array([3.0, 2.0, np.inf, np.inf])) == 1


def test_the_power_of_a_planted_drift():
    drift = {size: [-3 - 0.5 * np.log2(size), -2 - 0.5 * np.log2(size)] for size in (32, 64, 256)}
    power = optima.power_of_size(drift)
    assert power.mean == pytest.approx(-0.5) and power.high - power.low < 1e-6
    assert optima.nearest(drift[64], [2.0**-7, 2.0**-5.5, 2.0**-4]) == 2.0**-5.5
    assert optima.shown({8: [-3.0, -3.0]}) == "8: 1.2e-01"
