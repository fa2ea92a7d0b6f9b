"""Pairs differ in a pronoun, likelihoods are the model's, and scores are those of their definition."""

import json

from etils import epath
import numpy as np
import pytest

from llm_jax import errors
from llm_jax.understanding import bias
from llm_jax.understanding import occupations
from llm_jax.understanding import subject as subject_lib
from tests import helpers
from tests.understanding import runs


def test_sentences_differ_in_the_pronoun_alone():
    assert len(occupations.WOMEN) >= 40
    shares = np.array(list(occupations.WOMEN.values()))
    assert (shares < 25).sum() == (shares > 65).sum() == len(shares) / 2
    assert not set(occupations.WOMEN) & set(occupations.NEUTRAL)
    for template in occupations.TEMPLATES:
        male, female = (text.split() for text in occupations.pair(template, "nurse"))
        differing = [(a, b) for a, b in zip(male, female, strict=True) if a != b]
        assert len(differing) == 1
        assert differing[0][0].strip(".") in occupations.MALE.values()
        assert differing[0][1].strip(".") in occupations.FEMALE.values()
        assert male[:2] == ["The", "nurse"]


def _likelihoods(of_stereotype, of_male):
    """Returns likelihoods whose pairs differ by `of_male`, and `of_stereotype` the majority's way."""
    shares = np.array(list(occupations.WOMEN.values()))
    nouns = len(shares) + len(occupations.NEUTRAL)
    signs = np.concatenate([np.where(shares < 50, 1.0, -1.0), np.zeros(len(occupations.NEUTRAL))])
    rng = np.random.default_rng(0)
    found = np.repeat(rng.standard_normal((nouns, len(occupations.TEMPLATES), 1)), 2, axis=2)
    found[..., 0] += of_male + of_stereotype * signs[:, None]
    return found


def test_scores_of_what_is_known():
    found = bias.summarise(_likelihoods(0.25, 0.0))
    assert found.stereotyped.value == found.stereotyped.low == 1.0
    assert found.gap.value == pytest.approx(0.5) == found.gap.high
    assert found.neutral.value == pytest.approx(0.0)
    # A model that always prefers men has no gap, and half of its pairs are those of men's occupations.
    found = bias.summarise(_likelihoods(0.0, 2.0))
    assert found.stereotyped.value == pytest.approx(0.5)
    assert found.gap.value == pytest.approx(0.0) and found.neutral.value == pytest.approx(2.0)
    assert all(abs(one.relative) < 1e-9 for one in found.by_occupation)
    # One that does not care at all ties.
    assert bias.summarise(_likelihoods(0.0, 0.0)).stereotyped.value == 0.5
    # Intervals narrow to nothing only where occupations agree.
    noisy = _likelihoods(0.1, 0.0)
    noisy[..., 0] += np.random.default_rng(1).standard_normal(noisy.shape[:2])
    found = bias.summarise(noisy)
    assert found.gap.low < found.gap.value < found.gap.high
    rows = found.by_occupation
    men = [one.difference for one in rows if one.women < 50]
    women = [one.difference for one in rows if one.women > 50]
    assert found.gap.value == pytest.approx(np.mean(men) - np.mean(women))


def test_a_decoder_scores_the_whole_sentence(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path))
    texts = ["The cat said that she", "A dog"]
    found = bias.log_likelihoods(subject, texts)
    for text, value in zip(texts, found, strict=True):
        ids = subject.tokenizer.encode(text)
        wanted = runs.log_probabilities(subject, ids[:-1])
        assert value == pytest.approx(wanted[np.arange(len(ids) - 1), ids[1:]].sum(), rel=1e-5)


def test_an_encoder_hides_each_token_in_turn(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path, "mlm", **helpers.BERT))
    texts = ["he is", "we go"]
    found = bias.log_likelihoods(subject, texts)
    tokenizer = subject.tokenizer
    for text, value in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        row = np.array([tokenizer.cls_id, *ids, tokenizer.sep_id], np.int32)
        wanted = 0.0
        for place, token in enumerate(ids, 1):
            hidden = row.copy()
            hidden[place] = tokenizer.mask_id
            wanted += runs.log_probabilities(subject, hidden)[place, token]
        assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
def test_a_model_is_scored_and_written(tmp_path, monkeypatch):
    subject = subject_lib.load(runs.save(tmp_path))
    monkeypatch.setattr(occupations, "TEMPLATES", occupations.TEMPLATES[:1])
    found = bias.score(subject)
    nurse = next(one for one in found.by_occupation if one.name == "nurse")
    he, she = bias.log_likelihoods(
        subject, list(occupations.pair(occupations.TEMPLATES[0], "nurse"))
    )
    assert nurse.difference == pytest.approx(he - she, abs=1e-3)
    bias.write(found, epath.Path(tmp_path / "out"), 7)
    written = json.loads((tmp_path / "out" / "bias.json").read_text())
    assert written["step"] == 7 and len(written["occupations"]) == len(occupations.WOMEN)
    assert written["scores"]["gap"]["value"] == found.gap.value
    text = (tmp_path / "out" / "bias.txt").read_text()
    assert all(name in text for name in occupations.WOMEN)


def test_mistakes_are_told(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path, "seq2seq", **helpers.T5))
    with pytest.raises(errors.UserError, match="decoder or an encoder with model.head 'lm'"):
        bias.log_likelihoods(subject, ["x"])
