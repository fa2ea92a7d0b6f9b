"""What a family's file declares: which tensor is which parameter, and how its dimensions are laid out.

A layout spells the dimensions of a tensor by the letters of our parameter (`dims`): `(KGC)D` is a matrix
whose rows are heads side by side. The same row is read in both directions.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax.convert import settings

LAYER = "{layer}"  # in a name: the number of the layer
EXPERT = "{expert}"  # and of the expert

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our parameters, as (a part of) a tensor of theirs.

    Attributes:
      path: ours, as `inspect` prints it.
      layout: of the tensor's dimensions, those of our name in some order; `(..)` are merged into one, `1`
        is a dimension of one element.
      is_of_expert: whether there is a tensor of each expert, which our E counts.
    """

    path: str
    layout: str
    is_of_expert: bool = False

    @property
    def ours(self) -> str:
        """The letters of our dimensions, of one layer, and of one expert where each has a tensor."""
        letters = dims.suffix(self.path)
        return letters.replace("E", "") if self.is_of_expert else letters

    def shape(self, ours: Shape) -> Shape:
        """Returns the shape of theirs, of that of ours."""
        sizes = dict(zip(self.ours, ours, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups())

    def to_ours(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        """Returns a view of `theirs` in the order and shape of ours."""
        sizes, letters = dict(zip(self.ours, ours, strict=True)), "".join(self.groups())
        unmerged = theirs.reshape([sizes[letter] for letter in letters])
        return unmerged.transpose([letters.index(letter) for letter in self.ours])

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Returns the tensor of ours; a view where the layout allows it."""
        letters = "".join(self.groups())
        ordered = ours.transpose([self.ours.index(letter) for letter in letters])
        return ordered.reshape(self.shape(ours.shape))

    def groups(self) -> list[str]:
        """Returns the letters of ours that each of their dimensions holds, in its order."""
        groups = re.findall(r"\((\w+)\)|(\w)", self.layout)
        return [(merged or single).replace("1", "") for merged, single in groups]


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor of theirs, or one of each layer, or of each expert of each layer.

    Attributes:
      name: theirs, with `{layer}` where there is one of each, and `{expert}`.
      parts: what it holds: one parameter, or several joined along a dimension.
      axis: that dimension, of theirs.
      is_merged: whether theirs has this dimension and the one before as one: a head's parts are joined,
        and then the heads.
      first_layer: the layers before it have none.
      beside: a parameter without which there is no such tensor; "": it hangs on none.
      without: a parameter with which there is no such tensor.
      head: the only one of `ModelConfig.head` with which there is such a tensor; "": with all.
    """

    name: str
    parts: tuple[Part, ...]
    axis: int = 0
    is_merged: bool = False
    first_layer: int = 0
    beside: str = ""
    without: str = ""
    head: str = ""

    @property
    def is_of_layers(self) -> bool:
        return LAYER in self.name

    def is_of(self, params: Collection[str], head: str) -> bool:
        """Returns whether a model with these parameters and this head has such a tensor."""
        has_parts = all(part.path in params for part in self.parts)
        has_other = not self.beside or self.beside in params
        is_head = self.head in ("", head)
        return has_parts and has_other and is_head and self.without not in params

    def joined(self, shapes: Sequence[Shape]) -> Shape:
        """Returns the shape of parts that have these, joined along `axis`."""
        shape = list(shapes[0])
        shape[self.axis] = sum(s[self.axis] for s in shapes)
        return tuple(shape)

    def merged(self, joined: Shape) -> Shape:
        """Returns the shape of theirs, of that of its joined parts."""
        if not self.is_merged:
            return joined
        before, heads, size = joined[: self.axis - 1], *joined[self.axis - 1 : self.axis + 1]
        return *before, heads * size, *joined[self.axis + 1 :]

    @property
    def is_of_experts(self) -> bool:
        return EXPERT in self.name

    def names(self, layers: Sequence[int], num_experts: int) -> dict[tuple[int, ...], str]:
        """Returns the name of each tensor by its place in our parameters: layer, expert.

        Args:
          layers: which of the model's each of the parameters' layers is.
          num_experts: of each.
        """
        if not self.is_of_layers:
            return {(): self.name}
        found = {}
        for place, layer in enumerate(layers):
            name = self.name.replace(LAYER, str(layer))
            if layer < self.first_layer:
                continue
            if not self.is_of_experts:
                found[place,] = name
                continue
            for expert in range(num_experts):
                found[place, expert] = name.replace(EXPERT, str(expert))
        return found


def row(path: str, name: str, layout: str | None = None, **when: Any) -> Row:
    """Returns the row of one parameter; without a layout theirs has our dimensions as they are."""
    is_of_expert = EXPERT in name
    layout = layout or Part(path, "", is_of_expert).ours
    return Row(name, (Part(path, layout, is_of_expert),), **when)


def joined(name: str, axis: int, *parts: tuple[str, str], is_merged: bool = False) -> Row:
    """Returns the row of a tensor that joins several parameters, (path, layout) each."""
    return Row(name, tuple(Part(*part) for part in parts), axis, is_merged)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A buffer that older files hold though it follows from the config.

    Attributes:
      name: theirs.
      make: returns its values; None: they are not looked at, and never written.
    """

    name: str
    make: Callable[[config_lib.ModelConfig], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of Hugging Face model is one of ours.

    Attributes:
      model_type: as in `config.json`.
      settings: of `config.json` and of `ModelConfig`.
      rows: every tensor that such a model may have; those count whose parameters the model has.
      base: of the names; a file of the bare model (`BertModel`) has them without.
      aliases: names of tied tensors, and of those that they equal; a file may hold them too.
      constants: of older files.
      spellings: pairs of endings; files written from older ones have the second for the first.
    """

    model_type: str
    settings: tuple[settings.Setting, ...]
    rows: tuple[Row, ...]
    base: str = ""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: tuple[Constant, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
