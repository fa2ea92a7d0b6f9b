"""Scores are those of the libraries that others use, and intervals those of scipy."""

import numpy as np
import pytest
from scipy import stats

from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")

_LABELS = ["a", "b", "c", "never"]
_SAID = ["the cat sat on the mat", "a dog", "nothing at all", "it is a very long house"]
_WANTED = ["the cat sat on a mat", "the dogs", "something", "it is a long house indeed"]


def _values(scores):
    return {name: estimate.value for name, estimate in scores.estimates.items()}


def test_labels_are_scored_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 200)
    predictions = np.where(rng.random(200) < 0.6, targets, rng.integers(0, 3, 200))
    found = metrics.classification(targets, predictions, _LABELS)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        targets, predictions, average="macro", zero_division=0
    )
    wanted = {
        "accuracy": sklearn_metrics.accuracy_score(targets, predictions),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "micro_f1": sklearn_metrics.f1_score(targets, predictions, average="micro"),
    }
    assert _values(found) == pytest.approx(wanted)
    assert np.sum(found.details["confusion"]) == 200
    for estimate in found.estimates.values():
        assert estimate.low < estimate.value < estimate.high


def test_a_label_that_is_never_predicted_has_no_precision():
    found = _values(metrics.classification(np.array([0, 0, 1]), np.array([0, 0, 0]), _LABELS))
    assert found["macro_precision"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["macro_recall"] == pytest.approx((1 + 0) / 2)


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(50)
    y = x + rng.standard_normal(50)
    found = _values(metrics.regression(x, y))
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["mse"] == pytest.approx(np.mean((x - y) ** 2))
    constant = _values(metrics.regression(x, np.full(50, 0.1)))
    assert np.isnan(constant["pearson"]) and np.isnan(constant["spearman"])


def test_texts_are_scored_as_the_libraries_do():
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    found = metrics.texts(_SAID, _WANTED)
    values = _values(found)
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(_SAID, [_WANTED]).score)
    assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(_SAID, [_WANTED]).score)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(_SAID, _WANTED)]
    assert values["rougeL"] == pytest.approx(np.mean(rouge))
    assert "tok:13a" in found.settings["bleu"] and "nc:6" in found.settings["chrf"]
    for name in ("bleu", "chrf"):
        assert found.estimates[name].low <= values[name] <= found.estimates[name].high
    same = _values(metrics.texts(_WANTED, _WANTED))
    assert same["bleu"] == pytest.approx(100.0) and same["exact_match"] == 1.0


@pytest.mark.parametrize(
    "said, accepted, exact, f1",
    [
        ("The Cat!", ["cat"], 1, 1),
        ("a black cat", ["cat", "black cat"], 1, 1),
        ("black cat", ["cat sat"], 0, 0.5),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(said, accepted, exact, f1):
    found = _values(metrics.answers([said], [accepted]))
    assert found == pytest.approx({"exact_match": exact, "token_f1": f1})


def test_entities_agree_in_span_and_type():
    assert metrics.entities(["B-X", "I-X", "O", "I-Y", "B-Y", "I-X"]) == {
        (0, 2, "X"), (3, 4, "Y"), (4, 5, "Y"), (5, 6, "X"),
    }  # fmt: skip
    wanted = [["B-X", "I-X", "O"], ["O", "B-Y", "O"]]
    said = [["B-X", "O", "O"], ["O", "B-Y", "B-Y"]]
    found = _values(metrics.sequences(wanted, said))
    assert found == pytest.approx(
        {"accuracy": 4 / 6, "entity_precision": 1 / 3, "entity_recall": 1 / 2, "entity_f1": 0.4}
    )
    assert set(_values(metrics.sequences([["x"]], [["y"]]))) == {"accuracy"}


def test_intervals_are_scipys():
    values = np.random.default_rng(2).exponential(size=80)
    found = bootstrap.of_mean(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    # Of a thousand resamples: within a tenth of the width.
    width = theirs.high - theirs.low
    assert abs(found.low - theirs.low) < 0.1 * width and abs(found.high - theirs.high) < 0.1 * width
    assert bootstrap.of_mean(values) == found


def test_a_weighted_mean_resamples_values_with_their_weights():
    values, weights = np.array([1.0, 3.0]), np.array([3.0, 1.0])
    found = bootstrap.of_mean(values, weights)
    assert (found.value, found.low, found.high) == (1.5, 1.0, 3.0)


def test_a_planted_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(4)
    noise = rng.standard_normal(200)
    estimate, p_value = bootstrap.difference(noise + 0.5, noise + 0.1 * rng.standard_normal(200))
    assert estimate.low > 0.4 and p_value < 0.01
    # Of systems that do not differ a twentieth is called different, give or take.
    called = sum(
        bootstrap.difference(rng.standard_normal(60), rng.standard_normal(60))[1] < 0.05
        for _ in range(200)
    )
    assert 2 <= called <= 22  # 10 expected; the binomial's 99.9% interval
    with pytest.raises(ValueError, match="not the same"):
        bootstrap.difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no examples"):
        bootstrap.of_mean([])
