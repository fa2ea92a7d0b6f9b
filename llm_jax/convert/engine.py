"""The engine: reads a family's table in one direction or the other, a tensor at a time.

A model is filled in place: parameters of one layer are put on their devices and written into the stack, so
that the host holds a tensor as it was read and the same as it goes on, and beside them the target alone.
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import trees
from llm_jax.convert import table
from llm_jax.convert import tensors as tensors_lib

Infos = Mapping[str, tensors_lib.TensorInfo]

_STACKS = frozenset({"layers", "expert_layers"})

# What a layer has where theirs has no tensor for it: the scale of a norm that is not used.
_UNUSED = 1.0


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a file spells the names of its family's table.

    Attributes:
      has_base: whether they begin with `Family.base`, where the table's do.
      is_legacy: whether they have the second endings of `Family.spellings`.
    """

    has_base: bool = True
    is_legacy: bool = False

    def spelled(self, name: str, family: table.Family) -> str:
        """Returns the file's name for the table's."""
        if not self.has_base:
            name = name.removeprefix(family.base)
        for ending, legacy in family.spellings if self.is_legacy else ():
            if name.endswith(ending):
                return name.removesuffix(ending) + legacy
        return name

    def canonical(self, spelled: str, family: table.Family) -> str:
        """Returns the table's name for the file's; names of a head never begin with the base."""
        for ending, legacy in family.spellings if self.is_legacy else ():
            if spelled.endswith(legacy):
                spelled = spelled.removesuffix(legacy) + ending
        if self.has_base or not family.base:
            return spelled
        is_of_head = any(r.name == spelled for r in family.rows) or spelled in family.aliases
        return spelled if is_of_head else family.base + spelled


def naming(family: table.Family, names: Collection[str]) -> Naming:
    """Returns how a file with these names spells them."""
    return Naming(
        has_base=not family.base or any(name.startswith(family.base) for name in names),
        is_legacy=any(name.endswith(old) for name in names for _, old in family.spellings),
    )


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of theirs and where its values lie in the row's parameters.

    Attributes:
      row: which tensors of theirs it is one of.
      place: layer, and expert if each has one; empty where the parameters are whole.
      info: of theirs.
    """

    row: table.Row
    place: tuple[int, ...]
    info: tensors_lib.TensorInfo


def _is_stacked(path: str) -> bool:
    return not _STACKS.isdisjoint(path.split("/"))


class Plan:
    """Which tensors a model has in a family's files."""

    def __init__(self, family: table.Family, config: config_lib.ModelConfig, model: Any):
        """Args: family; config of the model; the model, abstract or not.

        Raises:
          errors.UserError: the family has no place for some parameters.
        """
        self.family, self.config = family, config
        self.params = trees.by_name(model)
        self.slots: dict[str, Slot] = {}
        placed: set[str] = set()
        for row in family.rows:
            if row.is_of(self.params, config.head):
                placed |= {part.path for part in row.parts}
                self._add(row)
        homeless = sorted(self.params.keys() - placed)
        if homeless:
            raise errors.UserError(f"{family.model_type} has no tensors for {', '.join(homeless)}")

    def _add(self, row: table.Row) -> None:
        (layers,) = {self._layers(part.path) for part in row.parts}
        dtype = np.dtype(self.params[row.parts[0].path].dtype)
        info = tensors_lib.TensorInfo(row.merged(self.joined(row)), dtype)
        for place, name in row.names(layers, self.config.moe.num_experts).items():
            self.slots[name] = Slot(row, place, info)

    def _layers(self, path: str) -> tuple[int, ...]:
        """Returns which layers of the model a parameter is of."""
        parts = path.split("/")
        if not _is_stacked(path):
            return ()
        stack = parts[0] if parts[0] in ("encoder", "decoder") else self.config.architecture
        depth = self.config.decoder_layers if stack == "decoder" else self.config.num_layers
        if not self.config.has_experts(stack):
            return tuple(range(depth))
        wanted = "expert_layers" in parts
        has_experts = self.config.expert_layers(depth)
        return tuple(index for index, own in enumerate(has_experts) if own == wanted)

    def shape(self, part: table.Part) -> table.Shape:
        """Returns the shape of a parameter, in one layer and of one expert if theirs are apart."""
        num_outside = _is_stacked(part.path) + part.is_of_expert
        return tuple(self.params[part.path].shape[num_outside:])

    def joined(self, row: table.Row) -> table.Shape:
        """Returns the shape of a row's parts, joined."""
        return row.joined([part.shape(self.shape(part)) for part in row.parts])

    def by_row(self) -> dict[table.Row, list[str]]:
        """Returns the names of the tensors of each row: those that are of the same parameters."""
        names: dict[table.Row, list[str]] = {}
        for name, slot in self.slots.items():
            names.setdefault(slot.row, []).append(name)
        return names

    def extras(self) -> dict[str, str | table.Constant]:
        """Returns the tensors that a file may hold beside: what each equals."""
        found: dict[str, str | table.Constant] = {
            alias: name
            for alias, name in self.family.aliases.items()
            if alias not in self.slots and name in self.slots
        }
        for constant in self.family.constants:
            for layer in range(self.config.num_layers):
                found[constant.name.replace(table.LAYER, str(layer))] = constant
        return found


