"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, beside its `hf` backend.

Requests are tokenised, cut and scored as that backend (lm-eval 0.4.13, `models/huggingface.py`) does it, so that
numbers can be compared with those of other codebases. In particular texts are read with their special tokens:
`</s>` in a prompt is the end of a text, where everywhere else here it is four characters.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
from typing import Any

from lm_eval import utils
from lm_eval.api import instance
from lm_eval.api import model as model_lib
from lm_eval.models import utils as models_utils
import tqdm

from llm_jax import checkpoint
from llm_jax import errors
from llm_jax.data import chat
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.evaluation import scoring
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers

_MAX_NEW_TOKENS = 256  # of a task that does not say, as the harness has it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GENERATION = ("until", "max_gen_toks", "do_sample", *_SAMPLING)
_OPEN = "<|the message goes on here|> "  # marks the end of one that is left open


class CheckpointLM(model_lib.TemplateLM):
    """Answers the harness's requests by a decoder or an encoder-decoder.

    An encoder reads contexts, and its decoder scores or writes what follows; such a model has no probability of a
    text alone, and refuses `loglikelihood_rolling`.
    """

    def __init__(
        self,
        loaded: load.Loaded,
        files: Mapping[str, Mapping[str, str]] | None = None,
        template: chat.Template | None = None,
        *,
        name: str = "llm_jax",
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        """Wraps a model.

        Args:
          loaded: from `load.load`.
          files: of a converted model, as its checkpoint keeps them: special tokens and templates are read.
          template: of conversations, where files have none.
          name: of the checkpoint, for results.
          batch_size: rows that are read or written side by side.
          max_length: tokens that the model reads at most; None: as many as it has positions.

        Raises:
          errors.UserError: sizes that make no sense.
        """
        super().__init__()
        most = loaded.model.config.max_length
        if max_length is not None and not 2 <= max_length <= most:
            raise errors.UserError(f"max_length = {max_length}: the model takes 2 to {most} tokens")
        if batch_size < 1:
            raise errors.UserError(f"--batch_size={batch_size} must be at least 1")
        self.loaded = loaded
        self.batch_size = batch_size
        self.max_length = max_length or most
        self.backend = "seq2seq" if loaded.is_encoder_decoder else "causal"
        self._files, self._template = dict(files or {}), template
        self._name = name

    # --- what the harness asks of a model ----------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @functools.cached_property
    def prefix_token_id(self) -> int:
        """The id before a text without context: bos, where the model's files name one, else eos."""
        if self._tokenizer.bos_id is not None:
            return self._tokenizer.bos_id
        name = chat.named_tokens(self._files).get("bos_token")
        return self._tokenizer.special_tokens.get(name, self.eot_token_id)

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are generated at most where a task does not say."""
        return _MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, by which the harness caches requests."""
        return f"llm_jax-{self._tokenizer.kind}-{self._tokenizer.fingerprint()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness's results say of the model."""
        return {
            "checkpoint": self._name,
            "step": self.loaded.step,
            "model_dtype": self.loaded.model.config.dtype,
            "max_length": self.max_length,
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the Jinja template of a conversation; None if none is asked for.

        Raises:
          errors.UserError: the checkpoint has none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        found = self._chat(None if chat_template is True else chat_template)
        if found is None:
            raise errors.UserError(
                f"{self._name} has no chat template {'' if chat_template is True else chat_template!r}:"
                " only models converted with one take conversations; evaluate without"
            )
        return found.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as the text that the model reads; see `chat_template`.

        Without `add_generation_prompt` the last message is left open, for the model to go on with.
        """
        history = list(chat_history)
        if not add_generation_prompt:
            history[-1] = history[-1] | {"content": history[-1]["content"] + _OPEN}
        self.chat_template(True)  # raises where there is none
        text = self._chat().render(history, is_answer_next=add_generation_prompt)
        if add_generation_prompt:
            return text
        before, _, after = text.rpartition(_OPEN.strip())
        # A template that strips messages has stripped this one's end as well.
        return before if after.startswith(" ") else before.rstrip()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, with what every text begins or ends with unless told not to."""
        del kwargs
        ids = chat.encode(self._tokenizer, string)
        if max(ids, default=0) >= self.loaded.model.config.vocab_size:
            raise errors.UserError(
                f"text {string[:40]!r} has token {max(ids)}, of which the model's vocabulary of"
                f" {self.loaded.model.config.vocab_size} knows nothing: the tokenizer is not the model's"
            )
        if add_special_tokens is False:
            return ids
        if self.backend == "seq2seq":
            return [*ids, self.eot_token_id]
        bos_id = self._tokenizer.bos_id
        # A conversation may have been given it already.
        return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def loglikelihood(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns of each (context, continuation) its log-probability (nats), and whether greedy
        generation would write it.

        Raises:
          errors.UserError: a continuation of no tokens, or of more than the model reads.
        """
        for request in requests:
            if not request.args[1]:
                raise errors.UserError(
                    f"task {request.task_name}: the continuation of {request.args[0][-40:]!r} is empty"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability (nats) of each text, read in windows that score each token once.

        Raises:
          errors.UserError: the model has an encoder.
        """
        if self.backend == "seq2seq":
            raise errors.UserError(
                f"{self._name} is an encoder_decoder, which gives no probability to a text alone"
                " (loglikelihood_rolling): evaluate a decoder, or tasks with contexts"
            )
        windows, of_request = [], []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                of_request.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_probability, _) in zip(of_request, found, strict=True):
            totals[number] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns what each (context, settings) is continued with, up to a stop string.

        Settings are `until`, `max_gen_toks` or its other names, `do_sample`, `temperature`, `top_k`, `top_p`,
        `min_p` and `repetition_penalty`, with the meaning that they have in `transformers`. Each repetition of
        a request draws anew, and the same in every run.

        Raises:
          errors.UserError: other settings, or more tokens than the model has room for.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        progress = tqdm.tqdm(total=len(requests), desc="Generating", disable=disable_tqdm)
        for numbers in alike.values():
            how = self._generation(requests[numbers[0]].args[1])
            prompts = self._prompts([requests[n].args[0] for n in numbers], how.max_tokens)
            # Long ones first, side by side with others of their length.
            order = sorted(range(len(numbers)), key=lambda i: -len(prompts[i].ids))
            completions = generate.generate(
                self.loaded,
                [prompts[i] for i in order],
                how.params,
                max_tokens=how.max_tokens,
                stops=how.stops,
                batch_size=self.batch_size,
            )
            for i, completion in zip(order, completions, strict=True):
                texts[numbers[i]] = completion.completion
                self.cache_hook.add_partial(
                    "generate_until", requests[numbers[i]].args, completion.completion
                )
                progress.update()
        progress.close()
        return texts

    # --- how ---------------------------------------------------------------------------------------

    @property
    def _tokenizer(self) -> tokenizer_lib.Tokenizer:
        return self.loaded.tokenizer

    def _chat(self, name: str | None = None) -> chat.Template | None:
        found = chat.of_files(self._files, name)
        return self._template if found is None and name is None else found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        to_score = [self._request(*request) for request in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm.tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm)
        for answer in scoring.score(self.loaded, to_score, self.batch_size):
            answers[answer.index] = (answer.log_probability, answer.is_greedy)
            texts = requests[answer.index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[answer.index])
            progress.update()
        progress.close()
        return answers

    def _request(
        self, texts: tuple[str, str] | None, context: Sequence[int], continuation: Sequence[int]
    ) -> scoring.Request:
        """Returns the tokens of a pair; too long a context loses its beginning."""
        if not 0 < len(continuation) <= self.max_length:
            what = "a window" if texts is None else f"continuation {texts[1][:40]!r}"
            raise errors.UserError(
                f"{what} has {len(continuation)} tokens of its own: the harness scores 1 to"
                f" {self.max_length} of this model"
            )
        if self.backend == "seq2seq":
            start = self.loaded.model.config.decoder_start_id
            source = tuple(context[-self.max_length :])
            return scoring.Request((start, *continuation), len(continuation), source)
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return scoring.Request(tokens, len(continuation))

    def _generation(self, given: Mapping[str, Any]) -> "_Generation":
        """Returns how to generate; UserError for what llm_jax has no counterpart of."""
        kwargs = dict(models_utils.normalize_gen_kwargs(dict(given), self.max_gen_toks))
        unknown = [name for name in kwargs if name not in _GENERATION]
        if unknown:
            hint = errors.nearest(unknown[0], _GENERATION)
            raise errors.UserError(
                f"generation_kwargs: {', '.join(unknown)} cannot be followed{hint}: llm_jax takes"
                f" {', '.join(_GENERATION)}"
            )
        max_tokens = kwargs["max_gen_toks"]
        room = self.max_length - 1
        if not 0 < max_tokens <= room:
            raise errors.UserError(
                f"generation_kwargs: max_gen_toks = {max_tokens} (the harness's {self.max_gen_toks} where a"
                f" task does not say) must be 1 to {room}, so that one token of the context is left"
            )
        if kwargs["do_sample"] and kwargs.get("temperature") == 0:
            raise errors.UserError(
                "generation_kwargs: do_sample = True and temperature = 0 contradict each other: leave out one"
            )
        params = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        if not kwargs["do_sample"]:
            params = {n: params[n] for n in params if n == "repetition_penalty"} | {
                "temperature": 0.0
            }
        special = self._tokenizer.special_tokens
        eos = next((name for name, i in special.items() if i == self.eot_token_id), None)
        stops = models_utils.handle_stop_sequences(kwargs["until"], eos=eos)
        return _Generation(samplers.SamplingParams(**params), max_tokens, tuple(stops))

    def _prompts(self, contexts: Sequence[str], max_tokens: int) -> list[generate.Prompt]:
        """Returns contexts, cut on the left to leave room, with a seed for each repetition."""
        room = self.max_length - (0 if self.backend == "seq2seq" else max_tokens)
        seen: dict[str, int] = {}
        prompts = []
        for context in contexts:
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            seed = seen[context] = seen.get(context, -1) + 1
            prompts.append(generate.Prompt(context, seed, tuple(ids)))
        return prompts


@dataclasses.dataclass(frozen=True)
class _Generation:
    params: samplers.SamplingParams
    max_tokens: int
    stops: tuple[str, ...]


def of_workdir(
    workdir: str,
    step: int | str | None = None,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> CheckpointLM:
    """Returns a run's checkpoint, or a converted model, for the harness.

    Args:
      workdir: of the run.
      step: which checkpoint, as `checkpoint.parse_step` gives it; None: the latest that is whole.
      batch_size, max_length: see `CheckpointLM`.

    Raises:
      errors.UserError: as `load.load`.
    """
    loaded = load.load(workdir, step)
    meta = checkpoint.read_latest(workdir, loaded.step, lambda _, meta: meta)
    files = (meta.source or {}).get("files", {})
    how = {"batch_size": batch_size, "max_length": max_length}
    return CheckpointLM(loaded, files, chat.of_checkpoint(meta), name=workdir, **how)
