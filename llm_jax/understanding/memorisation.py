"""What a model writes out of its training data (Carlini et al. 2022, section 3).

Prompts are stretches of documents of the training split; the model continues each greedily, and what counts is
how many tokens agree with what follows there. Of the same continuations, and of any texts, the longest stretches
that stand anywhere in the training split are found as well (`suffixes`). The held-out split is the control: what
is reproduced of it was guessed, or stands in both.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import sharding
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.evaluation import bootstrap
from llm_jax.sampling import decode
from llm_jax.sampling import load
from llm_jax.sampling import samplers
from llm_jax.understanding import suffixes

LENGTHS = (8, 16, 32, 50)  # tokens of a continuation, of which shares are told
_ROWS = 32  # of a device at a time
LONGEST = 256  # longer matches of texts count as this
_MOST_ROWS = 100  # of texts that are listed


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Stretches of documents: `prompts_NT` and what follows them, `targets_NT`, int32."""

    prompts_NT: np.ndarray
    targets_NT: np.ndarray


def draw(cache: token_cache.TokenCache, count: int, prompt: int, length: int) -> Stretches:
    """Draws stretches of documents, each of all there are with the same probability, none twice.

    Args:
      cache: of a split.
      count: how many; fewer where there are fewer.
      prompt, length: tokens of a prompt, and of what follows it.

    Raises:
      errors.UserError: no document is as long.
    """
    offsets = np.asarray(cache.offsets, np.int64)
    sizes_D = np.diff(offsets) - 1  # without eos
    starts_D = np.maximum(sizes_D - (prompt + length) + 1, 0)
    total = int(starts_D.sum())
    if not total:
        raise errors.UserError(
            f"split {cache.manifest.split!r} has no document of {prompt + length} tokens, the longest"
            f" has {int(sizes_D.max(initial=0))}: use a smaller --prompt_tokens (now {prompt})"
        )
    chosen = np.random.default_rng(0).choice(total, min(count, total), replace=False)
    ends_D = np.cumsum(starts_D)
    documents = np.searchsorted(ends_D, chosen, side="right")
    begins = offsets[documents] + chosen - (ends_D - starts_D)[documents]
    both_NT = np.stack([cache.tokens[at : at + prompt + length] for at in begins.tolist()])
    both_NT = both_NT.astype(np.int32)
    return Stretches(both_NT[:, :prompt], both_NT[:, prompt:])


