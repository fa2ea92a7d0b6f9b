"""Products of few rows on a CPU, as generation makes them: how weights lie, and what compiles them.

oneDNN, which `backend.set_flags` turns on for the large products of training, leaves small ones to loops
that convert each bfloat16 by itself. XLA's other library (YNN) multiplies a few rows faster, if
what is summed over lies side by side, as in PyTorch's weights; a single row it leaves to the loops, so
that one is made two. `tests/benchmarks/cpu_speed.py` measures what comes of it.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import backend
from llm_jax.kernels import placement

_DTYPES = ("bfloat16",)

# A program's own, whatever XLA_FLAGS say for the others.
_OPTIONS = {
    "xla_cpu_experimental_onednn_custom_call": False,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def are_fast(dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether programs of `jit` multiply few rows of `dtype` fast on the mesh that is set."""
    is_one_device = math.prod(jax.sharding.get_abstract_mesh().shape.values()) == 1
    is_taken = placement.device_kind() == "cpu" and jnp.dtype(dtype).name in _DTYPES
    return is_one_device and is_taken and backend.has_library_flags()


def jit(is_of_few_rows: Callable[..., bool], **how: Any) -> Callable[[Callable], Callable]:
    """Returns a decorator as `jax.jit(**how)`, which takes the library for few rows where it serves.

    Args:
      is_of_few_rows: says of a call's arguments whether it does.
      how: of `jax.jit`.
    """

    def decorate(function: Callable) -> Callable:
        plain = jax.jit(function, **how)
        compiled = {False: plain, True: jax.jit(function, compiler_options=_OPTIONS, **how)}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled[is_of_few_rows(*args, **kwargs)](*args, **kwargs)

        call.lower = plain.lower
        call.num_programs = lambda: sum(program._cache_size() for program in compiled.values())
        return call

    return decorate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A weight as a matrix of outputs and inputs, what a sum goes over side by side.

    Stands where a weight of dimensions (inputs..., outputs...) does, for `multiply` alone.

    Attributes:
      weight_MD: outputs, inputs.
      shape: of the weight that it stands for.
    """

    weight_MD: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return self.weight_MD.dtype

    def __getitem__(self, index: Any) -> "OutputsFirst":
        """Returns itself, whole: a parameter reads its value by `[...]`."""
        if index is not ...:
            raise TypeError(f"a weight for few rows has no elements to take: [{index}]")
        return self

    def reshape(self, shape: tuple[int, ...], out_sharding: Any = None) -> "OutputsFirst":
        """Returns the weight with dimensions joined or split; its one device has no sharding."""
        del out_sharding
        known = math.prod(size for size in shape if size != -1)
        sizes = (self.weight_MD.size // known if size == -1 else size for size in shape)
        return OutputsFirst(self.weight_MD, tuple(sizes))


def outputs_first(weight: jax.Array, num_inputs: int) -> OutputsFirst:
    """Returns a weight, of which the first `num_inputs` dimensions are summed over, turned."""
    num_rows = math.prod(weight.shape[:num_inputs])
    return OutputsFirst(jnp.reshape(weight, (num_rows, -1)).T, weight.shape)


def multiply(equation: str, x: jax.Array, weight: OutputsFirst) -> jax.Array:
    """Returns `einsum(equation, x, weight)` where the sum goes over the last dimensions of `x`."""
    before, after = equation.split("->")
    dims_of_x, dims = before.split(",")
    num_inputs = sum(letter not in after for letter in dims)
    if dims_of_x[-num_inputs:] != dims[:num_inputs]:
        raise ValueError(f"{equation}: a weight for few rows has inputs first, as x has them last")
    leading = x.shape[: x.ndim - num_inputs]
    rows_ND = jnp.reshape(jax.sharding.reshard(x, PartitionSpec()), (math.prod(leading), -1))
    padded_ND = jnp.pad(rows_ND, ((0, max(0, 2 - len(rows_ND))), (0, 0)))
    weight_MD = jax.sharding.reshard(weight.weight_MD, PartitionSpec())
    y_NM = jnp.einsum("ND,MD->NM", padded_ND, weight_MD)[: len(rows_ND)]
    return jnp.reshape(y_NM, (*leading, *weight.shape[num_inputs:]))
