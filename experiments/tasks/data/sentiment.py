"""Sentences of film reviews, and how they felt to those who read them: negative or positive.

Source: the sentences of Pang and Lee (2004) that Hutto and Gilbert (2014, "VADER", section 3.3) had rated by twenty
people each, from -4 to 4; they are in the source distribution of vaderSentiment (MIT), with its lexicon. The label is
the sign of the mean; the few without one are left out. Split by the hash of a sentence's words.
"""

import tarfile

from experiments.tasks.data import splits
from llm_jax import errors
from llm_jax.data import packages

VERSION = "3.3.2"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_ROOT = f"vaderSentiment-{VERSION}"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def _package() -> tarfile.TarFile:
    options = ["--no-binary=:all:"]
    return tarfile.open(packages.pip("vaderSentiment", VERSION, sha256=_SHA256, options=options))


def _read(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise errors.UserError(f"{archive.name} has no file {name}: remove it, to fetch it again")
    return file.read().decode("utf-8")


def examples_of(table: str) -> list[splits.Example]:
    """Returns the sentences of a table of number, mean rating and text that have a sign."""
    found = []
    for line in table.split("\n"):
        if line.strip():
            _, mean, text = line.split("\t")
            rating = float(mean)
            if rating:
                label = "positive" if rating > 0 else "negative"
                found.append({"text": text.strip(), "label": label, "rating": rating})
    return found


def load() -> splits.DataSet:
    """Returns the data set; downloads it if need be."""
    with _package() as package:
        inner = package.extractfile(f"{_ROOT}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            examples = examples_of(_read(archive, _RATINGS))
    about = {
        "source": f"vaderSentiment {VERSION}, {_RATINGS}",
        "licence": "the ratings MIT; the sentences are reviewers'",
        "split": "by the hash of the words of the sentence: 70% train, 10% validation, 20% test",
    }
    return splits.DataSet(splits.by_words(examples), about, lambda example: example["text"])


def lexicon() -> dict[str, float]:
    """Returns what VADER's words are rated, from -4 to 4; downloads it if need be."""
    with _package() as package:
        lines = _read(package, f"{_ROOT}/vaderSentiment/vader_lexicon.txt").split("\n")
    return {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines if line)}
