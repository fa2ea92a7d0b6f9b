"""The config of a run.

A config file builds an `ml_collections.ConfigDict` from `new()`, states its differences, and the
command line overrides single keys. `from_config_dict` turns the result, strictly and once, into the
frozen `RunConfig`; nothing behind that door reads a ConfigDict.

    schema       every knob, its default and its unit
    conversion   the door
    checks       contradictions, each an error that says what would do
"""

from llm_jax.config.checks import check
from llm_jax.config.checks import check_objective
from llm_jax.config.conversion import from_config_dict
from llm_jax.config.conversion import from_dict
from llm_jax.config.conversion import new
from llm_jax.config.conversion import to_dict
from llm_jax.config.schema import ACTIVATIONS
from llm_jax.config.schema import ARCHITECTURES
from llm_jax.config.schema import ATTENTIONS
from llm_jax.config.schema import BALANCES
from llm_jax.config.schema import CHAT_OBJECTIVES
from llm_jax.config.schema import CONTEXTS
from llm_jax.config.schema import CROSS_ENTROPIES
from llm_jax.config.schema import DISPATCHES
from llm_jax.config.schema import DTYPES
from llm_jax.config.schema import EXPERT_STACKS
from llm_jax.config.schema import HEADS
from llm_jax.config.schema import KV_HEADS
from llm_jax.config.schema import MESH_AXES
from llm_jax.config.schema import NONFINITE
from llm_jax.config.schema import NORM_PLACEMENTS
from llm_jax.config.schema import NORMS
from llm_jax.config.schema import OBJECTIVES
from llm_jax.config.schema import OPTIMIZERS
from llm_jax.config.schema import PACKINGS
from llm_jax.config.schema import PARAMETRISATIONS
from llm_jax.config.schema import POOLINGS
from llm_jax.config.schema import POSITIONS
from llm_jax.config.schema import QK_NORMS
from llm_jax.config.schema import REMATS
from llm_jax.config.schema import ROPE_SCALINGS
from llm_jax.config.schema import ROUTERS
from llm_jax.config.schema import RULES
from llm_jax.config.schema import SCHEDULES
from llm_jax.config.schema import TEXT_OBJECTIVES
from llm_jax.config.schema import TOO_LONG
from llm_jax.config.schema import CheckpointConfig
from llm_jax.config.schema import DataConfig
from llm_jax.config.schema import LoraConfig
from llm_jax.config.schema import MeshConfig
from llm_jax.config.schema import ModelConfig
from llm_jax.config.schema import MoeConfig
from llm_jax.config.schema import ObjectiveConfig
from llm_jax.config.schema import OptimConfig
from llm_jax.config.schema import RunConfig
from llm_jax.config.schema import TrainConfig
from llm_jax.config.schema import TuneConfig
from llm_jax.config.schema import rope_width

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "ATTENTIONS",
    "CONTEXTS",
    "CROSS_ENTROPIES",
    "CheckpointConfig",
    "DTYPES",
    "DataConfig",
    "HEADS",
    "KV_HEADS",
    "LoraConfig",
    "MESH_AXES",
    "MeshConfig",
    "ModelConfig",
    "NONFINITE",
    "NORMS",
    "NORM_PLACEMENTS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "ObjectiveConfig",
    "OptimConfig",
    "PACKINGS",
    "PARAMETRISATIONS",
    "POOLINGS",
    "POSITIONS",
    "QK_NORMS",
    "REMATS",
    "ROPE_SCALINGS",
    "RULES",
    "RunConfig",
    "SCHEDULES",
    "CHAT_OBJECTIVES",
    "TEXT_OBJECTIVES",
    "TOO_LONG",
    "TrainConfig",
    "TuneConfig",
    "ROUTERS",
    "DISPATCHES",
    "BALANCES",
    "EXPERT_STACKS",
    "MoeConfig",
    "check",
    "check_objective",
    "from_config_dict",
    "from_dict",
    "new",
    "rope_width",
    "to_dict",
]
