"""How far our models are from Hugging Face's on the goldens; `python -m tests.convert.parity` writes the table.

Each check returns the largest difference that it saw, as a share of the largest number compared, and 0 where
tokens are compared and are the same.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from llm_jax import config as config_lib
from llm_jax import trees
from llm_jax.convert import engine
from llm_jax.convert import importing
from llm_jax.convert import source as source_lib
from llm_jax.models import build
from llm_jax.models import trunk as trunk_lib
from llm_jax.sampling import beams
from llm_jax.sampling import decode
from llm_jax.sampling import samplers
from tests import helpers
from tests.golden.hf import goldens

NO_EOS = -1


@dataclasses.dataclass(frozen=True)
class Imported:
    """A golden, and the model that its files convert to."""

    golden: goldens.Golden
    conversion: importing.Conversion
    model: build.Model

    @property
    def config(self) -> config_lib.ModelConfig:
        return self.model.config


@functools.cache
def load(name: str) -> Imported:
    """Returns a committed golden, converted."""
    return convert(goldens.load(name))


def convert(golden: goldens.Golden) -> Imported:
    """Returns a golden converted, in float32, on one device."""
    mesh, rules = helpers.make_mesh()
    source = source_lib.open_folder(golden.folder, has_tokenizer=False)
    conversion = importing.Conversion(source, importing.Options(has_tokenizer=False), mesh, rules)
    config = dataclasses.replace(conversion.model_config, dtype="float32")
    with jax.set_mesh(mesh):
        model = trees.from_nested(build.abstract_model(config, rules), conversion.params())
    return Imported(golden, conversion, model)


# --- one pass -------------------------------------------------------------------------------------


def _inputs(one: Imported, side: str) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """Returns the arguments of `hidden` for the golden's rows."""
    arrays = {
        key.removeprefix(f"{side}/"): jnp.asarray(value)
        for key, value in one.golden.outputs.items()
        if key.startswith(f"{side}/")
    }
    ids_BT, mask_BT = arrays["input_ids"], arrays["attention_mask"]
    places_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    if one.config.architecture == "encoder_decoder":
        own_BT = arrays["decoder_input_ids"]
        own_places_BT = jnp.broadcast_to(jnp.arange(own_BT.shape[1]), own_BT.shape)
        encoder = {
            "encoder_tokens_BS": ids_BT,
            "encoder_positions_BS": places_BT,
            "encoder_segments_BS": mask_BT,
        }
        return (own_BT, own_places_BT, jnp.ones_like(own_BT)), encoder
    if one.config.architecture == "decoder":
        places_BT = arrays["position_ids"]
    types = {"token_types_BT": arrays["token_type_ids"]} if "token_type_ids" in arrays else {}
    return (ids_BT, places_BT, mask_BT), types


def _forward(model: build.Model, args: tuple, inputs: dict[str, jax.Array]) -> jax.Array:
    x_BTD, _ = model.hidden(*args, **inputs)
    if model.config.head == "lm":
        return model.vocabulary_logits(x_BTD)
    return model.label_logits(x_BTD, args[2])


def _difference(actual: Any, wanted: Any, counts: np.ndarray | None = None) -> float:
    """Returns the largest difference of what counts, as a share of the largest number wanted."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    if counts is not None:
        actual, wanted = actual[counts], wanted[counts]
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


def _counts(one: Imported, side: str) -> np.ndarray | None:
    """Returns which positions of the logits are of text; None: all."""
    if one.config.architecture == "encoder_decoder" or one.config.head == "sequence":
        return None
    return one.golden.outputs[f"{side}/attention_mask"] > 0


def logits(one: Imported) -> float:
    """Compares the logits of rows padded on either side."""
    differences = []
    # A classifier reads the first token, which padding on the left would be.
    for side in ("right",) if one.config.head == "sequence" else ("right", "left"):
        with jax.set_mesh(helpers.make_mesh()[0]):
            actual = jax.jit(_forward)(one.model, *_inputs(one, side))
        wanted = one.golden.outputs[f"{side}/logits"]
        differences.append(_difference(actual, wanted, _counts(one, side)))
    return max(differences)


@jax.jit
def _states(trunk: trunk_lib.Trunk, x_BTD: jax.Array, contexts: tuple) -> list[jax.Array]:
    """Returns what enters the first layer, what each gives, and the final norm of the last."""
    states = [x_BTD]
    for index, block in enumerate(trunk.stack.unstacked()):
        is_normalised = jnp.asarray(index == 0) if trunk.config.is_entry_normalised else None
        context = contexts[index % len(contexts)]
        states.append(block(states[-1], context, is_normalised=is_normalised)[0])
    states[-1] = trunk.normalise(states[-1])
    return states


def hidden(one: Imported) -> float:
    """Compares the states between all layers."""
    model, (args, inputs) = one.model, _inputs(one, "right")
    with jax.set_mesh(helpers.make_mesh()[0]):
        if one.config.architecture != "encoder_decoder":
            mask = trunk_lib.segments_mask(args[2], model.rules)
            x_BTD = model.embed(args[0], args[1], *inputs.values())
            kinds = {"hidden": _states(model, x_BTD, model.contexts(args[1], mask))}
        else:
            ids_BS, places_BS, segments_BS = inputs.values()
            mask = trunk_lib.segments_mask(segments_BS, model.rules)
            x_BSD = model.encoder.enter(model.embedding(ids_BS, "float32"), places_BS)
            encoder = _states(model.encoder, x_BSD, model.encoder.contexts(places_BS, mask))
            cross = model.cross_mask(segments_BS, args[0], args[2])
            contexts = model.decoder.contexts(args[1])
            contexts = model.with_encoder(contexts, encoder[-1], cross, args[1])
            decoder = _states(model.decoder, model.embed(args[0], args[1]), contexts)
            kinds = {"encoder": encoder, "decoder": decoder}
    differences = []
    text = one.golden.outputs["right/attention_mask"] > 0
    for kind, states in kinds.items():
        counts = None if kind == "decoder" else text
        assert f"{kind}/{len(states)}" not in one.golden.outputs
        for index, state in enumerate(states):
            wanted = one.golden.outputs[f"{kind}/{index}"]
            differences.append(_difference(state, wanted, counts))
    return max(differences)


def _loss(model, args, inputs, counts, targets) -> jax.Array:
    """Returns the mean cross-entropy where `counts`, as the goldens' script takes it."""
    log_p = jax.nn.log_softmax(_forward(model, args, inputs))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counts, chosen, 0.0)) / jnp.sum(counts)


