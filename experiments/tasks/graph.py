"""Sentences to a graph of what is related: entities by one model, relations between them by another.

    python -m experiments.tasks.graph --entities=runs/entities --relations=runs/relations \
        --text=sentences.txt --output=graph.jsonld
    python -m experiments.tasks.graph ... --data=~/.cache/llm_jax/tasks/relations/test.jsonl    # scores as well

Each sentence's entities are found first. The first one of a sentence, which a dictionary's sentences are about, is
judged with each of the others. The graph is JSON-LD 1.1: nodes are texts of entities, with their kind, and edges
those relations that are not `none`. Scores are of (entity, relation, entity) in their sentence, both ends found word
by word; pairs of right entities that the data do not judge count neither way.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags
import numpy as np

from experiments.tasks import run
from experiments.tasks.data import marked
from experiments.tasks.data import relations as relations_data
from llm_jax import checkpoint
from llm_jax import command
from llm_jax import errors
from llm_jax import evaluate
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import tasks

_CONTEXT = "https://github.com/globalwordnet/schemas/"  # names of WordNet's relations
_NONE = "none"
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence's words, its entities with their kinds, and what holds between some of them.

    Attributes:
      words: of the sentence.
      entities: kinds by their place, the end not included.
      triples: (first, relation, second).
    """

    words: tuple[str, ...]
    entities: dict[Span, str]
    triples: tuple[tuple[Span, str, Span], ...] = ()

    def text(self, span: Span) -> str:
        """Returns the words of a place."""
        return " ".join(self.words[slice(*span)])


def entities_of(labels: Sequence[str]) -> dict[Span, str]:
    """Returns the kinds of entities by their place, of BIO tags; an I without its B begins one."""
    found: dict[Span, str] = {}
    start, kind = 0, ""
    for place, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if kind and (mark != "I" or name != kind):
            found[start, place] = kind
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return found


