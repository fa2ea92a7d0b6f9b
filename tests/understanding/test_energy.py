"""The estimate is the product that it says, and says all that it rests on."""

import json

from etils import epath
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.understanding import energy

NONE = dict.fromkeys(("watts", *energy.ASSUMPTIONS))


def _run(folder, slice_name, rows=()):
    config = config_lib.RunConfig(slice=slice_name)
    (folder / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


ROWS = [
    {"step": 10, "train/loss": 2.0, "perf/seconds_per_step": 36.0},
    {"step": 10, "eval/validation/loss": 2.0},
    {"step": 30, "train/loss": 1.0, "perf/seconds_per_step": 18.0},
]


def test_energy_is_the_product_of_what_is_listed(tmp_path):
    workdir = _run(tmp_path, "2*v4:2x2x4", ROWS)
    found = energy.estimate(workdir, overrides=NONE)
    # 10 steps of 36 s and 20 of 18 s: 720 s. 192 W on 32 chips, by hand.
    assert found.chips == 32 and found.hours == pytest.approx(0.2)
    assert found.chip_hours == pytest.approx(6.4)
    assert found.kwh == pytest.approx(6.4 * 0.192 * 0.9 * 1.2 * 1.1)
    assert found.kg_co2e == pytest.approx(found.kwh * 0.48)
    given = {"watts": 500.0, "load": 0.5, "host": 0.0, "pue": 1.5, "grid": 0.02}
    found = energy.estimate(workdir, chips=8, hours=100.0, overrides=given)
    assert found.kwh == pytest.approx(300.0) and found.kg_co2e == pytest.approx(6.0)
    assert {one.source for one in found.assumptions.values()} == {f"--{name}" for name in given}


def test_every_assumption_is_stated(tmp_path):
    found = energy.estimate(_run(tmp_path, "v5e:4x4", ROWS), overrides=NONE | {"grid": 0.1})
    energy.write(found, epath.Path(tmp_path / "out"))
    text = (tmp_path / "out" / "energy.txt").read_text()
    assert "no power was measured" in text and "16" in text
    for name, one in found.assumptions.items():
        assert f"--{name}" in text and one.source in text and f"{one.value:g}" in text
    assert "(--grid)" in text
    written = json.loads((tmp_path / "out" / "energy.json").read_text())
    assert written["is_measured"] is False and set(written["assumptions"]) == set(NONE)
    product = written["chips"] * written["hours"]
    for name in ("watts", "load", "pue"):
        product *= written["assumptions"][name]["value"]
    product *= (1 + written["assumptions"]["host"]["value"]) / 1000
    assert written["kwh"] == pytest.approx(product)
    assert written["kg_co2e"] == pytest.approx(product * 0.1)


def test_mistakes_are_told(tmp_path):
    workdir = _run(tmp_path, "cpu")
    with pytest.raises(errors.UserError, match="no step with a time: give the run's --hours"):
        energy.estimate(workdir, overrides=NONE)
    with pytest.raises(errors.UserError, match="--pue=0.9 must be finite and at least 1"):
        energy.estimate(workdir, hours=1.0, overrides=NONE | {"pue": 0.9})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(errors.UserError, match="has no metrics.jsonl"):
        energy.estimate(workdir, overrides=NONE)
    with pytest.raises(errors.UserError, match="it is no run"):
        energy.estimate(str(tmp_path / "none"), hours=1.0, overrides=NONE)
    assert energy.estimate(workdir, hours=2.0, overrides=NONE).chips == 1
