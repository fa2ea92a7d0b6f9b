"""Text to batches: sources, tokenizers, the token cache on disk and the tf.data pipeline."""
