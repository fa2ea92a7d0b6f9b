"""One name of a slice leads to Google's names, to prices and to what compiles."""

import pytest

from launch import code
from launch import settings
from llm_jax import errors
from llm_jax.aot import chips
from llm_jax.aot import topology


@pytest.mark.parametrize(
    ("name", "accelerator", "num_chips", "num_slices"),
    [
        ("v5e:1x1", "v5litepod-1", 1, 1),
        ("v5e:4x8", "v5litepod-32", 32, 1),
        ("2*v5e:16x16", "v5litepod-256", 512, 2),
        ("v5p:2x2x1", "v5p-8", 4, 1),  # two cores a chip
        ("v5p:8x8x8", "v5p-1024", 512, 1),
        ("v6e:4x4", "v6e-16", 16, 1),
        ("v4:2x2x4", "v4-32", 16, 1),
    ],
)
def test_a_slice_has_googles_name(name, accelerator, num_chips, num_slices):
    found = settings.parse_slice(name)
    assert found.name == name
    assert found.accelerator_type == accelerator
    assert (found.num_chips, found.num_slices) == (num_chips, num_slices)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "not the name of a slice"),
        ("0*v5e:4x4", "not the name of a slice"),
        ("v5e:4x4 ", "not the name of a slice"),
        ("v5e:8x4", "v5e has no slice of 8x4"),
        ("v5p:4x4", "v5p has no slice of 4x4"),
        ("v5x:4x4", "no TPU is called 'v5x'"),
    ],
)
def test_other_names_are_refused_with_near_ones(name, said):
    with pytest.raises(errors.UserError, match=said.replace("*", r"\*")):
        settings.parse_slice(name)


def test_the_table_has_a_row_for_every_chip():
    assert set(settings.GENERATIONS) == set(chips.CHIPS)
    for generation in settings.GENERATIONS.values():
        types = [settings.Slice(generation, s, 1).accelerator_type for s in generation.shapes]
        assert len(set(types)) == len(types)  # a type names one shape
        assert generation.zones
        assert generation.price_source


@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", settings.GENERATIONS)
def test_the_compiler_knows_every_slice_of_the_table(chip):
    generation = settings.GENERATIONS[chip]
    for shape in generation.shapes[:6]:
        found = settings.Slice(generation, shape, 1)
        devices = topology.devices(found.name)
        assert len(devices) == found.num_chips * (2 if chip == "tpu7x" else 1)


def test_the_cost_is_chips_times_price_and_says_what_it_is_worth():
    cost = settings.parse_slice("2*v5e:16x16").cost()
    assert "512 chips x $1.20 = $614.40 an hour" in cost
    assert "check before you rely on it" in cost
    assert "not in our table" in settings.parse_slice("tpu7x:2x2x1").cost()


def test_the_page_for_newcomers_has_the_prices_of_the_table():
    page = (code.ROOT / "launch" / "README.md").read_text()
    prices = page.partition("<!-- prices")[2].partition("<!-- end of prices -->")[0]
    assert prices.rstrip().endswith(settings.price_table())


def test_zones_that_do_not_offer_a_chip_are_named():
    v5e = settings.GENERATIONS["v5e"]
    settings.check_zone("us-west4-a", v5e)
    with pytest.raises(errors.UserError, match="did you mean 'us-west4-a'.*--any_zone"):
        settings.check_zone("us-west4-b", v5e)
    assert settings.region("europe-west4-b") == "europe-west4"
