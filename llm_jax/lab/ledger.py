"""All sweeps in one table, `experiments/README.md`: what was claimed, and what came of it. Negative results stay."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from llm_jax.lab import analysis

FILE = "summary.json"
_STATUSES = ("reproduced", "not reproduced", "inconclusive")


def status_of(findings: Sequence[analysis.Finding]) -> str:
    """Returns what findings come to: reproduced if all are, not reproduced if one is not."""
    held = [finding.holds for finding in findings]
    if not held or None in held and False not in held:
        return "inconclusive"
    return "reproduced" if all(held) else "not reproduced"


def summary(table: analysis.Table) -> dict[str, Any]:
    """Returns a sweep's line of the ledger."""
    findings = table.findings()
    rows = [row for cell in table.cells.values() for row in cell.by_seed.values()]
    return {
        "claim": table.sweep.claim,
        "source": table.sweep.source,
        "status": status_of(findings),
        "effect": "; ".join(finding.effect for finding in findings if finding.effect),
        "runs": len(rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
        "commit": ", ".join(sorted({row["commit"] for row in rows})),
    }


def lines(folder: pathlib.Path) -> list[str]:
    """Returns the table's lines, of all folders with a summary."""
    found = [
        "| id | claim | source | status | effect | runs | minutes | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob(f"*/{FILE}")):
        one = json.loads(path.read_text())
        name = path.parent.name
        report = f"[{name}]({name}/report.md)"
        cells = [report, *(str(one[key]) for key in list(one))]
        found.append(f"| {' | '.join(cells)} |")
    return found


def write(folder: pathlib.Path, begin: str, end: str) -> None:
    """Writes the table between two marks of the folder's README.

    Raises:
      ValueError: the README has not both marks.
    """
    path = folder / "README.md"
    before, first, rest = path.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{path} has no place for the ledger between {begin} and {end}")
    path.write_text(f"{before}{begin}\n" + "\n".join(lines(folder)) + f"\n{end}{after}")
