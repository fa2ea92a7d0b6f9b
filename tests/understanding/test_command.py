"""The command writes what it is asked for, and mistakes are one line."""

import json

import pytest

from llm_jax import config as config_lib
from tests import commands
from tests.understanding import runs


@pytest.mark.long
def test_command(tmp_path):
    workdir = runs.save(tmp_path)
    config = config_lib.to_dict(config_lib.RunConfig(slice="v5e:2x2"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("a text")
    text = f"--file={tmp_path}/text.txt"
    wanted = {
        ("attention", text, "--layers=1"): "1 layers, 4 heads, 6 x 6",
        ("energy", "--hours=10", f"--output={tmp_path}/out"): "kWh",
    }
    wrong = {
        ("token", text): "'token' is nothing to show (did you mean 'tokens'?)",
        ("tokens", text, "--text=b"): "--text and --file both give the text",
        ("tokens", "--file=none"): "--file=none: there is no such file",
        ("attention", "--text=a", "--layers=x"): "'x' is no number of a layer",
        ("tokens",): "--text is missing",
        ("memorisation", "--samples=none"): "--samples=none: there is no such file",
        ("bias", "--step=9"): "has steps [0]",
    }
    argvs = [[*argv, f"--workdir={workdir}"] for argv in [*wanted, *wrong]]
    found = commands.run("llm_jax.understanding.__main__", tmp_path, argvs)
    for (code, out, err), part in zip(found, wanted.values()):
        assert code == 0, err
        assert part in out
    for (code, out, err), part in zip(found[len(wanted) :], wrong.values(), strict=True):
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
        assert part in err
    folder = tmp_path / "run" / "understanding"
    assert (folder / "0" / "attention_self.png").exists()
    kwh = json.loads((tmp_path / "out" / "energy.json").read_text())["kwh"]
    assert json.loads(found[1][1].splitlines()[-1])["kwh"] == kwh
