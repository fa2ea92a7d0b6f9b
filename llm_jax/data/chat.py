"""Conversations as text and tokens, by the Jinja templates that tokenizers ship.

A template is what `tokenizer_config.json` or `chat_template.jinja` of a model has; checkpoints keep it. What is
rendered has special tokens by their names (`<|im_start|>`), which are read as such here and nowhere else.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jinja2
from jinja2 import sandbox
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import tokenizer as tokenizer_lib

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = "assistant"  # the role whose messages are learned and written

_SETTINGS, _FILE = "tokenizer_config.json", "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")  # that templates may ask for

# For tokenizers without markers of turns. An answer ends as a document does.
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_BUILT_IN = {"plain": PLAIN}

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
      source: Jinja.
      tokens: special tokens that it may name, such as `bos_token`.
    """

    source: str
    tokens: Mapping[str, str]

    def render(self, messages: Messages, *, is_answer_next: bool = False) -> str:
        """Returns a conversation as text; with `is_answer_next` up to where the assistant writes.

        Raises:
          errors.UserError: the template is broken, or refuses the conversation.
        """
        try:
            return _compiled(self.source).render(
                messages=list(messages), add_generation_prompt=is_answer_next, **self.tokens
            )
        except jinja2.TemplateError as error:
            raise errors.UserError(f"the chat template fails: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns what checkpoints keep."""
        return {"source": self.source, "tokens": dict(self.tokens)}


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns Jinja as `transformers` sets it up for templates of conversations."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise errors.UserError(f"the chat template refuses the conversation: {message}")

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


# --- where templates come from ---------------------------------------------------------------------


def of_files(files: Mapping[str, Mapping[str, str]], name: str | None = None) -> Template | None:
    """Returns the template among the files of a converted model, as its checkpoint keeps them.

    Args:
      files: `{"text": ...}` by their names.
      name: of one of several; None: that of conversations.
    """
    settings = _settings(files)
    found = files[_FILE]["text"] if _FILE in files else settings.get("chat_template")
    if isinstance(found, list):  # of several, as older files have them
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get(name or "default")
    if not isinstance(found, str):
        return None
    return Template(found, named_tokens(files))


def named_tokens(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns special tokens by what the files of a converted model call them, such as `bos_token`."""
    settings = _settings(files)
    found = {key: settings[key] for key in _NAMES if settings.get(key) is not None}
    return {k: v["content"] if isinstance(v, dict) else v for k, v in found.items()}


def _settings(files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    return json.loads(files[_SETTINGS]["text"]) if _SETTINGS in files else {}


def of_checkpoint(meta: Any) -> Template | None:
    """Returns the template that a checkpoint has: its own, or that of the model it was converted from."""
    if meta.chat is not None:
        return Template(**meta.chat)
    return of_files(meta.source["files"]) if meta.source and "files" in meta.source else None


def of_config(data: config_lib.DataConfig, tokenizer: tokenizer_lib.Tokenizer) -> Template | None:
    """Returns the template of a run: `data.chat_template`, or where that is "" the one its tokenizer's workdir has.

    Raises:
      errors.UserError: there is no such file.
    """
    spec = data.chat_template
    kind, _, workdir = data.tokenizer.partition(":")
    if not spec:
        if kind != "workdir":
            return None
        from llm_jax import checkpoint  # it stands on the models, of which most data know nothing

        return checkpoint.read_latest(workdir, None, lambda _, meta: of_checkpoint(meta))
    eos = {i: name for name, i in tokenizer.special_tokens.items()}.get(tokenizer.eos_id, "")
    if spec in _BUILT_IN:
        return Template(_BUILT_IN[spec], {"eos_token": eos})
    path = pathlib.Path(spec).expanduser()
    if not path.is_file():
        hint = errors.nearest(spec, _BUILT_IN)
        raise errors.UserError(
            f"data.chat_template = {spec!r} is no file{hint}: name one of Jinja, {', '.join(_BUILT_IN)},"
            " or nothing for that of data.tokenizer=workdir:PATH"
        )
    bos = {i: name for name, i in tokenizer.special_tokens.items()}.get(tokenizer.bos_id, "")
    return Template(path.read_text(encoding="utf-8"), {"eos_token": eos, "bos_token": bos})


# --- conversations as tokens -----------------------------------------------------------------------


def check(messages: Any, place: str) -> Messages:
    """Returns a conversation; raises UserError, with its place, for what is none."""
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) and one.get("role") in ROLES
        for one in messages
    ):
        raise errors.UserError(
            f"{place}: a conversation is a list of messages, each an object with `role` (one of"
            f" {', '.join(ROLES)}) and `content`, a text; not {str(messages)[:80]!r}"
        )
    return messages


def encode(tokenizer: tokenizer_lib.Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text whose special tokens are read as such."""
    ids: list[int] = []
    special = tokenizer.special_tokens
    pattern = _pattern(tuple(sorted(filter(None, special), key=len, reverse=True)))
    for number, piece in enumerate(pattern.split(text) if pattern else [text]):
        if number % 2:  # what the pattern has found
            ids.append(special[piece])
        elif piece:
            ids.extend(tokenizer.encode(piece).tolist())
    return ids


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None


def encode_conversation(
    template: Template, tokenizer: tokenizer_lib.Tokenizer, messages: Messages
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a conversation, int32 [T], and which are of answers, bool [T].

    An answer is what the assistant writes, with what ends its turn. Each is tokenised by itself, as what a model
    reads and writes in generation is.

    Raises:
      errors.UserError: the template writes messages otherwise once others follow them, so that what the model
        would have seen before its answer is not what it is trained on.
    """
    whole = template.render(messages)
    pieces, start = [], 0
    for index, message in enumerate(messages):
        if message["role"] != ANSWERS:
            continue
        before = template.render(messages[:index], is_answer_next=True)
        after = template.render(messages[: index + 1])
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= start):
            raise errors.UserError(
                f"the chat template writes message {index + 1} otherwise once it is answered or others"
                " follow: train on conversations whose last message alone is the assistant's, or with"
                " another data.chat_template"
            )
        end = _end_of_turn(tokenizer, after, len(before))
        pieces += [(whole[start : len(before)], False), (whole[len(before) : end], True)]
        start = end
    pieces.append((whole[start:], False))
    encoded = [(encode(tokenizer, text), is_answer) for text, is_answer in pieces]
    ids = np.array([token for own, _ in encoded for token in own], np.int32)
    return ids, np.array([is_answer for own, is_answer in encoded for _ in own], bool)


def _end_of_turn(tokenizer: tokenizer_lib.Tokenizer, text: str, start: int) -> int:
    """Returns where an answer ends: white space behind its last special token is nothing that a model writes."""
    bare = text.rstrip()
    is_marked = any(name and bare.endswith(name) for name in tokenizer.special_tokens)
    return len(bare) if is_marked and len(bare) > start else len(text)


def end_ids(template: Template, tokenizer: tokenizer_lib.Tokenizer) -> frozenset[int]:
    """Returns the special tokens that end an assistant's turn, beside the end of a text."""
    asked = [{"role": "user", "content": "x"}]
    answered = [*asked, {"role": ANSWERS, "content": "y"}]
    ids, is_answer = encode_conversation(template, tokenizer, answered)
    # What else is special in an answer, such as where thinking begins, ends nothing.
    last = int(ids[is_answer][-1])
    return frozenset({last} & set(tokenizer.special_tokens.values()))
