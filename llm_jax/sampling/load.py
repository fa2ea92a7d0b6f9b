"""A checkpoint as something to generate with: parameters alone, on a mesh of its own."""

import dataclasses
import logging

import jax

from llm_jax import checkpoint
from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib
from llm_jax import sharding
from llm_jax.data import tokenizer as tokenizer_lib
from llm_jax.models import build
from llm_jax.models import lora
from llm_jax.sampling import decode

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What generation needs.

    Attributes:
      model: parameters, on `mesh`.
      tokenizer: that the model was trained with.
      mesh: data x tensor.
      step: of the checkpoint.
      is_of_pairs: whether it was trained to write texts for texts (seq2seq).
    """

    model: decode.CachedModel
    tokenizer: tokenizer_lib.Tokenizer
    mesh: jax.sharding.Mesh
    step: int
    is_of_pairs: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts are what an encoder reads, not what is continued."""
        return self.model.config.architecture == "encoder_decoder"

    @property
    def reads_sources(self) -> bool:
        """Whether prompts are read as wholes, that end, before anything is written."""
        return self.is_encoder_decoder or self.is_of_pairs


def load(workdir: str, step: int | str | None = None, tensor: int = 1) -> Loaded:
    """Loads a checkpoint for generation.

    Args:
      workdir: of the run.
      step: which checkpoint, as `checkpoint.parse_step` gives it; None: the latest that is whole.
      tensor: devices that share one copy of the weights; the others split the batch. Key-value heads
        that it does not divide lie on all of them, if it divides the queries of each; the log says so.

    Raises:
      errors.UserError: no such checkpoint, none that is whole, a model that writes no text, or one
        that `tensor` does not divide.
    """
    mesh = mesh_lib.make(config_lib.MeshConfig(tensor=tensor, rules="tp"))

    def read(step_dir, meta: checkpoint.Meta) -> Loaded:
        _check_writes(meta.config.model, workdir)
        kv_heads = sharding.fitting_kv_heads(meta.config.model, tensor)
        if kv_heads == "replicated":
            count = meta.config.model.kv_heads
            _LOG.info("%d key-value heads on each of %d devices, queries split", count, tensor)
        mesh_config = config_lib.MeshConfig(tensor=tensor, rules="tp", kv_heads=kv_heads)
        rules = sharding.axis_rules(mesh_config)
        sharding.check_model(meta.config.model, mesh_config, mesh)
        with jax.set_mesh(mesh):
            abstract = build.abstract_model(meta.config.model, rules)
            model = checkpoint.restore_params(step_dir, meta, abstract, mesh)
            if meta.config.model.lora.is_on:
                model = lora.merge(model, meta.config.model, rules)
            prepared = decode.prepare_model(model)
        tokenizer = tokenizer_lib.from_dict(meta.tokenizer)
        is_of_pairs = meta.config.objective.name == "seq2seq"
        return Loaded(prepared, tokenizer, mesh, meta.step, is_of_pairs)

    return checkpoint.read_latest(workdir, step, read)


def _check_writes(config: config_lib.ModelConfig, workdir: str) -> None:
    if config.architecture == "encoder" or config.head != "lm":
        raise errors.UserError(
            f"--workdir={workdir} holds a model that writes no text (model.architecture ="
            f" {config.architecture!r}, model.head = {config.head!r}); sampling takes a decoder or an"
            " encoder_decoder with head 'lm'"
        )