def gradients(one: Imported) -> float:
    """Compares the loss, and its gradient for every tensor, by Hugging Face's names."""
    outputs, (args, inputs) = one.golden.outputs, _inputs(one, "right")
    targets, mask = outputs["targets"], outputs["right/attention_mask"] > 0
    if one.config.head == "sequence":
        targets, counts = targets[:, 0] % one.config.num_labels, np.ones(len(targets), bool)
    elif one.config.architecture == "encoder_decoder":
        targets = targets[:, : args[0].shape[1]]
        counts = np.ones(targets.shape, bool)
    elif one.config.architecture == "encoder":
        counts = mask
    else:
        ids = outputs["right/input_ids"]
        targets = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        counts = np.concatenate([mask[:, 1:], np.zeros_like(mask[:, :1])], axis=1)
    with jax.set_mesh(helpers.make_mesh()[0]):
        run = jax.jit(jax.value_and_grad(_loss))
        loss, grads = run(one.model, args, inputs, jnp.asarray(counts), jnp.asarray(targets))
        plan = engine.Plan(one.conversion.family, one.config, grads)
        ours = {key: engine.theirs(plan, key) for key in plan.slots}
    prefix = "gradient/"
    wanted = {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)}
    # Buffers have no gradient there.
    beside = {key for key in set(ours) - set(wanted) if not key.endswith("e_score_correction_bias")}
    assert set(wanted) <= set(ours) and beside <= {"final_logits_bias"}
    largest = max(np.abs(value).max() for value in wanted.values())
    differences = [abs(float(loss) - float(outputs["loss"].item())) / float(outputs["loss"].item())]
    for key, value in wanted.items():
        # Of gradients that are zero but for rounding (key biases), a share of the largest in the model.
        scale = max(np.abs(value).max(), 0.01 * largest)
        differences.append(float(np.abs(ours[key] - value).max() / scale))
    return max(differences)


# --- text -----------------------------------------------------------------------------------------


def _prompts(one: Imported) -> tuple[decode.CachedModel, tuple]:
    """Returns a model ready to generate, and what it is given: prompts, where they begin, an encoder's."""
    outputs, model = one.golden.outputs, decode.prepare_model(one.model)
    mesh, rules = helpers.make_mesh()

    def place(array, dims):
        target = jax.sharding.NamedSharding(mesh, rules.act(dims))
        return jax.device_put(np.asarray(array, np.int32), target)

    if one.config.architecture == "encoder_decoder":
        ids, lengths = outputs["right/input_ids"], outputs["right/attention_mask"].sum(1)
        encoded = decode.encode(model, place(ids, "BS"), place(lengths, "B"))
        first = np.full((len(ids), 1), one.config.decoder_start_id)
        return model, (place(first, "BT"), place(np.zeros(len(ids)), "B"), encoded)
    ids, mask = outputs["left/input_ids"], outputs["left/attention_mask"]
    return model, (place(ids, "BT"), place(ids.shape[1] - mask.sum(1), "B"), None)


