"""Conversations and preferences: what a model answers last, and which of two answers it has come to prefer."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax import preferences
from llm_jax.data import batch as batch_lib
from llm_jax.data import chat
from llm_jax.evaluation import bootstrap
from llm_jax.evaluation import metrics
from llm_jax.models import build
from llm_jax.sampling import generate
from llm_jax.sampling import load
from llm_jax.sampling import samplers


def answers(
    loaded: load.Loaded,
    template: chat.Template,
    conversations: Sequence[chat.Messages],
    max_tokens: int,
) -> tuple[metrics.Scores, list[dict[str, Any]]]:
    """Returns how near greedy answers are to the last message of each conversation, and what was said.

    Conversations end with the assistant; what was said before is given as it stands in the data.

    Raises:
      errors.UserError: one does not end so, or has no room in the model.
    """
    ends = chat.end_ids(template, loaded.tokenizer)
    prompts, wanted = [], []
    for number, messages in enumerate(conversations, start=1):
        if messages[-1]["role"] != chat.ANSWERS:
            raise errors.UserError(
                f"conversation {number} ends with the {messages[-1]['role']}: the last message is what is"
                f" scored, and is the {chat.ANSWERS}'s"
            )
        text = template.render(messages[:-1], is_answer_next=True)
        ids = tuple(chat.encode(loaded.tokenizer, text))
        prompts.append(generate.Prompt(text, ids=ids, ends=ends))
        wanted.append(messages[-1]["content"].strip())
    said = [text.strip() for text in greedy(loaded, prompts, max_tokens)]
    rows = [
        {"messages": list(messages[:-1]), "target": target, "prediction": text}
        for messages, target, text in zip(conversations, wanted, said, strict=True)
    ]
    return metrics.texts(said, wanted), rows


def greedy(
    loaded: load.Loaded, prompts: Sequence[generate.Prompt], max_tokens: int, **how: Any
) -> list[str]:
    """Returns what prompts of `ids` are continued with; `how` as of `generate.generate`."""
    # Prompts of a length are written together: a batch is as long as its longest.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    completions = generate.generate(
        loaded,
        [prompts[index] for index in order],
        samplers.SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        **how,
    )
    said = [""] * len(prompts)
    for index, completion in zip(order, completions, strict=True):
        said[index] = completion.completion
    return said


def preferred(
    config: config_lib.RunConfig,
    model: build.Model,
    batches: Iterator[batch_lib.Batch],
    reference: preferences.Reference,
    rows: Sequence[dict[str, Any]],
) -> tuple[metrics.Scores, list[dict[str, Any]]]:
    """Returns which answers are preferred, and of each row by how much.

    `accuracy`: the chosen answer has gained more than the other one since the start (its implicit reward is
    higher; Rafailov et al. 2023, section 5). `margin`: by how many nats. `likelier`, `likelier_before`: the chosen
    answer is the likelier one, now and at the start.
    """

    @jax.jit
    def run(model: build.Model, batch: batch_lib.Batch) -> tuple[jax.Array, jax.Array]:
        return preferences.log_probabilities(config, model, batch), batch.reference

    parts = [[distributed.fetch(x) for x in run(model, reference(batch))] for batch in batches]
    own_N2, before_N2 = (np.concatenate(part)[: len(rows)] for part in zip(*parts))
    margins_N = np.subtract(*(own_N2 - before_N2).T)
    estimates = {
        "accuracy": bootstrap.of_mean(margins_N > 0),
        "margin": bootstrap.of_mean(margins_N),
        "likelier": bootstrap.of_mean(own_N2[:, 0] > own_N2[:, 1]),
        "likelier_before": bootstrap.of_mean(before_N2[:, 0] > before_N2[:, 1]),
    }
    shown = [row | {"margin": float(margin)} for row, margin in zip(rows, margins_N, strict=True)]
    return metrics.Scores(estimates), shown
