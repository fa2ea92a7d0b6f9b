"""Learning rates over widths, with the standard parametrisation and with maximal updates."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import optima
from llm_jax.lab import sweep

_WIDTHS = (32, 64, 128, 256)
_HEAD = 16  # elements of a head: wider models have more of them
# By powers of two: wide enough that optima lie inside, for the narrowest standard model and for the widest.
_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def base():
    config = small.decoder(base_width=_WIDTHS[0], base_depth=4)
    config.train.update(num_steps=250, eval_every=125)
    config.optim.warmup_steps = 25
    return config


def _variant(parametrisation, width):
    changes = {
        "model.parametrisation": parametrisation,
        "model.embed_dim": width,
        "model.mlp_dim": 4 * width,
        "model.num_heads": width // _HEAD,
        # Of matrices at the base: the inverse root of its width.
        "model.init_stddev": _WIDTHS[0] ** -0.5 if parametrisation == "mup" else width**-0.5,
    }
    return sweep.Variant(f"{parametrisation}_{width}", changes, group=f"width {width}")


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds the optimum's drift over widths to Yang et al. 2022, figure 1."""
    variants = {
        name: {width: f"{name}_{width}" for width in _WIDTHS} for name in ("standard", "mup")
    }
    expected = {
        "standard": lambda power: power.high < -0.25,
        "mup": lambda power: abs(power.mean) < 0.25,
    }
    return optima.findings(table, variants, _RATES, "width", expected)


SWEEP = sweep.Sweep(
    name="mup_widths",
    claim="with maximal updates the best learning rate does not move with the width",
    source="Yang et al. 2022",
    base=base,
    variants=tuple(
        _variant(parametrisation, width)
        for parametrisation in ("standard", "mup")
        for width in _WIDTHS
    ),
    baseline="standard_32",
    grid={"optim.learning_rate": _RATES},
    budgets=(sweep.Budget("tokens"), sweep.Budget("parameters"), sweep.Budget("flops")),
    smallest=0.01,
    diverged_above=5.55,
    findings=findings,
)
get_config = SWEEP.get_config
