"""Rotary tables and ALiBi slopes against their definitions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import positions
from tests import helpers


def _scores(config, q_C, k_C, q_positions, k_positions):
    """Returns q . k with both rotated to the given positions, [T, S]."""

    def rotated(x_C, at):
        x_BTKC = np.broadcast_to(x_C, (1, len(at), 1, len(x_C)))
        tables = positions.rotary_tables(config, jnp.asarray(at, jnp.int32)[None])
        return np.asarray(positions.rotate(jnp.asarray(x_BTKC), tables))[0, :, 0]

    return rotated(q_C, q_positions) @ rotated(k_C, k_positions).T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_fraction": 0.5},
        {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
        {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_original_length": 16},
        {"rope_scaling": "yarn", "rope_attention_factor": 1.0, "rope_original_length": 64},
    ],
)
def test_rope_scores_depend_on_distance_alone(options):
    config = helpers.tiny_model_config(head_dim=16, **options)
    rng = np.random.default_rng(0)
    q_C, k_C = rng.standard_normal((2, 16)).astype(np.float32)
    at = np.arange(20)
    near = _scores(config, q_C, k_C, at, at)
    far = _scores(config, q_C, k_C, at + 100, at + 100)
    helpers.assert_close(far, near, 1e-5)
    by_distance = near[:, 0]
    assert np.abs(by_distance[1:] - by_distance[:-1]).max() > 0.1
    norm = np.sqrt(_scores(config, q_C, q_C, at, at).diagonal())
    np.testing.assert_allclose(norm, np.linalg.norm(q_C), rtol=1e-5)


def test_rope_turns_pairs_by_their_frequencies():
    config = helpers.tiny_model_config(head_dim=4, rope_theta=100.0)
    frequencies = positions.rotary_frequencies(config)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    tables = positions.rotary_tables(config, jnp.asarray([[0, 3]]))
    x_BTKC = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 0.0, 0.0]), (1, 2, 1, 4))
    turned = np.asarray(positions.rotate(x_BTKC, tables))[0, :, 0]
    wanted = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    np.testing.assert_allclose(turned, [[1, 2, 0, 0], wanted], atol=1e-6)


def test_partial_rope_leaves_the_rest():
    config = helpers.tiny_model_config(head_dim=8, rope_fraction=0.5)
    x_BTKC = np.random.default_rng(0).standard_normal((1, 3, 1, 8)).astype(np.float32)
    tables = positions.rotary_tables(config, jnp.asarray([[1, 2, 3]]))
    turned = np.asarray(positions.rotate(jnp.asarray(x_BTKC), tables))
    np.testing.assert_array_equal(turned[..., 4:], x_BTKC[..., 4:])
    assert np.abs(turned[..., :4] - x_BTKC[..., :4]).min(axis=-1).max() > 1e-3


def test_rope_scaling():
    plain = helpers.tiny_model_config(head_dim=128, rope_theta=500_000.0)
    kept = positions.rotary_frequencies(plain)
    linear = dataclasses.replace(plain, rope_scaling="linear", rope_scaling_factor=4.0)
    np.testing.assert_allclose(positions.rotary_frequencies(linear), kept / 4, rtol=1e-6)

    llama3 = dataclasses.replace(plain, rope_scaling="llama3", rope_scaling_factor=8.0)
    scaled = positions.rotary_frequencies(llama3)
    # The released code of Llama 3.1, one frequency at a time.
    wanted = []
    for frequency in kept.astype(np.float64):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            wanted.append(frequency)
        elif wavelength > 8192 / 1:
            wanted.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(scaled, wanted, rtol=1e-6)
    ratio = scaled / kept
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8)
    assert np.any((ratio > 0.13) & (ratio < 0.99))


@pytest.mark.parametrize("original, fast, slow", [(4096, 32.0, 1.0), (64, 2.0, 0.5), (6, 2.0, 1.0)])
def test_yarn_by_its_definition(original, fast, slow):
    """Peng et al. 2023, equations 17 to 23 with the released code's rounding, one pair at a time."""
    config = helpers.tiny_model_config(
        head_dim=64,
        rope_scaling="yarn",
        rope_scaling_factor=40.0,
        rope_original_length=original,
        rope_beta_fast=fast,
        rope_beta_slow=slow,
    )

    def place(turns):  # of the pair, a fraction, that turns so often in the original length
        return 64 * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10_000.0))

    first, last = max(math.floor(place(fast)), 0), min(math.ceil(place(slow)), 63)
    wanted = []
    for pair in range(32):
        frequency = 10_000.0 ** (-2 * pair / 64)
        ramp = min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
        wanted.append((1 - ramp) * frequency + ramp * frequency / 40.0)
    np.testing.assert_allclose(positions.rotary_frequencies(config), wanted, rtol=1e-6)
    cos, sin = positions.rotary_tables(config, jnp.asarray([[0, 5]]))
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(40.0) + 1.0) ** 2, rtol=1e-5)
    given = dataclasses.replace(config, rope_attention_factor=0.7)
    np.testing.assert_allclose(positions.rotary_tables(given, jnp.asarray([[0]]))[0], 0.7)
    local = dataclasses.replace(config, rope_local_theta=100.0)
    np.testing.assert_allclose(positions.rotary_tables(local, jnp.asarray([[0]]), True)[0], 1.0)


def test_neighbours_turn_as_the_halves_they_are_brought_to():
    config = helpers.tiny_model_config(head_dim=8, rope_fraction=0.75)
    x_BTKC = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    tables = positions.rotary_tables(config, jnp.asarray([[1, 2, 5]]))
    turned = positions.rotate(jnp.asarray(x_BTKC), tables, is_interleaved=True)
    halves = jnp.asarray(x_BTKC[..., [0, 2, 4, 1, 3, 5, 6, 7]])
    np.testing.assert_array_equal(turned, positions.rotate(halves, tables))
    assert np.abs(turned - positions.rotate(jnp.asarray(x_BTKC), tables)).max() > 0.1


@pytest.mark.parametrize(
    "num_heads, wanted",
    [
        (8, [2.0**-i for i in range(1, 9)]),
        (12, [2.0**-i for i in range(1, 9)] + [2.0**-e for e in (0.5, 1.5, 2.5, 3.5)]),
        (16, [2.0 ** (-i / 2) for i in range(1, 17)]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_slopes(num_heads, wanted):
    np.testing.assert_allclose(positions.alibi_slopes(num_heads), wanted, rtol=1e-6)
