"""Low-rank updates of matrices that stay as they are (LoRA; Hu et al. 2022, section 4.1).

A matrix W of `model.lora.targets` becomes W + (alpha / rank) * down @ up. `up` starts at zero, so that a model
starts as it was. In training the two narrow products stand beside the wide one, which then needs no gradient
of its matrix; for anything else `merged` adds them up once.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import dims
from llm_jax import patterns
from llm_jax import sharding
from llm_jax import trees

# Keys of the updates follow from the layer's, which other parameters are drawn by as well.
_SALT = 0x10A4

LORA = "lora"  # a module's attribute that holds its updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Updated:
    """A matrix and its update, as `layers.project` takes it.

    Attributes:
      base: as its name says, e.g. [D, K, C].
      down: its inputs, then the rank: [D, I].
      up: the rank, then its outputs: [I, K, C].
      scale: of the product of the two.
    """

    base: jax.Array
    down: jax.Array
    up: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> "Updated":
        if index is not Ellipsis:
            raise ValueError(f"a matrix with an update is read whole, not at {index!r}: merge it")
        return self

    def map(self, letters: str, change: Callable[[jax.Array, str], jax.Array]) -> "Updated":
        """Returns it with each array changed, which is told its dimensions; `letters` are the base's."""
        inputs, outputs = dims.MATRICES[letters]
        return dataclasses.replace(
            self,
            base=change(self.base, letters),
            down=change(self.down, f"{inputs}I"),
            up=change(self.up, f"I{outputs}"),
        )


def multiply(
    equation: str, x: jax.Array, weight: Updated, out_sharding: PartitionSpec
) -> jax.Array:
    """Returns `einsum(equation, x, W)` of the updated W, computed in the dtype of `x`.

    Raises:
      ValueError: the equation sums over what the matrix gives, as products by absorbed weights do.
    """
    theirs, of_result = equation.split("->")
    of_x, of_weight = theirs.split(",")
    outputs = "".join(letter for letter in of_weight if letter in of_result)
    inputs = of_weight.removesuffix(outputs)
    is_plain = of_weight.endswith(outputs) and not set(outputs) & set(of_x)
    if len(inputs) != weight.down.ndim - 1 or not is_plain:
        raise ValueError(f"{equation} is no product of inputs with a low-rank update: merge it")
    rows = "".join(letter for letter in of_result if letter not in outputs)
    cast = jax.tree.map(lambda array: array.astype(x.dtype), weight)
    narrow = jnp.einsum(
        f"{of_x},{inputs}I->{rows}I",
        x,
        cast.down,
        out_sharding=PartitionSpec(*out_sharding[: len(rows)], None),
    )
    update = jnp.einsum(
        f"{rows}I,I{outputs}->{of_result}", narrow, cast.up, out_sharding=out_sharding
    )
    return jnp.einsum(equation, x, cast.base, out_sharding=out_sharding) + weight.scale * update


class Lora(nnx.Module):
    """The updates of one module's matrices: `q_down_DI` and `q_up_IKGC` of `q_DKGC`."""

    def __init__(
        self,
        key: jax.Array,
        config: config_lib.ModelConfig,
        rules: sharding.AxisRules,
        shapes: dict[str, tuple[int, ...]],
    ):
        self.scale = config.lora.alpha / config.lora.rank
        rank, dtype = config.lora.rank, config.param_dtype
        for index, (name, shape) in enumerate(shapes.items()):
            inputs, outputs = dims.MATRICES[dims.suffix(name)]
            short, own = name.rpartition("_")[0], jax.random.fold_in(key, index)
            fan_in = 1
            for size in shape[: len(inputs)]:
                fan_in *= size
            # The variance that PEFT draws by; the paper does not say which.
            stddev = (3 * fan_in) ** -0.5
            spec = rules.param(f"{inputs}I")
            drawn = jax.random.normal(own, (*shape[: len(inputs)], rank), dtype, out_sharding=spec)
            zero = jnp.zeros(
                (rank, *shape[len(inputs) :]), dtype, out_sharding=rules.param(f"I{outputs}")
            )
            setattr(self, f"{short}_down_{inputs}I", nnx.Param(stddev * drawn))
            setattr(self, f"{short}_up_I{outputs}", nnx.Param(zero))


def make(
    kind: str,
    key: jax.Array,
    module: nnx.Module,
    config: config_lib.ModelConfig,
    rules: sharding.AxisRules,
) -> Lora | None:
    """Returns the updates of a module's matrices that `model.lora` names, or None where there are none.

    Args:
      kind: "attention", "cross_attention" or "mlp": patterns match it and the matrix's name.
      key: of the module.
      module: its matrices made.
      config: of the model.
      rules: as of the matrices.
    """
    if not config.lora.is_on:
        return None
    shapes = {
        name: value.shape
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param) and _is_target(kind, name, config.lora.targets)
    }
    return Lora(jax.random.fold_in(key, _SALT), config, rules, shapes) if shapes else None


def _is_target(kind: str, name: str, targets: str) -> bool:
    short, _, letters = name.rpartition("_")
    is_matrix = letters in dims.MATRICES and "E" not in letters and not short.endswith("bias")
    return is_matrix and patterns.is_matched(f"{kind}/{short}", targets)


def matrix(module: nnx.Module, name: str) -> nnx.Param | Updated:
    """Returns a module's matrix, with its update where it has one."""
    base, lora = getattr(module, name), module.lora
    short, _, letters = name.rpartition("_")
    if lora is None or not hasattr(lora, f"{short}_up_I{dims.MATRICES[letters][1]}"):
        return base
    inputs, outputs = dims.MATRICES[letters]
    down = getattr(lora, f"{short}_down_{inputs}I")
    up = getattr(lora, f"{short}_up_I{outputs}")
    return Updated(base[...], down[...], up[...], lora.scale)


def merged(config: config_lib.ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters, nested by name, with updates added to their matrices and left out themselves.

    Args:
      config: of the model that they are of.
      params: of layers stacked along their first dimension.
    """
    scale = config.lora.alpha / config.lora.rank

    def walk(tree: dict[str, Any]) -> dict[str, Any]:
        updates = tree.get(LORA, {})
        found = {}
        for name, value in tree.items():
            if name == LORA:
                continue
            if isinstance(value, dict):
                found[name] = walk(value)
                continue
            short, _, letters = name.rpartition("_")
            inputs, outputs = dims.MATRICES.get(letters, ("", ""))
            up = updates.get(f"{short}_up_I{outputs}")
            found[name] = value
            if up is not None:
                down = updates[f"{short}_down_{inputs}I"]
                equation = f"L{inputs}I,LI{outputs}->L{letters}"
                operands = (x.astype(jnp.float32) for x in (down, up))
                spec = jax.typeof(value).sharding.spec
                update = scale * jnp.einsum(equation, *operands, out_sharding=spec)
                found[name] = (value.astype(jnp.float32) + update).astype(value.dtype)
        return found

    return walk(params)


def without(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """Returns the config of the merged model."""
    return dataclasses.replace(config, lora=config_lib.LoraConfig())


def merge(
    model: nnx.Module, config: config_lib.ModelConfig, rules: sharding.AxisRules
) -> nnx.Module:
    """Returns the model with its updates added to its matrices. Call it under the model's mesh."""
    from llm_jax.models import build  # which imports the modules that have updates

    abstract = build.abstract_model(without(config), rules)
    params = jax.jit(lambda params: merged(config, params))(trees.to_nested(model))
    return trees.from_nested(abstract, params)
