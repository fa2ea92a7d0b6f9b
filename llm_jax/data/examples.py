"""Examples to columns of numbers: texts to tokens, targets to tokens, labels, numbers or places.

    objective   data.target_field                                     column `target`
    seq2seq     text                                                  its tokens
    contrastive text                                                  its tokens
    sequence    a label (string, or a number from 0), or a number     its number, or the number
    token       a label for each word of a list                       of each token; -1 but for first ones
    span        {"text": ..., "answer_start": ...} as SQuAD has it    first and last token; none: -1, -1
    chat, preference                                                  see `conversations`

Several answers are a list in both fields, of which the first counts; an empty one is no answer.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import math
from typing import Any

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import patterns
from llm_jax.data import chat
from llm_jax.data import conversations
from llm_jax.data import preprocessing
from llm_jax.data import sources
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib

# Examples that are tokenised at a time, for the sake of the library's threads.
_CHUNK = 1024

NO_LABEL = -1

_WITH_TEXT = ("seq2seq", "contrastive")  # objectives whose target is a text

Records = Iterable[tuple[str, dict[str, Any]]]


def input_fields(data_config: config_lib.DataConfig) -> list[str]:
    """Returns the names of the fields of texts, one or two."""
    return [field.strip() for field in data_config.input_fields.split(",")]


def fields_of(config: config_lib.RunConfig) -> list[str]:
    """Returns the names of all fields that an example has, of inputs first."""
    data = config.data
    if config.objective.name == "chat":  # targets are among its messages
        return input_fields(data)
    targets = [field.strip() for field in data.target_field.split(",")]
    return [*input_fields(data), *targets]


def is_regression(config: config_lib.RunConfig) -> bool:
    """Returns whether targets are numbers instead of labels."""
    return config.objective.name == "sequence" and config.model.num_labels == 1


def texts(data_config: config_lib.DataConfig, split: str) -> Iterator[str]:
    """Yields all texts of the examples of a split, for a tokenizer to be trained on."""
    fields = [*input_fields(data_config), data_config.target_field]
    for _, record in sources.records(data_config, split, fields):
        for value in record.values():
            words = value if isinstance(value, list) else [value]
            if words and all(isinstance(word, str) for word in words):
                yield " ".join(words)  # as they are tokenised


def dtypes(config: config_lib.RunConfig, vocab_size: int) -> dict[str, str]:
    """Returns the type of each column."""
    tokens = token_cache.smallest_dtype(vocab_size).name
    name = config.objective.name
    count = 2 if name == "preference" else len(input_fields(config.data))
    target = tokens if name in (*_WITH_TEXT, "preference") else "int32"
    if name == "chat":
        target = "uint8"
    return {f"input_{i}": tokens for i in range(count)} | {
        "target": "float32" if is_regression(config) else target
    }


def label_names(config: config_lib.RunConfig) -> list[str] | None:
    """Returns the names of labels by their number, as the training split or TFDS has them.

    Strings are numbered in their alphabetical order. None where targets are no labels.

    Raises:
      errors.UserError: values that are no labels.
    """
    data = config.data
    if config.objective.name not in ("sequence", "token") or is_regression(config):
        return None
    names = None
    kind, _, rest = data.source.partition(":")
    if kind == "tfds":
        from llm_jax.data import tfds_source  # imports TensorFlow

        names = tfds_source.label_names(rest, data.cache_dir, data.target_field)
    if names is None:
        names = _names_of_values(config)
    return names


def _names_of_values(config: config_lib.RunConfig) -> list[str]:
    field = config.data.target_field
    values: set[str | int] = set()
    for place, record in sources.records(config.data, config.data.train_split, [field]):
        found = record[field]
        new = _list(found, place, field) if config.objective.name == "token" else [found]
        if not all(isinstance(value, (str, int)) for value in new):
            raise errors.UserError(f"{place}: {field!r} = {found!r} is no label")
        values.update(new)
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if any(isinstance(value, str) for value in values) or min(values) < 0:
        raise errors.UserError(
            f"data.target_field = {field!r}: labels are strings, or numbers from 0 on; found"
            f" {', '.join(map(repr, sorted(values, key=str)[:5]))} and so on"
        )
    return [str(value) for value in range(int(max(values)) + 1)]


def _list(value: Any, place: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise errors.UserError(f"{place}: {field!r} is a {type(value).__name__}, not a list")
    return value


def columns(
    config: config_lib.RunConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    labels: Sequence[str] | None,
    split: str,
    template: chat.Template | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of each example of a split.

    Args:
      config: source, fields and objective.
      tokenizer: of texts; no special tokens are added.
      labels: from `label_names`.
      split: which.
      template: of conversations, where examples are such.

    Raises:
      errors.UserError: an example that will not do; says which and why.
    """
    name, fields = config.objective.name, fields_of(config)
    records = sources.records(config.data, split, fields)
    if name in config_lib.CHAT_OBJECTIVES:
        yield from conversations.columns(config, tokenizer, template, records)
        return
    inputs, target = fields[:-1], fields[-1]
    stages = patterns.split(config.data.preprocessing)
    if stages:
        records = _preprocessed(records, inputs, preprocessing.make(stages, config.data.language))
    if name in (*_WITH_TEXT, "sequence"):
        texts = [*inputs, target] if name in _WITH_TEXT else inputs
        for chunk in _chunks(records):
            encoded = [_encoded(tokenizer, chunk, field) for field in texts]
            for index, (place, record) in enumerate(chunk):
                example = {f"input_{i}": encoded[i][index] for i in range(len(inputs))}
                if name in _WITH_TEXT:
                    example["target"] = encoded[-1][index]
                else:
                    example["target"] = _sequence_target(config, record[target], labels, place)
                yield example
        return
    for place, record in records:
        if name == "token":
            yield _labelled_tokens(tokenizer, record[inputs[0]], record[target], labels, place)
        else:
            texts = [_text(record[field], place, field) for field in inputs]
            yield _answered(tokenizer, *texts, record[target], place)