def continuations(loaded: load.Loaded, prompts_NT: np.ndarray, length: int) -> np.ndarray:
    """Returns the greedy continuation of each prompt, int32 [N, length]; behind an end all are pads."""
    tokenizer, rules = loaded.tokenizer, loaded.model.rules
    ways = sharding.axis_size(loaded.mesh, rules.act("B")[0])
    size = -(-min(len(prompts_NT), _ROWS * ways) // ways) * ways
    how = {
        "params": samplers.SamplingParams(temperature=0.0),
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "num_ids": tokenizer.vocab_size,
    }

    def place(array: np.ndarray, dims: str) -> jax.Array:
        return jax.device_put(array, jax.sharding.NamedSharding(loaded.mesh, rules.act(dims)))

    found = []
    for first in range(0, len(prompts_NT), size):
        rows_BT = prompts_NT[first : first + size]
        rows_BT = np.pad(rows_BT, ((0, size - len(rows_BT)), (0, 0)), mode="edge")
        with jax.set_mesh(loaded.mesh):
            keys_B = jax.random.wrap_key_data(place(np.zeros((size, 2), np.uint32), "B"))
            state = decode.prefill(
                loaded.model,
                place(rows_BT, "BS"),
                place(np.zeros(size, np.int32), "B"),
                keys_B,
                num_slots=rows_BT.shape[1] + length,
                **how,
            )
            tokens = [np.asarray(state.last_B)[None]]
            if length > 1:
                _, rest = decode.decode(loaded.model, state, num_tokens=length - 1, **how)
                tokens.append(np.asarray(rest))
        found.append(np.concatenate(tokens).T)
    return np.concatenate(found)[: len(prompts_NT)]


def agreement(targets_NT: np.ndarray, found_NT: np.ndarray) -> np.ndarray:
    """Returns how many tokens agree before the first that does not, int64 [N]."""
    differs_NT = targets_NT != found_NT
    return np.where(differs_NT.any(1), differs_NT.argmax(1), targets_NT.shape[1])


def check(config: config_lib.RunConfig) -> None:
    """Checks that a run's model continues texts; raises UserError."""
    architecture, objective = config.model.architecture, config.objective.name
    if architecture != "decoder" or objective not in ("causal", "prefix"):
        raise errors.UserError(
            "memorisation continues texts of the training data, which takes a decoder of objective"
            f" causal or prefix; this is of architecture {architecture!r} and objective {objective!r}"
        )


def measure(
    loaded: load.Loaded,
    train: token_cache.TokenCache,
    held_out: token_cache.TokenCache,
    count: int,
    prompt: int,
) -> dict[str, Any]:
    """Returns what a model reproduces of both splits.

    Args:
      loaded: of a run that `check` takes.
      train, held_out: that it was trained on, and that it was not.
      count: prompts of each split.
      prompt: tokens of one.

    Raises:
      errors.UserError: documents or positions that are too few.
    """
    config, length = loaded.model.config, max(LENGTHS)
    if prompt + length > config.max_length:
        raise errors.UserError(
            f"--prompt_tokens={prompt} and {length} that follow are more than the model's max_length ="
            f" {config.max_length}: use {config.max_length - length} at most"
        )
    result: dict[str, Any] = {"prompt_tokens": prompt, "continuation_tokens": length}
    for name, cache in (("train", train), ("held_out", held_out)):
        drawn = draw(cache, count, prompt, length)
        found_NT = continuations(loaded, drawn.prompts_NT, length)
        result[name] = {"split": cache.manifest.split} | _summary(
            drawn, found_NT, train.tokens, loaded.tokenizer
        )
    return result


def _summary(
    drawn: Stretches,
    found_NT: np.ndarray,
    tokens_N: np.ndarray,
    tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
    agreed_N = agreement(drawn.targets_NT, found_NT)
    best = int(np.argmax(agreed_N))
    return {
        "prompts": len(agreed_N),
        "reproduced": {
            str(length): dataclasses.asdict(bootstrap.of_mean(agreed_N >= length))
            for length in LENGTHS
        },
        "longest_exact": int(agreed_N[best]),
        "longest_exact_prompt": tokenizer.decode(drawn.prompts_NT[best]),
        "longest_exact_text": tokenizer.decode(drawn.targets_NT[best, : agreed_N[best]]),
        "anywhere_in_train": overlap(list(found_NT), tokens_N, tokenizer),
    }


def overlap(
    texts: Sequence[np.ndarray], tokens_N: np.ndarray, tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
    """Returns the longest stretches of texts, given as ids, that stand in a stream of tokens.

    Of each text its longest stretch counts; up to 100 texts are listed, those with the longest first.
    """
    # What pads or ends a text is none of it.
    ends = {tokenizer.eos_id, tokenizer.pad_id}
    texts = [text_T[~np.isin(text_T, list(ends))] for text_T in texts]
    matches = suffixes.longest_matches(texts, tokens_N, LONGEST)
    rows = []
    for number, (text_T, lengths_T) in enumerate(zip(texts, matches, strict=True)):
        start = int(np.argmax(lengths_T)) if len(lengths_T) else 0
        length = int(lengths_T[start]) if len(lengths_T) else 0
        text = tokenizer.decode(text_T[start : start + length])
        rows.append({"text": number, "start": start, "tokens": length, "matched": text})
    longest_N = np.array([row["tokens"] for row in rows], np.float64)
    return {
        "texts": len(rows),
        "mean_longest": dataclasses.asdict(bootstrap.of_mean(longest_N)),
        "longest": int(longest_N.max()),
        "counted_up_to": LONGEST,
        "rows": sorted(rows, key=lambda row: -row["tokens"])[:_MOST_ROWS],
    }


def read_samples(path: str) -> list[str]:
    """Returns the completions of a JSONL file as `sampling` writes them.

    Raises:
      errors.UserError: there is no such file, or a line without a `completion`.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise errors.UserError(f"--samples={path}: there is no such file")
    texts = []
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise errors.UserError(f"--samples={path} line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise errors.UserError(f"--samples={path} line {number} has no text 'completion'")
        texts.append(row["completion"])
    if not texts:
        raise errors.UserError(f"--samples={path} is empty")
    return texts


def table(found: dict[str, Any]) -> str:
    """Returns what was found as text."""
    lines = []
    for name in ("train", "held_out"):
        if name not in found:
            continue
        own = found[name]
        lines.append(
            f"{own['split']}: {own['prompts']} prompts of {found['prompt_tokens']} tokens, continued"
            " greedily"
        )
        for length, share in own["reproduced"].items():
            lines.append(f"  {length:>3} tokens reproduced  {bootstrap.Estimate(**share)}")
        lines.append(f"  longest: {own['longest_exact']} tokens")
        lines.append(f"  anywhere in the training split: {_longest(own['anywhere_in_train'])}")
    if "samples" in found:
        lines.append(f"{found['samples']['texts']} samples: {_longest(found['samples'])}")
    return "\n".join(lines) + "\n"


def _longest(found: dict[str, Any]) -> str:
    mean = bootstrap.Estimate(**found["mean_longest"])
    first = found["rows"][0]["matched"] if found["rows"] else ""
    return f"longest {found['longest']} tokens, on average {mean}; {first!r}"


def write(found: dict[str, Any], folder: epath.Path, step: int) -> list[epath.Path]:
    """Writes what was found as JSON and as text; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    values, text = folder / "memorisation.json", folder / "memorisation.txt"
    values.write_text(json.dumps({"step": step} | found, ensure_ascii=False, indent=1) + "\n")
    text.write_text(table(found))
    return [values, text]
