"""TensorFlow, for input pipelines on the host alone."""

from collections.abc import Iterator
import contextlib
import os
import types


def load() -> types.ModuleType:
    """Imports TensorFlow (which takes seconds) and hides the accelerators from it.

    JAX owns the accelerators: TensorFlow would claim their memory, or fail on a TPU in use.
    """
    # Without these TensorFlow tells every user what it was compiled for, and that oneDNN, which
    # reading batches has no use for, may round differently.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with _without_keras():
        import tensorflow as tf

    for kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(kind):
            tf.config.set_visible_devices([], kind)
    return tf


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Keeps TensorFlow from importing Keras, and what Keras imports, with it: two seconds of a start.

    Told that its predecessor is wanted, which nobody installed, TensorFlow imports neither. With the
    setting gone again `tf.keras` is Keras as ever, from when it is first asked for.
    """
    name = "TF_USE_LEGACY_KERAS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
