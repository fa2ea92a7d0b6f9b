"""Checkpoints that explain themselves and restore on any mesh; the only package that imports Orbax.

    WORKDIR/checkpoints/STEP/params     the model's parameters, what sampling reads
    WORKDIR/checkpoints/STEP/training   optimiser state and counters
    WORKDIR/checkpoints/STEP/meta       config, tokenizer, code version; shape and fingerprint per array
    WORKDIR/checkpoints_damaged/        what could not be read, moved aside by a resuming run

Orbax writes into a temporary folder and renames it, so a save that was cut off is never seen. What
was damaged afterwards shows by the fingerprints, sums over the bits of each array that do not
depend on how it is sharded.

    meta         what a checkpoint says of itself: `Meta`, `read_meta`
    contents     which arrays there are, in a state, a checkpoint and by a config
    arrays       their values, onto any mesh: `restore_params`
    folder       a run's checkpoints: `directory`, `steps`, the one asked for by `read_latest`
    mismatch     what keeps a checkpoint from fitting, by path, and the settings responsible
    parameters   checkpoints of parameters alone, such as those of converted models
    manager      `Checkpoints`, which a training run saves to and resumes from
    inspection   what `python -m llm_jax.checkpoint inspect PATH` finds out
    tables       and how it prints that
"""

from llm_jax.checkpoint.arrays import on_mesh
from llm_jax.checkpoint.arrays import params_of
from llm_jax.checkpoint.arrays import params_reader
from llm_jax.checkpoint.arrays import read_params
from llm_jax.checkpoint.arrays import restore_params
from llm_jax.checkpoint.folder import BEST
from llm_jax.checkpoint.folder import directory
from llm_jax.checkpoint.folder import parse_step
from llm_jax.checkpoint.folder import read_latest
from llm_jax.checkpoint.folder import steps
from llm_jax.checkpoint.manager import Checkpoints
from llm_jax.checkpoint.meta import FORMAT_VERSION
from llm_jax.checkpoint.meta import DamagedError
from llm_jax.checkpoint.meta import Meta
from llm_jax.checkpoint.meta import code_version
from llm_jax.checkpoint.meta import read_meta
from llm_jax.checkpoint.mismatch import check_resumable
from llm_jax.checkpoint.mismatch import differences
from llm_jax.checkpoint.parameters import check_new
from llm_jax.checkpoint.parameters import save_params

__all__ = [
    "BEST",
    "Checkpoints",
    "DamagedError",
    "FORMAT_VERSION",
    "Meta",
    "check_new",
    "check_resumable",
    "code_version",
    "differences",
    "directory",
    "on_mesh",
    "params_of",
    "params_reader",
    "parse_step",
    "read_latest",
    "read_meta",
    "read_params",
    "restore_params",
    "save_params",
    "steps",
]
