"""An estimate of the energy and the carbon of a run: hours and chips, times what is assumed of them.

    kWh = chips x hours x watts x load x (1 + host) x PUE / 1000,  kg CO2e = kWh x grid

after Patterson et al. 2021, section 2. Nothing is measured but the hours, and those by the run's own clock;
each assumption is printed with the result, and a flag replaces it.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any

from etils import epath

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import metrics
from llm_jax.aot import topology


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A number that is not measured, its unit, and where it is from."""

    value: float
    unit: str
    source: str


_OURS = "a guess of ours: its maker names none"

# At full load, of what a slice counts as one: a chip, of a TPU7x both its devices.
CHIP_WATTS = {
    "v4": Assumption(192.0, "W", "the highest that Jouppi et al. 2023 (table 4) measured"),
    "v5e": Assumption(200.0, "W", _OURS),
    "v5p": Assumption(450.0, "W", _OURS),
    "v6e": Assumption(350.0, "W", _OURS),
    "tpu7x": Assumption(1000.0, "W", _OURS),
    "cpu": Assumption(150.0, "W", "a guess of ours: a server's processor"),
}

# By the flag that replaces it.
ASSUMPTIONS = {
    "load": Assumption(0.9, "of watts", "power on average over that at full load; a guess of ours"),
    "host": Assumption(0.2, "of the chips' power", "hosts, memory, network; a guess of ours"),
    "pue": Assumption(1.1, "", "of Google's data centres on average, by its environmental reports"),
    "grid": Assumption(0.48, "kg CO2e / kWh", "the world's electricity in 2023, by Ember's review"),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Energy and carbon, what they follow from, and what is not in them.

    Attributes:
      chips, hours: of the run.
      hours_from: where these are from.
      assumptions: all the others, by name.
    """

    chips: int
    hours: float
    hours_from: str
    assumptions: dict[str, Assumption]

    @property
    def chip_hours(self) -> float:
        return self.chips * self.hours

    @property
    def kwh(self) -> float:
        """Energy that the data centre draws, kWh."""
        value = {name: one.value for name, one in self.assumptions.items()}
        watts = value["watts"] * value["load"] * (1.0 + value["host"])
        return self.chip_hours * watts * value["pue"] / 1000.0

    @property
    def kg_co2e(self) -> float:
        """Of making that energy, kg; making the machines is not in it."""
        return self.kwh * self.assumptions["grid"].value


def hours_of(workdir: str) -> float:
    """Returns the hours that the steps of a local run took, by its `metrics.jsonl`.

    Evaluations, saving, what comes before the first step, and steps that an interrupted run did twice are not
    in it; compiling the step is.

    Raises:
      errors.UserError: there is no such file, or no step in it.
    """
    file = pathlib.Path(workdir) / metrics.FILE_NAME
    if not file.is_file():
        raise errors.UserError(
            f"--workdir={workdir} has no {metrics.FILE_NAME}: give the run's --hours"
        )
    rows = [row for row in metrics.read(workdir) if "perf/seconds_per_step" in row]
    if not rows:
        raise errors.UserError(f"{file} has no step with a time: give the run's --hours")
    seconds, before = 0.0, 0
    for row in rows:
        seconds += (row["step"] - before) * row["perf/seconds_per_step"]
        before = row["step"]
    return seconds / 3600.0


def estimate(
    workdir: str,
    *,
    chips: int | None = None,
    hours: float | None = None,
    overrides: Mapping[str, float | None],
) -> Estimate:
    """Returns the estimate of a run.

    Args:
      workdir: of the run.
      chips: None: those of the slice that its config names; of `cpu` one processor.
      hours: None: `hours_of` the run.
      overrides: of `watts` and of `ASSUMPTIONS`, by name; None: as assumed.

    Raises:
      errors.UserError: no config, or no hours; or a number that makes no sense.
    """
    slice_name = _slice_of(workdir)
    kind, num_chips = "cpu", 1
    if slice_name != "cpu":
        found = topology.parse(slice_name)
        kind, num_chips = found.chip.name, found.num_chips
    assumptions = {"watts": CHIP_WATTS[kind], **ASSUMPTIONS}
    for name, value in overrides.items():
        if value is not None:
            least = 1.0 if name == "pue" else 0.0
            if not (math.isfinite(value) and value >= least):
                raise errors.UserError(f"--{name}={value} must be finite and at least {least:g}")
            given = dataclasses.replace(assumptions[name], value=value, source=f"--{name}")
            assumptions[name] = given
    source = (
        f"steps of {metrics.FILE_NAME}, without evaluations, saving, preparation and repeated steps"
    )
    if hours is not None:
        source = "--hours"
    return Estimate(
        num_chips if chips is None else chips,
        hours_of(workdir) if hours is None else hours,
        source,
        assumptions,
    )


def _slice_of(workdir: str) -> str:
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise errors.UserError(f"--workdir={workdir} has no config.json: it is no run")
    return config_lib.from_dict(json.loads(path.read_text())).slice


def as_dict(found: Estimate) -> dict[str, Any]:
    """Returns what JSON holds."""
    return {
        "kwh": found.kwh,
        "kg_co2e": found.kg_co2e,
        "chip_hours": found.chip_hours,
        "chips": found.chips,
        "hours": found.hours,
        "hours_from": found.hours_from,
        "is_measured": False,
        "assumptions": {name: dataclasses.asdict(one) for name, one in found.assumptions.items()},
    }


def table(found: Estimate) -> str:
    """Returns the estimate as text, with all that it rests on."""
    lines = [
        f"{found.kwh:,.4g} kWh, {found.kg_co2e:,.4g} kg CO2e: an estimate, no power was measured",
        f"  chips       {found.chips}",
        f"  hours       {found.hours:.4g} ({found.hours_from})",
    ]
    for name, one in found.assumptions.items():
        lines.append(f"  --{name:9} {one.value:g} {one.unit} ({one.source})".replace("  (", " ("))
    lines.append("not in it: making the machines, data preparation, other runs, using the model")
    return "\n".join(lines) + "\n"


def write(found: Estimate, folder: epath.Path) -> list[epath.Path]:
    """Writes the estimate as JSON and as text; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    values, text = folder / "energy.json", folder / "energy.txt"
    values.write_text(json.dumps(as_dict(found), indent=1) + "\n")
    text.write_text(table(found))
    return [values, text]
