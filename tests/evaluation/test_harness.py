"""Checkpoints in lm-evaluation-harness: what the model's own whole forward pass says, however requests come."""

import json
import math
import random

import jax
from lm_eval.api import instance
from lm_eval.api import model as model_lib
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax import train_step
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.evaluation import harness
from llm_jax.evaluation import harness_model
from llm_jax.sampling import decode
from llm_jax.sampling import load
from tests import commands
from tests import helpers
from tests.sampling import whole_forward

MAX_LENGTH = 24  # of what `whole_forward` reads
EOS = 0
PAIRS = [
    ("the cat", " sat"),
    ("the cat", " sap"),  # shares a row with the first
    ("the cat s", "at"),
    ("a", "b"),
    ("", "begins"),
    ("trailing  ", "spaces"),
    ("long " * 9, "context"),
    ("x", "y" * 20),
]


def _loaded(**changes):
    """Returns a random model of bytes, and itself as it is trained."""
    mesh, rules = helpers.make_mesh(rules="tp")
    sizes = {"vocab_size": 260, "max_length": MAX_LENGTH} | changes
    model = helpers.random_model(helpers.tiny_model_config(**sizes), mesh, rules)
    with jax.set_mesh(mesh):
        return load.Loaded(decode.prepare_model(model), tokenizer_lib.load("bytes"), mesh, 7), model


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(helpers.make_mesh(rules="tp")[0]):
        yield


@pytest.fixture(scope="module")
def decoder():
    return _loaded()


@pytest.fixture(scope="module")
def encoder_decoder():
    return _loaded(**helpers.T5)


def _asked(kind, *all_arguments):
    return [instance.Instance(kind, {}, arguments, 0) for arguments in all_arguments]


def _score(lm, pairs):
    return lm.loglikelihood(_asked("loglikelihood", *pairs), disable_tqdm=True)


def _log_probs(model, tokens, source=None):
    """Returns the log-probability of each of `tokens` but the first, and which token was the best."""
    logits_TV = whole_forward.logits(model, tokens[:-1], source).astype(np.float64)
    log_probs_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    log_probs_TV -= np.log(np.exp(log_probs_TV).sum(-1, keepdims=True))
    return log_probs_TV[np.arange(len(tokens) - 1), tokens[1:]], log_probs_TV.argmax(-1)


def _expected(model, context, continuation):
    """Returns what the sum rule says of a pair of texts of bytes, cut as the `hf` backend does."""
    tokens = [*(context.encode() or [EOS]), *continuation.encode()][-(MAX_LENGTH + 1) :]
    spaces = len(context) - len(context.rstrip())
    num_scored = len(continuation) + spaces
    log_probs_T, best_T = _log_probs(model, tokens)
    is_greedy = list(best_T[-num_scored:]) == tokens[-num_scored:]
    return log_probs_T[-num_scored:].sum(), is_greedy


def test_pairs_have_the_sum_of_their_tokens_log_probabilities(decoder):
    loaded, model = decoder
    answers = _score(harness_model.CheckpointLM(loaded), PAIRS)
    for pair, (log_prob, is_greedy) in zip(PAIRS, answers, strict=True):
        wanted, wanted_greedy = _expected(model, *pair)
        assert log_prob == pytest.approx(wanted, rel=1e-5), pair
        assert is_greedy == wanted_greedy


def test_what_the_model_writes_is_greedy_and_nothing_else(decoder):
    loaded, model = decoder
    tokens = list(b"go on")
    for _ in range(4):
        tokens.append(int(whole_forward.logits(model, tokens)[-1].argmax()))
    text = bytes(tokens[5:])
    other = text[:-1] + bytes([(text[-1] + 1) % 128 or 1])
    requests = [
        harness_model.scoring.Request((*b"go on", *ending), 4) for ending in (text, other)
    ] + [harness_model.scoring.Request((*b"go on", *text, 1), 5)]
    answers = harness_model.scoring.score(loaded, requests, 4)
    assert {a.index: a.is_greedy for a in answers} == {0: True, 1: False, 2: False}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_order_and_batches_change_no_answer(batch_size, decoder):
    loaded, _ = decoder
    expected = _score(harness_model.CheckpointLM(loaded), PAIRS)
    order = random.Random(batch_size).sample(range(len(PAIRS)), len(PAIRS))
    lm = harness_model.CheckpointLM(loaded, batch_size=batch_size)
    answers = _score(lm, [PAIRS[i] for i in order])
    for place, index in enumerate(order):
        assert answers[place][0] == pytest.approx(expected[index][0], rel=1e-5)
        assert answers[place][1] == expected[index][1]


