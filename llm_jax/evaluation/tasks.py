"""The tasks of `python -m llm_jax.evaluate --tasks=...`, and what they write.

classification   labels of sequences and of words, or numbers
spans            answers in a context
generation       texts for texts (seq2seq), by greedy or beam search
perplexity       a text's tokens, each with as much before it as a window has (--stride)
chat             the last answer of conversations, by greedy search
preferences      which of two answers has gained more since the start

WORKDIR/evaluation/STEP/TASK.json          scores with 95% intervals, how they were counted, of what
WORKDIR/evaluation/STEP/TASK.jsonl         what was given, wanted and said, an example a line
WORKDIR/evaluation/STEP/TASK.png           of labels of sequences, which are taken for which

TASK is followed by the name of what was scored where that is not the run's own held-out split.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import math
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax.data import chat
from llm_jax.data import examples as examples_lib
from llm_jax.data import prepare
from llm_jax.data import sources
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import examples as objective_examples
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import files
from llm_jax.evaluation import metrics
from llm_jax.evaluation import predict
from llm_jax.models import build

# They load the run themselves, on a mesh of their own.
GENERATING = ("generation", "chat")


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of a user.

    Attributes:
      num_beams: of a search; 1: greedy.
      max_tokens: of a text that is written; None: 128, or what the model has room for.
      stride: of windows; None: half of one.
    """

    num_beams: int = 1
    max_tokens: int | None = None
    stride: int | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What tasks are given: a model on a mesh, and what is scored, in its tokens.

    Attributes:
      workdir: of the run.
      meta: of the checkpoint.
      config: of the run, its data as they are scored.
      model, mesh, rules: where the model lies.
      cache: of the split that is scored.
      tokenizer: of the model.
      of: what is scored where it is not the run's own split, for names of files.
    """

    workdir: str
    meta: checkpoint.Meta
    config: config_lib.RunConfig
    model: build.Model
    mesh: jax.sharding.Mesh
    rules: Any
    cache: prepare.Cache
    tokenizer: tokenizer_lib.Tokenizer
    of: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores, and a row of each example: what was given, wanted and said."""

    scores: metrics.Scores
    rows: list[dict[str, Any]]


def run(name: str, given: Checkpoint, options: Options) -> dict[str, Any]:
    """Runs a task, writes what it found, and returns that.

    Raises:
      errors.UserError: there is no such task, or the checkpoint is not of a kind for it.
    """
    check(name, given.config)
    started = time.monotonic()
    # What generates has a mesh of its own.
    with contextlib.nullcontext() if name in GENERATING else jax.set_mesh(given.mesh):
        result = _TASKS[name].run(given, options)
    found = {
        "task": name,
        "step": given.meta.step,
        "split": given.cache.manifest.split,
        "source": given.config.data.eval_source or given.config.data.source,
        "examples": len(result.rows),
        "scores": {key: dataclasses.asdict(one) for key, one in result.scores.estimates.items()},
        "interval": f"{bootstrap.LEVEL:.0%}, {bootstrap.COUNT} resamples of examples",
        "settings": result.scores.settings,
        "seconds": round(time.monotonic() - started, 1),
    } | result.scores.details
    if distributed.is_main():
        _write(name, given, found, result.rows)
    return found


def check(name: str, config: config_lib.RunConfig) -> None:
    """Checks that there is such a task and that a model can be given it; raises UserError."""
    if name not in _TASKS:
        hint = errors.nearest(name, _TASKS)
        raise errors.UserError(f"--tasks: {name!r} is none of loss, {', '.join(_TASKS)}{hint}")
    objective, wanted = config.objective.name, _TASKS[name].objectives
    if objective not in wanted:
        fitting = [task for task, one in _TASKS.items() if objective in one.objectives]
        others = f"; for this one there is {', '.join(['loss', *fitting])}"
        raise errors.UserError(
            f"--tasks: {name!r} is for runs of objective.name {' or '.join(wanted)}, this one is of"
            f" {objective!r}{others}"
        )


def table(found: dict[str, Any]) -> str:
    """Returns the scores of a task as lines for the terminal."""
    lines = [f"{found['task']}: {found['examples']:,} examples of {found['split']}"]
    for name, score in found["scores"].items():
        lines.append(f"  {name:17} {bootstrap.Estimate(**score)}")
    return "\n".join(lines)


def _write(name: str, given: Checkpoint, found: dict[str, Any], rows: Sequence[dict]) -> None:
    name += f"-{given.of}" * bool(given.of)
    folder = files.write(given.workdir, given.meta.step, name, found, rows)
    if "confusion" in found:
        _draw(folder / f"{name}.png", found["confusion"], found["labels"])


