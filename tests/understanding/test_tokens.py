"""Losses of tokens are those that evaluation gives, and pages hold them."""

import dataclasses
import json
import re

from etils import epath
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import evaluate
from llm_jax.understanding import subject as subject_lib
from llm_jax.understanding import tokens
from tests import helpers
from tests.understanding import runs


def _evaluated(workdir, path):
    """Returns the loss that `evaluate --source=text:PATH` gives."""

    def read(step_dir, meta):
        data = dataclasses.replace(meta.config.data, eval_source=f"text:{path}")
        return evaluate.score(
            step_dir,
            dataclasses.replace(meta, config=dataclasses.replace(meta.config, data=data)),
        )

    found = checkpoint.read_latest(workdir, None, read)
    return next(value for name, value in found.items() if name.endswith("/loss"))


@pytest.mark.parametrize(
    "objective, model",
    [
        ("causal", {}),
        pytest.param("mlm", helpers.BERT, marks=pytest.mark.long),
        pytest.param("span_corruption", helpers.T5 | {"vocab_size": 400}, marks=pytest.mark.long),
    ],
)
def test_the_mean_is_what_evaluation_gives(tmp_path, objective, model):
    workdir = runs.save(tmp_path, objective, **model)
    (tmp_path / "one.txt").write_text(runs.TEXT)
    found = tokens.score(subject_lib.load(workdir), runs.TEXT)
    assert found.loss == pytest.approx(_evaluated(workdir, tmp_path / "one.txt"), rel=1e-5)
    assert 0 < found.num_scored < len(found.tokens) or objective == "span_corruption"


def test_alternatives_and_ranks_are_of_the_model(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path))
    text = "short text of 30 characters..."
    found = tokens.score(subject, text)
    ids = subject.tokenizer.encode(text)
    assert [token.id for token in found.tokens] == [*ids, subject.tokenizer.eos_id]
    assert found.tokens[0].loss is None and found.num_scored == len(ids)
    wanted = runs.log_probabilities(subject, ids)
    for place, token in enumerate(found.tokens[1:]):
        assert token.loss == pytest.approx(-wanted[place, token.id], rel=1e-4)
        assert token.rank == np.sum(wanted[place] > wanted[place, token.id])
        best = np.argsort(-wanted[place])[: tokens.NUM_ALTERNATIVES]
        probabilities = [probability for _, probability in token.alternatives]
        np.testing.assert_allclose(probabilities, np.exp(wanted[place, best]), rtol=1e-4)
        assert [name for name, _ in token.alternatives] == subject_lib.names(
            subject.tokenizer, best
        )
    files = tokens.write(found, epath.Path(tmp_path / "out"), "</script>")
    page = (tmp_path / "out" / "tokens.html").read_text()
    assert not re.search(r"https?:|<link|src=|@import", page) and page.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data == json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert data["title"] == "</script>" and data["loss"] == found.loss
    assert [file.name for file in files] == ["tokens.html", "tokens.json"]


def test_mistakes_are_told(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path / "a"))
    with pytest.raises(errors.UserError, match="has no tokens"):
        tokens.score(subject, "")
    with pytest.raises(errors.UserError, match="20,001 tokens and a page takes 20,000"):
        tokens.score(subject, "x" * 20_001)
    other = dataclasses.replace(subject.config.objective, name="seq2seq")
    config = dataclasses.replace(subject.config, objective=other)
    with pytest.raises(errors.UserError, match="this one has 'seq2seq' and 'lm'"):
        tokens.score(dataclasses.replace(subject, config=config), "x")
