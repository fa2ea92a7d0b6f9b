"""Documents to token caches, examples to example caches: once for each source, split and tokenizer.

    CACHE_DIR/tokens/KEY/            a token cache
    CACHE_DIR/examples/KEY/          an example cache
    CACHE_DIR/tokenizers/KEY.json    a tokenizer that was trained on the training split
    CACHE_DIR/tfds/                  TFDS datasets

A key hashes whatever the content follows from, so a change of any of it makes a new cache, and a
finished cache is never written to again.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from llm_jax import config as config_lib
from llm_jax import distributed
from llm_jax import errors
from llm_jax.data import cache_folder
from llm_jax.data import chat as chat_lib
from llm_jax.data import example_cache
from llm_jax.data import examples
from llm_jax.data import file_lock
from llm_jax.data import mixture
from llm_jax.data import objectives
from llm_jax.data import sources
from llm_jax.data import token_cache
from llm_jax.data import tokenizer as tokenizer_lib

# Documents are tokenised this many characters at a time: enough to keep threads busy, little enough
# that memory stays at some hundred MB whatever the size of the corpus.
_CHUNK_CHARS = 1 << 22
_KEY_LENGTH = 24  # hex digits of a sha256: collisions are out of the question

_log = logging.getLogger(__name__)


Cache = token_cache.TokenCache | example_cache.ExampleCache


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads: two caches, and their tokenizer with the objective's special tokens."""

    train: Cache
    eval: Cache
    tokenizer: tokenizer_lib.Tokenizer
    chat: chat_lib.Template | None = None  # how the model is spoken to
    mixed: tuple[Cache, ...] = ()  # of `data.mixture`, in its order

    @property
    def labels(self) -> list[str] | None:
        """Names of classes by their number, if the objective has any."""
        is_of_examples = isinstance(self.train, example_cache.ExampleCache)
        return self.train.manifest.labels if is_of_examples else None


def prepare(run_config: config_lib.RunConfig) -> Prepared:
    """Tokenises both splits of a run, or opens what was tokenised before.

    Several processes may do this at once: one works, the others wait for it and use its result.

    Raises:
      errors.UserError: bad input of any kind, an objective that the model cannot be trained on, a
        vocabulary that is larger than the model's, or a damaged cache.
    """
    config_lib.check_objective(run_config)
    data = run_config.data
    if "://" in data.cache_dir:
        raise errors.UserError(
            f"data.cache_dir = {data.cache_dir!r} is remote: caches are memory-mapped, so"
            " give a local directory"
        )
    is_of_text = run_config.objective.name in config_lib.TEXT_OBJECTIVES
    base = make_tokenizer(data, is_of_text=is_of_text)
    tokenizer = objectives.extended(run_config, base)
    if tokenizer.vocab_size > run_config.model.vocab_size:
        raise errors.UserError(
            f"data.tokenizer = {data.tokenizer!r} has {tokenizer.vocab_size} tokens"
            f"{_added(base, tokenizer)}, more than model.vocab_size = {run_config.model.vocab_size}: set"
            f" --config.model.vocab_size={tokenizer.vocab_size} or more"
        )
    chat = chat_lib.of_config(data, base)
    # Tokens that were added for the objective are in no text, so caches do without them.
    if is_of_text:
        train, evaluation = (
            _prepare_split(data, split, base) for split in (data.train_split, data.eval_split)
        )
        mixed = [_prepare_split(own, own.train_split, base) for own in mixture.sources_of(data)]
    else:
        # Labels follow from the training split.
        origin = sources.identity(data, data.train_split)
        own = (run_config, base, chat)
        train = _prepare_examples(*own, data.train_split, None, origin)
        labels = train.manifest.labels
        evaluation = _prepare_examples(*own, data.eval_split, labels, origin)
        _check_num_labels(run_config, train)
        mixed = []
        for source in mixture.sources_of(data):
            other = dataclasses.replace(run_config, data=source)
            mixed.append(_prepare_examples(other, base, chat, data.train_split, labels, labels))
    return Prepared(train, evaluation, tokenizer, chat, tuple(mixed))


