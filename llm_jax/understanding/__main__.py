"""Shows what a model does with a text, what it has kept of its data, and what it cost.

    python -m llm_jax.understanding attention --workdir=RUN --text='My fellow citizens'
    python -m llm_jax.understanding tokens --workdir=RUN --text='My fellow citizens'
    python -m llm_jax.understanding bias --workdir=RUN
    python -m llm_jax.understanding memorisation --workdir=RUN --samples=out.jsonl
    python -m llm_jax.understanding energy --workdir=RUN --hours=12 --grid=0.1

What is found goes to WORKDIR/understanding/STEP, or to `--output`; of energy to WORKDIR/understanding.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

from absl import flags
from etils import epath

from llm_jax import checkpoint
from llm_jax import command
from llm_jax import errors
from llm_jax.data import prepare
from llm_jax.sampling import load
from llm_jax.understanding import attention
from llm_jax.understanding import bias
from llm_jax.understanding import energy
from llm_jax.understanding import memorisation
from llm_jax.understanding import subject as subject_lib
from llm_jax.understanding import tokens

_OVERRIDES = ("watts", *energy.ASSUMPTIONS)


def define_flags() -> None:
    command.define_argument("WHAT", f"What to show: {', '.join(_COMMANDS)}.")
    command.define_workdir("Folder of the run that is looked at.")
    flags.DEFINE_string("step", None, "Checkpoint: its step, or `best`; the latest if not given.")
    flags.DEFINE_string("output", None, "Folder for what is found, instead of one in the workdir.")
    flags.DEFINE_string("text", None, "Of attention and tokens: what the model reads.")
    flags.DEFINE_string("file", None, "Of attention and tokens: a file with that text instead.")
    flags.DEFINE_string("target", None, "Of attention, encoder-decoders: what the decoder writes.")
    flags.DEFINE_list("layers", None, "Of attention: numbers of layers, from 0; all if not given.")
    flags.DEFINE_integer("num_prompts", 256, "Of memorisation: of each split.", 1)
    flags.DEFINE_integer("prompt_tokens", 50, "Of memorisation: of a prompt.", 1)
    flags.DEFINE_string("samples", None, "Of memorisation: JSONL file of texts to find, as well.")
    flags.DEFINE_integer("chips", None, "Of energy: those of the config's slice if not given.", 1)
    flags.DEFINE_float("hours", None, "Of energy: those of metrics.jsonl if not given.", 0.0)
    for name in _OVERRIDES:
        flags.DEFINE_float(name, None, "Of energy: see llm_jax.understanding.energy.")


def main() -> None:
    name = command.argument("WHAT")
    if name not in _COMMANDS:
        hint = errors.nearest(name, _COMMANDS)
        raise errors.UserError(f"{name!r} is nothing to show{hint}: use {', '.join(_COMMANDS)}")
    _COMMANDS[name]()


def _folder(step: int | None) -> epath.Path:
    """Returns where what is found goes."""
    if flags.FLAGS.output is not None:
        return epath.Path(flags.FLAGS.output).expanduser()
    folder = epath.Path(command.required("workdir")) / "understanding"
    return folder if step is None else folder / str(step)


def _say(text: str, files: Sequence[epath.Path]) -> None:
    print(text, end="")
    for file in files:
        print(file, file=sys.stderr)


def _step() -> int | str | None:
    return checkpoint.parse_step(flags.FLAGS.step)


def _text() -> str:
    given = flags.FLAGS
    if given.file is None:
        return command.required("text")
    if given.text is not None:
        raise errors.UserError("--text and --file both give the text: leave one of them out")
    path = pathlib.Path(given.file).expanduser()
    if not path.is_file():
        raise errors.UserError(f"--file={given.file}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise errors.UserError(f"--file={given.file} is no UTF-8: {error}") from error


def _layers() -> list[int] | None:
    given = flags.FLAGS.layers
    if given is None:
        return None
    for layer in given:
        if not (layer.isascii() and layer.isdigit()):
            raise errors.UserError(f"--layers={','.join(given)}: {layer!r} is no number of a layer")
    return [int(layer) for layer in given]


def _title(what: str, subject: subject_lib.Subject) -> str:
    return f"{what}: {command.required('workdir')}, step {subject.step}"


def _attention() -> None:
    text, layers = _text(), _layers()
    subject = subject_lib.load(command.required("workdir"), _step())
    found = attention.maps(subject, text, flags.FLAGS.target, layers)
    files = attention.write(found, _folder(subject.step), _title("Attention", subject))
    for one in found:
        count, heads, num_queries, num_keys = one.weights_LHTS.shape
        _say(f"{one.kind}: {count} layers, {heads} heads, {num_queries} x {num_keys} tokens\n", ())
    _say("", files)


def _tokens() -> None:
    text = _text()
    subject = subject_lib.load(command.required("workdir"), _step())
    found = tokens.score(subject, text)
    files = tokens.write(found, _folder(subject.step), _title("Losses of tokens", subject))
    _say(f"{found.num_scored} tokens, {found.loss:.4f} nats a token\n", files)


def _bias() -> None:
    subject = subject_lib.load(command.required("workdir"), _step())
    found = bias.score(subject)
    _say(bias.table(found), bias.write(found, _folder(subject.step), subject.step))


def _memorisation() -> None:
    given, workdir = flags.FLAGS, command.required("workdir")
    samples = None if given.samples is None else memorisation.read_samples(given.samples)
    meta = checkpoint.read_latest(workdir, _step(), lambda _, meta: meta)
    memorisation.check(meta.config)
    prepared = prepare.prepare(meta.config)
    loaded = load.load(workdir, meta.step)
    sizes = given.num_prompts, given.prompt_tokens
    found = memorisation.measure(loaded, prepared.train, prepared.eval, *sizes)
    if samples is not None:
        ids = loaded.tokenizer.encode_batch(samples)
        found["samples"] = memorisation.overlap(ids, prepared.train.tokens, loaded.tokenizer)
    files = memorisation.write(found, _folder(loaded.step), loaded.step)
    _say(memorisation.table(found), files)


def _energy() -> None:
    given = flags.FLAGS
    found = energy.estimate(
        command.required("workdir"),
        chips=given.chips,
        hours=given.hours,
        overrides={name: given[name].value for name in _OVERRIDES},
    )
    _say(energy.table(found), energy.write(found, _folder(None)))
    print(json.dumps({"kwh": found.kwh, "kg_co2e": found.kg_co2e}))


_COMMANDS = {
    "attention": _attention,
    "tokens": _tokens,
    "bias": _bias,
    "memorisation": _memorisation,
    "energy": _energy,
}


if __name__ == "__main__":
    command.run(main, define_flags)