def _preprocessed(
    records: Records, fields: Sequence[str], change: preprocessing.Stage
) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, record in records:
        changed = {field: change(_text(record[field], place, field)) for field in fields}
        yield place, record | changed


def _chunks(records: Records) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise errors.UserError(f"{place}: {field!r} is a {type(value).__name__}, not a string")
    return value


def _encoded(
    tokenizer: tokenizer_lib.Tokenizer, chunk: list[tuple[str, dict[str, Any]]], field: str
) -> list[np.ndarray]:
    texts = [_text(record[field], place, field) for place, record in chunk]
    try:
        return tokenizer.encode_batch(texts)
    except errors.UserError:
        for (place, _), text in zip(chunk, texts, strict=True):  # to name the one that is refused
            _with_places(tokenizer, text, place)
        raise


def _with_places(
    tokenizer: tokenizer_lib.Tokenizer, text: str, place: str
) -> tuple[np.ndarray, np.ndarray]:
    try:
        return tokenizer.encode_with_places(text)
    except errors.UserError as error:
        raise errors.UserError(f"{place}: {error}") from error


def _sequence_target(
    config: config_lib.RunConfig, value: Any, labels: Sequence[str] | None, place: str
) -> np.ndarray:
    if labels is not None:
        return np.array([_label(value, labels, place)], np.int32)
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_number:
        raise errors.UserError(
            f"{place}: {config.data.target_field!r} = {value!r} is no number, which model.num_labels = 1"
            " (regression) takes"
        )
    return np.array([value], np.float32)


def _label(value: Any, labels: Sequence[str], place: str) -> int:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and 0 <= value < len(labels):
        return int(value)
    hint = errors.nearest(value, labels) if isinstance(value, str) else ""
    raise errors.UserError(
        f"{place}: {value!r} is none of the {len(labels)} labels of the training split{hint}"
    )


def _labelled_tokens(
    tokenizer: tokenizer_lib.Tokenizer,
    words: Any,
    word_labels: Any,
    labels: Sequence[str],
    place: str,
) -> dict[str, np.ndarray]:
    """Returns the tokens of words with a space between, and the label of each word's first token."""
    words = [_text(word, place, "word") for word in _list(words, place, "words")]
    numbers = [_label(value, labels, place) for value in _list(word_labels, place, "labels")]
    if len(words) != len(numbers):
        raise errors.UserError(f"{place} has {len(words)} words and {len(numbers)} labels")
    text = " ".join(words)
    ids, places = _with_places(tokenizer, text, place)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    target = np.full(len(ids), NO_LABEL, np.int32)
    seen = -1
    for token, (start, end) in enumerate(places.tolist()):
        # A token may begin with the space before its word.
        while start < end and text[start] == " ":
            start += 1
        word = int(np.searchsorted(starts, start, side="right")) - 1
        if start < end and word > seen:
            target[token], seen = numbers[word], word
    return {"input_0": ids, "target": target}


def _answered(
    tokenizer: tokenizer_lib.Tokenizer, question: str, context: str, answer: Any, place: str
) -> dict[str, np.ndarray]:
    """Returns the tokens of both texts, and the first and the last of the answer in the context."""
    ids, places = _with_places(tokenizer, context, place)
    question_ids, _ = _with_places(tokenizer, question, place)
    example = {"input_0": question_ids, "input_1": ids}
    found = _first_answer(answer, place)
    if found is None:
        return example | {"target": np.array([NO_LABEL, NO_LABEL], np.int32)}
    text, start = found
    end = start + len(text)
    if not text or context[start:end] != text:
        raise errors.UserError(
            f"{place}: the answer {text!r} is not at character {start} of the context, where"
            f" {context[start:end]!r} is"
        )
    tokens = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < end))
    if not len(tokens):
        raise errors.UserError(f"{place}: the answer {text!r} has no token")
    return example | {"target": tokens[[0, -1]].astype(np.int32)}


def _first_answer(answer: Any, place: str) -> tuple[str, int] | None:
    if answer is None:
        return None
    if not (isinstance(answer, dict) and {"text", "answer_start"} <= answer.keys()):
        raise errors.UserError(
            f"{place}: an answer is an object with text and answer_start, or null, not {answer!r}"
        )
    texts, starts = answer["text"], answer["answer_start"]
    if isinstance(texts, list) and isinstance(starts, list):
        if not texts and not starts:
            return None
        if len(texts) != len(starts):
            raise errors.UserError(f"{place} has {len(texts)} answers and {len(starts)} places")
        texts, starts = texts[0], starts[0]
    if not (isinstance(texts, str) and isinstance(starts, int) and starts >= 0):
        raise errors.UserError(f"{place}: {answer!r} is no answer: its text and where it starts")
    return texts, starts
