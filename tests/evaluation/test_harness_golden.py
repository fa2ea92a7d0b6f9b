"""The harness's own `hf` backend on SmolLM2 135M, as `tests/golden/lm_eval/make.py` has kept it, and ours."""

import json

import lm_eval
from lm_eval import tasks
import numpy as np
import pytest

from llm_jax.evaluation import harness_model
from tests import commands
from tests.golden.lm_eval import answers

GOLDEN = json.loads((answers.FOLDER.parent / "answers.json").read_text())
# Both are float32 through 30 layers. The largest relative error measured is 1.8e-5, of a log-probability of -1.3
# (x86, jax 0.12.0 against torch 2.13.0).
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    workdir = answers.import_model(tmp_path_factory.mktemp("smollm2"))
    return harness_model.of_workdir(str(workdir), max_length=answers.MAX_LENGTH)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(commands.ROOT)  # tasks name their files from there
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        manager = tasks.TaskManager(include_path=str(answers.FOLDER), include_defaults=False)
        names = list(answers.TASKS)
        return answers.of(lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager))


def _numbers(task: dict) -> np.ndarray:
    """Returns the log-probabilities of a task's answers."""
    flat = [reply for replies in task["answers"] for reply in replies]
    return np.asarray([reply[0] if isinstance(reply, list) else reply for reply in flat])


@pytest.mark.long
def test_log_probabilities_are_those_of_the_hf_backend(found):
    worst = 0.0
    for name in ("llm_jax_choices", "llm_jax_letters", "llm_jax_texts"):
        ours, theirs = found[name], GOLDEN["tasks"][name]
        assert ours["requests"] == theirs["requests"]
        assert len(_numbers(theirs)) >= 4
        errors = np.abs(_numbers(ours) / _numbers(theirs) - 1)
        worst = max(worst, np.max(errors))
    assert worst <= TOLERANCE


@pytest.mark.long
def test_the_same_answers_are_greedy(found):
    flags = []
    for name in ("llm_jax_choices", "llm_jax_letters"):
        ours, theirs = (
            [reply[1] for replies in of["tasks"][name]["answers"] for reply in replies]
            for of in ({"tasks": found}, GOLDEN)
        )
        assert ours == theirs
        flags += theirs
    assert {True, False} == set(flags)


@pytest.mark.long
def test_texts_are_those_of_the_hf_backend(found):
    ours, theirs = found["llm_jax_beginnings"], GOLDEN["tasks"]["llm_jax_beginnings"]
    assert ours["requests"] == theirs["requests"]
    assert ours["answers"] == theirs["answers"]


@pytest.mark.long
def test_scores_are_those_of_the_hf_backend(found):
    for name in answers.TASKS:
        assert found[name]["scores"] == pytest.approx(
            GOLDEN["tasks"][name]["scores"], rel=TOLERANCE
        )


@pytest.mark.long
def test_conversations_are_rendered_as_transformers_does(model):
    assert [model.apply_chat_template(*case) for case in answers.CONVERSATIONS] == GOLDEN[
        "conversations"
    ]
