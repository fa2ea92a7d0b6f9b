"""Items of an objective to batches, as a pure function of (seed, step).

Row r of step s is the global row g = s * batch_size + r. It holds item g mod W of epoch g div W, out
of W items (windows of text, or rows of examples), through a permutation that follows from the seed and
the epoch alone; and what is drawn for it follows from the seed and g. Of a mixture each source has the rows
of its share, and its own g, which counts them. So any step can be made without the steps before it: a run that resumes, or runs on another number of hosts, sees the very same global
batches.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.data import batch as batch_lib
from llm_jax.data import host_tensorflow
from llm_jax.data import mixture
from llm_jax.data import objectives

tf = host_tensorflow.load()

# Of the cipher behind the permutation; TensorFlow's own default. Changing it changes every run.
_SHUFFLE_ROUNDS = 4
_FOREVER = np.iinfo(np.int64).max


def train_batches(
    stage: objectives.Stage,
    data_config: config_lib.DataConfig,
    *,
    seed: int,
    start_step: int,
    rows: Sequence[int] | np.ndarray,
    num_steps: int | None = None,
) -> Iterator[batch_lib.Batch]:
    """Returns an iterator over this host's part of each training batch.

    Args:
      stage: the objective on the training split.
      data_config: batch size (global), prefetch.
      seed: of the order of items, and of what is drawn for rows.
      start_step: step of the first batch.
      rows: which rows of the global batch this host reads, each in [0, batch_size).
      num_steps: batches to make; None: no end.

    Returns:
      An iterator of batches of numpy arrays, of len(rows) rows.

    Raises:
      errors.UserError: the split is too small for one item, or rows are outside of the batch.
    """
    rows = _checked_rows(rows, data_config)
    count = _checked_items(stage)
    end_step = _FOREVER if num_steps is None else start_step + num_steps

    def items_of(step: Any) -> Any:
        global_rows = step * data_config.batch_size + tf.constant(rows)
        if isinstance(stage, mixture.Mixture):
            return _mixed(global_rows, seed, stage.parts), global_rows
        return _shuffled(global_rows, seed, count), global_rows

    steps = tf.data.Dataset.range(start_step, end_step)
    return _batches(stage, objectives.Draws(seed), data_config, steps, items_of)


def eval_batches(
    stage: objectives.Stage,
    data_config: config_lib.DataConfig,
    *,
    rows: Sequence[int] | np.ndarray,
    num_steps: int = 0,
) -> Iterator[batch_lib.Batch]:
    """Returns an iterator over a split in order; the last batch is filled up with padding rows.

    What is drawn for an item is the same in each evaluation, whatever the seed and the batch size.

    Args:
      stage: the objective on the split.
      data_config, rows: as for `train_batches`.
      num_steps: batches at most; 0: the whole split.

    Raises as `train_batches`.
    """
    rows = _checked_rows(rows, data_config)
    count = _checked_items(stage)

    def items_of(step: Any) -> Any:
        items = step * data_config.batch_size + tf.constant(rows)
        return tf.where(items < count, items, tf.constant(-1, tf.int64)), items

    steps = tf.data.Dataset.range(num_eval_steps(stage, data_config, num_steps))
    return _batches(stage, objectives.EVALUATION, data_config, steps, items_of)


def num_eval_steps(
    stage: objectives.Stage, data_config: config_lib.DataConfig, num_steps: int = 0
) -> int:
    """Returns how many batches `eval_batches` gives with the same arguments."""
    whole = -(-stage.num_items // data_config.batch_size)
    return min(whole, num_steps) if num_steps else whole


def _shuffled(numbers: Any, seed: int, count: int, source: int = 0) -> Any:
    """Returns which of `count` items each row holds: an epoch's are a permutation of all.

    This is `tf.random.experimental.index_shuffle`, whose Python wrapper fails on a matrix of
    seeds in TensorFlow 2.21: it appends the third word of the seed along the wrong axis.

    Args:
      numbers: int64 [B], of rows, counted over all epochs.
      seed: of the run.
      count: items.
      source: which of a mixture, so that two of one size are not in one order.
    """
    epochs = numbers // count
    words = [tf.fill(tf.shape(epochs), tf.constant(word, tf.int64)) for word in (seed, source)]
    return tf.raw_ops.RandomIndexShuffle(
        index=numbers % count,
        seed=tf.stack([words[0], epochs, words[1]], axis=1),
        max_index=tf.fill(tf.shape(epochs), tf.constant(count - 1, tf.int64)),
        rounds=_SHUFFLE_ROUNDS,
    )


def _mixed(numbers: Any, seed: int, parts: Sequence[mixture.Part]) -> Any:
    """Returns the items of a mixture's rows, int64 [B], counted over all its sources.

    Of the rows that the sources before have left, source k takes row n where n * share passes a whole
    number; so its count never strays from its share of those by a row.
    """
    items, left, start = tf.zeros_like(numbers), mixture.UNIT, 0
    is_open = tf.ones_like(numbers, tf.bool)
    for source, part in enumerate(parts):
        taken, after = numbers * part.share // left, (numbers + 1) * part.share // left
        is_own = is_open & (after > taken)
        items = tf.where(is_own, start + _shuffled(taken, seed, part.num_items, source), items)
        is_open = is_open & ~is_own
        numbers, left, start = numbers - taken, left - part.share, start + part.num_items
    return items


def _batches(
    stage: objectives.Stage,
    draws: objectives.Draws,
    data_config: config_lib.DataConfig,
    steps: Any,
    items_of: Callable[[Any], Any],
) -> Iterator[batch_lib.Batch]:
    """Makes the batch of each step; `items_of` gives its items and their numbers, int64 [B] each."""
    # A row of padding shows which fields there are.
    empty = stage(np.array([-1]), np.array([0]), draws)._asdict()
    fields = {name: field for name, field in empty.items() if field is not None}

    def make(items: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        made = stage(items, rows, draws)
        return [getattr(made, name) for name in fields]

    def load(step: Any) -> Any:
        items, rows = items_of(step)
        dtypes = [field.dtype for field in fields.values()]
        arrays = tf.numpy_function(make, [items, rows], dtypes, stateful=False)
        return tuple(
            tf.ensure_shape(array, (None, *field.shape[1:]))
            for array, field in zip(arrays, fields.values(), strict=True)
        )

    options = tf.data.Options()
    options.deterministic = True
    dataset = steps.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    if data_config.prefetch:
        dataset = dataset.prefetch(data_config.prefetch)
    for arrays in dataset.with_options(options).as_numpy_iterator():
        yield batch_lib.Batch(**empty | dict(zip(fields, arrays, strict=True)))


def _checked_rows(
    rows: Sequence[int] | np.ndarray, data_config: config_lib.DataConfig
) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or np.any(rows < 0) or np.any(rows >= data_config.batch_size):
        raise errors.UserError(
            f"rows {rows.tolist()} are not rows of data.batch_size = {data_config.batch_size}"
        )
    return rows


def _checked_items(stage: objectives.Stage) -> int:
    if stage.num_items == 0:
        raise errors.UserError(f"{stage.name} is too small for a single row: give it more text")
    return stage.num_items