def prepare_split(
    run_config: config_lib.RunConfig,
    split: str,
    tokenizer: tokenizer_lib.Tokenizer,
    labels: list[str] | None,
    chat: chat_lib.Template | None = None,
) -> Cache:
    """Tokenises one split for a model that has a tokenizer and labels already, or opens what was
    tokenised before; raises as `prepare`.

    Args:
      run_config: source, objective and fields.
      split: which.
      tokenizer: the model's, with the special tokens of its objective.
      labels: names of the model's classes by their number; None where it has none.
      chat: how the model is spoken to.
    """
    config_lib.check_objective(run_config)
    if run_config.objective.name in config_lib.TEXT_OBJECTIVES:
        return _prepare_split(run_config.data, split, tokenizer)
    return _prepare_examples(run_config, tokenizer, chat, split, labels, labels)


def _added(base: tokenizer_lib.Tokenizer, tokenizer: tokenizer_lib.Tokenizer) -> str:
    count = tokenizer.vocab_size - base.vocab_size
    return f" with the {count} that its objective adds" if count else ""


def training_stage(run_config: config_lib.RunConfig, prepared: Prepared) -> objectives.Stage:
    """Returns what makes a run's training batches: the objective on its data, or on its mixture of data."""
    stages = [
        objectives.make(run_config, cache, prepared.tokenizer)
        for cache in (prepared.train, *prepared.mixed)
    ]
    return mixture.Mixture(stages, run_config.data.mixture) if len(stages) > 1 else stages[0]


def check_same(prepared: Prepared) -> None:
    """Checks that all processes of a run have prepared the same; each of them must call it.

    Hosts that share no disk tokenise each for itself, from documents that may differ.

    Raises:
      errors.UserError: they have not; names the process and its cache.
    """
    caches = (prepared.train, prepared.eval, *prepared.mixed)
    manifests = [cache.manifest for cache in caches]
    distributed.check_same(
        "the data",
        [json.dumps(manifest.sha256, sort_keys=True) for manifest in manifests]
        + [prepared.tokenizer.fingerprint()],
        "data.source and data.tokenizer must name the same files on every host; see"
        f" {prepared.train.path}",
    )


def make_tokenizer(
    data: config_lib.DataConfig, *, is_of_text: bool = True
) -> tokenizer_lib.Tokenizer:
    """Returns the tokenizer of a config; one to be trained is trained once and kept.

    Args:
      data: which, and what it is trained on.
      is_of_text: whether the source is of documents, not of examples.

    Raises:
      errors.UserError: a bad spec or file; or bad documents, if it has to be trained on them.
    """
    size = tokenizer_lib.trained_size(data.tokenizer)
    if size is None:
        return tokenizer_lib.load(data.tokenizer)
    parts = ["train_bpe", size, sources.identity(data, data.train_split)]
    key = _key(*parts, *([] if is_of_text else [data.input_fields, data.target_field]))
    path = _cache_dir(data) / "tokenizers" / f"{key}.json"
    if not path.exists():
        with file_lock.hold(path.parent / f".{key}.lock"):
            if not path.exists():
                texts = sources.documents if is_of_text else examples.texts
                _train_tokenizer(data, functools.partial(texts, data, data.train_split), path)
    return tokenizer_lib.from_dict(json.loads(path.read_bytes()))


def _train_tokenizer(
    data: config_lib.DataConfig, documents: Callable[[], Iterable[str]], path: pathlib.Path
) -> None:
    _log.info("training %s on %s, split %s", data.tokenizer, data.source, data.train_split)
    trained = tokenizer_lib.make(data.tokenizer, documents)
    temporary = path.with_suffix(".tmp")  # nobody else's, as the lock is held
    cache_folder.write_synced(temporary, json.dumps(trained.to_dict()).encode())
    os.replace(temporary, path)


def cache_path(
    data: config_lib.DataConfig, split: str, tokenizer: tokenizer_lib.Tokenizer
) -> pathlib.Path:
    """Returns where the token cache of a split is, or will be. Raises as `sources.identity`."""
    key = _key(token_cache.FORMAT_VERSION, sources.identity(data, split), tokenizer.fingerprint())
    return _cache_dir(data) / "tokens" / key


