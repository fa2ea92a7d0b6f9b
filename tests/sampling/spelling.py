"""A tiny model that spells out a fixed order of letters, for tests that need to know the text."""

import jax
import numpy as np

from llm_jax.models import build
from tests import helpers

# Each byte has one successor, so greedy text is known: it goes round until something ends it.
# The characters take 1, 2, 3 and 4 bytes, and no byte comes up twice.
CIRCLE = "né日🎉x "
LETTERS = CIRCLE.encode()
ENDING = "qu"  # after u comes the end of the text


def spelling_config(**changes):
    sizes = {"num_layers": 1, "embed_dim": 256, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 1}
    parts = {"positions": "none", "tie_embeddings": False, "vocab_size": 256, "max_length": 128}
    return helpers.tiny_model_config(**(sizes | parts | changes))


def spelling_model(config, mesh, rules):
    """A decoder whose blocks add nothing and whose head looks the last byte's successor up."""
    successor = dict(zip(LETTERS, LETTERS[1:] + LETTERS[:1]))
    successor |= {ord("q"): ord("u"), ord("u"): 0, 0: LETTERS[0]}
    head_DV = np.zeros((256, 256), np.float32)
    for byte, following in successor.items():
        head_DV[byte, following] = 1.0

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        array = np.ones(leaf.shape) if "scale" in name else np.zeros(leaf.shape)
        if "table_VD" in name:
            array = np.eye(256)
        if "head_DV" in name:
            array = head_DV
        target = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.device_put(array.astype(np.float32), target)

    return jax.tree_util.tree_map_with_path(value, build.abstract_model(config, rules))