def _assert_same_text(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Compares ids; Hugging Face's end where no row has more."""
    np.testing.assert_array_equal(actual[:, : wanted.shape[1]], wanted)
    assert not actual[:, wanted.shape[1] :].any()  # padding


def greedy(one: Imported) -> float:
    """Compares greedy text, with an end and without, token by token."""
    outputs = one.golden.outputs
    num_tokens = goldens.NUM_NEW_TOKENS
    with jax.set_mesh(helpers.make_mesh()[0]):
        model, (tokens_BT, starts_B, encoded) = _prompts(one)
        keys_B = jax.random.split(jax.random.key(0), len(starts_B))
        for key, eos_id in (("greedy_free", NO_EOS), ("greedy", int(outputs["eos_id"].item()))):
            how = {
                "params": samplers.SamplingParams(temperature=0.0),
                "eos_id": eos_id,
                "pad_id": 0,
            }
            slots = tokens_BT.shape[1] + num_tokens
            state = decode.prefill(
                model, tokens_BT, starts_B, keys_B, encoded, num_slots=slots, **how
            )
            first_B = np.asarray(state.last_B)
            _, rest_NB = decode.decode(model, state, num_tokens=num_tokens - 1, **how)
            actual = np.concatenate([first_B[:, None], np.asarray(rest_NB).T], axis=1)
            _assert_same_text(actual, outputs[key])
    return 0.0


def beam_search(one: Imported) -> float:
    """Compares the texts of beam search token by token, and returns how far their scores are apart."""
    outputs = one.golden.outputs
    eos_id, differences = int(outputs["eos_id"].item()), []
    with jax.set_mesh(helpers.make_mesh()[0]):
        model, prompts = _prompts(one)
        for key in sorted({key.rpartition("/")[0] for key in outputs if key.startswith("beams/")}):
            _, stopping, penalty = key.split("/")
            stopping = {"false": False, "true": True, "never": "never"}[stopping]
            found = beams.search(
                model,
                *prompts,
                params=beams.BeamParams(4, float(penalty), stopping),
                eos_id=eos_id,
                pad_id=0,
                num_tokens=goldens.NUM_NEW_TOKENS,
                max_tokens=goldens.NUM_NEW_TOKENS,
            )
            ids, scores = outputs[f"{key}/ids"], outputs[f"{key}/scores"]
            # Theirs fills up with the end, where padding is id 0.
            is_after = np.cumsum(ids == eos_id, axis=1) - (ids == eos_id) > 0
            wanted = np.where(is_after, 0, ids)
            ours = np.asarray(found.tokens_BQN[:, :2]).reshape(len(ids), -1)
            _assert_same_text(ours, wanted)
            differences.append(_difference(found.scores_BQ[:, :2].reshape(-1), scores))
    return max(differences)


# --- the table ------------------------------------------------------------------------------------


def export(one: Imported) -> float:
    """Compares what the converted model is written back as with the golden's own tensors, bit by bit."""
    plan = engine.Plan(one.conversion.family, one.config, one.model)
    theirs = safetensors_numpy.load_file(one.golden.folder / "model.safetensors")
    written = {one.conversion.naming.spelled(key, one.conversion.family) for key in plan.slots}
    assert written <= set(theirs) and set(theirs) - written <= set(plan.extras())
    for key in plan.slots:
        value = engine.theirs(plan, key)
        wanted = theirs[one.conversion.naming.spelled(key, one.conversion.family)]
        assert value.dtype == wanted.dtype and value.tobytes() == wanted.tobytes(), key
    return 0.0


@dataclasses.dataclass(frozen=True)
class Check:
    """A column of the table: what is compared, for which variants, and how far apart it may be."""

    compare: Callable[[Imported], float]
    names: tuple[str, ...]
    tolerance: float


_GENERATING = goldens.DECODERS + goldens.ENCODER_DECODERS
CHECKS = {
    "import and export": Check(export, goldens.NAMES, 0.0),
    "logits": Check(logits, goldens.NAMES, 1e-5),
    "hidden states": Check(hidden, goldens.NAMES, 1e-5),
    # Both sides round: up to 3.7e-5 was seen, in norms' scales of a few rows.
    "gradients": Check(gradients, goldens.NAMES, 5e-5),
    "greedy text": Check(greedy, _GENERATING, 0.0),
    "beam search": Check(beam_search, goldens.WITH_BEAMS, 1e-5),
}
TABLE = pathlib.Path(__file__).parents[2] / "llm_jax" / "convert" / "README.md"
_MARK = "<!-- python -m tests.convert.parity -->"


def table() -> str:
    """Returns the table: a row for each variant, a column for each check."""
    lines = ["| model | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    for name in goldens.NAMES:
        cells = [name]
        for check in CHECKS.values():
            if name not in check.names:
                cells.append("-")
                continue
            difference = check.compare(load(name))
            assert difference <= check.tolerance, (name, cells, difference)
            cells.append("same" if check.tolerance == 0.0 else f"{difference:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, _, rest = TABLE.read_text().partition(_MARK)
    _, _, after = rest.partition(_MARK)
    TABLE.write_text(f"{before}{_MARK}\n{table()}{_MARK}{after}")


if __name__ == "__main__":
    main()
