"""Which mesh axis each dimension lies on: one table, read by models, data and checkpoints.

Models name dimensions (`rules.param("DF")`), never mesh axes. The presets (`mesh.rules`):

  dp          batch over replica and data; weights on every device
  fsdp        as dp, and the model width D of each weight over data (ZeRO-3), or where it has none the
              latent's width Z: a layer's weights are gathered where they are used and their gradients
              scattered back
  fsdp_tp     as fsdp, and heads, feed-forward width and vocabulary over tensor (Megatron)
  fsdp_cp     as fsdp, with weights over data and seq: the devices that share a long sequence share
              the weights and the optimiser's state as well
  fsdp_ep     as fsdp_tp, and the batch over expert too: experts lie over expert, all other weights over
              data and expert as if they were one axis
  multislice  as fsdp_cp, and over tensor as fsdp_tp: whatever the axes within a slice are, a slice has
              one copy of the weights, and only gradients of its shards cross the slow network
  tp          heads, feed-forward width and vocabulary over tensor alone: for generation, which reads
              every weight for every token and must not gather them

The sizes of the mesh are free; an axis that a preset does not use must be 1. Activations and optimiser
state follow: a moment lies where its parameter does.

`seq` shards the sequence of activations in all of them: queries stay put. `mesh.context` says how keys and
values reach them: `gather` gives each device all of them, in one exchange and in O(T) of its memory; `ring`
passes them around, in O(T / n), and balances causal masks by the order in which devices hold the sequence
(`kernels.flash_attention.ring`).

`mesh.kv_heads` is for key-value heads that `tensor` does not divide: `replicated` puts them, weights and
activations, on each of its devices, and shards the queries of each head instead.
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
    # How keys reach the queries of a sequence that is cut, as in `config.MeshConfig`.
    context: str = "gather"

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
    axes, spec, used = dict(table), [], set()
    if "D" in dims:  # which lies on what Z does: an axis cuts one dimension of an array
        axes.pop("Z", None)
    for letter in dims:
        # Of weights with experts the width lies on what the experts leave of its axes.
        names = [name for name in _names(axes.get(letter)) if name not in used]
        used.update(names)
        spec.append(names[0] if len(names) == 1 else tuple(names) or None)
    return PartitionSpec(*spec)


def _names(axes: Axes | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _rules(params: dict[str, Axes], acts: dict[str, Axes]) -> AxisRules:
    base = {"B": ("replica", "data"), "T": "seq", "N": ("replica", "data")}
    return AxisRules(tuple(params.items()), tuple((base | acts).items()))


_TENSOR = {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}

_ROWS = ("replica", "data", "expert")

PRESETS = {
    "dp": _rules({}, {}),
    "fsdp": _rules(dict.fromkeys("DZ", "data"), {}),
    "fsdp_tp": _rules(dict.fromkeys("DZ", "data") | _TENSOR, _TENSOR),
    "fsdp_cp": _rules(dict.fromkeys("DZ", ("data", "seq")), {}),
    "fsdp_ep": _rules(
        dict.fromkeys("DZ", ("data", "expert")) | {"E": "expert"} | _TENSOR,
        {"B": _ROWS, "N": _ROWS, "E": "expert"} | _TENSOR,
    ),
    "multislice": _rules(dict.fromkeys("DZ", ("data", "seq")) | _TENSOR, _TENSOR),
    "tp": _rules(_TENSOR, _TENSOR),
}


def axis_rules(config: config_lib.MeshConfig) -> AxisRules:
    """Returns the preset that the config names, with its choices."""
    rules = PRESETS[config.rules]
    params, acts = rules.params, rules.acts
    if config.kv_heads == "replicated":
        params, acts = _of_groups(params), _of_groups(acts)
    if config.context == "ring":
        acts += (("S", dict(acts)["T"]),)
    return AxisRules(params, acts, config.context)


def _of_groups(table: tuple[tuple[str, Axes], ...]) -> tuple[tuple[str, Axes], ...]:
    """Returns the table with groups of queries where it has key-value heads."""
    return tuple(("G" if letter == "K" else letter, axes) for letter, axes in table)


def axis_size(mesh: jax.sharding.Mesh, axes: Axes | None) -> int:
    """Returns how many ways `axes` of `mesh` split a dimension."""
    size = 1
    for name in _names(axes):
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
        ("objective.target_length", config.target_length, dict(rules.acts)["T"]),
    ]
    sizes += _model_sizes(config.model, rules)
    is_ring = config.mesh.context == "ring" and mesh.shape["seq"] > 1
    if is_ring and config.data.sequence_length % (2 * mesh.shape["seq"]):
        raise errors.UserError(
            f"config.data.sequence_length = {config.data.sequence_length} cannot be cut into two pieces"
            f" for each of {mesh.shape['seq']} devices of a ring; use a multiple of"
            f" {2 * mesh.shape['seq']}, or mesh.context = 'gather'"
        )
    if config.data.sequence_length > config.model.attention_chunk and not is_ring:
        sizes.append(("model.attention_chunk", config.model.attention_chunk, dict(rules.acts)["T"]))
    _check_heads(config.model, config.mesh, mesh)
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
    _check_heads(model, mesh_config, mesh)
    _check_divides(_model_sizes(model, axis_rules(mesh_config)), mesh)


def _check_heads(
    model: config_lib.ModelConfig, mesh_config: config_lib.MeshConfig, mesh: jax.sharding.Mesh
) -> None:
    """Checks that what the rules shard of the heads can be: key-value heads, or their groups."""
    params = dict(axis_rules(mesh_config).params)
    ways = axis_size(mesh, params.get("K") or params.get("G"))
    kv_heads, groups = model.kv_heads, model.num_heads // model.kv_heads
    is_replicated = mesh_config.kv_heads == "replicated"
    name, count = ("query groups", groups) if is_replicated else ("key-value heads", kv_heads)
    if is_replicated and ways > 1 and model.attention == "jax_nn":
        raise errors.UserError(
            "config.model.attention = 'jax_nn' takes whole groups of heads, and mesh.kv_heads ="
            " 'replicated' shards them; use attention = 'auto', or mesh.kv_heads = 'sharded'"
        )
    if count % ways == 0:
        return
    other = ("sharded", kv_heads) if is_replicated else ("replicated", groups)
    would_do = f"mesh.kv_heads = {other[0]!r}, or " if other[1] % ways == 0 else ""
    sizes = " or ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    raise errors.UserError(
        f"config.model.num_kv_heads = {kv_heads}: {count} {name} (mesh.kv_heads ="
        f" {mesh_config.kv_heads!r}) cannot be split {ways} ways over mesh axis tensor; use {would_do}"
        f"tensor = {sizes}"
    )


def fitting_kv_heads(model: config_lib.ModelConfig, tensor: int) -> str:
    """Returns the `mesh.kv_heads` for a model on `tensor` devices: sharded, unless only groups divide."""
    is_divided = model.kv_heads % tensor == 0
    do_groups_divide = model.num_heads // model.kv_heads % tensor == 0
    return "replicated" if do_groups_divide and not is_divided else "sharded"


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
    latents = {"model.kv_latent_dim": m.kv_latent_dim, "model.q_latent_dim": m.q_latent_dim}
    return [
        *((name, size, params.get("Z")) for name, size in latents.items() if size is not None),
        ("model.embed_dim", m.embed_dim, params.get("D")),
        ("model.mlp_dim", m.mlp_width, params.get("F")),
        *(
            [
                ("model.moe.num_experts", m.moe.num_experts, params.get("E")),
                ("model.moe.expert_dim", m.expert_width, params.get("F")),
            ]
            if m.moe.is_on
            else []
        ),
        ("model.vocab_size", m.vocab_size, params.get("V")),
    ]
