"""Tokenises the data of a config ahead of time: `python -m llm_jax.prepare --config=configs/x.py`.

Training does the same when it starts and finds the caches then; on a pod, each host (or the disk
that they share) needs them.
"""

from llm_jax import command
from llm_jax.data import example_cache
from llm_jax.data import prepare


def main() -> None:
    prepared = prepare.prepare(command.config_from_flags())
    print(f"tokenizer: {prepared.tokenizer.vocab_size:,} tokens in the vocabulary")
    for name, cache in (("train", prepared.train), ("eval", prepared.eval)):
        print(f"{name}: {_summary(cache)}")


def _summary(cache: prepare.Cache) -> str:
    if isinstance(cache, example_cache.ExampleCache):
        num_tokens = sum(len(column.values) for column in cache.inputs)
        labels = cache.manifest.labels
        named = f", labels {', '.join(labels)}" if labels else ""
        return f"{cache.num_examples:,} examples, {num_tokens:,} tokens to read{named}, in {cache.path}"
    return (
        f"{cache.num_documents:,} documents, {cache.num_tokens:,} tokens,"
        f" {cache.num_bytes / 1e6:.2f} MB of text"
        f" ({cache.num_bytes / cache.num_tokens:.2f} bytes a token) in {cache.path}"
    )


if __name__ == "__main__":
    command.run(main, command.define_config)
