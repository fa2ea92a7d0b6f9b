"""Which mesh axis each dimension lies on: one table, read by models, data and checkpoints.

Models name dimensions (`rules.param("DF")`), never mesh axes. The presets:

  dp       batch over replica and data; weights on every device
  fsdp     as dp, and the model width D of each weight over data (ZeRO-3): a layer's weights are
           gathered where they are used and their gradients scattered back
  fsdp_tp  as fsdp, and heads, feed-forward width and vocabulary over tensor (Megatron)
  tp       heads, feed-forward width and vocabulary over tensor alone: for generation, which reads
           every weight for every token and must not gather them

`seq` shards the sequence of activations: queries stay put, keys and values are gathered.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax import mesh as mesh_lib

Axes = str | tuple[str, ...]  # of the mesh


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes of each dimension letter, for parameters and for activations."""

    # Pairs instead of dicts: modules hold the rules as static data, which JAX hashes.
    params: tuple[tuple[str, Axes], ...]
    acts: tuple[tuple[str, Axes], ...]

    def param(self, dims: str) -> PartitionSpec:
        """Returns the spec of a parameter with dimensions `dims`.

        Vectors are replicated: gathering them would cost more than they weigh. `L`, the stacked
        layers of a scan, is never sharded.
        """
        if len(dims.replace("L", "")) < 2:
            return PartitionSpec(*(None for _ in dims))
        return _spec(self.params, dims)

    def act(self, dims: str) -> PartitionSpec:
        """Returns the spec of an activation with dimensions `dims`."""
        return _spec(self.acts, dims)


def _spec(table: tuple[tuple[str, Axes], ...], dims: str) -> PartitionSpec:
    axes = dict(table)
    return PartitionSpec(*(axes.get(letter) for letter in dims))


def _rules(params: dict[str, Axes], acts: dict[str, Axes]) -> AxisRules:
    base = {"B": ("replica", "data"), "T": "seq", "N": ("replica", "data")}
    return AxisRules(tuple(params.items()), tuple((base | acts).items()))


_TENSOR = {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}

PRESETS = {
    "dp": _rules({}, {}),
    "fsdp": _rules({"D": "data"}, {}),
    "fsdp_tp": _rules({"D": "data"} | _TENSOR, _TENSOR),
    "tp": _rules(_TENSOR, _TENSOR),
}


def axis_rules(config: config_lib.MeshConfig) -> AxisRules:
    """Returns the preset that the config names."""
    return PRESETS[config.rules]


def axis_size(mesh: jax.sharding.Mesh, axes: Axes | None) -> int:
    """Returns how many ways `axes` of `mesh` split a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def check(config: config_lib.RunConfig, mesh: jax.sharding.Mesh) -> None:
    """Checks that every sharded dimension divides its mesh axes.

    Raises:
      errors.UserError: names the setting, its value and the axis that it must divide.
    """
    rules = axis_rules(config.mesh)
    micro = config.data.batch_size // config.optim.accumulation_steps
    sizes = [
        ("data.batch_size / optim.accumulation_steps", micro, dict(rules.acts)["B"]),
        ("data.sequence_length", config.data.sequence_length, dict(rules.acts)["T"]),
    ]
    sizes += _model_sizes(config.model, rules)
    if config.data.sequence_length > config.model.attention_chunk:
        sizes.append(("model.attention_chunk", config.model.attention_chunk, dict(rules.acts)["T"]))
    _check_divides(sizes, mesh)
    tables = (*dict(rules.acts).values(), *dict(rules.params).values())
    used = {name for axes in tables for name in ((axes,) if isinstance(axes, str) else axes)}
    for axis in mesh_lib.AXES:
        if axis not in used and mesh.shape[axis] > 1:
            raise errors.UserError(
                f"config.mesh.{axis} = {mesh.shape[axis]}: mesh.rules = {config.mesh.rules!r} shard"
                " nothing over it; set it to 1, or use other rules"
            )


def check_model(
    model: config_lib.ModelConfig, mesh_config: config_lib.MeshConfig, mesh: jax.sharding.Mesh
) -> None:
    """Checks the model's own dimensions against the mesh, as `check` does for a whole run."""
    _check_divides(_model_sizes(model, axis_rules(mesh_config)), mesh)


def _check_divides(sizes: list[tuple[str, int, Axes | None]], mesh: jax.sharding.Mesh) -> None:
    for name, size, axes in sizes:
        ways = axis_size(mesh, axes)
        if size % ways:
            raise errors.UserError(
                f"config.{name} = {size} cannot be split {ways} ways over mesh axis {axes}; use a"
                f" multiple of {ways}, or change config.mesh"
            )


def _model_sizes(m: config_lib.ModelConfig, rules: AxisRules) -> list[tuple[str, int, Axes | None]]:
    params = dict(rules.params)
    return [
        ("model.embed_dim", m.embed_dim, params.get("D")),
        ("model.num_kv_heads", m.kv_heads, params.get("K")),
        ("model.mlp_dim", m.mlp_width, params.get("F")),
        ("model.vocab_size", m.vocab_size, params.get("V")),
    ]
