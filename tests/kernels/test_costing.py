"""What is said of an attention in numbers and words, and the tables made of that."""

import dataclasses

import jax
import numpy as np
import pytest

from llm_jax.kernels.costing import accuracy
from llm_jax.kernels.costing import peers
from llm_jax.kernels.costing import shapes
from llm_jax.kernels.costing import tables
from llm_jax.kernels.flash_attention import masks


@pytest.mark.parametrize(
    "mask", ["causal", "full", "window 3", "window 40", "packed 4", "packed 9"]
)
def test_pairs_are_those_of_the_mask(mask):
    shape = shapes.Attention(batch=2, length=11, heads=3, mask=mask)
    place = np.arange(shape.length)
    allowed = np.asarray(masks.allowed_BTS(shape.make_mask(), place, place))
    one_row = allowed.sum() / allowed.shape[0]
    assert shape.num_pairs == one_row * shape.batch * shape.heads


@pytest.mark.parametrize(
    "mask, tiles", [("full", 16), ("causal", 10), ("window 256", 7), ("packed 512", 6)]
)
def test_tiles_are_those_with_a_pair(mask, tiles):
    assert shapes.Attention(batch=2, length=1024, heads=3, mask=mask).num_tiles == tiles * 2 * 3


@pytest.mark.parametrize("mask", ["casual", "window", "window 0", "packed x", "causal 3"])
def test_an_unknown_mask_is_named(mask):
    with pytest.raises(ValueError, match=f"mask '{mask}' is none of"):
        shapes.Attention(batch=1, length=8, mask=mask).make_mask()


def test_bytes_and_flops_grow_with_what_is_asked():
    one = shapes.Attention(batch=1, length=8, heads=4, width=16)
    qkv_and_result, statistic = 4 * 8 * 4 * 16 * 2, 8 * 4 * 4
    assert one.least_bytes == qkv_and_result + statistic
    assert dataclasses.replace(one, key_heads=2).least_bytes == one.least_bytes - 8 * 2 * 2 * 16 * 2
    assert one.flops == 2 * 2 * 16 * one.num_pairs
    both = dataclasses.replace(one, has_gradient=True)
    assert both.flops == 7 * 2 * 16 * one.num_pairs
    assert both.least_bytes > 2 * one.least_bytes


def test_peers_are_asked_only_for_what_they_have():
    causal = shapes.Attention(batch=1, length=2048)
    names = {setting.peer for setting in peers.settings(causal)}
    assert {"jax flash", "jax splash"} <= names
    assert not peers.settings(dataclasses.replace(causal, bias="t5"))
    assert not peers.settings(dataclasses.replace(causal, mask="packed 512"))
    assert not peers.settings(dataclasses.replace(causal, length=2000))
    windowed = {
        setting.peer for setting in peers.settings(dataclasses.replace(causal, mask="window 9"))
    }
    assert "jax flash" not in windowed and "jax splash" in windowed


@pytest.mark.slow
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_errors_are_those_of_the_dtype(dtype, limit):
    shape = shapes.Attention(
        1, 256, heads=2, key_heads=1, softcap=20.0, has_sinks=True, dtype=dtype
    )
    ours = accuracy.of_ours(shape, "TPU v6 lite")
    splash = accuracy.of_peer(
        peers.Setting("jax splash", (128, 128, 128)), dataclasses.replace(shape, key_heads=None)
    )
    for errors in (ours, splash):
        assert 0 < errors.result < limit and 0 < errors.gradient < 2 * limit


def test_an_error_is_seen():
    shape = shapes.Attention(1, 128, heads=1)

    def attend(arrays):
        return jax.numpy.zeros_like(arrays["v"])

    assert accuracy.errors(shape, attend).result == pytest.approx(1.0)


def test_tables_are_markdown():
    assert tables.table(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