def _draw(path: epath.Path, confusion: list[list[int]], labels: Sequence[str]) -> None:
    """Draws a confusion matrix, rows as shares of the true label."""
    from matplotlib import figure

    counts = np.array(confusion, float)
    side = max(3.0, 0.35 * len(labels) + 1.5)
    drawn = figure.Figure(figsize=(side + 1, side), layout="constrained")
    axes = drawn.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=7
            )
    drawn.colorbar(picture, label="share of the true label")
    with path.open("wb") as file:
        drawn.savefig(file, format="png", dpi=120)


# --- the tasks -------------------------------------------------------------------------------------


def _records(given: Checkpoint) -> list[dict[str, Any]]:
    """Returns the examples of the split, in its order."""
    data = given.config.data
    fields = examples_lib.fields_of(given.config)
    return [record for _, record in sources.records(data, data.eval_split, fields)]


def _inputs(given: Checkpoint, record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in examples_lib.input_fields(given.config.data)}


def _batches(given: Checkpoint):
    cache, tokenizer = given.cache, given.tokenizer
    return predict.batches(given.config, cache, tokenizer, given.mesh, given.rules)


def _classification(given: Checkpoint, options: Options) -> Result:
    del options
    records, names = _records(given), given.meta.labels
    if given.config.objective.name == "token":
        wanted, said = predict.token_labels(
            given.config, given.model, _batches(given), len(records)
        )
        wanted, said = ([[names[i] for i in row] for row in rows] for rows in (wanted, said))
        scores = metrics.sequences(wanted, said)
    else:
        wanted, said = predict.labels(given.config, given.model, _batches(given), len(records))
        if names is None:
            scores = metrics.regression(wanted, said)
            wanted, said = wanted.tolist(), said.tolist()
        else:
            scores = metrics.classification(wanted, said, names)
            wanted, said = ([names[i] for i in row] for row in (wanted, said))
    rows = [
        _inputs(given, record) | {"target": target, "prediction": prediction}
        for record, target, prediction in zip(records, wanted, said, strict=True)
    ]
    return Result(scores, rows)


def _spans(given: Checkpoint, options: Options) -> Result:
    del options
    records, tokenizer = _records(given), given.tokenizer
    starts = predict.kept_contexts(given.config, given.cache, tokenizer)
    found = predict.spans(given.config, given.model, _batches(given), starts)
    fields, target = examples_lib.input_fields(given.config.data), given.config.data.target_field
    rows = []
    for record, (first, last) in zip(records, found.tolist(), strict=True):
        said, context = "", record[fields[1]]
        if first >= 0:
            _, places = tokenizer.encode_with_places(context)
            said = context[places[first, 0] : places[last, 1]].strip()
        rows.append(
            _inputs(given, record) | {"target": _answers(record[target]), "prediction": said}
        )
    scores = metrics.answers([row["prediction"] for row in rows], [row["target"] for row in rows])
    return Result(scores, rows)


def _answers(answer: dict[str, Any] | None) -> list[str]:
    """Returns the texts that are right."""
    if answer is None:
        return []
    return answer["text"] if isinstance(answer["text"], list) else [answer["text"]]


def _generation(given: Checkpoint, options: Options) -> Result:
    from llm_jax.evaluation import dialogue
    from llm_jax.sampling import beams
    from llm_jax.sampling import generate
    from llm_jax.sampling import load

    if (
        given.config.objective.is_input_bidirectional
        and given.config.model.architecture == "decoder"
    ):
        raise errors.UserError(
            "--tasks: generation reads a decoder's inputs from left to right, and this one was trained with"
            " objective.is_input_bidirectional: score it by its loss"
        )
    records, data = _records(given), given.config.data
    options = dataclasses.replace(options, max_tokens=_max_tokens(given.config, options))
    fields = examples_lib.input_fields(data)
    loaded = load.load(given.workdir, given.meta.step)
    prompts = [
        generate.Prompt(
            record[fields[0]], ids=_prompt_ids(given, [record[f] for f in fields], options)
        )
        for record in records
    ]
    said = dialogue.greedy(
        loaded,
        prompts,
        options.max_tokens,
        batch_size=max(16, options.num_beams),
        beams=beams.BeamParams(num_beams=options.num_beams),
    )
    rows = [
        _inputs(given, record) | {"target": record[data.target_field], "prediction": text}
        for record, text in zip(records, said, strict=True)
    ]
    # Rows keep the space around texts, which code needs; scores are of what is between.
    scores = metrics.texts(*([row[of].strip() for row in rows] for of in ("prediction", "target")))
    how = {"num_beams": options.num_beams, "max_tokens": options.max_tokens}
    return Result(dataclasses.replace(scores, settings=scores.settings | how), rows)


