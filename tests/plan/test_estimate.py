"""The estimate agrees with the compiler where that was asked, and moves the right way elsewhere."""

import dataclasses

import pytest

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.plan import budgets
from llm_jax.plan import estimate as estimate_lib

_LLAMA = budgets.Entry("llama_7b", "v5e:4x8")


def _changed(config, section, **fields):
    part = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: part})


@pytest.mark.parametrize("entry", budgets.ENTRIES, ids=lambda entry: entry.name)
def test_memory_is_within_a_third_of_the_compilers(entry):
    estimate = estimate_lib.estimate(entry.config(), entry.slice_name)
    for figures in budgets.load().values():
        if entry.name in figures:
            actual = figures[entry.name]["hbm_bytes"]
            assert 3 / 4 < estimate.peak / actual < 4 / 3


def test_parameters_and_optimiser_are_exact():
    estimate = estimate_lib.estimate(_LLAMA.config(), _LLAMA.slice_name)
    num_params = 6_738_415_616
    # Norm scales are whole on each chip, all else is cut 32 ways.
    scales = 65 * 4096
    assert estimate.parameters == 4 * ((num_params - scales) // 32 + scales)
    assert estimate.optimiser == pytest.approx(2 * estimate.parameters, rel=1e-6)


@pytest.mark.parametrize(
    ("section", "fields", "less"),
    [
        ("model", {"remat": "dots"}, None),
        ("model", {"remat": "offload"}, "saved"),
        ("optim", {"accumulation_steps": 32}, "saved"),
        ("optim", {"offload_state": True}, "optimiser"),
        ("mesh", {"tensor": 4, "rules": "fsdp_tp"}, "loss"),
        ("mesh", {"seq": 2}, None),
        ("train", {"cross_entropy": "chunked"}, "loss"),
    ],
)
def test_settings_move_memory_as_they_should(section, fields, less):
    config = _LLAMA.config()
    before = estimate_lib.estimate(config, _LLAMA.slice_name)
    after = estimate_lib.estimate(_changed(config, section, **fields), _LLAMA.slice_name)
    if less is not None:
        assert getattr(after, less) < getattr(before, less)
    elif section == "model":
        assert after.saved > before.saved
    else:  # a batch cut along the sequence instead of the rows is the same share of it
        assert after.saved == before.saved


def test_what_does_not_learn_has_no_gradients_and_no_moments():
    config = _LLAMA.config()
    lora = config_lib.LoraConfig(rank=8, targets="*")
    before = estimate_lib.estimate(config, _LLAMA.slice_name)
    after = estimate_lib.estimate(_changed(config, "model", lora=lora), _LLAMA.slice_name)
    # The outputs of updates have no width that is cut over devices.
    assert after.gradients < 0.1 * before.gradients
    assert after.optimiser < 0.1 * before.optimiser
    assert before.parameters < after.parameters < 1.1 * before.parameters


def test_latents_are_kept_beside_what_they_are_expanded_to():
    """And queries, keys and values of their own widths, cut by heads where latents are not."""
    latents = {"kv_latent_dim": 512, "q_latent_dim": 768, "rope_head_dim": 64}
    config = _changed(_LLAMA.config(), "model", **latents, value_head_dim=96)
    for tensor in (1, 4):
        mesh = {"tensor": tensor, "rules": "fsdp_tp"}
        one = _changed(config, "mesh", **mesh)
        saved = {
            remat: estimate_lib.estimate(
                _changed(one, "model", remat=remat), _LLAMA.slice_name
            ).saved
            for remat in ("full", "qkv", "dots")
        }
        m, data, optim = one.model, one.data, one.optim
        tokens = data.batch_size * data.sequence_length // optim.accumulation_steps // 32 * tensor
        number = 2 * tokens * m.num_layers
        qkv = m.num_heads * (2 * (m.head_width + 64) + 96) // tensor
        assert saved["qkv"] - saved["full"] == number * qkv
        products = 2 * m.embed_dim + qkv + 2 * m.mlp_width // tensor + 512 + 64 + 768
        assert saved["dots"] - saved["full"] == number * products


def test_a_batch_that_does_not_divide_is_refused():
    config = _changed(_LLAMA.config(), "data", batch_size=1000)
    config = _changed(config, "optim", accumulation_steps=1)
    with pytest.raises(errors.UserError, match="data.batch_size"):
        estimate_lib.estimate(config, _LLAMA.slice_name)


def test_a_mesh_of_another_size_is_refused():
    config = _changed(config_lib.RunConfig(), "mesh", data=3)
    with pytest.raises(errors.UserError, match="config.mesh"):
        estimate_lib.estimate(config, "v5e:2x2")
