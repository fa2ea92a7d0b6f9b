"""Token cache to batches, as a pure function of (seed, step).

Row r of step s is the global row g = s * batch_size + r. It reads window g mod W of epoch g div W,
out of W windows, through a permutation that follows from the seed and the epoch alone. So any step
can be made without the steps before it: a run that resumes, or runs on another number of hosts,
sees the very same global batches.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import host_tensorflow
from llm_jax.data import packing
from llm_jax.data import token_cache

tf = host_tensorflow.load()

# Of the cipher behind the permutation; TensorFlow's own default. Changing it changes every run.
_SHUFFLE_ROUNDS = 4
_FOREVER = np.iinfo(np.int64).max


def train_batches(
    cache: token_cache.TokenCache,
    data_config: config_lib.DataConfig,
    *,
    seed: int,
    start_step: int,
    rows: Sequence[int] | np.ndarray,
    num_steps: int | None = None,
) -> Iterator[batch_lib.Batch]:
    """Returns an iterator over this host's part of each training batch.

    Args:
      cache: the training split.
      data_config: batch size (global), sequence length, packing, prefetch.
      seed: of the order of windows.
      start_step: step of the first batch.
      rows: which rows of the global batch this host reads, each in [0, batch_size).
      num_steps: batches to make; None: no end.

    Returns:
      An iterator of batches of numpy arrays, [len(rows), sequence_length].

    Raises:
      errors.UserError: the split is too small for one window, or rows are outside of the batch.
    """
    rows = _checked_rows(rows, data_config)
    count = _checked_windows(cache, data_config)
    end_step = _FOREVER if num_steps is None else start_step + num_steps

    def windows_of(step: Any) -> Any:
        global_rows = step * data_config.batch_size + tf.constant(rows)
        epochs = global_rows // count
        seeds = tf.stack([tf.fill(tf.shape(epochs), tf.constant(seed, tf.int64)), epochs], axis=1)
        return _shuffled(global_rows % count, seeds, count)

    steps = tf.data.Dataset.range(start_step, end_step)
    return _batches(cache, data_config, steps.map(windows_of), len(rows))


def eval_batches(
    cache: token_cache.TokenCache,
    data_config: config_lib.DataConfig,
    *,
    rows: Sequence[int] | np.ndarray,
    num_steps: int = 0,
) -> Iterator[batch_lib.Batch]:
    """Returns an iterator over a split in order; the last batch is filled up with padding rows.

    Args:
      cache, data_config, rows: as for `train_batches`.
      num_steps: batches at most; 0: the whole split.

    Raises as `train_batches`.
    """
    rows = _checked_rows(rows, data_config)
    count = _checked_windows(cache, data_config)

    def windows_of(step: Any) -> Any:
        windows = step * data_config.batch_size + tf.constant(rows)
        return tf.where(windows < count, windows, tf.constant(-1, tf.int64))

    steps = tf.data.Dataset.range(num_eval_steps(cache, data_config, num_steps))
    return _batches(cache, data_config, steps.map(windows_of), len(rows))


def num_eval_steps(
    cache: token_cache.TokenCache, data_config: config_lib.DataConfig, num_steps: int = 0
) -> int:
    """Returns how many batches `eval_batches` gives with the same arguments."""
    whole = -(-num_windows(cache, data_config) // data_config.batch_size)
    return min(whole, num_steps) if num_steps else whole


def num_windows(cache: token_cache.TokenCache, data_config: config_lib.DataConfig) -> int:
    """Returns the windows of one epoch."""
    return packing.num_windows(cache.num_tokens, data_config.sequence_length)


def _shuffled(indices: Any, seeds: Any, count: int) -> Any:
    """Returns the place of each index in a permutation of range(count), one for each seed.

    This is `tf.random.experimental.index_shuffle`, whose Python wrapper fails on a matrix of
    seeds in TensorFlow 2.21: it appends the third word of the seed along the wrong axis.

    Args:
      indices: int64 [B], in [0, count).
      seeds: int64 [B, 2].
      count: size of the permutation.
    """
    third_word = tf.zeros_like(seeds[:, :1])
    return tf.raw_ops.RandomIndexShuffle(
        index=indices,
        seed=tf.concat([seeds, third_word], axis=1),
        max_index=tf.fill(tf.shape(indices), tf.constant(count - 1, tf.int64)),
        rounds=_SHUFFLE_ROUNDS,
    )


def _batches(
    cache: token_cache.TokenCache,
    data_config: config_lib.DataConfig,
    windows: Any,
    num_rows: int,
) -> Iterator[batch_lib.Batch]:
    """Reads each element of a dataset of window indices, int64 [num_rows], into a batch."""
    length = data_config.sequence_length
    dtypes = (tf.int32, tf.int32, tf.float32, tf.int32, tf.int32)  # the others are None

    def read(indices: np.ndarray) -> list[np.ndarray]:
        read = packing.windows(cache, indices, length=length, packing=data_config.packing)
        return list(read[: len(dtypes)])

    def load(indices: Any) -> Any:
        arrays = tf.numpy_function(read, [indices], dtypes, stateful=False)
        return tuple(tf.ensure_shape(array, (num_rows, length)) for array in arrays)

    options = tf.data.Options()
    options.deterministic = True
    dataset = windows.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    if data_config.prefetch:
        dataset = dataset.prefetch(data_config.prefetch)
    for arrays in dataset.with_options(options).as_numpy_iterator():
        yield batch_lib.Batch(*arrays)


def _checked_rows(
    rows: Sequence[int] | np.ndarray, data_config: config_lib.DataConfig
) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or np.any(rows < 0) or np.any(rows >= data_config.batch_size):
        raise errors.UserError(
            f"rows {rows.tolist()} are not rows of data.batch_size = {data_config.batch_size}"
        )
    return rows


def _checked_windows(cache: token_cache.TokenCache, data_config: config_lib.DataConfig) -> int:
    count = num_windows(cache, data_config)
    if count == 0:
        raise errors.UserError(
            f"split {cache.manifest.split!r} of {cache.manifest.source} has {cache.num_tokens}"
            " token, no input with a target: give it more text"
        )
    return count
