"""The weights that are shown are those that the model used, and pages and pictures hold them."""

import base64
import json
import re

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import errors
from llm_jax import train_step
from llm_jax.understanding import attention
from llm_jax.understanding import recording
from llm_jax.understanding import subject as subject_lib
from tests import helpers
from tests.understanding import runs

VARIANTS = {
    "grouped_qk_norm": {"use_qk_norm": True},
    "alibi_softcap": {"positions": "alibi", "num_heads": 8, "attention_softcap": 0.5},
    "kernels_window": {"attention": "pallas", "window": 6, "attention_softcap": 2.0},
    "pattern": {
        "num_layers": 3,
        "layer_pattern": "LG",
        "window": 3,
        "is_entry_normalised": True,
        "use_embedding_norm": True,
    },
    "latents": helpers.LATENTS | {"attention_softcap": 2.0},
    "experts": helpers.EXPERTS,
    "bert": helpers.BERT,
    "t5": helpers.T5,
}


# What costs most to compile, and whose masks the others have as well.
_DEAR = ("kernels_window", "experts")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.long if name in _DEAR else ()) for name in VARIANTS
    ],
)
def recorded(request):
    """A config and a batch, what its attentions did, and the model's states with and without a watch."""
    model = VARIANTS[request.param]
    names = {"encoder": "mlm", "encoder_decoder": "span_corruption"}
    objective = names.get(model.get("architecture"), "causal")
    config = helpers.tiny_run_config(model, objective={"name": objective})
    mesh, rules = helpers.make_mesh()
    model = helpers.random_model(config.model, mesh, rules)
    batch = helpers.random_batch(config)
    kinds = []

    @jax.jit
    def run(model, batch):
        plain_BTD, _ = train_step.states(config, model, batch)
        watched_BTD, found = recording.record(config, model, batch)
        kinds.extend(one.kind for one in found)
        arrays = [(one.weights_BKGTS, one.y_BTD, _output(one)) for one in found]
        return plain_BTD, watched_BTD, arrays

    with jax.set_mesh(mesh):
        states = jax.device_get(run(model, helpers.place(batch, mesh, rules)))
    return config, batch, states, kinds


def _output(one):
    """Returns what weights times values are, through the output projection."""
    _, _, v_BSKC = one.module.projected(one.x_BTD, one.context)
    return one.module.out(jnp.einsum("BKGTS,BSKC->BTKGC", one.weights_BKGTS, v_BSKC))


def test_weights_times_values_are_what_the_layer_gave(recorded):
    config, _, (plain, watched, found), kinds = recorded
    helpers.assert_close(watched, plain)
    for _, given, again in found:
        assert np.abs(given).max() > 1e-2
        helpers.assert_close(again, given)
    m = config.model
    if m.architecture == "encoder_decoder":
        in_each = ["decoder", "cross"] * m.decoder_layers
        assert kinds == ["encoder"] * m.num_layers + in_each
    else:
        assert kinds == ["self"] * m.num_layers


def test_rows_sum_to_one_and_see_what_they_may(recorded):
    config, batch, (_, _, found), kinds = recorded
    m = config.model
    for layer, (kind, (weights, _, _)) in enumerate(zip(kinds, found, strict=True)):
        own = batch.segments if kind in ("self", "decoder", "cross") else batch.encoder_segments
        keys = batch.encoder_segments if kind in ("encoder", "cross") else batch.segments
        assert weights.shape[:3] == (len(own), m.kv_heads, m.num_heads // m.kv_heads)
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
        t, s = np.arange(weights.shape[3])[:, None], np.arange(weights.shape[4])
        may = own[:, :, None] == keys[:, None, :]
        if kind == "decoder" or (kind == "self" and m.architecture == "decoder"):
            may = may & (s <= t)
        letters = m.layer_pattern or ("G" if m.window is None else "L")
        if letters[layer % len(letters)] == "L":
            may = may & (s > t - m.window)
        seen = weights.max((1, 2)) > 0
        np.testing.assert_array_equal(seen, may)


# --- the files --------------------------------------------------------------------------------


def _page_data(page):
    return json.loads(re.search(r"const data = (.*);\n", page)[1])


def test_the_page_holds_the_weights_and_needs_nothing_else(tmp_path):
    subject = subject_lib.load(runs.save(tmp_path))
    found = attention.maps(subject, runs.TEXT, layers=[1])
    files = attention.write(found, epath.Path(tmp_path / "out"), "A <title>")
    assert sorted(file.name for file in files) == [
        "attention.html",
        "attention.npz",
        "attention_self.png",
    ]
    page = (tmp_path / "out" / "attention.html").read_text()
    assert not re.search(r"https?:|<link|src=|@import", page) and page.count("</script>") == 1
    data = _page_data(page)
    assert data["title"] == "A <title>"
    (shown,) = data["maps"]
    ids = subject.tokenizer.encode(runs.TEXT)
    assert shown["layers"] == [1] and len(shown["queries"]) == len(shown["keys"]) == len(ids)
    assert shown["queries"][:3] == ["M", "y", " "]
    (kept,) = np.load(tmp_path / "out" / "attention.npz").values()
    assert kept.shape == (1, 4, len(ids), len(ids))
    packed = np.frombuffer(base64.b64decode(shown["weights"]), "<u2").reshape(kept.shape)
    np.testing.assert_allclose(packed / data["steps"], kept, atol=1e-5)
    np.testing.assert_allclose(kept.sum(-1), 1.0, atol=1e-5)
    assert (tmp_path / "out" / "attention_self.png").read_bytes().startswith(b"\x89PNG")
    # The layer that was asked for, not another: the first one's differ.
    (both,) = attention.maps(subject, runs.TEXT)
    np.testing.assert_array_equal(both.weights_LHTS[1], kept[0])
    assert np.abs(both.weights_LHTS[0] - kept[0]).max() > 0.01


@pytest.mark.long
def test_an_encoder_decoder_has_three_kinds(tmp_path):
    workdir = runs.save(tmp_path, "seq2seq", **helpers.T5)
    subject = subject_lib.load(workdir)
    found = {one.kind: one for one in attention.maps(subject, "a source", "target")}
    assert {kind: one.weights_LHTS.shape for kind, one in found.items()} == {
        "encoder": (2, 4, 9, 9),
        "decoder": (3, 4, 7, 7),
        "cross": (3, 4, 7, 9),
    }
    assert found["cross"].keys[-1] == "<eos>" and found["cross"].queries[1:] == tuple("target")
    with pytest.raises(errors.UserError, match="--target is missing"):
        attention.maps(subject, "a source")


def test_mistakes_are_told(tmp_path, monkeypatch):
    subject = subject_lib.load(runs.save(tmp_path))
    for arguments, part in (
        (("",), "has no tokens"),
        (("x" * 129,), "has 129 tokens, the model 128 positions"),
        (("x", "y"), "leave it out"),
        (("x", None, [2]), "--layers=2: a stack has the layers 0 to 1"),
    ):
        with pytest.raises(errors.UserError, match=part):
            attention.maps(subject, *arguments)
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 100)
    with pytest.raises(errors.UserError, match="128 attention weights"):
        attention.maps(subject, "four")
