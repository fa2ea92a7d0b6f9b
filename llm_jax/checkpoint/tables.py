"""What was found out about a checkpoint, as plain text or as JSON."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import math
from typing import Any

from llm_jax import config as config_lib
from llm_jax import errors
from llm_jax.checkpoint import contents
from llm_jax.checkpoint import inspection
from llm_jax.checkpoint import meta as meta_lib
from llm_jax.checkpoint import mismatch
from llm_jax.data import tokenizer as tokenizer_lib

_NOT_RECORDED = "not recorded"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to print.

    Attributes:
      training: list the arrays of the optimiser's state as well.
      config: print all settings, not just those that differ from the defaults.
    """

    training: bool = False
    config: bool = False


def text(
    found: inspection.Inspection, comparison: inspection.Comparison | None, options: Options
) -> str:
    """Returns the tables that a person reads."""
    blocks = [_header(found)]
    if found.meta is not None:
        blocks.append(_settings(found.meta.config, options.config))
    blocks.append(_arrays(found.arrays, options.training))
    blocks.append(_totals(found.arrays))
    if comparison is not None:
        blocks.append(_comparison(comparison))
    return "\n\n".join(filter(None, blocks))


def as_json(
    found: inspection.Inspection, comparison: inspection.Comparison | None, options: Options
) -> str:
    """Returns the same for machines, the config and the paths of all parts' totals included."""
    meta = found.meta
    result: dict[str, Any] = {
        "path": str(found.step_dir),
        "damage": found.damage,
        "is_verified": found.is_verified,
        "steps": [dataclasses.asdict(step) for step in found.steps],
        "mesh": found.mesh,
        "arrays": [
            {"path": path, "bytes": info.num_bytes, **dataclasses.asdict(info)}
            for path, info in _listed(found.arrays, options.training)
        ],
        "totals": {part: total for part, total in _totals_by_part(found.arrays).items()},
    }
    if meta is not None:
        result |= {
            "step": meta.step,
            "eval_loss": _finite(meta.eval_loss),
            "versions": meta.versions,
            "source": meta.source and {key: meta.source[key] for key in ("family", "path")},
            "tokenizer": _tokenizer(meta.tokenizer),
            "config": config_lib.to_dict(meta.config),
        }
        result |= {"labels": meta.labels} if meta.labels else {}
    if comparison is not None:
        result["comparison"] = {
            "against": comparison.against,
            "fits": comparison.fits,
            "mismatches": [
                {"kind": m.kind, **dataclasses.asdict(m)} for m in comparison.mismatches
            ],
            "refused": comparison.refused,
            "settings": comparison.settings,
        }
    return json.dumps(result, indent=2, allow_nan=False)


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligns rows, the columns of `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _header(found: inspection.Inspection) -> str:
    meta = found.meta
    rows = [("checkpoint", str(found.step_dir))]
    if meta is not None:
        rows += [
            _origin(meta),
            ("evaluation", _loss(meta.eval_loss)),
            ("tokenizer", _tokenizer_line(meta.tokenizer)),
            *([("labels", ", ".join(meta.labels))] if meta.labels else []),
            ("saved by", ", ".join(f"{name} {v}" for name, v in meta.versions.items())),
        ]
    rows.append(("saved from", _mesh(found.mesh)))
    if found.damage:
        rows += [
            ("whole" if index == 0 else "", f"NO: {x}") for index, x in enumerate(found.damage)
        ]
    elif found.is_verified:
        rows.append(("whole", f"yes: all {len(found.arrays)} arrays are what was saved"))
    else:
        rows.append(("whole", "its record is, and its index is there; --verify reads the arrays"))
    return _table(rows + _steps(found.steps))


def _origin(meta: meta_lib.Meta) -> tuple[str, str]:
    """Returns how far the run was, or what was converted."""
    if meta.source is None:
        return "step", f"{meta.step} of {meta.config.train.num_steps}"
    return "converted", f"from {meta.source['path']} ({meta.source['family']})"


def _steps(steps: Sequence[inspection.Step]) -> list[tuple[str, str]]:
    losses = [step.eval_loss for step in steps if step.eval_loss is not None]
    rows = []
    for step in steps:
        state = _loss(step.eval_loss) if step.problem is None else f"UNREADABLE: {step.problem}"
        is_best = step.eval_loss is not None and step.eval_loss == min(losses)
        rows.append(("", f"{step.step}: {state}{', the best' if is_best else ''}"))
    return [("steps", rows[0][1]), *rows[1:]] if rows else []


def _loss(loss: float | None) -> str:
    return "not evaluated" if loss is None else f"{loss:.4f} nats a token"


def _mesh(mesh: dict[str, int] | None) -> str:
    if mesh is None:
        return f"mesh {_NOT_RECORDED}"
    num_devices = math.prod(mesh.values())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
    return f"{num_devices} devices: {axes}" if axes else "1 device"


def _tokenizer(raw: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(raw, sort_keys=True).encode()
    summary = {"kind": raw["kind"], "sha256": hashlib.sha256(content).hexdigest()}
    try:
        return summary | {"vocab_size": tokenizer_lib.from_dict(raw).vocab_size}
    except errors.UserError:
        return summary | {"vocab_size": None}  # a kind of another version


def _tokenizer_line(raw: dict[str, Any]) -> str:
    summary = _tokenizer(raw)
    size = summary["vocab_size"]
    ids = "not known here" if size is None else f"{size:,} ids"
    return f"{summary['kind']}, {ids}, sha256 {summary['sha256'][:12]}"


def _settings(config: config_lib.RunConfig, is_whole: bool) -> str:
    if is_whole:
        rows = list(_flat(config_lib.to_dict(config)))
        return "config\n" + _table([(f"  {name}", repr(value)) for name, value in rows])
    changed = mismatch.differing(config_lib.RunConfig(), config)
    if not changed:
        return "config: the defaults"
    rows = [(f"  {name}", repr(new)) for name, (_, new) in changed.items()]
    return "config, where it is not the defaults (--config prints it whole)\n" + _table(rows)


def _flat(raw: dict[str, Any], prefix: str = ""):
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _listed(arrays: contents.Arrays, training: bool) -> list[tuple[str, meta_lib.ArrayInfo]]:
    return [
        (path, info)
        for path, info in arrays.items()
        if training or contents.part_of(path) != contents.TRAINING
    ]


def _arrays(arrays: contents.Arrays, training: bool) -> str:
    listed = _listed(arrays, training)
    if not listed:
        return ""
    rows = [("array", "shape", "dtype", "sharding", "bytes")]
    for path, info in listed:
        shape = f"[{', '.join(map(str, info.shape))}]"
        rows.append((path, shape, info.dtype, _spec(info), f"{info.num_bytes:,}"))
    return _table(rows, right=(4,))


def _spec(info: meta_lib.ArrayInfo) -> str:
    if info.spec is None:
        return _NOT_RECORDED
    if not any(info.spec):
        return "replicated"
    names = ["+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in info.spec]
    return f"({', '.join(names)})"


def _totals_by_part(arrays: contents.Arrays) -> dict[str, dict[str, int]]:
    totals = {}
    for part in contents.PARTS:
        of_part = [info for path, info in arrays.items() if contents.part_of(path) == part]
        totals[part] = {
            "arrays": len(of_part),
            "elements": sum(info.num_elements for info in of_part),
            "bytes": sum(info.num_bytes for info in of_part),
        }
    return totals


def _totals(arrays: contents.Arrays) -> str:
    if not arrays:
        return ""
    rows = [("part", "arrays", "elements", "bytes", "")]
    for part, total in _totals_by_part(arrays).items():
        rows.append((part, *(f"{n:,}" for n in total.values()), _in_units(total["bytes"])))
    return _table(rows, right=(1, 2, 3, 4))


def _in_units(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1024 and unit + 1 < len(_UNITS):
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.1f} {_UNITS[unit]}" if unit else ""


def _comparison(comparison: inspection.Comparison) -> str:
    blocks = [f"against {comparison.against}: {_verdict(comparison)}"]
    if comparison.mismatches:
        rows = [("array", "", "checkpoint", "against", "because of")]
        for m in comparison.mismatches:
            because = ", ".join(m.settings) or "no setting: other code made it"
            saved, wanted = ("-" if info is None else str(info) for info in (m.saved, m.wanted))
            rows.append((m.path, m.kind, saved, wanted, because))
        blocks.append(_table(rows))
    if comparison.settings:
        rows = [("setting", "checkpoint", "against")]
        rows += [(f"config.{n}", repr(a), repr(b)) for n, (a, b) in comparison.settings.items()]
        blocks.append(_table(rows))
    return "\n\n".join(blocks)


def _verdict(comparison: inspection.Comparison) -> str:
    if comparison.fits:
        return "it fits"
    parts = sorted({contents.part_of(m.path) for m in comparison.mismatches})
    lines = [f"{len(comparison.mismatches)} arrays differ ({', '.join(parts)})"] if parts else []
    if comparison.refused:
        names = [line.partition(":")[0] for line in comparison.refused]
        lines.append(f"training would not resume: {', '.join(names)}")
    return "; ".join(lines)
