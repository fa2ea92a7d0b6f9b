"""A host batch on a mesh: each field where its dimensions lie, whatever fields there are."""

import jax
import numpy as np
import pytest

from llm_jax.data import batch as batch_lib
from llm_jax.data import placement
from tests import helpers

BATCH, LENGTH, ENCODER_LENGTH = 4, 8, 16


def _batch(**fields):
    rng = np.random.default_rng(0)
    five = [rng.integers(0, 99, (BATCH, LENGTH)).astype(np.int32) for _ in range(5)]
    made = batch_lib.Batch(*five)
    return made._replace(**{k: rng.integers(0, 99, s).astype(np.int32) for k, s in fields.items()})


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 1, 1, 2), (2, 1, 2, 1, 1)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"token_types": (BATCH, LENGTH), "targets": (BATCH,), "weights": (BATCH,)},
        {"targets": (BATCH, 2), "weights": (BATCH,)},
        {"encoder_tokens": (BATCH, ENCODER_LENGTH), "encoder_segments": (BATCH, ENCODER_LENGTH)},
    ],
)
def test_fields_arrive(shape, fields):
    rules_name = "fsdp_cp" if shape[2] > 1 else "fsdp"
    mesh, rules = helpers.make_mesh(shape, rules_name)
    sharding = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    host = _batch(**fields)
    placed = placement.to_mesh(host, sharding, BATCH, np.arange(BATCH))
    for name, mine, theirs in zip(batch_lib.Batch._fields, placed, host, strict=True):
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            np.testing.assert_array_equal(mine, theirs, name)
            is_label = theirs.shape[1:] not in ((LENGTH,), (ENCODER_LENGTH,))
            expected = rules.act("B") if is_label else rules.act("BT")
            assert mine.sharding.is_equivalent_to(
                jax.sharding.NamedSharding(mesh, expected), theirs.ndim
            ), name
