"""Measures one case in this process and prints a row of JSON; `cpu_speed.py` starts it.

python tests/benchmarks/worker.py --case=train_char
"""

import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from llm_jax import backend  # noqa: E402

backend.set_flags()
backend.keep_freed_memory()

from absl import app  # noqa: E402
from absl import flags  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs import bert_base  # noqa: E402
from configs import char  # noqa: E402
from configs import gpt2_124m  # noqa: E402
from configs import t5_base  # noqa: E402
from llm_jax import config as config_lib  # noqa: E402
from llm_jax import mesh as mesh_lib  # noqa: E402
from llm_jax import sharding  # noqa: E402
from llm_jax import train_step  # noqa: E402
from llm_jax.aot import steps  # noqa: E402
from llm_jax.data import batch as batch_lib  # noqa: E402
from llm_jax.models import build  # noqa: E402
from llm_jax.sampling import beams  # noqa: E402
from llm_jax.sampling import decode  # noqa: E402
from llm_jax.sampling import samplers  # noqa: E402

_PROMPT, _NEW = 16, 128  # tokens
_SOURCE, _TARGET = 128, 64  # of an encoder and a decoder

CASES = {
    "train_char": {"batch_size": 12, "sequence_length": 64, "repeats": 60},
    "train_gpt2": {"batch_size": 4, "sequence_length": 256, "repeats": 4},
    "tune_bert": {"batch_size": 8, "sequence_length": 128, "repeats": 4},
    "train_t5": {"batch_size": 4, "sequence_length": 128, "target_length": 32, "repeats": 4},
    "sample_1": {"batch_size": 1, "repeats": 2},
    "sample_16": {"batch_size": 16, "repeats": 2},
    "write_t5": {"batch_size": 8, "num_beams": 1, "repeats": 2},
    "beams_t5": {"batch_size": 4, "num_beams": 4, "repeats": 2},
}

_CASE = flags.DEFINE_enum("case", None, list(CASES), "What to measure.", required=True)


def _config(case: str) -> config_lib.RunConfig:
    configs = {"train_char": char, "tune_bert": bert_base}
    config = t5_base if case.endswith("t5") else configs.get(case, gpt2_124m)
    raw = config.get_config()
    raw.model.update(remat="none", dtype="auto", scan_layers=None)
    if case == "tune_bert":
        raw.model.update(head="sequence", use_pooler=True, vocab_size=30_522)
        raw.objective.name = "sequence"
    if case == "train_t5":
        raw.optim.update(name="adamw", schedule="constant")  # as the peer
    sizes = dict(CASES[case])
    if "sequence_length" in sizes:
        raw.data.update(batch_size=sizes["batch_size"], sequence_length=sizes["sequence_length"])
        raw.optim.accumulation_steps = 1
    if "target_length" in sizes:
        raw.objective.target_length = sizes["target_length"]
    return config_lib.from_config_dict(raw)


def measure(repeat, num_repeats: int) -> tuple[list[float], list[float]]:
    """Returns wall and processor seconds of each call, two calls after the first."""
    repeat()
    repeat()
    wall, cpu = [], []
    for _ in range(num_repeats):
        started, worked = time.perf_counter(), time.process_time()
        repeat()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - worked)
    return wall, cpu


