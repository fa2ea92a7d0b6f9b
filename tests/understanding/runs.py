"""Checkpoints of tiny models with tokenizers and texts of their own."""

import jax
import numpy as np

from llm_jax import checkpoint
from llm_jax import trees
from llm_jax.data import objectives
from llm_jax.data import tokenizer as tokenizer_lib
from tests import helpers

TEXT = (
    "My fellow citizens: we méet again,\nand the state of the Union is <script>strong</script>.\n"
)


def save(folder, objective="causal", **model):
    """Saves a random model of bytes in `folder`/run, whose data are texts there; returns the workdir."""
    tokenizer = tokenizer_lib.load("bytes")
    (folder / "texts").mkdir(parents=True)
    for number in range(6):
        (folder / "texts" / f"{number}.txt").write_text(f"document {number}: " + TEXT * 2)
    config = helpers.tiny_run_config(
        {"vocab_size": 264, "max_length": 128} | model,
        data={
            "source": f"text:{folder}/texts/*.txt",
            "cache_dir": str(folder / "cache"),
            "sequence_length": 32,
        },
        objective={"name": objective},
    )
    tokenizer = objectives.extended(config, tokenizer)
    mesh, rules = helpers.make_mesh()
    params = helpers.random_model(config.model, mesh, rules)
    workdir = folder / "run"
    checkpoint.save_params(str(workdir), config, tokenizer.to_dict(), trees.to_nested(params))
    return str(workdir)


@jax.jit
def _logits(model, *inputs):
    return model(*inputs)


def log_probabilities(subject, row_T):
    """Returns log-probabilities of the vocabulary, [T, V] in float64, of a row by the model's own logits."""
    shape = (subject.mesh.size, len(row_T))
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    with jax.set_mesh(subject.mesh):
        spec = jax.sharding.NamedSharding(subject.mesh, subject.rules.act("BT"))
        inputs = jax.device_put((np.broadcast_to(row_T, shape).astype(np.int32), places), spec)
        logits = np.asarray(_logits(subject.model, *inputs))[0].astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
