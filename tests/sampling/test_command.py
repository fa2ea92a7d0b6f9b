"""`python -m llm_jax.sampling` as a process: completions out, one-line errors, what it imports."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from llm_jax import checkpoint
from llm_jax import train_step
from tests import commands
from tests import helpers
from tests.sampling import spelling


def _run_commands(folder, argvs) -> list[tuple[int, str, str]]:
    return commands.run("llm_jax.sampling.__main__", folder, argvs)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder whose only checkpoint, of step 7, is the spelling model."""
    folder = tmp_path_factory.mktemp("run")
    config = helpers.tiny_run_config(
        {
            field: getattr(spelling.spelling_config(), field)
            for field in spelling.spelling_config().__dict__
        }
    )
    mesh, rules = helpers.make_mesh()
    with jax.set_mesh(mesh):
        zero = jnp.zeros((), jnp.int32)
        state = train_step.TrainState(
            zero + 7, zero, spelling.spelling_model(config.model, mesh, rules), {"count": zero}
        )
        manager = checkpoint.Checkpoints(str(folder), config, {"kind": "bytes"})
        manager.save(state)
        manager.close()
    return folder


@pytest.mark.slow
def test_the_command_writes_completions(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text("n\n\nq\n", encoding="utf-8")
    rows = [{"prompt": "n", "seed": 5}, {"prompt": "日\u2028n"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = [f"--workdir={workdir}", "--temperature=0", "--max_tokens=12"]
    streamed, many, listed, from_rows, searched = _run_commands(
        tmp_path,
        [
            [*base, "--prompt=n", "--stop=x"],
            [*base, "--prompt=n", "--num_samples=2"],
            [*base, "--prompts=prompts.txt", "--output=new/samples.jsonl", "--seed=3"],
            [*base, "--prompts=prompts.jsonl", "--output=rows.jsonl", "--step=7"],
            [
                *base,
                "--prompt=n",
                "--num_beams=2",
                "--length_penalty=0.6",
                "--early_stopping=never",
            ],
        ],
    )
    assert streamed[:2] == (0, "né日🎉\n")
    assert many[0] == 0
    assert many[1].splitlines() == [
        "--- 'n', sample 0",
        "né日🎉x n",
        "--- 'n', sample 1",
        "né日🎉x n",
    ]
    assert searched[0] == 0, searched[2]
    header, text = searched[1].splitlines()  # not streamed: the best is known at the end
    # Logits are 16 for the letter and 0 for 255 others: 12 * log(1 + 255 / e^16) / 12^0.6 = 0.00008.
    assert (header, text) == ("--- 'n', sample 0, score -0.0001", "né日🎉x n")
    assert (listed[0], from_rows[0]) == (0, 0), listed[2] + from_rows[2]
    written = (tmp_path / "new/samples.jsonl").read_text(encoding="utf-8").strip().split("\n")
    common = {"step": 7, "seed": 3, "sample": 0}
    circle = (spelling.LETTERS[1:] + spelling.LETTERS)[:12].decode("utf-8", "replace")
    assert [json.loads(line) for line in written] == [
        common | {"prompt": "n", "completion": circle, "finish_reason": "length", "num_tokens": 12},
        common | {"prompt": "q", "completion": "u", "finish_reason": "eos", "num_tokens": 2},
    ]
    again = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert [(json.loads(x)["prompt"], json.loads(x)["seed"]) for x in again] == [
        ("n", 5),
        ("日\u2028n", 0),
    ]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_errors_are_one_line_with_exit_code_two(workdir, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "no_field.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad_seed.jsonl").write_text('{"prompt": "a", "seed": "x"}\n')
    (tmp_path / "empty.txt").write_text("\n\n")
    run = f"--workdir={workdir}"
    cases = {
        "either --prompt=TEXT or --prompts=FILE": [
            [run],
            [run, "--prompt=a", "--prompts=bad.jsonl"],
        ],
        "--workdir is missing": [["--prompt=a"]],
        "is a folder: name a file": [[run, "--prompt=a", f"--output={tmp_path}"]],
        "no checkpoints": [["--workdir=nowhere", "--prompt=a"]],
        "--step=9": [[run, "--step=9", "--prompt=a"]],
        "bad.jsonl line 2 is not JSON": [[run, "--prompts=bad.jsonl"]],
        "line 1 has no text in field 'prompt'": [[run, "--prompts=no_field.jsonl"]],
        "seed 'x'": [[run, "--prompts=bad_seed.jsonl"]],
        "no prompt in it": [[run, "--prompts=empty.txt"]],
        "--prompts=none.txt cannot be read": [[run, "--prompts=none.txt"]],
        "--top_p=0.0": [[run, "--prompt=a", "--top_p=0"]],
        "Unknown command line flag": [[run, "--prompt=a", "--top=3"]],
        "more than the model's max_length": [
            [run, "--prompt=a", "--max_tokens=200"],
            [run, "--prompt=a", "--max_tokens=200", "--output=out.jsonl"],
        ],
        "must be at least 1": [
            [run, "--prompt=a", "--num_samples=0"],
            [run, "--prompt=a", "--num_beams=0"],
        ],
        "--num_beams=4 searches and draws nothing: leave out --temperature=0.7, or it": [
            [run, "--prompt=a", "--num_beams=4", "--temperature=0.7"]
        ],
        "leave out --top_k=5": [[run, "--prompt=a", "--num_beams=4", "--top_k=5"]],
        "leave out --stop": [[run, "--prompt=a", "--num_beams=4", "--stop=x"]],
        "--num_samples=5: --num_beams=4 searches for 4 texts": [
            [run, "--prompt=a", "--num_beams=4", "--num_samples=5"]
        ],
        "the tokenizer has 256; use --num_beams=128": [[run, "--prompt=a", "--num_beams=200"]],
        "--length_penalty=0.6 is for a search": [[run, "--prompt=a", "--length_penalty=0.6"]],
        "--early_stopping=True is for a search": [[run, "--prompt=a", "--early_stopping"]],
        "use true, false, never": [[run, "--prompt=a", "--early_stopping=soon"]],
    }
    flat = [(message, argv) for message, argvs in cases.items() for argv in argvs]
    results = _run_commands(tmp_path, [argv for _, argv in flat])
    for (message, argv), (code, out, err) in zip(flat, results, strict=True):
        assert code == 2, (argv, err)
        last = err.rstrip("\n").split("\n")[-1]
        assert last.startswith("error: ") and message in last, (argv, err)
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, (argv, err)
        assert out == "", argv
    assert not list(tmp_path.rglob("out.jsonl*"))  # nothing half made is left behind


def test_sampling_imports_no_part_of_the_trainer():
    code = """
import importlib, json, pkgutil, sys
import llm_jax.sampling
names = [m.name for m in pkgutil.iter_modules(llm_jax.sampling.__path__, "llm_jax.sampling.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=commands.child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    names, modules = json.loads(ran.stdout)
    assert {"llm_jax.sampling.__main__", "llm_jax.sampling.generate"} <= set(names)
    forbidden = {
        "llm_jax.train",
        "llm_jax.train_step",
        "llm_jax.optim",
        "llm_jax.evaluate",
        "llm_jax.data.pipeline",
        "llm_jax.data.prepare",
        "tensorflow",
    }
    assert forbidden.isdisjoint(modules)