def _random_batch(config: config_lib.RunConfig, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
    """Returns a batch of the config on the mesh: random ids and labels, each row one text."""
    rng = np.random.default_rng(0)

    def values(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        kind = name.removeprefix("encoder_")
        if kind == "positions":
            value = np.tile(np.arange(like.shape[1]), (like.shape[0], 1))
        elif kind in ("segments", "weights"):
            value = np.ones(like.shape)
        else:
            is_text = kind == "tokens" or config.model.head == "lm"
            high = config.model.vocab_size if is_text else 2  # labels, types of tokens
            value = rng.integers(0, high, like.shape)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    shapes = steps.abstract_batch(config, mesh)._asdict()
    fields = {name: values(name, like) for name, like in shapes.items() if like is not None}
    return batch_lib.Batch(**fields)


def _trainer(config: config_lib.RunConfig, mesh: jax.sharding.Mesh):
    rules = sharding.axis_rules(config.mesh)
    batch = _random_batch(config, mesh)
    step = train_step.make_train_step(config)
    state = jax.jit(lambda: train_step.init_state(config, rules))()

    def repeat() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return repeat, config.tokens_per_step


def _sampler(config: config_lib.RunConfig, batch_size: int):
    rules = sharding.axis_rules(config_lib.MeshConfig(rules="tp"))
    model = jax.jit(lambda key: build.make_model(key, config.model, rules))(jax.random.key(0))
    model = decode.prepare_model(model)
    tokens_BT = jax.random.randint(jax.random.key(1), (batch_size, _PROMPT), 0, 50_257)
    starts_B = np.zeros(batch_size, np.int32)
    keys_B = jax.random.split(jax.random.key(2), batch_size)
    # No token ends the text: every repeat generates the same number.
    how = {"params": samplers.SamplingParams(temperature=0.0), "eos_id": -1, "pad_id": 0}

    def repeat() -> None:
        state = decode.prefill(model, tokens_BT, starts_B, keys_B, num_slots=_PROMPT + _NEW, **how)
        _, tokens_NB = decode.decode(model, state, num_tokens=_NEW - 1, **how)
        jax.block_until_ready(tokens_NB)

    return repeat, batch_size * _NEW


def _writer(config: config_lib.RunConfig, batch_size: int, num_beams: int):
    """T5-base on sources of random tokens; no token ends a text."""
    rules = sharding.axis_rules(config_lib.MeshConfig(rules="tp"))
    model = jax.jit(lambda key: build.make_model(key, config.model, rules))(jax.random.key(0))
    model = decode.prepare_model(model)
    tokens_BS = jax.random.randint(jax.random.key(1), (batch_size, _SOURCE), 2, 30_000)
    lengths_B = np.full(batch_size, _SOURCE, np.int32)
    first_B1, starts_B = np.zeros((batch_size, 1), np.int32), np.zeros(batch_size, np.int32)
    keys_B = jax.random.split(jax.random.key(2), batch_size)
    params = {"params": samplers.SamplingParams(temperature=0.0)}
    how = {"eos_id": -1, "pad_id": 0}

    def repeat() -> None:
        encoded = decode.encode(model, tokens_BS, lengths_B)
        if num_beams > 1:
            search = beams.BeamParams(num_beams)
            sizes = {"num_tokens": _TARGET, "max_tokens": _TARGET}
            found = beams.search(model, first_B1, starts_B, encoded, params=search, **sizes, **how)
            jax.block_until_ready(found)
            return
        slots = {"num_slots": 1 + _TARGET}
        state = decode.prefill(model, first_B1, starts_B, keys_B, encoded, **slots, **params, **how)
        _, tokens_NB = decode.decode(model, state, num_tokens=_TARGET - 1, **params, **how)
        jax.block_until_ready(tokens_NB)

    return repeat, batch_size * _TARGET


def main(argv: list[str]) -> None:
    del argv
    case = _CASE.value
    config = _config(case)
    mesh = mesh_lib.make(config.mesh)
    with jax.set_mesh(mesh):
        if case in ("write_t5", "beams_t5"):
            sizes = CASES[case]
            repeat, num_tokens = _writer(config, sizes["batch_size"], sizes["num_beams"])
        elif not case.startswith("sample"):
            repeat, num_tokens = _trainer(config, mesh)
        else:
            repeat, num_tokens = _sampler(config, CASES[case]["batch_size"])
        wall, cpu = measure(repeat, CASES[case]["repeats"])
    what = f"llm_jax {build.resolve(config.model).dtype}, jax {jax.__version__}"
    row = {"program": what, "tokens": num_tokens, "wall": wall, "cpu": cpu, "cores": os.cpu_count()}
    print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
