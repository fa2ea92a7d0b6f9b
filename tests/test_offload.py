"""What waits in host memory: the optimiser's state, what layers keep; equal results, on any mesh."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import train_step
from llm_jax.aot import steps
from llm_jax.aot import topology
from tests import helpers

TOKENIZER = {"kind": "bytes"}


def _config(**changes):
    sections = {"optim": {"warmup_steps": 0, "epsilon": 1e-3} | changes.pop("optim", {})}
    return helpers.tiny_run_config(changes.pop("model", None), **sections, **changes)


def _run(config, shape=(1, 2, 1, 1, 2), num_steps=3):
    """Returns the state after some steps, where it lies."""
    mesh, rules = helpers.make_mesh(shape, "fsdp_tp")
    batch = helpers.place(helpers.random_batch(config), mesh, rules)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: train_step.init_state(config, rules))()
        places = [leaf.sharding for leaf in jax.tree.leaves(state)]
        step = train_step.make_train_step(config)
        for _ in range(num_steps):
            state, _ = step(state, batch)
        assert step._cache_size() == 1, "the second step compiles again"
        abstract = train_step.abstract_state(config, rules)
    # State stays where it was born, and is known beforehand to lie there.
    for leaf, place, known in zip(*map(jax.tree.leaves, (state, places, abstract)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert leaf.sharding.memory_kind == place.memory_kind
        if known.sharding is not None:
            assert known.sharding.memory_kind in (None, place.memory_kind)
    return state


def _kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        *(
            pytest.param(x, marks=pytest.mark.long)
            for x in ("muon", "adafactor", "soap", "schedule_free")
        ),
    ],
)
def test_an_update_is_the_same_with_its_state_in_host_memory(name):
    optim = {"name": name, "schedule": "constant"}
    wanted = _run(_config(optim=optim))
    state = _run(_config(optim=optim | {"offload_state": True}))
    assert _kinds(state.opt_state) == {"pinned_host"}
    assert _kinds(state.model) == _kinds(wanted) == {"device"}
    helpers.assert_equal(jax.tree.leaves(state), jax.tree.leaves(wanted))


def test_a_skipped_update_leaves_the_state_in_host_memory_as_it_was():
    optim = {"offload_state": True, "learning_rate": 1e38, "clip_norm": None}
    config = _config(optim=optim, train={"on_nonfinite": "skip"})
    state = _run(config, (1, 1, 1, 1, 1), num_steps=3)
    assert int(state.num_skipped) >= 1
    assert _kinds(state.opt_state) == {"pinned_host"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_checkpoints_restore_where_the_config_wants_the_state(tmp_path):
    config = _config(optim={"offload_state": True})
    state = _run(config)
    manager = checkpoint.Checkpoints(str(tmp_path), config, TOKENIZER)
    mesh, rules = helpers.make_mesh((1, 2, 1, 1, 2), "fsdp_tp")
    with jax.set_mesh(mesh):
        manager.save(state)
    manager.close()
    for is_offloaded, kind in ((True, "pinned_host"), (False, "device")):
        optim = dataclasses.replace(config.optim, offload_state=is_offloaded)
        wanted = dataclasses.replace(config, optim=optim)
        mesh, rules = helpers.make_mesh((1, 4, 1, 1, 1), "fsdp")
        manager = checkpoint.Checkpoints(str(tmp_path), wanted, TOKENIZER)
        with jax.set_mesh(mesh):
            abstract = train_step.abstract_state(wanted, rules)
            restored = manager.restore_latest(abstract, mesh)
        manager.close()
        assert _kinds(restored.opt_state) == {kind} and _kinds(restored.model) == {"device"}
        helpers.assert_equal(jax.tree.leaves(restored), jax.tree.leaves(state))


# --- compiled for a slice -------------------------------------------------------------------------

_LAYERS, _WIDTH, _LENGTH, _ROWS = 8, 512, 8192, 2


def _program(is_offloaded):
    """Compiles a step of a ring for a slice."""
    config = config_lib.RunConfig(
        model=config_lib.ModelConfig(
            num_layers=_LAYERS,
            embed_dim=_WIDTH,
            num_heads=4,
            num_kv_heads=2,
            head_dim=128,
            vocab_size=1024,
            max_length=_LENGTH,
            remat="offload" if is_offloaded else "attention_output",
        ),
        data=config_lib.DataConfig(batch_size=_ROWS, sequence_length=_LENGTH, packing="concat"),
        optim=config_lib.OptimConfig(offload_state=is_offloaded),
        train=config_lib.TrainConfig(cross_entropy="chunked"),
        mesh=config_lib.MeshConfig(data=1, seq=4, rules="fsdp_cp", context="ring"),
    )
    config_lib.check(config)
    devices = topology.devices("v5e:2x2")
    return steps.train_step(devices, config=config_lib.to_dict(config)).compile()


@pytest.mark.long
@pytest.mark.skipif(not topology.is_available(), reason="libtpu is not installed")
def test_a_slice_keeps_state_and_residuals_in_host_memory_and_passes_keys_meanwhile():
    plain, compiled = _program(False), _program(True)
    before, after = plain.memory_analysis(), compiled.memory_analysis()
    assert before.host_argument_size_in_bytes == before.host_temp_size_in_bytes == 0
    # Two moments in float32 for each parameter, but for what vectors share.
    moments = after.host_argument_size_in_bytes
    assert moments == pytest.approx(before.argument_size_in_bytes - after.argument_size_in_bytes)
    assert 0.6 < moments / before.argument_size_in_bytes < 0.7
    # What a layer begins with and what its attention gives, in bfloat16.
    residuals = 2 * _LAYERS * (_ROWS * _LENGTH // 4) * _WIDTH * 2
    assert after.host_temp_size_in_bytes == pytest.approx(residuals, rel=0.05)
    totals = (x.argument_size_in_bytes + x.temp_size_in_bytes for x in (before, after))
    assert next(totals) - next(totals) > 0.9 * moments
    # Keys of others are under way while the kernels attend to those at hand, forward and back.
    keys = f"bf16[{_ROWS},{_LENGTH // 4},2,128]"
    bodies = [
        body
        for body in re.split(r"\n(?=%|ENTRY )", compiled.as_text())
        # Layers hold the loop of a ring; a turn of that holds no other.
        if " conditional(" in body and "permute-start(" in body and " while(" not in body
    ]
    for kernel in ("flash_attention_forward", "flash_attention_backward"):
        assert any(kernel in body for body in bodies), kernel
    for body in bodies:
        begins = re.search(rf"\({re.escape(keys)}.* collective-permute-start\(", body).start()
        assert begins < body.index(" conditional(") < body.rindex(" collective-permute-done(")
