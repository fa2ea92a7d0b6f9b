"""TensorFlow, for input pipelines on the host alone."""

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
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(kind):
            tf.config.set_visible_devices([], kind)
    return tf
