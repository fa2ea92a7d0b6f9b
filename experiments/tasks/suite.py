"""The tasks: data, model, commands, and what their row of the README says.

A row's last command prints scores as JSON in its last line, as `llm_jax.evaluate` and `llm_jax.search evaluate` do.
"""

from collections.abc import Mapping
import dataclasses

_CONFIGS = "experiments/tasks/configs"
_DATA = "~/.cache/llm_jax/tasks"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where a command writes what was said, and which fields are shown of it.

    Attributes:
      file: under WORKDIR/evaluation/STEP.
      given: the field of what the model read; None where texts may not be shown.
      wanted, said: fields of what was right and what the model said.
      run: whose workdir, where it is not the task's own.
      is_continued: whether what was given ends where the model goes on.
    """

    file: str
    given: str | None
    wanted: str = "target"
    said: str = "prediction"
    run: str = ""
    is_continued: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """One row.

    Attributes:
      title: what is learned, by what.
      data: data sets, as `experiments.tasks.data` names them.
      models: trained models to start from, as `experiments.tasks.models` names them.
      commands: modules and their flags, by the names of stages, in order.
      scores: keys of the scores that the row shows, of those the last command prints.
      baselines: what the scores stand beside: a label, a file of `results` or `stage NAME`, and the score's key.
      outputs: what is shown of what was said; None where nothing is written.
    """

    title: str
    data: tuple[str, ...]
    models: tuple[str, ...]
    commands: Mapping[str, str]
    scores: tuple[str, ...]
    baselines: tuple[tuple[str, str, str], ...]
    outputs: Outputs | None


def _train(name: str, config: str, argument: str = "", more: str = "") -> str:
    argument, more = f":{argument}" * bool(argument), f" {more}" * bool(more)
    return f"llm_jax.train --config={_CONFIGS}/{config}.py{argument} --workdir=runs/{name}{more}"


def _evaluate(name: str, task: str, data: str, more: str = "") -> str:
    source = f"'jsonl:{_DATA}/{data}/test.jsonl'"
    more = f" {more}" * bool(more)
    return f"llm_jax.evaluate --workdir=runs/{name} --tasks={task}{more} --source={source}"


def _perplexity(name: str, config: str) -> str:
    source = f"'jsonl:{_DATA}/python_code/test.jsonl:text'"
    like = f"--config={_CONFIGS}/{config}.py:runs/smollm2"
    return f"llm_jax.evaluate --workdir=runs/{name} --tasks=perplexity {like} --source={source}"


def _chat(name: str) -> str:
    like = f"--config={_CONFIGS}/chat.py:runs/smollm2"
    return _evaluate(name, "chat", "conversations", f"--max_tokens=24 {like}")


def _french(name: str, config: str = "") -> str:
    like = f"--config={_CONFIGS}/{config}" * bool(config)
    return _evaluate(name, "generation", "translation_fr", f"--max_tokens=64 {like}".strip())


def _preprocessed(name: str, stages: str) -> Task:
    """Returns spam by MiniLM, its mails preprocessed as the classic pipeline does."""
    baseline = "spam-baseline-" + stages.replace(",", "-")
    return Task(
        f"SpamAssassin, by MiniLM, after {stages.replace(',', ', ')}",
        ("spam",),
        ("minilm",),
        {
            "train": _train(name, "spam", "runs/minilm", f"--config.data.preprocessing={stages}"),
            "evaluate": _evaluate(name, "classification", "spam"),
        },
        ("accuracy", "macro_f1"),
        (("TF-IDF and a linear SVM after the same", baseline, "accuracy"),),
        Outputs("classification-spam-test.jsonl", None),
    )


TASKS: dict[str, Task] = {
    "newsgroups": Task(
        "20 Newsgroups, by MiniLM",
        ("newsgroups",),
        ("minilm",),
        {
            "train": _train("newsgroups", "newsgroups", "runs/minilm"),
            "evaluate": _evaluate("newsgroups", "classification", "newsgroups"),
        },
        ("accuracy", "macro_f1"),
        (("TF-IDF and a linear SVM", "newsgroups-baseline", "accuracy"),),
        Outputs("classification-newsgroups-test.jsonl", None),
    ),
    "spam": Task(
        "SpamAssassin, by MiniLM",
        ("spam",),
        ("minilm",),
        {
            "train": _train("spam", "spam", "runs/minilm"),
            "evaluate": _evaluate("spam", "classification", "spam"),
        },
        ("accuracy", "macro_f1"),
        (("TF-IDF and a linear SVM", "spam-baseline", "accuracy"),),
        Outputs("classification-spam-test.jsonl", None),
    ),
    "spam_segment": _preprocessed("spam_segment", "normalise,segment"),
    "spam_stop_words": _preprocessed("spam_stop_words", "normalise,segment,stop_words"),
    "spam_stem": _preprocessed("spam_stem", "normalise,segment,stop_words,stem"),
    "spam_decoder": Task(
        "SpamAssassin, by SmolLM2 with a head and low-rank updates",
        ("spam",),
        ("smollm2",),
        {
            "train": _train("spam_decoder", "spam", "runs/smollm2"),
            "evaluate": _evaluate("spam_decoder", "classification", "spam"),
        },
        ("accuracy", "macro_f1"),
        (("TF-IDF and a linear SVM", "spam-baseline", "accuracy"),),
        Outputs("classification-spam-test.jsonl", None),
    ),
    "sentiment": Task(
        "Sentences of film reviews, by MiniLM",
        ("sentiment",),
        ("minilm",),
        {
            "train": _train("sentiment", "sentiment", "runs/minilm"),
            "evaluate": _evaluate("sentiment", "classification", "sentiment"),
        },
        ("accuracy", "macro_f1"),
        (
            ("TF-IDF and a linear SVM", "sentiment-baseline", "accuracy"),
            ("the sum of a lexicon's ratings", "sentiment-baseline", "lexicon/accuracy"),
        ),
        Outputs("classification-sentiment-test.jsonl", None),
    ),
    "translation_it": Task(
        "Debian's descriptions in Italian, an encoder-decoder from scratch",
        ("translation:it",),
        (),
        {
            "train": _train("translation_it", "translation", "it"),
            "evaluate": _evaluate(
                "translation_it", "generation", "translation_it", "--num_beams=4"
            ),
        },
        ("bleu", "chrf"),
        (
            ("the nearest source's translation", "translation_it-baseline", "memory/bleu"),
            ("the source as it is", "translation_it-baseline", "bleu"),
        ),
        Outputs("generation-translation_it-test.jsonl", "source"),
    ),
    "translation_it_decoder": Task(
        "The same by a decoder that is given the source",
        ("translation:it",),
        (),
        {
            "train": _train("translation_it_decoder", "translation", "it,decoder"),
            "evaluate": _evaluate(
                "translation_it_decoder", "generation", "translation_it", "--num_beams=4"
            ),
        },
        ("bleu", "chrf"),
        (
            ("the nearest source's translation", "translation_it-baseline", "memory/bleu"),
            ("the source as it is", "translation_it-baseline", "bleu"),
        ),
        Outputs("generation-translation_it-test.jsonl", "source"),
    ),
    "summaries": Task(
        "A line on a package, by SmolLM2 with low-rank updates",
        ("summaries",),
        ("smollm2",),
        {
            "train": _train("summaries", "summaries", "runs/smollm2"),
            "evaluate": _evaluate("summaries", "generation", "summaries", "--max_tokens=24"),
        },
        ("rougeL", "rouge1"),
        (("the first sentence", "summaries-baseline", "rougeL"),),
        Outputs("generation-summaries-test.jsonl", "long"),
    ),
    "definitions": Task(
        "What is X? By SmolLM2 with low-rank updates",
        ("definitions",),
        ("smollm2",),
        {
            "train": _train("definitions", "definitions", "runs/smollm2"),
            "evaluate": _evaluate("definitions", "generation", "definitions", "--max_tokens=40"),
        },
        ("token_f1", "exact_match"),
        (("the nearest question's answer", "definitions-baseline", "token_f1"),),
        Outputs("generation-definitions-test.jsonl", "question"),
    ),
    "spans": Task(
        "Where X is defined among definitions, by MiniLM",
        ("spans",),
        ("minilm",),
        {
            "train": _train("spans", "spans", "runs/minilm"),
            "evaluate": _evaluate("spans", "spans", "spans"),
        },
        ("exact_match", "token_f1"),
        (
            ("the first definition", "spans-baseline", "exact_match"),
            ("a rule that looks X up", "spans-baseline", "rule/exact_match"),
        ),
        Outputs("spans-spans-test.jsonl", "question"),
    ),
    "code": Task(
        "Files of Python, by SmolLM2 with low-rank updates",
        ("python_code",),
        ("smollm2",),
        {
            "before": _perplexity("smollm2", "code"),
            "train": _train("code", "code", "runs/smollm2"),
            "write": "experiments.tasks.complete --workdir=runs/code",
            "evaluate": _perplexity("code", "code"),
        },
        ("perplexity", "bits_per_byte"),
        (("SmolLM2 as it is", "stage before", "perplexity"),),
        Outputs("completion-test.jsonl", "before", is_continued=True),
    ),
    "fill": Task(
        "Lines missing in the middle of Python, by SmolLM2 with low-rank updates",
        ("python_fill",),
        ("smollm2",),
        {
            "train": _train("fill", "fill", "runs/smollm2"),
            "write": _evaluate("fill", "generation", "python_fill", "--max_tokens=96"),
            "evaluate": "experiments.tasks.syntax --workdir=runs/fill",
        },
        ("syntax", "exact_match", "chrf"),
        (("nothing written", "stage evaluate", "syntax_of_nothing"),),
        Outputs("generation-python_fill-test.jsonl", "before", is_continued=True),
    ),
    "chat": Task(
        "Conversations of two questions, the second on the first, by SmolLM2 with low-rank updates",
        ("conversations",),
        ("smollm2",),
        {
            "before": _chat("smollm2"),
            "train": _train("chat", "chat", "runs/smollm2"),
            "evaluate": _chat("chat"),
        },
        ("exact_match", "token_f1"),
        (("SmolLM2 as it is", "stage before", "exact_match"),),
        Outputs("chat-conversations-test.jsonl", "messages"),
    ),
    "preferences": Task(
        "A line rather than a sentence: preferences, by SmolLM2 with low-rank updates",
        ("preferences",),
        ("smollm2",),
        {
            "train": _train("preferences", "preferences", "runs/smollm2"),
            "evaluate": _evaluate("preferences", "preferences", "preferences"),
        },
        ("accuracy", "likelier"),
        (("likelier by SmolLM2 as it is", "stage evaluate", "likelier_before"),),
        Outputs("preferences-preferences-test.jsonl", "chosen", "rejected", "margin"),
    ),
    "graph": Task(
        "Entities and relations to a graph, by two MiniLMs",
        ("relations", "relation_pairs"),
        ("minilm",),
        {
            "train entities": _train("entities", "entities", "runs/minilm"),
            "train relations": _train("relations", "relations", "runs/minilm"),
            "evaluate entities": _evaluate("entities", "classification", "relations"),
            "evaluate relations": _evaluate("relations", "classification", "relation_pairs"),
            "evaluate": (
                "experiments.tasks.graph --entities=runs/entities --relations=runs/relations"
                f" --data={_DATA}/relations/test.jsonl --output=runs/graph/graph.jsonld"
            ),
        },
        ("triples/f1", "triples/precision", "triples/recall", "entities/f1"),
        (
            ("relations by the model", "stage evaluate relations", "accuracy"),
            ("the most frequent relation", "relations-baseline", "accuracy"),
        ),
        Outputs("classification-relation_pairs-test.jsonl", "text", run="relations"),
    ),
    "replay": Task(
        "The same with a quarter of presidents' addresses: what SmolLM2 forgets of them",
        ("python_code",),
        ("smollm2",),
        {
            "train": _train("replay", "code", "runs/smollm2,replay"),
            "write": "experiments.tasks.complete --workdir=runs/replay",
            "evaluate": (
                "llm_jax.evaluation.forgetting --before=runs/smollm2 --after=runs/code,runs/replay"
                f" --old={_CONFIGS}/addresses.py:runs/smollm2 --new={_CONFIGS}/code.py:runs/smollm2"
                f" --new_source=jsonl:{_DATA}/python_code/test.jsonl:text"
            ),
        },
        (),
        (),
        Outputs("completion-test.jsonl", "before", is_continued=True),
    ),
    "transfer_fr": Task(
        "The model of Italian goes on to French, 300 steps",
        ("translation:fr",),
        (),
        {
            "before": _french("translation_it", "transfer.py:runs/translation_it"),
            "train": _train("transfer_fr", "transfer", "runs/translation_it"),
            "train from scratch": _train("scratch_fr", "transfer", "scratch"),
            "evaluate from scratch": _french("scratch_fr"),
            "evaluate": _french("transfer_fr"),
        },
        ("bleu", "chrf"),
        (
            ("from scratch, as many steps", "stage evaluate from scratch", "bleu"),
            ("Italian alone", "stage before", "bleu"),
            ("the nearest source's translation", "translation_fr-baseline", "memory/bleu"),
            ("the source as it is", "translation_fr-baseline", "bleu"),
        ),
        Outputs("generation-translation_fr-test.jsonl", "source"),
    ),
    "search": Task(
        "Packages by what they are for, by MiniLM",
        ("descriptions",),
        ("minilm",),
        {
            "train": _train("search", "search", "runs/minilm"),
            "evaluate": (
                "llm_jax.search evaluate --workdir=runs/search --max_length=256"
                f" --pairs='{_DATA}/descriptions/test.jsonl:query,document'"
            ),
        },
        ("recall@1", "mrr@10", "ndcg@10"),
        (("TF-IDF", "descriptions-baseline", "recall@1"),),
        Outputs("search-descriptions-test.jsonl", "query"),
    ),
}
