"""Indexes documents, finds them by meaning, and says how well.

    python -m llm_jax.search index --workdir=RUN --documents='docs.jsonl:text' --index=DIR
    python -m llm_jax.search query --index=DIR --query='something to edit pictures with'
    python -m llm_jax.search evaluate --workdir=RUN --pairs='test.jsonl:query,document'

The last one writes scores and what each query found first to WORKDIR/evaluation/STEP/search-NAME.json and .jsonl, where
NAME is that of the file's folder and the file's. `--pooling=mean` is for models whose checkpoint does not know how its states are pooled, as MiniLM's. Queries come
from the terminal, a line each, where none is given.
"""

import dataclasses
import json
import sys
import time

from absl import flags
import numpy as np

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import errors
from llm_jax.data import sources
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import files
from llm_jax.search import embedder as embedder_lib
from llm_jax.search import index as index_lib
from llm_jax.search import ranking

_COMMANDS = ("index", "query", "evaluate")


def define_flags() -> None:
    command.define_argument("COMMAND", f"What to do: {', '.join(_COMMANDS)}.")
    command.define_workdir("Folder of the run, or of a converted model, that makes vectors.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_string("pooling", None, "first, mean or last; the checkpoint's if not given.")
    flags.DEFINE_integer("max_length", None, "Tokens of a text; the model's if not given.")
    flags.DEFINE_string("documents", None, "GLOB:FIELD of JSONL files: what is indexed.")
    flags.DEFINE_string("index", None, "Folder of the index.")
    flags.DEFINE_string("query", None, "What to look for; lines of the terminal if not given.")
    flags.DEFINE_string("pairs", None, "GLOB:FIELD,FIELD of JSONL files: queries, what is right.")
    flags.DEFINE_integer("count", 5, "Documents that a query finds.", 1)
    flags.DEFINE_integer("limit", None, "With evaluate: so many pairs, drawn with seed 0.", 1)


def main() -> None:
    name = command.argument("COMMAND")
    if name not in _COMMANDS:
        hint = errors.nearest(name, _COMMANDS)
        raise errors.UserError(f"{name!r} is no command{hint}: use one of {', '.join(_COMMANDS)}")
    {"index": _index, "query": _query, "evaluate": _evaluate}[name]()


def _embedder() -> embedder_lib.Embedder:
    given = flags.FLAGS
    return embedder_lib.load(
        command.required("workdir"),
        checkpoint.parse_step(given.step),
        pooling=given.pooling,
        max_length=given.max_length,
    )


def _rows(flag: str) -> tuple[list[dict], list[str]]:
    """Returns the objects of the files that a flag names, and the fields that it names."""
    pattern, colon, fields = command.required(flag).rpartition(":")
    if not colon or not pattern:
        raise errors.UserError(f"--{flag}={fields}: use GLOB:FIELD, of JSONL files")
    names = [field.strip() for field in fields.split(",")]
    return list(sources.objects(pattern, names)), names


def _index() -> None:
    documents, fields = _rows("documents")
    if len(fields) != 1:
        raise errors.UserError(f"--documents={flags.FLAGS.documents}: name one field")
    made = index_lib.build(command.required("index"), _embedder(), documents, fields[0])
    count, width = made.vectors_MD.shape
    print(f"{count:,} documents, {width} elements each: {made.path}")


def _query() -> None:
    opened = index_lib.open_index(command.required("index"))
    embed = opened.embedder()
    given = flags.FLAGS.query
    for query in [given] if given is not None else map(str.strip, sys.stdin):
        (hits,) = opened.search(embed([query]), flags.FLAGS.count)
        for hit in hits:
            print(f"{hit.score:.3f}  {json.dumps(hit.document, ensure_ascii=False)}")


def _evaluate() -> None:
    rows, fields = _rows("pairs")
    if len(fields) != 2:
        raise errors.UserError(
            f"--pairs={flags.FLAGS.pairs}: name two fields, of query and document"
        )
    if flags.FLAGS.limit is not None:
        rng = np.random.default_rng(0)
        rows = [rows[i] for i in rng.permutation(len(rows))[: flags.FLAGS.limit]]
    embed, started = _embedder(), time.monotonic()
    queries, documents = ([row[field] for row in rows] for field in fields)
    # What several queries share is one document.
    numbers = {text: number for number, text in enumerate(dict.fromkeys(documents))}
    right_N = np.asarray([numbers[text] for text in documents])
    queries_ND, documents_MD = embed(queries), embed(list(numbers))
    ranks_N = ranking.ranks(queries_ND, documents_MD, right_N)
    found = {"task": "search", "queries": len(queries), "documents": len(numbers), "scores": {}}
    for name, values_N in ranking.scores(ranks_N).items():
        estimate = bootstrap.of_mean(values_N)
        found["scores"][name] = dataclasses.asdict(estimate)
        print(f"{name:10} {estimate}", file=sys.stderr)
    found["seconds"] = round(time.monotonic() - started, 1)
    firsts_N = ranking.firsts(queries_ND, documents_MD)
    texts = list(numbers)
    _write(
        embed.step,
        found,
        [
            {"query": query, "target": right, "prediction": texts[first], "rank": rank}
            for query, right, first, rank in zip(
                queries, documents, firsts_N, ranks_N.tolist(), strict=True
            )
        ],
    )
    print(json.dumps(found))


def _write(step: int, found: dict, rows: list[dict]) -> None:
    name = f"search-{files.name_of(f'jsonl:{flags.FLAGS.pairs}')}"
    files.write(command.required("workdir"), step, name, found, rows)


if __name__ == "__main__":
    command.run(main, define_flags)
