"""Talks with a model in the terminal: `python -m llm_jax.sampling.chat --workdir=RUN`.

    --system='You answer in one line.'    what comes before the conversation
    --temperature=0.7 --top_p=0.9         as of `llm_jax.sampling`; 0 is greedy
    --max_tokens=256                      of an answer

Each line is a message; `/new` begins anew, `/quit` or the end of input ends. The conversation is written as the
checkpoint's chat template has it; where it outgrows the model its oldest messages are left out, and a line says so.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import logging
import sys

from absl import flags

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import errors
from llm_jax.data import chat as chat_lib
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers

_NEW, _QUIT = "/new", "/quit"


class Conversation:
    """Messages so far, and what the model answers to the next one.

    Args:
      loaded: the model.
      template: how it is spoken to.
      params: how tokens are chosen.
      system: the first message; None for none.
      max_tokens: of an answer.
      seed: of what is drawn; each answer has its own.

    Raises:
      errors.UserError: an answer has no room in the model.
    """

    def __init__(
        self,
        loaded: load.Loaded,
        template: chat_lib.Template,
        *,
        params: samplers.SamplingParams,
        system: str | None = None,
        max_tokens: int = 256,
        seed: int = 0,
    ):
        self._loaded, self._template = loaded, template
        self._params, self._max_tokens, self._seed = params, max_tokens, seed
        self._ends = chat_lib.end_ids(template, loaded.tokenizer)
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._room = loaded.model.config.max_length - max_tokens
        if self._room < 1:
            raise errors.UserError(
                f"--max_tokens={max_tokens} leaves no room for a conversation in the model's max_length ="
                f" {loaded.model.config.max_length}"
            )
        self.messages: list[dict[str, str]] = []
        self.num_left_out = 0

    def clear(self) -> None:
        """Forgets all messages but the system's."""
        self.messages, self.num_left_out = [], 0

    def answer(self, text: str, on_text: generate.OnText | None = None) -> str:
        """Returns what the model answers to a message; both join the conversation.

        Raises:
          errors.UserError: the message alone leaves no room for an answer.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids(text)
        except errors.UserError:
            self.messages.pop()  # as if it had not been said
            raise
        prompt = generate.Prompt(text, self._seed + len(self.messages), tuple(ids), self._ends)
        (completion,) = generate.generate(
            self._loaded, [prompt], self._params, max_tokens=self._max_tokens, on_text=on_text
        )
        said = completion.completion.strip()
        self.messages.append({"role": chat_lib.ANSWERS, "content": said})
        return said

    def _fitting_ids(self, text: str) -> list[int]:
        """Returns the tokens of the conversation; its oldest messages go until it has room."""
        while True:
            whole = [*self._first, *self.messages]
            ids = chat_lib.encode(
                self._loaded.tokenizer, self._template.render(whole, is_answer_next=True)
            )
            if len(ids) <= self._room:
                return ids
            if len(self.messages) < 3:
                raise errors.UserError(
                    f"message {text[:40]!r} makes {len(ids)} tokens, and there is room for {self._room}:"
                    " shorten it, or lower --max_tokens"
                )
            del self.messages[:2]  # a message and its answer
            self.num_left_out += 2


def load_template(workdir: str, step: int) -> chat_lib.Template:
    """Returns how the model of a checkpoint is spoken to; raises UserError where it does not say."""
    template = checkpoint.read_latest(workdir, step, lambda _, meta: chat_lib.of_checkpoint(meta))
    if template is None:
        raise errors.UserError(
            f"--workdir={workdir} has no chat template: talk with a model that was converted with one, or"
            " trained with objective.name=chat; llm_jax.sampling continues texts"
        )
    return template


def talk(conversation: Conversation, lines: Iterable[str], is_terminal: bool) -> None:
    """Answers lines, one after the other, on the terminal."""
    for text in _messages(conversation, lines, is_terminal):
        before = conversation.num_left_out
        try:
            conversation.answer(text, on_text=lambda piece: print(piece, end="", flush=True))
        except errors.UserError as error:  # of this message: the conversation goes on
            print(f"error: {error}", file=sys.stderr)
            continue
        print(flush=True)
        count = conversation.num_left_out - before
        if count:
            print(f"[the first {count} messages are left out from here on]", file=sys.stderr)


def _messages(conversation: Conversation, lines: Iterable[str], is_terminal: bool) -> Iterator[str]:
    lines = iter(lines)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = next(lines, None)
        if line is None or line.strip() == _QUIT:
            return
        if line.strip() == _NEW:
            conversation.clear()
        elif line.strip():
            yield line.strip()


def define_flags() -> None:
    command.define_workdir("Folder of the run, or of a converted model, to talk with.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_string("system", None, "Message that comes before the conversation.")
    flags.DEFINE_integer("max_tokens", 256, "Tokens of an answer at most.", 1)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", 0)
    flags.DEFINE_integer("tensor", 1, "Devices that share one copy of the weights.")
    for field in dataclasses.fields(samplers.SamplingParams):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
        define(field.name, field.default, f"See {samplers.__name__}.SamplingParams.")


def main() -> None:
    given, workdir = flags.FLAGS, command.required("workdir")
    # How attention runs is no part of a conversation.
    logging.getLogger("llm_jax").setLevel(logging.WARNING)
    names = [field.name for field in dataclasses.fields(samplers.SamplingParams)]
    params = samplers.SamplingParams(**{name: getattr(given, name) for name in names})
    loaded = load.load(workdir, checkpoint.parse_step(given.step), given.tensor)
    if loaded.reads_sources:
        raise errors.UserError(f"--workdir={workdir} writes texts for texts: it does not talk")
    conversation = Conversation(
        loaded,
        load_template(workdir, loaded.step),
        system=given.system,
        params=params,
        max_tokens=given.max_tokens,
        seed=given.seed,
    )
    talk(conversation, sys.stdin, sys.stdin.isatty())


if __name__ == "__main__":
    command.run(main, define_flags)