def predictions(workdir: str, rows: list[dict[str, Any]]) -> list[Any]:
    """Returns what a run's newest checkpoint predicts of each row, which has its fields of inputs and target."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        def read(step_dir: Any, meta: checkpoint.Meta) -> None:
            data = dataclasses.replace(meta.config.data, eval_source=f"jsonl:{path}")
            data = dataclasses.replace(data, cache_dir=folder)
            config = dataclasses.replace(meta.config, data=data)
            meta = dataclasses.replace(meta, config=config)
            evaluate.run(step_dir, meta, folder, ["classification"], tasks.Options())

        checkpoint.read_latest(workdir, None, read)
        found = run.rows_of(pathlib.Path(folder), "classification.jsonl")
    return [row["prediction"] for row in found]


def read_sentences(entities: str, relations: str, texts: Sequence[Sequence[str]]) -> list[Sentence]:
    """Returns what two runs find in sentences, given as words."""
    rows = [{"words": list(words), "labels": ["O"] * len(words)} for words in texts]
    sentences = []
    for words, labels in zip(texts, predictions(entities, rows), strict=True):
        # Words that the model's rows have no room for are no entities.
        padded = [*labels, *["O"] * (len(words) - len(labels))]
        sentences.append(Sentence(tuple(words), entities_of(padded)))
    pairs = [
        (number, *pair)
        for number, sentence in enumerate(sentences)
        for pair in candidates(sentence.entities)
    ]
    if not pairs:
        return sentences
    rows = [
        {"text": marked.text(sentences[number].words, first, second), "label": _NONE}
        for number, first, second in pairs
    ]
    triples: list[list[tuple[Span, str, Span]]] = [[] for _ in sentences]
    for (number, first, second), label in zip(pairs, predictions(relations, rows), strict=True):
        if label != _NONE:
            triples[number].append(marked.triple(first, label, second))
    return [
        dataclasses.replace(sentence, triples=tuple(own))
        for sentence, own in zip(sentences, triples, strict=True)
    ]


def candidates(entities: Iterable[Span]) -> list[tuple[Span, Span]]:
    """Returns which pairs are judged: the first entity of a sentence, and each of the others."""
    first, *others = sorted(entities) or [None]
    return [(first, other) for other in others]


def to_json_ld(sentences: Iterable[Sentence]) -> dict[str, Any]:
    """Returns the graph of all sentences: a node for each text, with its kinds and what it is related to."""
    nodes: dict[str, dict[str, Any]] = {}
    for sentence in sentences:
        for span, kind in sentence.entities.items():
            name = sentence.text(span)
            node = nodes.setdefault(
                name, {"@id": f"#{'_'.join(name.split())}", "label": name, "kind": []}
            )
            if kind not in node["kind"]:
                node["kind"].append(kind)
        for first, relation, second in sentence.triples:
            own, other = nodes[sentence.text(first)], nodes[sentence.text(second)]
            ids = own.setdefault(relation, [])
            if {"@id": other["@id"]} not in ids:
                ids.append({"@id": other["@id"]})
    context = {"@vocab": _CONTEXT, "label": "http://www.w3.org/2000/01/rdf-schema#label"}
    return {"@context": context, "@graph": list(nodes.values())}


def score(found: Sequence[Sentence], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns precision, recall and F1 of entities and of triples, counted over all sentences."""
    counts = {"entities": [], "triples": []}
    for sentence, row in zip(found, rows, strict=True):
        entities = set(entities_of(row["labels"]).items())
        judged = {
            frozenset((tuple(a), tuple(b))): (tuple(a), name, tuple(b))
            for a, name, b in row["relations"]
        }
        right = {triple for triple in judged.values() if triple[1] != _NONE}
        known = {span for span, _ in entities}
        said = {
            triple
            for triple in sentence.triples
            if frozenset((triple[0], triple[2])) in judged or not {triple[0], triple[2]} <= known
        }
        own = set(sentence.entities.items())
        for key, a, b in (("entities", own, entities), ("triples", said, right)):
            counts[key].append((len(a & b), len(a), len(b)))
    scores = {}
    for key, of_sentences in counts.items():
        both_N, said_N, right_N = np.array(of_sentences, float).T
        for name, over_N in (
            ("precision", said_N),
            ("recall", right_N),
            ("f1", (said_N + right_N) / 2),
        ):
            ratio = np.divide(both_N, over_N, out=np.zeros_like(both_N), where=over_N > 0)
            scores[f"{key}/{name}"] = dataclasses.asdict(bootstrap.of_mean(ratio, over_N))
    return scores


def define_flags() -> None:
    flags.DEFINE_string("entities", None, "Run that finds entities.")
    flags.DEFINE_string("relations", None, "Run that names relations.")
    flags.DEFINE_string("text", None, "File of sentences, one a line.")
    flags.DEFINE_string("data", None, "JSONL file of words, labels and relations, to score.")
    flags.DEFINE_string("output", "graph.jsonld", "File of the graph.")


def main() -> None:
    given = flags.FLAGS
    runs = [command.required(name) for name in ("entities", "relations")]
    if (given.text is None) == (given.data is None):
        raise errors.UserError("give either --text=FILE of sentences or --data=FILE of examples")
    path = pathlib.Path(given.data or given.text).expanduser()
    if not path.is_file():
        raise errors.UserError(f"there is no {path}")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if given.data is not None:
        rows = [json.loads(line) for line in lines]
        texts = [row["words"] for row in rows]
    else:
        texts = [relations_data.words_of(line) for line in lines]
    found = read_sentences(*runs, texts)
    graph = to_json_ld(found)
    output = pathlib.Path(given.output).expanduser()
    output.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n")
    count = sum(len(sentence.triples) for sentence in found)
    print(f"{output}: {len(graph['@graph'])} entities, {count} relations", file=sys.stderr)
    if given.data is not None:
        scores = score(found, rows)
        for name, one in scores.items():
            print(f"{name:20} {bootstrap.Estimate(**one)}", file=sys.stderr)
        print(json.dumps({"task": "graph", "examples": len(rows), "scores": scores}))


if __name__ == "__main__":
    command.run(main, define_flags)
