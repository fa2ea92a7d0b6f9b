"""What is to be beaten, by data set: `python -m experiments.tasks.baselines NAME [--preprocessing=normalise,...]`.

    newsgroups, spam   TF-IDF and a linear support vector machine
    sentiment          the same; and the sum of what a lexicon says of the words
    summaries          the first sentence of the long description
    descriptions       TF-IDF vectors of queries and documents, by their cosine
    definitions        the answer to the question that is nearest by TF-IDF, of the training split
    spans              the first definition of the context; and the one that stands behind the term, by a rule
    translation_it     the source as it is; and the translation of the nearest source of the training split
    relations          the relation that most pairs of the training split have

Data are those that `python -m experiments.tasks.data NAME` wrote. Scores are on the test split and are kept in
`experiments/tasks/results/NAME-baseline.json`, with 95% intervals. What was said of some texts is shown, and not
kept: few of the data may be published.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

from absl import flags
import numpy as np

from experiments.tasks.data import dialogue
from experiments.tasks.data import sentiment as sentiment_data
from experiments.tasks.data import splits
from llm_jax import command
from llm_jax import errors
from llm_jax.data import preprocessing
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import metrics
from llm_jax.search import ranking

FOLDER = pathlib.Path.home() / ".cache" / "llm_jax" / "tasks"
RESULTS = pathlib.Path(__file__).parent / "results"

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Scores, and some of what was said: given, wanted, said."""

    scores: dict[str, metrics.Estimate]
    examples: list[tuple[str, str, str]]


def read(name: str, split: str) -> Rows:
    """Returns the examples of a split; raises UserError where it was not written yet."""
    path = FOLDER / name / f"{split}.jsonl"
    if not path.is_file():
        dataset = name.replace("_", ":", 1) if name.startswith("translation") else name
        raise errors.UserError(
            f"there is no {path}: run python -m experiments.tasks.data {dataset}"
        )
    # Not by `splitlines`, which ends lines at marks that JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def labels(name: str, change: preprocessing.Stage) -> Baseline:
    """TF-IDF of words and pairs of words, and a linear SVM (Joachims 1998)."""
    from sklearn import pipeline
    from sklearn import svm
    from sklearn.feature_extraction import text

    train, test = read(name, "train") + read(name, "validation"), read(name, "test")
    names = sorted({row["label"] for row in train})
    model = pipeline.make_pipeline(
        text.TfidfVectorizer(sublinear_tf=True, preprocessor=change, token_pattern=r"(?u)\b\w+\b"),
        svm.LinearSVC(),
    )
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    said = model.predict([row["text"] for row in test]).tolist()
    wanted = [row["label"] for row in test]
    scores = metrics.classification(
        *(np.array([names.index(x) for x in y]) for y in (wanted, said)), names
    )
    return Baseline(scores.estimates, _some([row["text"] for row in test], wanted, said))


def sentiment(name: str, change: preprocessing.Stage) -> Baseline:
    """As of any labels; and the sign of the sum of what VADER's lexicon says of the words, without VADER's rules.

    Sentences without a word of the lexicon count as negative.
    """
    test, ratings = read(name, "test"), sentiment_data.lexicon()
    sums = [sum(ratings.get(word, 0.0) for word in splits.words_of(row["text"])) for row in test]
    said = np.array([int(total > 0) for total in sums])
    wanted = np.array([int(row["label"] == "positive") for row in test])
    found = labels(name, change)
    by_lexicon = metrics.classification(wanted, said, ["negative", "positive"]).estimates
    scores = dict(found.scores) | {f"lexicon/{key}": one for key, one in by_lexicon.items()}
    return dataclasses.replace(found, scores=scores)


def summaries(name: str, change: preprocessing.Stage) -> Baseline:
    """The first sentence."""
    test = read(name, "test")
    said = [dialogue.first_sentence(row["long"]) for row in test]
    return _texts([row["long"] for row in test], [row["short"] for row in test], said)


def translation(name: str, change: preprocessing.Stage) -> Baseline:
    """The source, which shares names and numbers with its translation; and a memory of translations."""
    train, test = read(name, "train"), read(name, "test")
    sources, targets = ([row[key] for row in test] for key in ("source", "target"))
    found = _texts(sources, targets, sources)
    nearest = _nearest([row["source"] for row in train], sources, change)
    said = [train[index]["target"] for index in nearest]
    memory = metrics.texts(said, targets).estimates
    remembered = {f"memory/{key}": one for key, one in memory.items()}
    return dataclasses.replace(found, scores=dict(found.scores) | remembered)


def definitions(name: str, change: preprocessing.Stage) -> Baseline:
    """The answer to the nearest question, by characters: of other terms, as no term is in two splits."""
    train, test = read(name, "train"), read(name, "test")
    questions = [row["question"] for row in test]
    nearest = _nearest([row["question"] for row in train], questions, change)
    said = [train[index]["answer"] for index in nearest]
    return _texts(questions, [row["answer"] for row in test], said)