def check(plan: Plan, infos: Infos, where: str) -> None:
    """Checks that a file has the tensors of a plan, and no others.

    Args:
      plan: what is wanted.
      infos: what there is, by canonical names.
      where: names the file in errors.

    Raises:
      errors.UserError: names each tensor that is missing, unknown or of another shape or kind.
    """
    extras = plan.extras()
    missing = [name for name in plan.slots if name not in infos]
    unknown = [name for name in infos if name not in plan.slots and name not in extras]
    misshapen: dict[str, list[str]] = {}
    for name, slot in plan.slots.items():
        if name in infos and infos[name].shape != slot.info.shape:
            shapes = f"{list(infos[name].shape)} where {list(slot.info.shape)} is wanted"
            misshapen.setdefault(shapes, []).append(name)
    strange = [name for name in plan.slots if name in infos and not _is_floating(infos[name].dtype)]
    problems = [f"missing: {grouped(missing)}"] if missing else []
    problems += [f"unknown (--skip leaves some out): {grouped(unknown)}"] if unknown else []
    problems += [f"of shape {shapes}: {grouped(names)}" for shapes, names in misshapen.items()]
    problems += [f"no floating-point numbers: {grouped(strange)}"] if strange else []
    if problems:
        raise errors.UserError(
            f"the tensors of {where} are not those of its config.json: {'; '.join(problems)}"
        )


def _is_floating(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def grouped(names: Sequence[str]) -> str:
    """Returns all names in one line, those of several layers as one: `h.{0-11}.ln_1.weight`."""
    return ", ".join(_grouped_by(r"\.(\d+)\.", _grouped_by(r"\.experts\.(\d+)\.", names)))


def _grouped_by(pattern: str, names: Sequence[str]) -> list[str]:
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.search(pattern, name)
        if found is None:
            layers[name, ""] = []
        else:
            key = name[: found.start(1)], name[found.end(1) :]
            layers.setdefault(key, []).append(int(found[1]))
    spelled = []
    for (before, after), numbers in layers.items():
        if not numbers:
            spelled.append(before)
            continue
        of_layers = str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(sorted(numbers))}}}"
        spelled.append(f"{before}{of_layers}{after}")
    return spelled


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


# --- into a model ---------------------------------------------------------------------------------


def fill(plan: Plan, source: Mapping[str, str], tensors: tensors_lib.Tensors) -> dict[str, Any]:
    """Returns the parameters of a plan with the values of a file, as nested dicts by name.

    Args:
      plan: of an abstract model whose leaves have a sharding on devices and the dtype to be had.
      source: the file's name for each canonical one.
      tensors: the file's.
    """
    filled: dict[str, jax.Array] = {
        path: _full(tuple(leaf.shape), leaf.dtype, leaf.sharding, _UNUSED)
        for path, leaf in plan.params.items()
        if _is_stacked(path)
    }
    for name, slot in plan.slots.items():
        whole, start = tensors.read(source[name]).reshape(plan.joined(slot.row)), 0
        for part in slot.row.parts:
            leaf, shape = plan.params[part.path], plan.shape(part)
            size = part.shape(shape)[slot.row.axis]
            place = (slice(None),) * slot.row.axis + (slice(start, start + size),)
            piece = np.ascontiguousarray(part.to_ours(whole[place], shape), leaf.dtype)
            start += size
            if start == whole.shape[slot.row.axis]:
                del whole  # before the next copy is made
            if not slot.place:
                filled[part.path] = jax.device_put(piece, leaf.sharding)
            else:
                place = np.asarray(slot.place, np.int32)
                filled[part.path] = _set_layer(filled[part.path], piece, place)
    return _nested(filled)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _full(shape: table.Shape, dtype: Any, sharding: jax.sharding.Sharding, value: float) -> Any:
    return jnp.full(shape, value, dtype, out_sharding=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, piece: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(stack, piece, _start(stack, place))


def _start(stack: jax.Array, place: jax.Array) -> list[jax.Array | int]:
    return [*place, *(0,) * (stack.ndim - len(place))]


def _set_layer(stack: jax.Array, piece: np.ndarray, place: np.ndarray) -> jax.Array:
    """Writes a layer, or an expert of one, into its stack, in place."""
    piece = piece[(None,) * len(place)]
    placed = jax.device_put(piece, stack.sharding)
    # Waiting bounds what is in flight to this one.
    return jax.block_until_ready(_write_layer(stack, placed, place))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return nested


# --- out of a model -------------------------------------------------------------------------------


def theirs(plan: Plan, name: str, params: Mapping[str, jax.Array] | None = None) -> np.ndarray:
    """Returns the tensor that a model has under a canonical name.

    Args:
      plan: of the model.
      name: of the tensor.
      params: those that the tensor is of, by path; None: they are the plan's own.
    """
    slot = plan.slots[name]
    params = plan.params if params is None else params
    pieces = []
    for part in slot.row.parts:
        leaf = params[part.path]
        value = leaf if not slot.place else _layer(leaf, np.asarray(slot.place, np.int32))
        pieces.append(part.to_theirs(np.asarray(value)))
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, slot.row.axis)
    return whole.reshape(slot.info.shape)


@jax.jit
def _layer(stack: jax.Array, place: jax.Array) -> jax.Array:
    sizes = (*(1,) * len(place), *stack.shape[len(place) :])
    return jax.lax.dynamic_slice(stack, _start(stack, place), sizes).reshape(sizes[len(place) :])
