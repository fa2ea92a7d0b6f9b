"""Conversations and preferences to columns of numbers; see `examples` for other objectives.

chat         a list of messages                                input_0: its tokens; target: 1 for those of answers
preference   a list of messages, or a text, and two answers    input_0: what is asked; input_1, target: the answers
"""

from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import chat
from llm_jax.data import tokenizer as tokenizer_lib


def columns(
    config: config_lib.RunConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    template: chat.Template | None,
    records: Iterable[tuple[str, dict[str, Any]]],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of each record.

    Args:
      config: of `objective.name` chat or preference.
      tokenizer: of texts.
      template: of conversations; None where there is none.
      records: where each is, for messages, and its fields.

    Raises:
      errors.UserError: an example that will not do, or a conversation without a template.
    """
    is_chat = config.objective.name == "chat"
    for place, record in records:
        try:
            if is_chat:
                yield _conversation(config, tokenizer, template, record, place)
            else:
                yield _preference(config, tokenizer, template, record, place)
        except errors.UserError as error:
            is_told = str(error).startswith(place)
            raise error if is_told else errors.UserError(f"{place}: {error}") from error


def _needed(template: chat.Template | None, data: config_lib.DataConfig) -> chat.Template:
    if template is None:
        raise errors.UserError(
            f"data.tokenizer = {data.tokenizer!r} has no chat template: start from a model that has one"
            " (tokenizer=workdir:PATH), or set data.chat_template to a file of Jinja, or to 'plain'"
        )
    return template


def _conversation(
    config: config_lib.RunConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    template: chat.Template | None,
    record: dict[str, Any],
    place: str,
) -> dict[str, np.ndarray]:
    messages = chat.check(record[config.data.input_fields.strip()], place)
    template = _needed(template, config.data)
    ids, is_answer = chat.encode_conversation(template, tokenizer, messages)
    if not is_answer.any():
        raise errors.UserError(f"{place}: no message is the {chat.ANSWERS}'s: nothing to learn")
    return {"input_0": ids, "target": is_answer}


def _preference(
    config: config_lib.RunConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    template: chat.Template | None,
    record: dict[str, Any],
    place: str,
) -> dict[str, np.ndarray]:
    asked = record[config.data.input_fields.strip()]
    fields = [field.strip() for field in config.data.target_field.split(",")]
    answers = [record[field] for field in fields]
    for field, answer in zip(fields, answers, strict=True):
        if not isinstance(answer, str):
            raise errors.UserError(f"{place}: {field!r} is {answer!r}, not a text")
    if answers[0] == answers[1]:
        raise errors.UserError(f"{place}: both answers are {answers[0][:40]!r}: neither is better")
    if isinstance(asked, str):
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        eos = [tokenizer.eos_id]
        both = [np.array([*tokenizer.encode(answer), *eos], np.int32) for answer in answers]
        before = np.array([*bos, *tokenizer.encode(asked)], np.int32)
        return {"input_0": before, "input_1": both[0], "target": both[1]}
    messages, template = chat.check(asked, place), _needed(template, config.data)
    both = []
    for answer in answers:
        whole = [*messages, {"role": chat.ANSWERS, "content": answer}]
        ids, is_answer = chat.encode_conversation(template, tokenizer, whole)
        # The last answer: those before it are given, too.
        last = int(np.flatnonzero(is_answer)[-1])
        start = 1 + int(np.flatnonzero(~is_answer[:last])[-1])
        both.append((ids[:start], ids[start : last + 1]))
    (before, chosen), (_, rejected) = both
    return {"input_0": before, "input_1": chosen, "target": rejected}
