"""The table of block sizes: it covers what it says, and the search improves what it starts from."""

import dataclasses

import pytest

from llm_jax import errors
from llm_jax.kernels.costing import tune
from llm_jax.kernels.flash_attention import backward_visits
from llm_jax.kernels.flash_attention import blocks
from llm_jax.kernels.flash_attention import forward_visits


def _row(device_kind, width, length, q):
    sizes = blocks.Blocks(forward_visits.Blocks(q=q))
    return blocks.Row(device_kind, width, length, sizes, {"forward": 1.0})


def test_every_row_is_found_by_its_own_width_and_length():
    for row in blocks.rows():
        assert blocks.for_device(row.device_kind, row.width, row.length) == row.blocks


@pytest.mark.parametrize("device_kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_tpus_are_known(device_kind):
    assert blocks.is_known(device_kind)
    assert blocks.for_device(device_kind, 80, 100) == blocks.for_device(device_kind, 128, 100)
    assert blocks.for_device(device_kind, 999, 10**6)


def test_an_unknown_device_is_named():
    assert not blocks.is_known("GPU")
    with pytest.raises(ValueError, match="'GPU', only for .*TPU v5 lite"):
        blocks.for_device("GPU", 64, 128)


def test_the_nearest_row_that_is_large_enough_is_taken(monkeypatch):
    table = [_row("TPU x", 64, 100, 1024), _row("TPU x", 128, 100, 2048)]
    table += [_row("TPU x", 128, 1000, 3072), _row("TPU y", 64, 100, 4096)]
    monkeypatch.setattr(blocks, "rows", lambda: tuple(table))

    def q(*size):
        return blocks.for_device("TPU x", *size).forward.q

    assert [q(64, 100), q(65, 1), q(128, 101), q(500, 9999)] == [1024, 2048, 3072, 3072]
    assert q(64, 5000) == 1024


def test_a_device_prefers_rows_of_its_own(monkeypatch):
    table = [_row("TPU v5 lite", 64, 100, 1024)]
    monkeypatch.setattr(blocks, "rows", lambda: tuple(table))
    assert blocks.for_device("TPU v5", 64, 100).forward.q == 1024
    table.append(_row("TPU v5", 64, 100, 2048))
    assert blocks.for_device("TPU v5", 64, 100).forward.q == 2048
    assert blocks.for_device("TPU v4", 64, 100).forward.q == 1024


def test_a_row_replaces_its_predecessor_in_the_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("[]")
    for row in (_row("b", 64, 8, 1024), _row("a", 64, 8, 1024), _row("b", 64, 8, 2048)):
        blocks.write_row(row, path)
    assert [(row.device_kind, row.blocks.forward.q) for row in blocks.rows(path)] == [
        ("a", 1024),
        ("b", 2048),
    ]
    assert blocks.rows(path)[1] == _row("b", 64, 8, 2048)


def test_the_search_ends_at_sizes_that_no_change_improves():
    wanted = {"open_q": 256, "masked_unroll": 4, "macro_k": 8192}

    def seconds(candidates):
        def of(sizes):
            if sizes["open_k"] == 1024:
                return float("inf")  # as if it did not compile
            return 1.0 + sum(sizes[name] != value for name, value in wanted.items())

        return [of(sizes) for sizes in candidates]

    # Open tiles are whole masked ones: to become smaller they need another change first.
    start = dataclasses.asdict(backward_visits.Blocks(masked_q=512, open_q=512))
    found, time = tune.descend("backward", [start], seconds)
    assert time == 2.0 and found["masked_unroll"] == 4 and found["macro_k"] == 8192
    better = start | {"masked_q": 256, "open_q": 256}
    found, time = tune.descend("backward", [start, better, start], seconds)
    assert time == 1.0 and wanted.items() <= found.items()


def test_sizes_that_do_not_compile_are_named_at_the_start():
    start = dataclasses.asdict(backward_visits.Blocks())
    with pytest.raises(errors.UserError, match="no backward sizes to start from compile"):
        tune.descend("backward", [start], lambda candidates: [float("inf")])
