"""The table agrees with itself and with the peaks that MFU is figured from; mistakes are told."""

import pytest

from llm_jax import errors
from llm_jax import flops
from llm_jax.aot import chips
from llm_jax.aot import topology


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_peak_follows_from_the_units_and_the_clock(chip):
    macs = chip.num_cores * chip.num_mxus * chip.mxu_size**2 * chip.mxu_rows_per_cycle
    assert 2 * macs * chip.clock_hz == pytest.approx(chip.peak_bf16_flops, rel=3e-3)
    assert flops.PEAK_FLOPS[chip.device_kind] == chip.peak_bf16_flops


def test_names_and_device_kinds_find_the_same_chip():
    for chip in chips.CHIPS.values():
        assert chips.by_name(chip.name) is chips.by_device_kind(chip.device_kind) is chip


@pytest.mark.parametrize(
    ("chip", "sides", "rings"),
    [
        ("v5e", (16, 16), (True, True)),
        ("v6e", (8, 16), (False, True)),
        ("v5e", (4, 8), (False, False)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
        ("tpu7x", (1, 1, 1), (False, False, False)),
    ],
)
def test_sides_close_to_rings_where_the_chips_are_cabled_so(chip, sides, rings):
    assert chips.by_name(chip).rings(sides) == rings


@pytest.mark.parametrize(
    ("call", "name", "said"),
    [
        (chips.by_name, "v5f", "did you mean 'v5"),
        (chips.by_device_kind, "TPU v5e", "'TPU v5 lite'"),
        (topology.chip_of, "v5e", "v5e:4x4"),
        (topology.chip_of, "v5e:4", "v5e:4x4"),
        (topology.chip_of, "v9:2x2", "no TPU is called 'v9'"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(call, name, said):
    with pytest.raises(errors.UserError, match=said):
        call(name)


def test_without_libtpu_its_name_is_said(monkeypatch):
    monkeypatch.setattr(topology, "is_available", lambda: False)
    with pytest.raises(errors.UserError, match=r"pip install 'llm_jax\[aot\]'"):
        topology.devices.__wrapped__("v5e:1x1")


@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
def test_slices_have_the_devices_that_their_names_say():
    for name, count in (("v5e:1x1", 1), ("v6e:2x4", 8), ("v5p:2x2x1", 4), ("v4:2x2x1", 4)):
        devices = topology.devices(name)
        assert len(devices) == count
        assert chips.by_device_kind(devices[0].device_kind) is topology.chip_of(name)


@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
def test_a_slice_that_is_not_made_is_refused_with_its_reason():
    with pytest.raises(errors.UserError, match="v5e:3x3.*not divisible"):
        topology.devices("v5e:3x3")
