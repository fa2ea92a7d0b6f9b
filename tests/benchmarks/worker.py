"""Measures one case in this process and prints a row of JSON; `cpu_speed.py` starts it.

python tests/benchmarks/worker.py --case=train_char
"""

import dataclasses
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

from configs import char  # noqa: E402
from configs import gpt2_124m  # noqa: E402
from llm_jax import config as config_lib  # noqa: E402
from llm_jax import mesh as mesh_lib  # noqa: E402
from llm_jax import sharding  # noqa: E402
from llm_jax import train_step  # noqa: E402
from llm_jax.data import batch as batch_lib  # noqa: E402
from llm_jax.data import placement  # noqa: E402
from llm_jax.models import build  # noqa: E402
from llm_jax.sampling import decode  # noqa: E402
from llm_jax.sampling import samplers  # noqa: E402

_PROMPT, _NEW = 16, 128  # tokens

CASES = {
    "train_char": {"batch_size": 12, "sequence_length": 64, "repeats": 60},
    "train_gpt2": {"batch_size": 4, "sequence_length": 256, "repeats": 4},
    "sample_1": {"batch_size": 1, "repeats": 2},
    "sample_16": {"batch_size": 16, "repeats": 2},
}

_CASE = flags.DEFINE_enum("case", None, list(CASES), "What to measure.", required=True)


def _config(case: str) -> config_lib.RunConfig:
    raw = char.get_config() if case == "train_char" else gpt2_124m.get_config()
    config = config_lib.from_config_dict(raw)
    sizes = CASES[case]
    if not case.startswith("train"):
        return config
    data = dataclasses.replace(
        config.data, batch_size=sizes["batch_size"], sequence_length=sizes["sequence_length"]
    )
    optim = dataclasses.replace(config.optim, accumulation_steps=1)
    model = dataclasses.replace(config.model, remat="none")
    return dataclasses.replace(config, data=data, optim=optim, model=model)


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


def _trainer(config: config_lib.RunConfig, mesh: jax.sharding.Mesh):
    rules = sharding.axis_rules(config.mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1))
    host_batch = batch_lib.empty(*shape, 0)._replace(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        weights=np.ones(shape, np.float32),
        segments=np.ones(shape, np.int32),
        positions=np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    )
    target = jax.sharding.NamedSharding(mesh, rules.act("BT"))
    batch = placement.to_mesh(host_batch, target, shape[0], np.arange(shape[0]))
    step = train_step.make_train_step(config)
    state = jax.jit(lambda: train_step.init_state(config, rules))()

    def repeat() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return repeat, shape[0] * shape[1]


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


def main(argv: list[str]) -> None:
    del argv
    case = _CASE.value
    config = _config(case)
    mesh = mesh_lib.make(config.mesh)
    with jax.set_mesh(mesh):
        if case.startswith("train"):
            repeat, num_tokens = _trainer(config, mesh)
        else:
            repeat, num_tokens = _sampler(config, CASES[case]["batch_size"])
        wall, cpu = measure(repeat, CASES[case]["repeats"])
    what = f"llm_jax {build.resolve(config.model).dtype}, jax {jax.__version__}"
    row = {"program": what, "tokens": num_tokens, "wall": wall, "cpu": cpu, "cores": os.cpu_count()}
    print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
