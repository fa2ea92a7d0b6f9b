"""`python -m llm_jax.convert` as a process: both ways, and mistakes in one line."""

import pytest

from tests import commands
from tests.convert import folders


def _run(folder, *argvs: list[str]) -> list[tuple[int, str, str]]:
    return commands.run("llm_jax.convert.__main__", folder, list(argvs))


@pytest.mark.slow
def test_the_command_converts_both_ways(tmp_path):
    folder = folders.copy("gpt2", tmp_path / "model")
    there, back = _run(
        tmp_path,
        ["from-hf", "model", "run", "--tokenizer=none"],
        ["to-hf", "run", "back", "--max_shard_size=8KB"],
    )
    assert there[0] == 0 and "gpt2 with 8,256 parameters in float32, is " in there[1]
    assert back[0] == 0 and back[1].endswith(f"as gpt2 in float32, is {tmp_path}/back\n")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    folders.assert_same(folders.arrays_of(tmp_path / "back"), folders.arrays_of(folder))
    flags = ["--workdir=run", "--prompt=3 5", "--max_tokens=2", "--temperature=0"]
    ((code, text, _),) = commands.run("llm_jax.sampling.__main__", tmp_path, [flags])
    assert code == 0 and len(text.split()) == 4
    inspected = commands.run(
        "llm_jax.checkpoint.__main__", tmp_path, [["inspect", "run", "--verify"]]
    )
    assert inspected[0][0] == 0 and f"from {tmp_path}/model (gpt2)" in inspected[0][1]


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path):
    folders.copy("gpt2", tmp_path / "model")
    cases = {
        "COMMAND is missing: What to do: from-hf, from-gguf, to-hf": [],
        "'from-fh' is no command (did you mean 'from-hf'?)": ["from-fh", "model", "run"],
        "TARGET is missing": ["from-hf", "model"],
        "/nowhere is no folder": ["from-hf", "nowhere", "run"],
        "has no tokenizer": ["from-hf", "model", "run"],
        "--tokenizer=nope": ["from-hf", "model", "run", "--tokenizer=nope"],
        "--param_dtype=float16": ["from-hf", "model", "run", "--param_dtype=float16"],
        "is no GGUF file": ["from-gguf", "model/config.json", "run"],
        "has no checkpoints": ["to-hf", "model", "back"],
        "--max_shard_size=big: use": ["to-hf", "model", "back", "--max_shard_size=big"],
        "--dtype=int8": ["to-hf", "model", "back", "--dtype=int8"],
        "written to local folders": ["to-hf", "model", "gs://bucket/back"],
    }
    for (code, out, err), expected in zip(_run(tmp_path, *cases.values()), cases):
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert sorted(path.name for path in tmp_path.glob("[!0-9]*")) == ["model"]
