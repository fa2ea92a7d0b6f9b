"""The stages of the classic pipeline, each a pure function of a text: what models of counts want, and BERT does not.

    normalise    Unicode's NFKC, lower case, accents off, one space between words
    segment      words alone: runs of letters, digits and marks, by Unicode (of Chinese and Japanese each character)
    stop_words   the words that say little are left out, by the lists of the `stop-words` package
    stem         what is left of a word without its endings (Porter 1980; `snowballstemmer`)

Stages run in the order in which they are named; the last two take words with spaces between.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import re
import unicodedata

from llm_jax import errors

Stage = Callable[[str], str]

_MOST_STEMS = 100_000  # words whose stem is kept

# Ideographs and kana, between which no space is written.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*")


def normalise(text: str) -> str:
    """Returns a text in one spelling: compatible characters as one, lower case, no accents."""
    text = unicodedata.normalize("NFKC", text).casefold()
    parts = unicodedata.normalize("NFKD", text)
    bare = "".join(ch for ch in parts if not unicodedata.combining(ch))
    return " ".join(unicodedata.normalize("NFKC", bare).split())


def segment(text: str) -> str:
    """Returns the words of a text with a space between."""
    return " ".join(_WORDS.findall(text))


def _without_stop_words(language: str) -> Stage:
    import stop_words

    try:
        words = frozenset(map(str.casefold, stop_words.get_stop_words(language)))
    except stop_words.StopWordError as error:
        raise errors.UserError(
            f"stop_words: there is no list for {language!r}, but for"
            f" {', '.join(sorted(stop_words.AVAILABLE_LANGUAGES))}"
        ) from error
    return lambda text: " ".join(w for w in text.split() if w.casefold() not in words)


def _stemmed(language: str) -> Stage:
    import snowballstemmer

    if language not in snowballstemmer.algorithms():
        known = ", ".join(sorted(snowballstemmer.algorithms()))
        raise errors.UserError(f"stem: there is no stemmer for {language!r}, but for {known}")
    # Words come again, and stemming one takes ten times as long as looking it up.
    stem = functools.lru_cache(maxsize=_MOST_STEMS)(snowballstemmer.stemmer(language).stemWord)
    return lambda text: " ".join(map(stem, text.split()))


STAGES: dict[str, Callable[[str], Stage]] = {
    "normalise": lambda language: normalise,
    "segment": lambda language: segment,
    "stop_words": _without_stop_words,
    "stem": _stemmed,
}


def make(names: Sequence[str], language: str = "english") -> Stage:
    """Returns the function that runs stages one after the other; of none it is the identity.

    Raises:
      errors.UserError: a stage that is not there, or one that does not know the language.
    """
    for name in names:
        if name not in STAGES:
            hint = errors.nearest(name, STAGES)
            raise errors.UserError(
                f"data.preprocessing: {name!r} is none of {', '.join(STAGES)}{hint}"
            )
    stages = [STAGES[name](language) for name in names]
    return lambda text: functools.reduce(lambda done, stage: stage(done), stages, text)
