"""What families with experts share: which layers have them, how many there are, and their tensors."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import settings
from llm_jax.convert import table
from llm_jax.convert.families import llama

STACK = "stack/expert_layers"

# Of training, which llm_jax sets for itself: its losses are means over a batch, a layer at a time.
UNREAD = settings.Unread(
    ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "moe_layer_freq")
)


def rows(
    of_layers: Sequence[table.Row], mlp: str, gate: str, up: str, out: str
) -> tuple[table.Row, ...]:
    """Returns the rows of layers with experts.

    Args:
      of_layers: of dense layers, but for the feed-forward part.
      mlp: their name of that part.
      gate, up, out: of an expert's matrices.
    """
    theirs = f"{llama.THEIRS}.{mlp}"
    each = f"{theirs}.experts.{{expert}}"
    return (
        *(_moved(row) for row in of_layers),
        table.row(f"{STACK}/mlp/router/router_DE", f"{theirs}.gate.weight", "ED"),
        table.row(f"{STACK}/mlp/gate_EDF", f"{each}.{gate}.weight", "FD"),
        table.row(f"{STACK}/mlp/up_EDF", f"{each}.{up}.weight", "FD"),
        table.row(f"{STACK}/mlp/out_EFD", f"{each}.{out}.weight", "DF"),
    )


def _moved(row: table.Row) -> table.Row:
    parts = tuple(
        dataclasses.replace(part, path=part.path.replace(llama.STACK, STACK)) for part in row.parts
    )
    return dataclasses.replace(row, parts=parts)


def setting(
    keys: Mapping[str, tuple[str | tuple[str, ...], Any]],
    fixed: Mapping[str, Any],
    dense_layers: bool = False,
) -> settings.Setting:
    """Returns the setting of the experts of a family.

    Args:
      keys: for our fields of `MoeConfig` theirs, of several names the first that is there, and what it is
        where none is.
      fixed: fields that all models of the family have.
      dense_layers: whether `mlp_only_layers` and `decoder_sparse_step` say which layers have experts.
    """
    spellings = {
        name: ((key,) if isinstance(key, str) else key, default)
        for name, (key, default) in keys.items()
    }
    theirs = [key for names, _ in spellings.values() for key in names]
    theirs += ["mlp_only_layers", "decoder_sparse_step"] if dense_layers else []

    def read(given: settings.Json, tensors: settings.Names) -> settings.Ours:
        del tensors
        ours = {
            name: next((given[key] for key in names if key in given), default)
            for name, (names, default) in spellings.items()
        }
        if dense_layers:
            ours |= _which_layers(given)
        return {"moe": config_lib.MoeConfig(**dict(fixed) | ours)}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        moe = dataclasses.replace(model.moe, expert_dim=model.expert_width)
        written = {
            next((key for key in names if key in original), names[0]): getattr(moe, name)
            for name, (names, _) in spellings.items()
        }
        if dense_layers:
            first = list(range(moe.first_dense_layers))
            if first and moe.every > 1:
                raise errors.UserError(
                    f"config.model.moe.every = {moe.every} with first_dense_layers = {len(first)}"
                    " (it counts from the first layer)"
                )
            written |= {"mlp_only_layers": first, "decoder_sparse_step": moe.every}
        return written

    return settings.Custom(tuple(theirs), read, write)


def _which_layers(given: settings.Json) -> settings.Ours:
    dense, every = given.get("mlp_only_layers") or [], given.get("decoder_sparse_step", 1)
    if sorted(dense) != list(range(len(dense))):
        raise errors.UserError(f"mlp_only_layers = {dense} (llm_jax has the first ones alone)")
    if dense and every > 1:
        raise errors.UserError(
            f"decoder_sparse_step = {every} with mlp_only_layers = {dense} (llm_jax has one of them)"
        )
    return {"first_dense_layers": len(dense), "every": every}