def _max_tokens(config: config_lib.RunConfig, options: Options) -> int:
    """Returns how many tokens a text may have."""
    if options.max_tokens is not None:
        return options.max_tokens
    if config.model.architecture == "encoder_decoder":
        return min(128, config.objective.target_length, config.model.max_length - 1)
    return min(128, config.data.sequence_length // 2)


def _prompt_ids(given: Checkpoint, texts: Sequence[str], options: Options) -> tuple[int, ...]:
    """Returns what a model reads of an example, cut as in training; a decoder has room to write."""
    config, tokenizer = given.config, given.tokenizer
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = config.data.sequence_length - len(first) - len(texts)
    if config.model.architecture == "decoder":
        room -= options.max_tokens
    if room < 1:
        raise errors.UserError(
            f"--max_tokens={options.max_tokens} leaves no room for what is given in"
            f" data.sequence_length = {config.data.sequence_length}"
        )
    ids = [tokenizer.encode(text) for text in texts]
    kept = [min(len(ids[0]), room)]
    if len(ids) == 2:
        lengths = (np.array([len(own)]) for own in ids)
        kept = [int(count[0]) for count in objective_examples.fit(*lengths, room)]
    pieces = [[*own[:count], tokenizer.eos_id] for own, count in zip(ids, kept, strict=True)]
    return tuple(int(token) for piece in [first, *pieces] for token in piece)


def _perplexity(given: Checkpoint, options: Options) -> Result:
    cache, length = given.cache, given.config.data.sequence_length
    stride = length // 2 if options.stride is None else options.stride
    if not 1 <= stride <= length:
        raise errors.UserError(f"--stride={stride}: use 1 to data.sequence_length = {length}")
    losses_N, places_N = predict.window_losses(
        given.config, given.model, given.mesh, given.rules, cache, stride
    )
    # Documents are what is resampled, as their tokens are not independent.
    owners_N = np.searchsorted(cache.offsets, places_N, side="right") - 1
    counts_D, sums_D = np.bincount(owners_N), np.bincount(owners_N, losses_N)
    loss = bootstrap.of_mean(sums_D / np.maximum(counts_D, 1), counts_D)
    per_byte = cache.num_tokens / max(cache.num_bytes, 1) / math.log(2)

    def changed(how: Callable[[float], float]) -> bootstrap.Estimate:
        return bootstrap.Estimate(*(how(x) for x in (loss.value, loss.low, loss.high)))

    estimates = {
        "loss": loss,
        "perplexity": changed(lambda x: math.exp(min(x, 700.0))),
        "bits_per_byte": changed(lambda x: x * per_byte),
    }
    settings = {"window": length, "stride": stride}
    rows = [
        {"document": number, "tokens": int(count), "loss": float(total / max(count, 1))}
        for number, (count, total) in enumerate(zip(counts_D, sums_D, strict=True))
    ]
    return Result(metrics.Scores(estimates, settings), rows)


def _chat(given: Checkpoint, options: Options) -> Result:
    from llm_jax.evaluation import dialogue
    from llm_jax.sampling import load

    (field,) = examples_lib.input_fields(given.config.data)
    conversations = [record[field] for record in _records(given)]
    loaded = load.load(given.workdir, given.meta.step)
    template = chat.of_checkpoint(given.meta)
    if template is None:
        raise errors.UserError(f"--tasks: {given.workdir} has no chat template")
    max_tokens = _max_tokens(given.config, options)
    scores, rows = dialogue.answers(loaded, template, conversations, max_tokens)
    how = {"max_tokens": max_tokens}
    return Result(dataclasses.replace(scores, settings=scores.settings | how), rows)


def _preferences(given: Checkpoint, options: Options) -> Result:
    from llm_jax import preferences
    from llm_jax.evaluation import dialogue

    del options
    reference = preferences.Reference(given.config, given.mesh)
    records, batches = _records(given), _batches(given)
    return Result(*dialogue.preferred(given.config, given.model, batches, reference, records))


@dataclasses.dataclass(frozen=True)
class _Task:
    run: Callable[[Checkpoint, Options], Result]
    objectives: tuple[str, ...]


_TASKS = {
    "classification": _Task(_classification, ("sequence", "token")),
    "spans": _Task(_spans, ("span",)),
    "generation": _Task(_generation, ("seq2seq",)),
    "perplexity": _Task(_perplexity, ("causal",)),
    "chat": _Task(_chat, ("chat",)),
    "preferences": _Task(_preferences, ("preference",)),
}