def _cache_dir(data: config_lib.DataConfig) -> pathlib.Path:
    return pathlib.Path(data.cache_dir).expanduser()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _prepare_split(
    data: config_lib.DataConfig, split: str, tokenizer: tokenizer_lib.Tokenizer
) -> token_cache.TokenCache:
    path = cache_path(data, split, tokenizer)
    if cache_folder.exists(path):
        return token_cache.TokenCache.open(path)
    with cache_folder.lock(path):
        # Another process may have made it while this one waited.
        if cache_folder.exists(path):
            return token_cache.TokenCache.open(path)
        documents = sources.documents(data, split)
        return token_cache.write(
            path,
            tokenized(documents, tokenizer, progress=f"{data.source} {split}"),
            source=data.source,
            split=split,
            tokenizer=data.tokenizer,
            tokenizer_fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )


def _prepare_examples(
    run_config: config_lib.RunConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    chat: chat_lib.Template | None,
    split: str,
    labels: list[str] | None,
    origin: str | list[str] | None,
) -> example_cache.ExampleCache:
    """Returns the examples of a split.

    Args:
      run_config, tokenizer, chat, split: which, and how they are read.
      labels: names by number; None to find them in the training split.
      origin: what labels follow from.
    """
    data, name = run_config.data, run_config.objective.name
    key = _key(
        example_cache.FORMAT_VERSION,
        sources.identity(data, split),
        origin,
        tokenizer.fingerprint(),
        [name, examples.is_regression(run_config), data.input_fields, data.target_field],
        *([data.preprocessing, data.language] if data.preprocessing else []),
        *([chat and chat.to_dict()] if name in config_lib.CHAT_OBJECTIVES else []),
    )
    path = _cache_dir(data) / "examples" / key
    if cache_folder.exists(path):
        return example_cache.ExampleCache.open(path)
    with cache_folder.lock(path):
        if cache_folder.exists(path):
            return example_cache.ExampleCache.open(path)
        labels = examples.label_names(run_config) if labels is None else labels
        made = examples.columns(run_config, tokenizer, labels, split, chat)
        is_hidden = None if distributed.is_main() else True
        with tqdm.tqdm(made, f"{data.source} {split}", unit=" examples", disable=is_hidden) as bar:
            return example_cache.write(
                path,
                bar,
                examples.dtypes(run_config, tokenizer.vocab_size),
                source=data.source,
                split=split,
                objective=name,
                fields=examples.fields_of(run_config),
                tokenizer=data.tokenizer,
                tokenizer_fingerprint=tokenizer.fingerprint(),
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
                labels=labels,
            )


def _check_num_labels(run_config: config_lib.RunConfig, cache: example_cache.ExampleCache) -> None:
    num_labels = len(cache.manifest.labels or ())
    if num_labels > run_config.model.num_labels:
        raise errors.UserError(
            f"data.target_field = {run_config.data.target_field!r} has {num_labels} labels, more than"
            f" model.num_labels = {run_config.model.num_labels}: set"
            f" --config.model.num_labels={num_labels}"
        )


def tokenized(
    documents: Iterable[str], tokenizer: tokenizer_lib.Tokenizer, *, progress: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the ids (int32, no eos) and the UTF-8 bytes of each document, in their order.

    Shows a progress bar named `progress` where stderr is a terminal.

    Raises:
      errors.UserError: a document that the tokenizer refuses; says which.
    """
    num_documents = num_tokens = num_bytes = 0
    # None: shown on a terminal alone; of several processes the first shows it.
    is_hidden = None if distributed.is_main() else True
    with tqdm.tqdm(desc=progress, unit=" documents", disable=is_hidden) as bar:
        for chunk in _chunks(documents):
            for ids, size in zip(
                _encode(chunk, tokenizer, num_documents), map(_num_bytes, chunk), strict=True
            ):
                num_tokens += len(ids)
                num_bytes += size
                yield ids, size
            num_documents += len(chunk)
            seconds = max(bar.format_dict["elapsed"], 1e-3)
            rate = num_tokens / seconds
            bar.set_postfix_str(f"{num_bytes / 1e6:.1f} MB, {rate / 1e6:.2f} M tokens/s", False)
            bar.update(len(chunk))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _encode(
    chunk: list[str], tokenizer: tokenizer_lib.Tokenizer, first_index: int
) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch(chunk)
    except errors.UserError:
        # Find the one that is refused, to name it.
        for index, document in enumerate(chunk):
            try:
                tokenizer.encode(document)
            except errors.UserError as error:
                number = first_index + index + 1
                raise errors.UserError(f"document {number} of the split: {error}") from error
        raise


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    num_chars = 0
    for document in documents:
        chunk.append(document)
        num_chars += len(document)
        if num_chars >= _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk
