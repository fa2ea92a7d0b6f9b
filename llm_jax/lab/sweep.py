"""An ablation as an object: what is compared, over which grid and seeds, under which budget, by which metric.

    SWEEP = sweep.Sweep(
        name="activations",
        claim="gated activations beat others of as many parameters",
        source="Shazeer 2020 (GLU variants)",
        base=base,
        variants=(sweep.Variant("gelu", {"model.activation": "gelu"}), ...),
        baseline="gelu",
        budgets=(sweep.Budget("parameters", 0.02), sweep.Budget("tokens")),
        smallest=0.01,
    )
    get_config = SWEEP.get_config

A run is a variant at a point of the grid with a seed, named `swiglu;optim.learning_rate=0.001;seed=2`; that name is
what `--config=experiments/activations/sweep.py:NAME` takes.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
from typing import Any

import jax
import ml_collections

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import flops
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.checkpoint import mismatch
from llm_jax.models import build

LOSS = "eval/validation/loss"
SEED = "train.seed"
_BUDGETS = ("tokens", "flops", "parameters")

Changes = Mapping[str, Any]  # of settings, by their path: {"optim.learning_rate": 1e-3}
Point = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named difference from the base.

    Attributes:
      name: of letters, digits and underscores.
      changes: of settings.
      is_exempt: whether budgets do not bind it: a control that has more on purpose.
      group: budgets bind, and tables compare, variants of one group: with the baseline, in other groups than its own
        with their first.
      grid: values of tuned axes that are its own, as an optimiser's learning rates may be.
    """

    name: str
    changes: Changes = dataclasses.field(default_factory=dict)
    is_exempt: bool = False
    group: str = ""
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all variants have the same of: tokens, training flops or parameters, within a tolerance."""

    kind: str
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant at a point of the grid, with a seed."""

    variant: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """What configs and results call it."""
        settings = [f"{path}={json.dumps(value)}" for path, value in self.point]
        return ";".join([self.variant, *settings, f"seed={self.seed}"])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """An ablation.

    Attributes:
      name: of its folder.
      claim: what is to be shown.
      source: the paper.
      base: makes the config that variants change.
      variants: what is compared.
      baseline: the variant that others stand beside.
      grid: values by the path of their setting; each variant runs at each point.
      tuned: axes of the grid of which each variant has its own best value in the table.
      seeds: runs of each.
      tuning_seeds: so many of them run at all points, and choose the values of tuned axes, with which the others then
        run alone; 0: all seeds run at all points.
      budgets: what must be equal, and is checked before anything runs.
      metric: of `metrics.jsonl`, at the end of a run.
      is_less_better: whether a lower value wins.
      smallest: the difference that counts as one.
      diverged_above: a run that ends with a higher metric has diverged; None: if it is not finite.
      evaluations: further evaluations of the last checkpoint, by name: changes of data and objective. Their
        loss is the metric `NAME`.
      probe: changes for a second training, from the end of each run: the metric is that of its end, and so are the
        curves. What runs learned is held to one task so, whatever they learned it by. None: there is none.
      kept: further metrics of which all rows are kept.
      columns: further columns of the table: kept metrics by their heading, as means of the last quarter of runs.
      full_size: makes the config of a variant at the size that it is meant for; None: no cost is compiled.
      slice: that the full size is compiled for.
      findings: from an `analysis.Table` to what it shows of the claim.
      pictures: from an `analysis.Table` to further figures of the report, with their captions, by name.
    """

    name: str
    claim: str
    source: str
    base: Callable[[], ml_collections.ConfigDict]
    variants: tuple[Variant, ...]
    baseline: str
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    seeds: int = 3
    tuning_seeds: int = 0
    budgets: tuple[Budget, ...] = (Budget("tokens"),)
    metric: str = LOSS
    is_less_better: bool = True
    smallest: float = 0.01
    diverged_above: float | None = None
    evaluations: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    probe: Changes | None = None
    kept: tuple[str, ...] = ()
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    full_size: Callable[[str], ml_collections.ConfigDict] | None = None
    slice: str = "v5e:4x4"
    findings: Callable[[Any], list[Any]] | None = None
    pictures: Callable[[Any], Mapping[str, tuple[Any, str]]] | None = None

    def __post_init__(self):
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise ValueError(f"{self.name}: variants {names} are not names, each of one")
        if self.baseline not in names:
            raise ValueError(f"{self.name}: baseline {self.baseline!r} is none of {names}")
        if not set(self.tuned) <= set(self.grid):
            raise ValueError(
                f"{self.name}: {self.tuned} are tuned, and the grid has {[*self.grid]}"
            )
        if self.tuning_seeds and not self.tuned:
            raise ValueError(f"{self.name}: {self.tuning_seeds} seeds choose, and no axis is tuned")
        for variant in self.variants:
            # Other axes are what variants are compared at.
            if not set(variant.grid) <= set(self.tuned):
                raise ValueError(
                    f"{self.name}: {variant.name} has values of its own of {[*variant.grid]}, and {self.tuned} are tuned"
                )
        unknown = {budget.kind for budget in self.budgets} - set(_BUDGETS)
        if unknown:
            raise ValueError(f"{self.name}: budgets {unknown} are none of {_BUDGETS}")

    # --- runs -------------------------------------------------------------------------------------

    def points(self, variant: str) -> Iterator[Point]:
        """Yields the points of a variant's grid; one without axes."""
        grid = {**self.grid, **self.variant(variant).grid}
        for values in itertools.product(*grid.values()):
            yield tuple(zip(grid, values, strict=True))

    def reference(self, variant: str) -> str:
        """Returns the variant that one stands beside, which may be itself."""
        group = self.variant(variant).group
        if group == self.variant(self.baseline).group:
            return self.baseline
        return next(one.name for one in self.variants if one.group == group)

    @property
    def choosing_seeds(self) -> range:
        """The seeds that run at all points."""
        return range(min(self.tuning_seeds or self.seeds, self.seeds))

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """Returns the runs of all points, the first seed of each first; see `analysis.further_runs` for the rest.

        Args:
          only: names of variants; none: all.

        Raises:
          errors.UserError: there is no such variant.
        """
        known = [variant.name for variant in self.variants]
        for name in only:
            if name not in known:
                raise errors.UserError(
                    f"--only: {name!r} is no variant of {self.name}{errors.nearest(name, known)}; there are"
                    f" {', '.join(known)}"
                )
        return [
            Run(name, point, seed)
            for seed in self.choosing_seeds
            for name in (only or known)
            for point in self.points(name)
        ]

    def variant(self, name: str) -> Variant:
        """Returns a variant by its name; raises UserError."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = [variant.name for variant in self.variants]
        raise errors.UserError(
            f"{name!r} is no variant of {self.name}{errors.nearest(name, known)}; there are {', '.join(known)}"
        )

    def get_config(self, arg: str = "") -> ml_collections.ConfigDict:
        """Returns the config of a run by its name; without one of the baseline.

        `NAME;evaluation=E` is that of one of its evaluations, `NAME;probe` that of what follows it.
        """
        name, *settings = (arg or self.baseline).split(";")
        changes, after = dict(self.variant(name).changes), {}
        for setting in settings:
            path, equals, value = setting.partition("=")
            if setting == "probe" and self.probe is not None:
                after = self.probe
                continue
            if not equals:
                raise errors.UserError(f"{setting!r} of run {arg!r} is no setting: path=value")
            if path == "evaluation":
                if value not in self.evaluations:
                    raise errors.UserError(f"{value!r} is no evaluation of {self.name}")
                changes |= self.evaluations[value]
            else:
                changes[SEED if path == "seed" else path] = json.loads(value)
        config = self.base()
        apply(config, {**changes, **after})
        return config

    def config(self, run: Run, is_probe: bool = False) -> config_lib.RunConfig:
        """Returns the checked config of a run, or of its probe."""
        return config_lib.from_config_dict(self.get_config(run.name + ";probe" * is_probe))

    def configs(self, run: Run) -> list[config_lib.RunConfig]:
        """Returns the configs of all that is trained for a run."""
        return [
            self.config(run),
            *([] if self.probe is None else [self.config(run, is_probe=True)]),
        ]

    # --- budgets ----------------------------------------------------------------------------------

    def check_budgets(self) -> dict[str, dict[str, float]]:
        """Returns what each variant uses, at the first point of the grid, by kind of budget.

        Raises:
          errors.UserError: one uses more, or less, than what it stands beside, by more than the tolerance.
        """
        used = {
            variant.name: usage(self.config(Run(variant.name, next(self.points(variant.name)), 0)))
            for variant in self.variants
        }
        for budget in self.budgets:
            for variant in self.variants:
                reference = self.reference(variant.name)
                ratio = used[variant.name][budget.kind] / used[reference][budget.kind]
                if abs(ratio - 1) > budget.tolerance + 1e-9 and not variant.is_exempt:
                    raise errors.UserError(
                        f"{self.name}: {variant.name} has {ratio:.3f} times the {budget.kind} of"
                        f" {reference}, where {budget.tolerance:g} either way is allowed: make them equal, or"
                        " exempt it by name"
                    )
        return used


def usage(config: config_lib.RunConfig) -> dict[str, float]:
    """Returns the tokens, flops and parameters of a run."""
    tokens = config.tokens_per_step * config.train.num_steps
    lengths = (config.data.sequence_length, config.target_length)
    return {
        "tokens": tokens,
        "flops": tokens * flops.train_flops_per_token(config.model, *lengths),
        "parameters": num_parameters(config.model),
    }


def apply(config: ml_collections.ConfigDict, changes: Changes) -> None:
    """Changes settings by their paths; raises UserError for one that there is not."""
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part] if part in section else None
            if section is None:
                break
        if section is None or name not in section:
            raise errors.UserError(f"there is no setting {path!r}")
        with section.ignore_type():
            section[name] = value


def settings_hash(config: config_lib.RunConfig) -> str:
    """Returns a hash of the settings that are not at their defaults.

    So a setting that the code gets later, which changes nothing by itself, leaves runs what they are.
    """
    changed = mismatch.differing(config_lib.RunConfig(), config)
    settings = {name: value for name, (_, value) in changed.items()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def num_parameters(config: config_lib.ModelConfig) -> int:
    """Returns how many parameters a model has, without making it."""
    mesh_config = config_lib.MeshConfig(rules="dp")
    mesh = mesh_lib.make(mesh_config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return flops.num_params(build.abstract_model(config, sharding.axis_rules(mesh_config)))
