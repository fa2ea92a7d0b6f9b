"""Settings that several families share: rotary positions, and which layers have a window."""

from collections.abc import Mapping
import itertools
import math
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.convert import equality
from llm_jax.convert import settings

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Of theirs, in each type of scaling: their keys and ours.
_SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "original_max_position_embeddings": "rope_original_length",
        "attention_factor": "rope_attention_factor",
    },
}
_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
# What a type takes besides, and where theirs may leave some out, what it means then.
_BESIDE = {"yarn": ("mscale", "mscale_all_dim", "truncate")}
_DEFAULTS = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0}}
_OPTIONAL = ("attention_factor",)  # None in ours as well


_ROPE_KEYS = ("rope_scaling", "rope_parameters", "partial_rotary_factor")


def _check_rope(theirs: settings.Json) -> None:
    if theirs.get("rope_parameters") and theirs.get("rope_scaling"):
        raise errors.UserError("rope_parameters and rope_scaling are both there: leave one out")
    if theirs.get("partial_rotary_factor") not in (None, 1.0):
        raise errors.UserError(
            f"partial_rotary_factor = {theirs['partial_rotary_factor']!r} (llm_jax has 1.0 alone)"
        )


def _read_scaling(raw: Mapping[str, Any], where: str, length: int | None) -> settings.Ours:
    """Returns our fields of a dict such as `rope_scaling`, which may hold the base as well."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in _SCALINGS:
        raise errors.UserError(f"{where}.rope_type = {kind!r} (llm_jax has {', '.join(_SCALINGS)})")
    keys, given = _SCALINGS[kind], {key: value for key, value in raw.items() if value is not None}
    defaults = {"original_max_position_embeddings": length} | _DEFAULTS.get(kind, {})
    raw = dict.fromkeys(_OPTIONAL) | defaults | given
    others = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}
    unknown = sorted(given.keys() - keys.keys() - others - {*_BESIDE.get(kind, ())})
    missing = sorted(key for key in keys if raw.get(key) is None and key not in _OPTIONAL)
    if unknown or missing:
        problem = f"has {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise errors.UserError(f"{where} {problem} (rope_type = {kind!r})")
    if kind == "yarn":
        raw["attention_factor"] = _attention_factor(raw, where)
    return {"rope_scaling": _TYPES[kind]} | {ours: raw[key] for key, ours in keys.items()}


def _attention_factor(raw: Mapping[str, Any], where: str) -> float | None:
    """Returns what YaRN multiplies rotated elements with, where that is not what the paper has."""
    if not raw.get("truncate", True):
        raise errors.UserError(f"{where}.truncate = False (llm_jax rounds the ramp of yarn)")
    own, of_all = raw.get("mscale"), raw.get("mscale_all_dim")
    if raw["attention_factor"] is None and own and of_all:
        return yarn_scale(raw["factor"], own) / yarn_scale(raw["factor"], of_all)
    return raw["attention_factor"]


def yarn_scale(factor: float, share: float) -> float:
    """Returns by how much a context that is `factor` times as long sharpens attention, by their share."""
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _write_scaling(model: config_lib.ModelConfig) -> dict[str, Any]:
    kind = next(theirs for theirs, ours in _TYPES.items() if ours == model.rope_scaling)
    values = {key: getattr(model, ours) for key, ours in _SCALINGS[kind].items()}
    left_out = [key for key in _OPTIONAL if values.get(key, 0) is None]
    return {"rope_type": kind} | {k: v for k, v in values.items() if k not in left_out}


def rope(default_theta: float = 10_000.0) -> settings.Setting:
    """Returns the setting of families whose layers all have the same rotary positions.

    transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    """

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        del names
        _check_rope(theirs)
        where = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"
        raw = theirs.get(where) or {}
        theta = raw.get("rope_theta", theirs.get("rope_theta", default_theta))
        length = theirs.get("max_position_embeddings")
        scaling = _read_scaling(raw, where, length)
        return {"positions": "rope", "rope_fraction": 1.0, "rope_theta": theta} | scaling

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        scaling = _write_scaling(model)
        if "rope_parameters" in original:
            return {"rope_parameters": {"rope_theta": model.rope_theta} | scaling}
        has_scaling = model.rope_scaling != "none"
        return {"rope_theta": model.rope_theta, "rope_scaling": scaling if has_scaling else None}

    return settings.Custom((*_ROPE_KEYS, "rope_theta"), read, write)


def rope_by_kind(
    global_key: str, local_key: str, global_theta: float, local_theta: float
) -> settings.Setting:
    """Returns the setting of families whose local layers have a base of their own.

    Args:
      global_key, local_key: under which transformers before 5 wrote the bases.
      global_theta, local_theta: where there are none.
    """

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        del names
        _check_rope(theirs)
        by_kind = theirs.get("rope_parameters") or {}
        if strange := sorted(by_kind.keys() - {_LOCAL, _GLOBAL}):
            raise errors.UserError(
                f"rope_parameters has {', '.join(strange)} (llm_jax reads {_GLOBAL} and {_LOCAL})"
            )
        of_global = by_kind.get(_GLOBAL) or theirs.get("rope_scaling") or {}
        of_local = by_kind.get(_LOCAL) or {}
        where = f"rope_parameters.{_GLOBAL}" if by_kind else "rope_scaling"
        length = theirs.get("max_position_embeddings")
        if _read_scaling(of_local, f"rope_parameters.{_LOCAL}", length)["rope_scaling"] != "none":
            raise errors.UserError(
                f"rope_parameters.{_LOCAL} is scaled (llm_jax scales global ones)"
            )
        return {
            "positions": "rope",
            "rope_fraction": 1.0,
            "rope_theta": of_global.get("rope_theta", theirs.get(global_key, global_theta)),
            "rope_local_theta": of_local.get("rope_theta", theirs.get(local_key, local_theta)),
        } | _read_scaling(of_global, where, length)

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        scaling, local = _write_scaling(model), model.rope_local_theta
        if local is None and model.rope_scaling != "none":
            raise errors.UserError(
                "config.model.rope_local_theta = None (local layers are not scaled)"
            )
        local = model.rope_theta if local is None else local
        if "rope_parameters" in original:
            return {
                "rope_parameters": {
                    _GLOBAL: {"rope_theta": model.rope_theta} | scaling,
                    _LOCAL: {"rope_theta": local, "rope_type": "default"},
                }
            }
        has_scaling = model.rope_scaling != "none"
        return {
            global_key: model.rope_theta,
            local_key: local,
            "rope_scaling": scaling if has_scaling else None,
        }

    keys = (*_ROPE_KEYS, global_key, local_key)
    return settings.Custom(keys, read, write)


def window(
    key: str,
    default: int | None,
    kinds: settings.Callable[[settings.Json], str],
    extra: tuple[str, ...] = (),
    is_fixed: bool = False,
) -> settings.Setting:
    """Returns the setting of which layers see how far.

    Args:
      key, default: of the window.
      kinds: gives the letters that layers repeat (`context.kinds`) where `layer_types` does not.
      extra: other keys that `kinds` reads.
      is_fixed: whether layers are always those of `kinds`, so that there are no `layer_types`.
    """

    def letters(theirs: settings.Json) -> str:
        types = None if is_fixed else theirs.get("layer_types")
        if types is None:
            return kinds(theirs)
        depth = theirs.get("num_hidden_layers")
        if depth is not None and len(types) != depth:
            raise errors.UserError(
                f"layer_types has {len(types)} layers (num_hidden_layers = {depth})"
            )
        unknown = sorted({*types} - {_LOCAL, _GLOBAL})
        if unknown:
            raise errors.UserError(f"layer_types has {', '.join(unknown)} (llm_jax has {_LOCAL},"
                                   f" {_GLOBAL})")  # fmt: skip
        return shortest("".join("L" if kind == _LOCAL else "G" for kind in types))

    def read(theirs: settings.Json, names: settings.Names) -> settings.Ours:
        del names
        pattern, width = letters(theirs), theirs.get(key, default)
        if "L" not in pattern or width is None:
            width = None
        is_mixed = "L" in pattern and "G" in pattern
        return {"window": width, "layer_pattern": pattern if is_mixed else ""}

    def write(model: config_lib.ModelConfig, original: settings.Json) -> settings.Ours:
        del original
        spelled = equality.local_and_global(model) or "G" * model.num_layers
        types = [_LOCAL if letter == "L" else _GLOBAL for letter in spelled]
        width = {key: model.window}
        return width if is_fixed else width | {"layer_types": types}

    keys = (key, *extra) if is_fixed else (key, "layer_types", *extra)
    return settings.Custom(keys, read, write)


def shortest(letters: str) -> str:
    """Returns the shortest beginning that, repeated, gives the letters."""
    for size in range(1, len(letters)):
        if "".join(itertools.islice(itertools.cycle(letters[:size]), len(letters))) == letters:
            return letters[:size]
    return letters
