"""Scores as others count them, each with a confidence interval.

Labels: scikit-learn's definitions of precision, recall and F1. Texts: sacrebleu's BLEU and chrF (Post 2018; Popovic
2015), with the signatures that say how, and rouge-score's ROUGE (Lin 2004). Answers: exact match and F1 of tokens after
SQuAD's normalisation (Rajpurkar et al. 2016, section 6.1). Each is imported where it is used.
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import functools
import re
import string
from typing import Any

import numpy as np

from llm_jax.evaluation import bootstrap

Estimate = bootstrap.Estimate


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a task found.

    Attributes:
      estimates: by the name of the metric.
      settings: of metrics that have some, such as sacrebleu's signatures.
      details: tables that are no single number.
    """

    estimates: dict[str, Estimate]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def classification(
    targets_N: np.ndarray, predictions_N: np.ndarray, labels: Sequence[str]
) -> Scores:
    """Scores labels, given as numbers.

    A label that neither occurs nor is predicted counts in no mean over labels. One that is never predicted has
    a precision of 0, as in scikit-learn with `zero_division=0`.
    """
    from sklearn import metrics

    size = len(labels)
    true_NY, said_NY = (np.eye(size)[np.asarray(rows)] for rows in (targets_N, predictions_N))
    estimates = {"accuracy": bootstrap.of_mean(np.equal(targets_N, predictions_N))}
    for name in ("precision", "recall", "f1"):
        estimates[f"macro_{name}"] = bootstrap.of_counts(
            functools.partial(_macro, true_NY, said_NY, name), len(true_NY)
        )
    # With one label for each example these three are one number, the accuracy.
    estimates["micro_f1"] = estimates["accuracy"]
    every = list(range(size))
    table = metrics.precision_recall_fscore_support(
        targets_N, predictions_N, labels=every, zero_division=0
    )
    details = {
        "confusion": metrics.confusion_matrix(targets_N, predictions_N, labels=every).tolist(),
        "labels": list(labels),
        "by_label": {
            label: dict(zip(("precision", "recall", "f1", "support"), map(float, row), strict=True))
            for label, row in zip(labels, zip(*table, strict=True), strict=True)
        },
    }
    return Scores(estimates, details=details)


def _macro(
    true_NY: np.ndarray, said_NY: np.ndarray, name: str, counts_RN: np.ndarray
) -> np.ndarray:
    """Returns the mean over labels of precision, recall or F1 of samples, [R]."""
    hits_RY, true_RY, said_RY = (counts_RN @ x for x in (true_NY * said_NY, true_NY, said_NY))
    below = {"precision": said_RY, "recall": true_RY, "f1": (true_RY + said_RY) / 2}[name]
    values_RY = np.where(below > 0, hits_RY / np.maximum(below, 1e-12), 0.0)
    is_there_RY = true_RY + said_RY > 0
    return (values_RY * is_there_RY).sum(1) / np.maximum(is_there_RY.sum(1), 1)


def regression(targets_N: np.ndarray, predictions_N: np.ndarray) -> Scores:
    """Scores numbers: Pearson's and Spearman's correlation, and the mean squared error.

    Of numbers that are all the same there is no correlation: it is NaN, as scipy has it. Ranks are those among all
    examples, in resamples as well.
    """
    from scipy import stats

    ranked = [stats.rankdata(values) for values in (targets_N, predictions_N)]
    estimates = {
        "pearson": _correlation(np.asarray(targets_N), np.asarray(predictions_N)),
        "spearman": _correlation(*ranked),
        "mse": bootstrap.of_mean(np.square(np.subtract(targets_N, predictions_N))),
    }
    return Scores(estimates)


def _correlation(x_N: np.ndarray, y_N: np.ndarray) -> Estimate:
    x_N, y_N = x_N.astype(np.float64), y_N.astype(np.float64)

    def score(counts_RN: np.ndarray) -> np.ndarray:
        sums = counts_RN.sum(1)
        mean_x, mean_y = counts_RN @ x_N / sums, counts_RN @ y_N / sums
        covariance = counts_RN @ (x_N * y_N) / sums - mean_x * mean_y
        squares = (counts_RN @ x_N**2 / sums - mean_x**2) * (counts_RN @ y_N**2 / sums - mean_y**2)
        # What is left of nothing by rounding is nothing.
        is_constant = squares <= 1e-24 * np.square(np.abs(x_N).max() * np.abs(y_N).max())
        root = np.sqrt(np.where(is_constant, 1.0, squares))
        return np.where(is_constant, np.nan, covariance / root)

    return bootstrap.of_counts(score, len(x_N))