def test_windows_score_each_token_once(decoder):
    loaded, model = decoder
    lm = harness_model.CheckpointLM(loaded, max_length=8)
    texts = ["short", "just 8 b", "a text of several windows", ""]
    found = lm.loglikelihood_rolling(_asked("rolling", *[(t,) for t in texts]), disable_tqdm=True)
    for text, log_prob in zip(texts, found, strict=True):
        tokens, total, done = [EOS, *text.encode()], 0.0, 1
        while done < len(tokens):
            # Eight are read at a time, and the last eight where fewer are left.
            end = min(done + 8, len(tokens))
            log_probs_T, _ = _log_probs(model, tokens[max(0, end - 9) : end])
            total += log_probs_T[-(end - done) :].sum()
            done = end
        assert log_prob == pytest.approx(total, rel=1e-5, abs=1e-9), text


def test_an_encoder_reads_the_context(encoder_decoder):
    loaded, model = encoder_decoder
    lm = harness_model.CheckpointLM(loaded, batch_size=2)
    pairs = [("a source", "text"), ("another", "text"), ("", "begins"), ("a source", "texture")]
    for (context, continuation), (log_prob, _) in zip(pairs, _score(lm, pairs), strict=True):
        source = [*context.encode(), EOS] if context else [EOS]
        tokens = [model.config.decoder_start_id, *continuation.encode()]
        wanted = _log_probs(model, tokens, source)[0].sum()
        assert log_prob == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(errors.UserError, match="no probability to a text alone"):
        lm.loglikelihood_rolling(_asked("rolling", ("text",)))


# --- generation -----------------------------------------------------------------------------------


def _write(lm, *requests):
    return lm.generate_until(_asked("generate_until", *requests), disable_tqdm=True)


def _greedy(model, text, num_tokens):
    tokens = list(text.encode())
    for _ in range(num_tokens):
        tokens.append(int(whole_forward.logits(model, tokens)[-1, :257].argmax()))
    return tokens[len(text) :]


def test_texts_are_greedy_up_to_a_stop_string(decoder):
    loaded, model = decoder
    lm = harness_model.CheckpointLM(loaded, batch_size=2)
    tokens = _greedy(model, "go on", 6)
    assert EOS not in tokens
    text = bytes(tokens).decode("utf-8", "replace")
    room = (MAX_LENGTH - 6) * "x"
    cut = bytes(_greedy(model, room, 6)).decode("utf-8", "replace")
    stops = (text[3], text[2:5])
    found = _write(
        lm,
        ("go on", {"max_gen_toks": 6}),
        ("go on", {"max_new_tokens": 6, "until": [stops[0], "absent"], "do_sample": False}),
        ("lost" + room, {"max_gen_toks": 6}),
        ("go on", {"max_gen_toks": 6, "until": stops[1], "temperature": 0.0}),
    )
    before = [text[: text.index(stop)] for stop in stops]
    assert found == [text, before[0], cut, before[1]]
    assert text not in before


def test_repetitions_are_drawn_anew_and_the_same_in_each_run(decoder):
    loaded, _ = decoder
    how = {"max_gen_toks": 6, "do_sample": True, "temperature": 3.0}
    requests = [("go on", how)] * 3
    first = _write(harness_model.CheckpointLM(loaded), *requests)
    assert len(set(first)) == 3
    assert _write(harness_model.CheckpointLM(loaded, batch_size=2), *requests) == first


