"""Generates text from a run's checkpoint.

    python -m llm_jax.sampling --workdir=runs/tiny --prompt="My fellow citizens" --top_p=0.9
    python -m llm_jax.sampling --workdir=runs/tiny --prompts=prompts.txt --output=samples.jsonl
    python -m llm_jax.sampling --workdir=runs/t5 --prompts=sources.txt --num_beams=4 --length_penalty=0.6

A prompt file holds a prompt a line, or, named .jsonl, rows with `prompt` and optionally `seed`. An
encoder reads the prompts of an encoder-decoder, and what the decoder writes is the completion.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from absl import flags

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import distributed
from llm_jax import errors
from llm_jax.sampling import beams
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers


def define_flags() -> None:
    """Defines the flags; defaults are those of `samplers.SamplingParams` and `beams.BeamParams`."""
    command.define_processes()
    command.define_workdir("Folder of the run whose checkpoint is loaded.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_string("prompt", None, "Text to continue.")
    flags.DEFINE_string("prompts", None, "File of prompts, one a line, or .jsonl.")
    flags.DEFINE_string("output", None, "JSONL file of completions; the terminal if not given.")
    flags.DEFINE_integer("max_tokens", 128, "Tokens of each completion at most.")
    flags.DEFINE_integer("num_samples", 1, "Completions of each prompt.")
    flags.DEFINE_integer("seed", 0, "Seed of every prompt that brings none.")
    flags.DEFINE_multi_string("stop", [], "A completion ends before this text; may be repeated.")
    flags.DEFINE_integer("batch_size", 16, "Completions generated side by side.")
    flags.DEFINE_integer("tensor", 1, "Devices that share one copy of the weights.")
    for params in (samplers.SamplingParams, beams.BeamParams):
        for field in dataclasses.fields(params):
            text = f"See {params.__module__}.{params.__name__}."
            if field.type in (int, float):
                define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
                define(field.name, field.default, text)
            else:
                parser = _TrueFalseNever()
                flags.DEFINE_flag(
                    flags.Flag(parser, None, field.name, field.default, text, boolean=True)
                )


class _TrueFalseNever(flags.ArgumentParser):
    """Reads `--flag`, `--flag=true`, `--flag=false` and `--flag=never`."""

    _VALUES = {"true": True, "false": False, "never": "never"}

    def parse(self, argument: str | bool) -> bool | str:
        if isinstance(argument, bool):
            return argument
        if argument not in self._VALUES:
            raise ValueError(f"use {', '.join(self._VALUES)}")
        return self._VALUES[argument]


def _params(params: type) -> Any:
    given = flags.FLAGS
    return params(**{f.name: getattr(given, f.name) for f in dataclasses.fields(params)})


def main() -> None:
    given = flags.FLAGS
    prompts = _prompts(given.prompt, given.prompts, given.seed)
    params, search = _params(samplers.SamplingParams), _params(beams.BeamParams)
    output = None if given.output is None else pathlib.Path(given.output).expanduser()
    if output is not None and output.is_dir():
        raise errors.UserError(f"--output={given.output} is a folder: name a file")
    loaded = load.load(command.required("workdir"), checkpoint.parse_step(given.step), given.tensor)
    is_main = distributed.is_main()
    is_single = len(prompts) * given.num_samples == 1
    is_streaming = is_main and output is None and is_single and search.num_beams == 1
    completions = generate.generate(
        loaded,
        prompts,
        params,
        max_tokens=given.max_tokens,
        num_samples=given.num_samples,
        stops=given.stop,
        batch_size=given.batch_size,
        on_text=_print_now if is_streaming else None,
        beams=search,
    )
    if not is_main:
        for _ in completions:  # text is made as it is read, by all processes together
            pass
        return
    if output is not None:
        _write(output, completions, loaded.step)
        return
    if is_streaming and not loaded.reads_sources:
        _print_now(prompts[0].text)
    for completion in completions:
        if is_streaming:
            print()
        else:
            score = "" if completion.score is None else f", score {completion.score:.4f}"
            print(f"--- {completion.prompt!r}, sample {completion.sample}{score}")
            text = "" if loaded.reads_sources else completion.prompt
            print(text + completion.completion)


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def _write(path: pathlib.Path, completions, step: int) -> None:
    """Writes a row each as it is done; the file gets its name when all of them are."""
    temporary = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for completion in completions:
            row = {"step": step} | dataclasses.asdict(completion)
            row = {name: value for name, value in row.items() if value is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
    temporary.replace(path)
    print(f"wrote {count} completions to {path}", file=sys.stderr)


def _prompts(prompt: str | None, path: str | None, seed: int) -> list[generate.Prompt]:
    if (prompt is None) == (path is None):
        raise errors.UserError("give either --prompt=TEXT or --prompts=FILE")
    if prompt is not None:
        return [generate.Prompt(prompt, seed)]
    try:
        # Not splitlines(): U+2028 and its like may stand inside of a JSON string.
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--prompts={path} cannot be read: {error}") from error
    if not any(lines):
        raise errors.UserError(f"--prompts={path} has no prompt in it")
    if not path.endswith(".jsonl"):
        return [generate.Prompt(line, seed) for line in lines if line]
    return [_prompt_row(path, n, line, seed) for n, line in enumerate(lines, 1) if line]


def _prompt_row(path: str, number: int, line: str, seed: int) -> generate.Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise errors.UserError(f"--prompts={path} line {number} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise errors.UserError(f"--prompts={path} line {number} has no text in field 'prompt'")
    own_seed = row["seed"] if "seed" in row else seed
    if not isinstance(own_seed, int):
        raise errors.UserError(f"--prompts={path} line {number}: seed {own_seed!r} is no integer")
    return generate.Prompt(row["prompt"], own_seed)


if __name__ == "__main__":
    command.run(main, define_flags)
