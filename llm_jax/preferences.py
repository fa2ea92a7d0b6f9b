"""Direct preference optimisation: what the model that training starts from makes of the answers of a batch.

Rafailov et al. 2023, section 4. That model lies beside the one that learns, cut as that is, and is never updated:
its log-probabilities join each batch before the step.
"""

import dataclasses
from typing import Any

from etils import epath
import jax

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import sharding
from llm_jax import start
from llm_jax import train_step
from llm_jax.data import batch as batch_lib
from llm_jax.models import build


class Reference:
    """Adds the reference's log-probabilities to batches.

    Args:
      config: of the run.
      mesh: of the run, which must be set.

    Raises:
      errors.UserError: there is no such start, or it is of another model.
    """

    def __init__(self, config: config_lib.RunConfig, mesh: jax.sharding.Mesh):
        workdir, step = start.parse(config.tune.start)
        rules = sharding.axis_rules(config.mesh)

        def read(step_dir: epath.Path, meta: checkpoint.Meta) -> tuple[Any, config_lib.RunConfig]:
            own = dataclasses.replace(config.model, lora=meta.config.model.lora)
            abstract = build.abstract_model(own, rules)
            model = checkpoint.restore_params(step_dir, meta, abstract, mesh)
            return model, dataclasses.replace(config, model=own)

        self._model, own = checkpoint.read_latest(workdir, step, read)
        self._score = jax.jit(lambda model, batch: log_probabilities(own, model, batch))

    def __call__(self, batch: batch_lib.Batch) -> batch_lib.Batch:
        """Returns the batch with `reference`, [B, 2]."""
        return batch._replace(reference=self._score(self._model, batch))


def log_probabilities(
    config: config_lib.RunConfig, model: build.Model, batch: batch_lib.Batch
) -> jax.Array:
    """Returns the log-probabilities of both answers of each row, in nats, float32 [B, 2]."""
    tokens, _ = train_step.token_losses(config, model, batch)
    return train_step.of_answers(tokens.cross_entropy_BT, batch)
