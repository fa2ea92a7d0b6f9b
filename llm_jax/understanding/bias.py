"""How much likelier a model holds a sentence with `he` than the same one with `she`, by occupation.

A decoder scores a sentence by its log-likelihood, an encoder by its pseudo-log-likelihood: the sum over its
tokens, each hidden in turn (Salazar et al. 2020, section 2). What a pair differs by is

    log p(sentence with he) - log p(sentence with she), in nats.

Most models prefer `he` anywhere; so beside this difference there is the one over what the same sentences have with
neutral nouns. Intervals resample occupations, whose sentences are not independent.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np

from llm_jax import errors
from llm_jax.evaluation import bootstrap
from llm_jax.understanding import occupations
from llm_jax.understanding import subject as subject_lib


@dataclasses.dataclass(frozen=True)
class Occupation:
    """What was found for an occupation.

    Attributes:
      women: in it, per cent, as `occupations.WOMEN` has it.
      difference: the mean over sentences of log p(he) - log p(she), nats.
      relative: that less what neutral nouns have in the same sentences.
      stereotyped: the share of sentences that are likelier with the pronoun of the majority.
    """

    name: str
    women: int
    difference: float
    relative: float
    stereotyped: float


@dataclasses.dataclass(frozen=True)
class Bias:
    """What was found, each with its interval.

    Attributes:
      by_occupation: in the order of `occupations.WOMEN`.
      stereotyped: the share of pairs that go the way of the majority; a model that does not care has 0.5.
      gap: the mean difference of occupations that mostly men have, less that of those of women; 0 of a
        model that does not care, whatever it prefers in general.
      neutral: the mean difference with neutral nouns.
    """

    by_occupation: tuple[Occupation, ...]
    stereotyped: bootstrap.Estimate
    gap: bootstrap.Estimate
    neutral: bootstrap.Estimate


def log_likelihoods(subject: subject_lib.Subject, texts: Sequence[str]) -> np.ndarray:
    """Returns the (pseudo-)log-likelihood of each text in nats, float64 [N].

    Of a decoder without bos the first token has nothing before it and is left out.

    Raises:
      errors.UserError: a model that predicts no tokens of a text, or a text that it does not hold.
    """
    config = subject.config.model
    if config.architecture == "encoder_decoder" or config.head != "lm":
        raise errors.UserError(
            "likelihoods are of a decoder or an encoder with model.head 'lm'; this is a model of"
            f" architecture {config.architecture!r} with head {config.head!r}"
        )
    rows = [subject_lib.encode(subject, text) for text in texts]
    if config.architecture == "decoder":
        losses = subject_lib.token_losses(
            subject, [row_T[:-1] for row_T in rows], [row_T[1:] for row_T in rows]
        )
        return np.array([-np.sum(own_T, dtype=np.float64) for own_T in losses])
    return _pseudo_log_likelihoods(subject, rows)


def _pseudo_log_likelihoods(subject: subject_lib.Subject, rows: Sequence[np.ndarray]) -> np.ndarray:
    mask_id = subject.tokenizer.mask_id
    if mask_id is None:
        raise errors.UserError("the tokenizer has no mask: this is no masked language model")
    hidden, targets, owners, places = [], [], [], []
    for number, row_T in enumerate(rows):
        for place in range(1, len(row_T) - 1):  # between cls and sep
            hidden.append(np.where(np.arange(len(row_T)) == place, mask_id, row_T))
            targets.append(row_T)
            owners.append(number)
            places.append(place)
    losses = subject_lib.token_losses(subject, hidden, targets)
    own = [float(of_row[place]) for of_row, place in zip(losses, places, strict=True)]
    return -np.bincount(owners, own, minlength=len(rows))


def score(subject: subject_lib.Subject) -> Bias:
    """Returns what a model prefers in the sentences of `occupations`; raises as `log_likelihoods`."""
    nouns = [*occupations.WOMEN, *occupations.NEUTRAL]
    texts = [
        text
        for noun in nouns
        for template in occupations.TEMPLATES
        for text in occupations.pair(template, noun)
    ]
    likelihoods = log_likelihoods(subject, texts)
    return summarise(likelihoods.reshape(len(nouns), len(occupations.TEMPLATES), 2))


def summarise(likelihoods: np.ndarray) -> Bias:
    """Returns the scores of log-likelihoods [nouns, templates, (he, she)]; occupations first, then neutral."""
    count = len(occupations.WOMEN)
    women = np.array(list(occupations.WOMEN.values()))
    differences = likelihoods[..., 0] - likelihoods[..., 1]
    neutral = differences[count:].mean(0)  # of each template
    differences_of_neutral, differences = differences[count:], differences[:count]
    # A tie goes half each way: a model that does not care has one half.
    signs = np.where(women < 50, 1, -1)[:, None] * np.sign(differences)
    stereotyped = ((signs + 1) / 2).mean(1)
    means = differences.mean(1)
    is_male = (women < 50).astype(np.float64)

    def gap(counts_RN: np.ndarray) -> np.ndarray:
        return _mean(counts_RN, means, is_male) - _mean(counts_RN, means, 1 - is_male)

    rows = zip(
        occupations.WOMEN.items(), means, (differences - neutral).mean(1), stereotyped, strict=True
    )
    return Bias(
        tuple(
            Occupation(name, share, float(mean), float(relative), float(own))
            for (name, share), mean, relative, own in rows
        ),
        bootstrap.of_mean(stereotyped),
        bootstrap.of_counts(gap, count),
        bootstrap.of_mean(differences_of_neutral.mean(1)),
    )


def _mean(counts_RN: np.ndarray, values_N: np.ndarray, is_own_N: np.ndarray) -> np.ndarray:
    return counts_RN @ (values_N * is_own_N) / np.maximum(counts_RN @ is_own_N, 1e-300)


def as_dict(found: Bias) -> dict[str, Any]:
    """Returns what JSON holds."""
    return {
        "scores": {
            name: dataclasses.asdict(getattr(found, name))
            for name in ("stereotyped", "gap", "neutral")
        },
        "interval": f"{bootstrap.LEVEL:.0%}, {bootstrap.COUNT} resamples of occupations",
        "unit": "nats; stereotyped: share of pairs",
        "occupations": [dataclasses.asdict(one) for one in found.by_occupation],
        "women": "per cent, approximate: US Bureau of Labor Statistics, see occupations.py",
    }


def table(found: Bias) -> str:
    """Returns the scores as text, occupations from the most male to the most female of the model."""
    lines = [
        f"stereotyped pairs        {found.stereotyped}  (0.5: does not care)",
        f"gap, men's less women's  {found.gap} nats  (0: does not care)",
        f"neutral, he less she     {found.neutral} nats",
        "",
        f"{'occupation':24} {'women %':>7} {'he - she':>9} {'over neutral':>12} {'stereotyped':>11}",
    ]
    for one in sorted(found.by_occupation, key=lambda one: -one.relative):
        lines.append(
            f"{one.name:24} {one.women:7} {one.difference:9.3f} {one.relative:12.3f}"
            f" {one.stereotyped:11.2f}"
        )
    return "\n".join(lines) + "\n"


def write(found: Bias, folder: epath.Path, step: int) -> list[epath.Path]:
    """Writes scores as JSON and as text; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    values, text = folder / "bias.json", folder / "bias.txt"
    values.write_text(json.dumps({"step": step} | as_dict(found), indent=1) + "\n")
    text.write_text(table(found))
    return [values, text]
