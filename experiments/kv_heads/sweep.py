"""Heads of keys and values: quality against the bytes of the cache."""

from experiments import small
from llm_jax.lab import analysis
from llm_jax.lab import sweep

_HEADS = 8
_COUNTS = {"mha": 8, "gqa4": 4, "gqa2": 2, "mqa": 1}


def base():
    return small.decoder(num_heads=_HEADS)


def full_size(name):
    """Returns GPT-2 124M with a variant's share of its twelve heads."""
    return small.gpt2(num_kv_heads=max(1, 12 * _COUNTS[name] // _HEADS))


def findings(table: analysis.Table) -> list[analysis.Finding]:
    """Holds the order of Ainslie et al. 2023: fewer heads of keys cost little, one costs most."""
    base_config = table.sweep.get_config().model
    width = base_config.embed_dim // _HEADS
    means = {name: table.row(name).value.mean for name in _COUNTS}
    cached = {
        name: 2 * 2 * base_config.num_layers * width * count for name, count in _COUNTS.items()
    }
    lines = ", ".join(f"{name} {cached[name]:,} bytes {means[name]:.4f}" for name in _COUNTS)
    pairs = [(table.row(name).cell, table.row("mha").cell) for name in ("gqa2", "mqa")]
    two, one = table.contrasts(pairs)
    text = (
        f"Bytes of cache a token (bfloat16) and loss: {lines}. MQA costs {one.difference.mean:+.4f} against MHA"
        f" ({one.verdict}), GQA of two {two.difference.mean:+.4f} ({two.verdict})."
    )
    is_ordered = one.difference.mean > two.difference.mean
    is_shown = one.verdict.startswith("worse")
    holds = True if is_ordered and is_shown else None if one.difference.mean > 0 else False
    return [
        analysis.Finding(
            text, holds, f"mqa {one.difference.mean:+.3f}, gqa2 {two.difference.mean:+.3f}"
        )
    ]


SWEEP = sweep.Sweep(
    name="kv_heads",
    claim="grouped heads of keys keep most of the quality at a part of the cache",
    source="Shazeer 2019; Ainslie et al. 2023",
    base=base,
    variants=tuple(
        sweep.Variant(name, {"model.num_kv_heads": count}, is_exempt=name != "mha")
        for name, count in _COUNTS.items()
    ),
    baseline="mha",
    seeds=5,
    smallest=0.005,
    full_size=full_size,
    findings=findings,
)
get_config = SWEEP.get_config
