"""Conversations are written by their template, and what the assistant says is learned, nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import chat
from llm_jax.data import objectives
from llm_jax.data import prepare
from llm_jax.data import tokenizer as tokenizer_lib

# As models of Llama's and Qwen's kind have it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] +"
    " '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
# Forgets what was thought once an answer follows, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}A{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>{% endfor %}"
)
TOKENIZER = tokenizer_lib.load("bytes").extended(["<|im_start|>", "<|im_end|>"])
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hé?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why <|im_end|>"},
    {"role": "assistant", "content": "so\n"},
]


def _template(source=CHATML):
    return chat.Template(source, {"eos_token": "", "bos_token": ""})


def _text(ids):
    return TOKENIZER.decode(ids)


def test_answers_are_marked_with_what_ends_them():
    ids, is_answer = chat.encode_conversation(_template(), TOKENIZER, TALK)
    runs = np.split(ids, np.flatnonzero(np.diff(is_answer)) + 1)
    marked = [_text(run) for run in runs[1::2]]
    assert not is_answer[0] and marked == ["yes<|im_end|>", "so\n<|im_end|>"]
    assert _text(ids) == _template().render(TALK)
    # Markers are single tokens, and what is not marked is the rest.
    assert int(TOKENIZER.special_tokens["<|im_end|>"]) in ids
    assert not is_answer[-1]  # the line end that follows is no part of an answer


def test_what_is_read_before_an_answer_is_what_generation_reads():
    ids, is_answer = chat.encode_conversation(_template(), TOKENIZER, TALK)
    asked = chat.encode(TOKENIZER, _template().render(TALK[:4], is_answer_next=True))
    last = np.flatnonzero(is_answer)[-1]
    start = 1 + np.flatnonzero(~is_answer[:last])[-1]
    assert ids[:start].tolist() == asked


def test_ends_of_turns_are_the_special_tokens_of_answers():
    end = TOKENIZER.special_tokens["<|im_end|>"]
    assert chat.end_ids(_template(), TOKENIZER) == {end}
    thinking = CHATML.replace("message['content']", "'<|im_start|>' + message['content']")
    assert chat.end_ids(_template(thinking), TOKENIZER) == {end}
    plain = chat.Template(chat.PLAIN, {"eos_token": ""})
    assert chat.end_ids(plain, TOKENIZER) == frozenset()


def test_a_template_that_rewrites_answers_is_refused():
    with pytest.raises(errors.UserError, match="message 3 otherwise"):
        chat.encode_conversation(_template(FORGETFUL), TOKENIZER, TALK)
    chat.encode_conversation(_template(FORGETFUL), TOKENIZER, TALK[:3])


@pytest.mark.parametrize(
    ("source", "message"),
    [("{{ raise_exception('no tools') }}", "no tools"), ("{% for %}", "template fails")],
)
def test_a_template_may_refuse_or_be_broken(source, message):
    with pytest.raises(errors.UserError, match=message):
        _template(source).render(TALK)


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}]],
)
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(errors.UserError, match="here: a conversation is a list"):
        chat.check(messages, "here")


def test_files_of_a_converted_model_name_their_template():
    settings = {
        "chat_template": [
            {"name": "default", "template": "d"},
            {"name": "tool_use", "template": "t"},
        ],
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    files = {"tokenizer_config.json": {"text": json.dumps(settings)}}
    assert chat.of_files(files).source == "d" and chat.of_files(files, "tool_use").source == "t"
    assert chat.of_files(files).tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert chat.of_files(files | {"chat_template.jinja": {"text": "f"}}).source == "f"
    assert chat.of_files({}) is None


# --- rows ------------------------------------------------------------------------------------------


def _config(folder, rows, objective, **data):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config_lib.RunConfig(
        model=config_lib.ModelConfig(vocab_size=264, max_length=256),
        data=config_lib.DataConfig(
            source=f"jsonl:{path}",
            eval_source=f"jsonl:{path}",
            chat_template="plain",
            cache_dir=str(folder / "cache"),
            **{"batch_size": 2, "sequence_length": 128} | data,
        ),
        objective=config_lib.ObjectiveConfig(name=objective),
        tune=config_lib.TuneConfig(start="somewhere"),
    )


def _batch(config):
    prepared = prepare.prepare(config)
    stage = objectives.make(config, prepared.train, prepared.tokenizer)
    items = np.arange(stage.num_items)
    return stage(items, items, objectives.Draws(0)), prepared.tokenizer


def _learned(batch, tokenizer, row, segment=None):
    counts = batch.weights[row] > 0
    if segment is not None:
        counts &= batch.segments[row] == segment
    return tokenizer.decode(batch.targets[row][counts])


def test_rows_of_conversations_learn_answers_alone(tmp_path):
    rows = [{"messages": TALK[1:3]}, {"messages": TALK}]
    batch, tokenizer = _batch(_config(tmp_path, rows, "chat", input_fields="messages"))
    assert len(batch.tokens) == 1  # both share a row
    eos = tokenizer.decode([tokenizer.eos_id])
    assert _learned(batch, tokenizer, 0, 1).replace(eos, "|") == " yes|"
    assert _learned(batch, tokenizer, 0, 2).replace(eos, "|") == " yes| so\n|"
    follows = batch.segments[0][1:] == batch.segments[0][:-1]
    assert np.all(follows[batch.weights[0][:-1] > 0])


def test_a_conversation_that_is_too_long_loses_its_end(tmp_path, caplog):
    config = _config(tmp_path, [{"messages": TALK}], "chat", input_fields="messages")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=40))
    batch, tokenizer = _batch(config)
    text = chat.of_config(config.data, tokenizer).render(TALK)
    assert tokenizer.decode(batch.tokens[0]) == text.encode()[:40].decode()
    assert "1 of the 1 examples" in caplog.text


def test_rows_of_preferences_hold_both_answers(tmp_path):
    rows = [
        {"q": TALK[:4], "good": "better", "bad": "b"},
        {"q": "a text", "good": " one", "bad": " two"},
    ]
    fields = {"input_fields": "q", "target_field": "good,bad", "packing": "none"}
    batch, tokenizer = _batch(_config(tmp_path, rows, "preference", **fields))
    eos = tokenizer.decode([tokenizer.eos_id])
    said = [[_learned(batch, tokenizer, row, part) for part in (1, 2)] for row in (0, 1)]
    assert said == [[f" better{eos}", f" b{eos}"], [f" one{eos}", f" two{eos}"]]
    # Both are asked the same.
    asked = [batch.tokens[1][batch.segments[1] == part][:6].tolist() for part in (1, 2)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x", "good": "a", "bad": "a"}, "neither is better"),
        ({"q": "x", "good": "a", "bad": 3}, "'bad' is 3, not a text"),
        ({"q": 3, "good": "a", "bad": "b"}, "a conversation is a list"),
    ],
)
def test_what_is_no_preference_is_refused(row, message, tmp_path):
    fields = {"input_fields": "q", "target_field": "good,bad", "packing": "none"}
    with pytest.raises(errors.UserError, match=f"rows.jsonl:1: .*{message}"):
        _batch(_config(tmp_path, [row], "preference", **fields))


def test_a_tokenizer_without_a_template_is_told(tmp_path):
    config = _config(tmp_path, [{"messages": TALK}], "chat", input_fields="messages")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=""))
    with pytest.raises(errors.UserError, match="'bytes' has no chat template"):
        _batch(config)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, chat_template="plane")
    )
    with pytest.raises(errors.UserError, match="did you mean 'plain'"):
        _batch(config)
