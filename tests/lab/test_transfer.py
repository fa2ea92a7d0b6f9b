"""What is tuned small is given to a large config, or it is said why it cannot be."""

import dataclasses

import pytest

from experiments import transfer
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.lab import analysis
from llm_jax.lab import sweep
from tests.lab import sweeps

RATES = (1e-3, 2e-3, 4e-3)


def _table(values, diverged=()):
    """A table of one variant over learning rates, with the values of two seeds each."""
    own = dataclasses.replace(
        sweeps.SWEEP, grid={"optim.learning_rate": RATES}, evaluations={}, seeds=2
    )
    cells = {}
    for rate, value in zip(RATES, values, strict=True):
        point = (("optim.learning_rate", rate),)
        by_seed = {seed: {"value": value + 0.1 * seed} for seed in (0, 1)}
        if rate in diverged:
            by_seed[1] = {"value": None}
        cells["normal", point] = analysis.Cell("normal", point, by_seed)
    return analysis.Table(own, cells, ())


def test_the_best_point_is_by_the_mean():
    cell = transfer.best_cell(_table([3.0, 2.5, 2.9]), "normal")
    assert dict(cell.point) == {"optim.learning_rate": 2e-3}


def test_an_edge_is_no_optimum():
    with pytest.raises(errors.UserError, match="best at optim.learning_rate = 0.004, the edge"):
        transfer.best_cell(_table([3.0, 2.5, 2.4]), "normal")
    # A rate at which some run diverged is not the best one, whatever the others reached.
    cell = transfer.best_cell(_table([3.0, 2.5, 2.4], diverged=(4e-3,)), "normal")
    assert dict(cell.point) == {"optim.learning_rate": 2e-3}
    with pytest.raises(errors.UserError, match="diverged at each point"):
        transfer.best_cell(_table([3.0, 2.5, 2.4], diverged=RATES), "normal")


def _configs(parametrisation, **large):
    small = config_lib.ModelConfig(
        parametrisation=parametrisation, embed_dim=64, num_heads=4, base_width=64, num_layers=2
    )
    small = dataclasses.replace(small, base_depth=2)
    fields = {"embed_dim": 512, "num_heads": 8, "num_layers": 2} | large
    return (
        config_lib.RunConfig(model=small),
        config_lib.RunConfig(model=config_lib.ModelConfig(**fields)),
    )


def test_overrides_make_the_large_model_one_of_the_same_family():
    small, large = _configs("mup")
    point = (("optim.learning_rate", 2e-3),)
    found = transfer.overrides(small, point, large)
    assert found == {
        "model.parametrisation": "mup",
        "model.base_width": 64,
        "model.base_depth": 2,
        "model.init_stddev": 0.02,
        "model.base_head_dim": 16,
        "optim.learning_rate": 2e-3,
    }
    raw = config_lib.new()
    sweep.apply(raw, found)
    config_lib.check(config_lib.from_config_dict(raw))


def test_what_does_not_carry_over_is_refused():
    with pytest.raises(errors.UserError, match="'standard', whose optima move"):
        transfer.overrides(*_swapped(_configs("standard")))
    with pytest.raises(errors.UserError, match="sweep with 'completep'"):
        transfer.overrides(*_swapped(_configs("mup", num_layers=8)))
    assert transfer.overrides(*_swapped(_configs("completep", num_layers=8)))


def _swapped(configs):
    small, large = configs
    return small, (), large