@pytest.mark.parametrize(
    "how, expected",
    [
        (
            {"max_gen_toks": 4, "num_beam": 3},
            "generation_kwargs: num_beam cannot be followed.*takes",
        ),
        ({}, "max_gen_toks = 256 .* must be 1 to 23"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": 0.0}, "contradict"),
        ({"max_gen_toks": 4, "do_sample": True, "top_p": 2.0}, "top_p=2.0 must be"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(how, expected, decoder):
    with pytest.raises(errors.UserError, match=expected):
        _write(harness_model.CheckpointLM(decoder[0]), ("go on", how))


def test_requests_that_cannot_be_answered_are_refused(decoder):
    lm = harness_model.CheckpointLM(decoder[0])
    with pytest.raises(errors.UserError, match="continuation of 'text' is empty"):
        _score(lm, [("text", "")])
    with pytest.raises(errors.UserError, match="has 25 tokens of its own: .* 1 to 24"):
        _score(lm, [("text", "y" * 25)])
    with pytest.raises(errors.UserError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "text"}])
    with pytest.raises(errors.UserError, match="max_length = 25: the model takes 2 to 24"):
        harness_model.CheckpointLM(decoder[0], max_length=25)


def test_special_tokens_in_texts_are_read_as_such(decoder):
    lm = harness_model.CheckpointLM(decoder[0])
    assert lm.tok_encode("a<eos>b") == [97, EOS, 98]
    assert lm.tok_encode("a<eos") == [*b"a<eos"]


def test_answers_are_kept_as_the_harness_asks(decoder, tmp_path):
    """A second run answers from its cache, so that it must be under the keys that it looks for."""
    kept = {}
    for kind, requests in (
        ("loglikelihood", PAIRS[:3]),
        ("loglikelihood_rolling", [("text",)]),
        ("generate_until", [("go on", {"max_gen_toks": 2})]),
    ):
        lm = harness_model.CheckpointLM(decoder[0])
        caching = model_lib.CachingLM(lm, str(tmp_path / "cache.db"))
        getattr(lm, kind)(_asked(kind, *requests), disable_tqdm=True)
        for request in requests:
            kept[kind] = caching.dbdict[model_lib.hash_args(kind, request)]
    assert [type(v) for v in kept.values()] == [tuple, float, str]


# --- the command ----------------------------------------------------------------------------------

TASK = """
task: which_letter
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a folder of tasks in it."""
    folder = tmp_path_factory.mktemp("run")
    config = helpers.tiny_run_config({"vocab_size": 260})
    mesh, rules = helpers.make_mesh()
    manager = checkpoint.Checkpoints(str(folder), config, {"kind": "bytes"})
    with jax.set_mesh(mesh):
        manager.save(jax.jit(lambda: train_step.init_state(config, rules))())
    manager.close()
    (folder / "tasks").mkdir()
    rows = [{"text": f"letter {n}:", "answer": n % 3} for n in range(5)]
    (folder / "tasks" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = TASK.format(path=folder / "tasks" / "rows.jsonl")
    (folder / "tasks" / "which_letter.yaml").write_text(task)
    return folder


def test_the_command_prints_the_harnesss_table_and_writes_its_results(workdir, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(workdir / "cache"))
    flags = [f"--workdir={workdir}", "--tasks=which_letter", f"--include_path={workdir}/tasks"]
    (code, out, err), (wrong_code, _, wrong) = commands.run(
        "llm_jax.evaluation.harness",
        workdir,
        [[*flags, "--limit=4", "--num_fewshot=1"], [*flags, "--include_path=absent"]],
    )
    assert code == 0, err
    assert "|which_letter|" in out and "|acc" in out
    results = json.loads((workdir / "evaluation" / "0" / harness.FILE).read_text())
    assert results["n-samples"]["which_letter"]["effective"] == 4
    assert results["n-shot"]["which_letter"] == 1
    accuracy = results["results"]["which_letter"]["acc,none"]
    assert math.isclose(accuracy * 4, round(accuracy * 4))
    assert (results["config"]["step"], results["config"]["checkpoint"]) == (0, str(workdir))
    assert (wrong_code, wrong) == (2, "error: --include_path=absent is no folder\n")


@pytest.mark.long  # reads the index of the harness's own tasks, 15 s
def test_unknown_tasks_are_told(workdir):
    with pytest.raises(errors.UserError, match="no such task .did you mean 'which_letter'"):
        harness.run(str(workdir), None, ["which_leter"], str(workdir / "tasks"))


def test_a_run_gives_the_answers_of_its_model(workdir, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workdir / "datasets")
    results = harness.run(str(workdir), None, ["which_letter"], str(workdir / "tasks"))
    lm = harness_model.of_workdir(str(workdir))
    for number, sample in enumerate(results["samples"]["which_letter"]):
        pairs = [(f"letter {number}:", f" {letter}") for letter in "abc"]
        found = [reply[0][0] for reply in sample["resps"]]
        assert found == pytest.approx([own for own, _ in _score(lm, pairs)], rel=1e-5)
