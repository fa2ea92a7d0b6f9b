"""Each stage does what it is named for, and twice what it does once."""

import hypothesis
from hypothesis import strategies as st
import pytest

from llm_jax import errors
from llm_jax.data import preprocessing


@pytest.mark.parametrize(
    "names, text, wanted",
    [
        ([], " As  it IS ", " As  it IS "),
        (["normalise"], " Ｆｕｌｌ  Ünïcode\tĳ STRAßE ", "full unicode ij strasse"),
        (["segment"], "Don't stop--now, 3.5!", "Don't stop now 3 5"),
        (["segment"], "東京に行く now", "東 京 に 行 く now"),
        (["stop_words"], "the cat is on The mat", "cat mat"),
        (["stem"], "running runners ran", "run runner ran"),
        (
            ["normalise", "segment", "stop_words", "stem"],
            "The DOGS, they were barking!",
            "dog bark",
        ),
    ],
)
def test_stages_do_what_they_say(names, text, wanted):
    assert preprocessing.make(names)(text) == wanted


@hypothesis.given(st.text(max_size=40))
def test_normalising_and_segmenting_twice_changes_nothing_more(text):
    for name in ("normalise", "segment", "stop_words"):
        stage = preprocessing.make([name])
        assert stage(stage(text)) == stage(text)


def test_other_languages():
    stage = preprocessing.make(["stop_words", "stem"], "italian")
    assert stage("i gatti e le case") == "gatt cas"
    for names, language, said in (
        (["stop_words"], "klingon", "no list for 'klingon'"),
        (["stem"], "klingon", "no stemmer for 'klingon'"),
        (["stemm"], "english", "did you mean 'stem'"),
    ):
        with pytest.raises(errors.UserError, match=said):
            preprocessing.make(names, language)
