"""What is to be predicted: one file an objective, each a pure function from items to a batch.

    stage = objectives.make(run_config, cache, tokenizer)
    batch = stage(items, rows, draws)

`items` are windows of a token cache, or rows of packed examples; `rows` are global numbers of rows, which
randomness follows from (`draws`). So a batch is a function of (seed, step), whatever hosts there are.

    causal, prefix, mlm, span_corruption, ul2     of text
    seq2seq, pairs, sequence, token_labels, span  of examples
    chat, preference                              of conversations
    draws, rows, spans, examples, plan            what they share
"""

from collections.abc import Callable

from llm_jax import config as config_lib
from llm_jax.data import example_cache
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.data.objectives import causal
from llm_jax.data.objectives import chat
from llm_jax.data.objectives import mlm
from llm_jax.data.objectives import pairs
from llm_jax.data.objectives import preference
from llm_jax.data.objectives import prefix
from llm_jax.data.objectives import seq2seq
from llm_jax.data.objectives import sequence
from llm_jax.data.objectives import span
from llm_jax.data.objectives import span_corruption
from llm_jax.data.objectives import stage
from llm_jax.data.objectives import token_labels
from llm_jax.data.objectives import ul2
from llm_jax.data.objectives.draws import EVALUATION
from llm_jax.data.objectives.draws import Draws

__all__ = ["EVALUATION", "Draws", "Stage", "extended", "make"]

Stage = stage.Stage

_STAGES: dict[str, Callable[..., Stage]] = {
    "causal": lambda config, cache, _: causal.Causal(config, cache),
    "prefix": lambda config, cache, _: prefix.Prefix(config, cache),
    "mlm": mlm.MaskedLM,
    "span_corruption": span_corruption.SpanCorruption,
    "ul2": ul2.MixtureOfDenoisers,
    "seq2seq": seq2seq.Seq2Seq,
    "contrastive": pairs.Pairs,
    "chat": chat.Chat,
    "preference": preference.Preference,
    "sequence": sequence.Sequence,
    "token": token_labels.TokenLabels,
    "span": span.Span,
}


def make(
    config: config_lib.RunConfig,
    cache: token_cache.TokenCache | example_cache.ExampleCache,
    tokenizer: tokenizer_lib.Tokenizer,
) -> Stage:
    """Returns the stage of a config on a split.

    Args:
      config: checked, by `config.check_objective` too.
      cache: of text or of examples, as the objective is of.
      tokenizer: as `extended` makes it.

    Raises:
      errors.UserError: rows, special tokens or examples that do not fit each other.
    """
    return _STAGES[config.objective.name](config, cache, tokenizer)


def extended(
    config: config_lib.RunConfig, tokenizer: tokenizer_lib.Tokenizer
) -> tokenizer_lib.Tokenizer:
    """Returns the tokenizer with the special tokens that the objective needs and it lacks.

    They come behind its vocabulary: cls and mask for an encoder; modes for UL2; and T5's sentinels, of
    which the first has the highest id.
    """
    names = []
    if config.model.architecture == "encoder":
        names += ["<cls>"] if tokenizer.cls_id is None else []
        names += ["<mask>"] if tokenizer.mask_id is None else []
    if config.objective.name == "ul2":
        names += [mode for mode in ul2.MODES if mode not in tokenizer.special_tokens]
    if config.objective.name in ("span_corruption", "ul2") and not tokenizer.sentinel_ids:
        count = config.objective.num_sentinels
        names += [tokenizer_lib.SENTINEL.format(count - 1 - i) for i in range(count)]
    return tokenizer.extended(names) if names else tokenizer