def _nearest(known: Sequence[str], asked: Sequence[str], change: preprocessing.Stage) -> list[int]:
    """Returns for each text the place of the known one that is nearest to it, by TF-IDF of runs of characters."""
    from sklearn.feature_extraction import text

    vectoriser = text.TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), preprocessor=change)
    known_MD = vectoriser.fit_transform(known)
    asked_ND = vectoriser.transform(asked)
    nearest = []
    for start in range(0, asked_ND.shape[0], 256):
        scores = asked_ND[start : start + 256] @ known_MD.T
        nearest += np.asarray(scores.argmax(axis=1)).ravel().tolist()
    return nearest


def spans(name: str, change: preprocessing.Stage) -> Baseline:
    """The first definition of the context."""
    test = read(name, "test")
    firsts = [row["context"].partition(": ")[2].partition(". ")[0] for row in test]
    wanted = [row["answer"]["text"] for row in test]
    scores = dict(metrics.answers(firsts, [[text] for text in wanted]).estimates)
    # How much of the task is to find the term.
    found = [f". {row['context']}".partition(f". {row['term']}: ")[2] for row in test]
    found = [text.partition(". ")[0].rstrip(".") for text in found]
    for key, score in metrics.answers(found, [[text] for text in wanted]).estimates.items():
        scores[f"rule/{key}"] = score
    return Baseline(scores, _some([row["question"] for row in test], wanted, firsts))


def relations(name: str, change: preprocessing.Stage) -> Baseline:
    """The most frequent relation, whatever the words."""
    rows = {split: read(name, split) for split in ("train", "test")}
    named = {split: [one[1] for row in rows[split] for one in row["relations"]] for split in rows}
    names = sorted({*named["train"], *named["test"]})
    most, _ = collections.Counter(named["train"]).most_common(1)[0]
    wanted = np.array([names.index(relation) for relation in named["test"]])
    scores = metrics.classification(wanted, np.full_like(wanted, names.index(most)), names)
    given = [" ".join(row["words"]) for row in rows["test"] for _ in row["relations"]]
    return Baseline(scores.estimates, _some(given, named["test"], [most] * len(wanted)))


def descriptions(name: str, change: preprocessing.Stage) -> Baseline:
    """Cosines of TF-IDF vectors, fitted on the documents."""
    from sklearn.feature_extraction import text

    test = read(name, "test")
    vectoriser = text.TfidfVectorizer(sublinear_tf=True, preprocessor=change)
    documents_MD = vectoriser.fit_transform([row["document"] for row in test]).toarray()
    queries_ND = vectoriser.transform([row["query"] for row in test]).toarray()
    ranks_N = ranking.ranks(queries_ND, documents_MD, np.arange(len(test)))
    scores = {key: bootstrap.of_mean(values) for key, values in ranking.scores(ranks_N).items()}
    best = ranking.firsts(queries_ND, documents_MD)
    queries = [row["query"] for row in test]
    documents = [row["document"] for row in test]
    return Baseline(scores, _some(queries, documents, [documents[i] for i in best]))


def _texts(given: Sequence[str], wanted: Sequence[str], said: Sequence[str]) -> Baseline:
    return Baseline(metrics.texts(said, wanted).estimates, _some(given, wanted, said))


def _some(
    given: Sequence[str], wanted: Sequence[str], said: Sequence[str]
) -> list[tuple[str, str, str]]:
    return [tuple(text[:300] for text in row) for row in list(zip(given, wanted, said))[:3]]


BASELINES: dict[str, Callable[[str, preprocessing.Stage], Baseline]] = {
    "newsgroups": labels,
    "spam": labels,
    "sentiment": sentiment,
    "summaries": summaries,
    "descriptions": descriptions,
    "definitions": definitions,
    "spans": spans,
    "relations": relations,
    "translation_it": translation,
    "translation_fr": translation,
}


def score(name: str, stages: Sequence[str]) -> tuple[dict[str, Any], Baseline]:
    """Returns what is kept of a baseline, without any of its texts, and the baseline.

    Raises:
      errors.UserError: there is no such baseline, its data were not written, or there is no such stage.
    """
    if name not in BASELINES:
        hint = errors.nearest(name, BASELINES)
        raise errors.UserError(f"{name!r} is none of {', '.join(BASELINES)}{hint}")
    started = time.monotonic()
    found = BASELINES[name](name, preprocessing.make(stages))
    kept = {
        "data": name,
        "preprocessing": list(stages),
        "scores": {key: dataclasses.asdict(one) for key, one in found.scores.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    return kept, found


def define_flags() -> None:
    command.define_argument("NAME", f"What: {', '.join(BASELINES)}.")
    flags.DEFINE_list("preprocessing", [], f"Stages: {', '.join(preprocessing.STAGES)}.")


def main() -> None:
    name, stages = command.argument("NAME"), flags.FLAGS.preprocessing
    kept, found = score(name, stages)
    RESULTS.mkdir(exist_ok=True)
    file = "-".join([name, "baseline", *stages]) + ".json"
    (RESULTS / file).write_text(json.dumps(kept, indent=1) + "\n")
    for given, wanted, said in found.examples:
        print(f"given: {given}\nwanted: {wanted}\nsaid: {said}\n")
    for key, estimate in found.scores.items():
        print(f"{key:16} {estimate}")
    print(f"{kept['seconds']} s, {RESULTS / file}")


if __name__ == "__main__":
    command.run(main, define_flags)