def texts(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """Scores texts against one reference each: BLEU, chrF, ROUGE-1, -2 and -L, exact match, F1 of tokens.

    Raises:
      ValueError: there are no texts.
    """
    from rouge_score import rouge_scorer
    import sacrebleu

    if not predictions:
        raise ValueError("there are no texts to score")
    estimates, settings = {}, {}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        value = metric.corpus_score(predictions, [references]).score
        low, high = _resampled(metric, predictions, references)
        estimates[name] = Estimate(value, low, high)
        settings[name] = str(metric.get_signature())
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    of_each = [
        scorer.score(reference, prediction)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    for name in names:
        estimates[name] = bootstrap.of_mean(np.array([scores[name].fmeasure for scores in of_each]))
    settings["rouge"] = "rouge-score, F-measure, with its stemmer"
    return Scores(
        estimates | answers(predictions, [[text] for text in references]).estimates, settings
    )


def _resampled(
    metric: Any, predictions: Sequence[str], references: Sequence[str]
) -> tuple[float, float]:
    """Returns the interval of a corpus metric of sacrebleu, of the sums that its sentences add up to.

    sacrebleu resamples as well, but keeps the half of a symmetric interval, and to itself.
    """
    statistics = np.array(metric._extract_corpus_statistics(predictions, [references]), np.float64)
    size, tail = len(predictions), (1.0 - bootstrap.LEVEL) / 2.0
    found = [
        metric._compute_score_from_stats((counts_N @ statistics).tolist()).score
        for counts_RN in bootstrap.samples(size)
        for counts_N in counts_RN
    ]
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return float(low), float(high)


def normalised(text: str) -> str:
    """Returns an answer as SQuAD compares it: lower case, without punctuation, articles and double spaces."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, answer: str) -> float:
    """Returns the F1 of the tokens that two normalised answers share; of two empty ones 1."""
    said, wanted = normalised(prediction).split(), normalised(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2.0 * shared / (len(said) + len(wanted))


def answers(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> Scores:
    """Scores answers, each by the best of those that are accepted; none accepted means no answer ("")."""
    exact, shared = [], []
    for prediction, answers_of_one in zip(predictions, accepted, strict=True):
        right = list(answers_of_one) or [""]
        exact.append(max(normalised(prediction) == normalised(answer) for answer in right))
        shared.append(max(token_f1(prediction, answer) for answer in right))
    return Scores(
        {
            "exact_match": bootstrap.of_mean(np.array(exact, np.float64)),
            "token_f1": bootstrap.of_mean(np.array(shared)),
        }
    )


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Returns the spans of BIO tags: first word, the one behind the last, and the type.

    An I that continues nothing of its type begins a span, as conlleval has it (Tjong Kim Sang 2002).
    """
    found, start, kind = set(), None, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if start is not None and (prefix != "I" or own != kind):
            found.add((start, index, kind))
            start = None
        if prefix in ("B", "I") and start is None:
            start, kind = index, own
    return found


def sequences(targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Scores:
    """Scores labels of words: accuracy, and where they are BIO tags, entities that agree in span and type."""
    sizes, hits = (
        np.array([len(row) for row in targets], np.float64),
        np.array([sum(map(str.__eq__, *rows)) for rows in zip(targets, predictions, strict=True)]),
    )
    estimates = {"accuracy": bootstrap.of_mean(hits / np.maximum(sizes, 1), sizes)}
    every = {tag for row in [*targets, *predictions] for tag in row}
    if all(tag.partition("-")[0] in ("B", "I", "O") for tag in every):
        found = [entities(row) for row in predictions]
        wanted = [entities(row) for row in targets]
        shared = np.array([len(a & b) for a, b in zip(found, wanted, strict=True)], np.float64)
        said, true = (np.array([len(row) for row in rows], np.float64) for rows in (found, wanted))

        def ratio(above_N: np.ndarray, below_N: np.ndarray) -> Estimate:
            return bootstrap.of_counts(
                lambda counts: counts @ above_N / np.maximum(counts @ below_N, 1e-12), len(above_N)
            )

        estimates |= {
            "entity_precision": ratio(shared, said),
            "entity_recall": ratio(shared, true),
            "entity_f1": ratio(shared, (said + true) / 2),
        }
    return Scores(estimates)
