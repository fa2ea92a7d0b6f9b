"""A sweep's report: `report.md`, `report.html`, `table.tex` and figures, all from results and costs alone."""

from collections.abc import Mapping
from collections.abc import Sequence
import html
import json
import math
import pathlib
from typing import Any

from llm_jax.lab import analysis
from llm_jax.lab import cost as cost_lib
from llm_jax.lab import figures
from llm_jax.lab import ledger
from llm_jax.lab import results as results_lib
from llm_jax.lab import statistics
from llm_jax.lab import sweep as sweep_lib

Lines = list[list[str]]


def write(folder: pathlib.Path, sweep: sweep_lib.Sweep) -> analysis.Table:
    """Writes the report of a sweep into its folder; returns its table.

    Raises:
      errors.UserError: as `analysis.tabulate`.
    """
    table = analysis.tabulate(sweep, results_lib.Results(folder, sweep))
    costs = cost_lib.read(folder, sweep)
    pictures = draw(folder, table, costs)
    lines = rows(table, costs)
    text = markdown(table, lines, pictures)
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(page(table, lines, pictures))
    (folder / "table.tex").write_text(latex(table, lines))
    (folder / "summary.json").write_text(json.dumps(ledger.summary(table), indent=1) + "\n")
    return table


def draw(
    folder: pathlib.Path, table: analysis.Table, costs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Draws the figures; returns their captions, by file."""
    metric = table.sweep.metric
    # Of runs that were evaluated at their end alone, that of training.
    drawn = metric if _has_curve(table, metric) else "train/loss"
    found = {
        figures.save(figures.curves(table, drawn), folder, "curves"): (
            f"Learning curves, `{drawn}`: the mean over seeds, and their range."
        )
    }
    for path in table.sweep.grid:
        name = f"over_{path.rpartition('.')[2]}"
        drawn = figures.over_axis(table, path)
        found[figures.save(drawn, folder, name)] = (
            f"The metric over `{path}`: a point is a seed, a cross a run that diverged."
        )
    for kept in table.sweep.kept:
        name = "curves_" + kept.rpartition("/")[2]
        if _has_curve(table, kept):
            found[figures.save(figures.curves(table, kept), folder, name)] = f"`{kept}`."
    own = {} if table.sweep.pictures is None else table.sweep.pictures(table)
    for name, (drawn, caption) in own.items():
        found[figures.save(drawn, folder, name)] = caption
    drawn = figures.pareto(table, costs, metric)
    if drawn is not None:
        found[figures.save(drawn, folder, "pareto")] = (
            f"Quality here against the full size's cost on {table.sweep.slice}; the line joins what nothing beats."
        )
    return found


def _has_curve(table: analysis.Table, metric: str) -> bool:
    """Returns whether runs have more than one row of a metric of numbers."""
    return any(len(cell.curve(metric)) > 1 for cell in table.cells.values())


def rows(table: analysis.Table, costs: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Returns the cells of the table, its head first."""
    sweep = table.sweep
    head = [
        "variant",
        *(["tuned"] if sweep.tuned else []),
        "metric, 95% CI",
        "difference to baseline",
    ]
    head += ["p, corrected", "speed-up", *sweep.evaluations, *sweep.columns, "diverged", "verdict"]
    head += [f"full size on {sweep.slice}"] if sweep.full_size is not None else []
    found = [head]
    for row in table.rows:
        comparison = row.comparison
        is_baseline = row.variant == sweep.reference(row.variant)
        cells = [figures.label_of(row) + " (baseline)" * is_baseline]
        if sweep.tuned:
            cells.append(", ".join(f"{p.rpartition('.')[2]} {value:g}" for p, value in row.tuned))
        cells.append("all diverged" if row.value is None else str(row.value))
        cells.append("" if comparison is None else _signed(comparison.difference))
        cells.append("" if comparison is None else _p(comparison.adjusted))
        cells.append("" if math.isnan(row.speedup) else f"{row.speedup:.2f}")
        for name in sweep.evaluations:
            values = list(row.cell.values(name).values())
            cells.append(str(statistics.interval(values)) if values else "")
        for name in sweep.columns.values():
            values = row.cell.ends(name)
            cells.append(f"{analysis.mean_of(values):.3f}" if values else "")
        cells.append(f"{len(row.cell.diverged)} of {len(row.cell.by_seed)}")
        cells.append(_verdict(row, is_baseline))
        if sweep.full_size is not None:
            cells.append(cost_lib.describe(costs.get(row.variant)))
        found.append(cells)
    return found


def _verdict(row: analysis.Row, is_baseline: bool) -> str:
    if is_baseline:
        return ""
    if row.value is None:
        return "diverged"
    return "nothing to compare with" if row.comparison is None else row.comparison.verdict


def _signed(found: statistics.Interval) -> str:
    if math.isnan(found.low):
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def introduction(table: analysis.Table) -> list[str]:
    """Returns what a reader must know of the runs, a paragraph each."""
    sweep = table.sweep
    points = {one.name: list(sweep.points(one.name)) for one in sweep.variants}
    base = sweep.config(sweep_lib.Run(sweep.baseline, points[sweep.baseline][0], 0))
    used = sweep_lib.usage(base)
    equal = ", ".join(f"{b.kind} (within {b.tolerance:.1%})" for b in sweep.budgets) or "nothing"
    exempt = [variant.name for variant in sweep.variants if variant.is_exempt]
    is_grouped = len({variant.group for variant in sweep.variants}) > 1
    return [
        f"**Claim**: {sweep.claim} ({sweep.source}).",
        f"{table.num_seeds} seeds of each of {len(sweep.variants)} variants at {len(points[sweep.baseline])} points;"
        f" the baseline has {used['parameters']:,} parameters and trains on {used['tokens']:,} tokens"
        f" ({used['flops']:.2e} flops). Equal for all{' of a group' * is_grouped}: {equal}"
        + (f"; but for {', '.join(exempt)}." if exempt else ".")
        + _choice(sweep),
        f"The metric is `{sweep.metric}`, {'less' if sweep.is_less_better else 'more'} is better; a difference of"
        f" {sweep.smallest:g} counts. Intervals are Student's over seeds; differences are paired by seed, which"
        " decides the order of data, and initialisation where shapes allow; p-values are of the paired test, corrected"
        " for the comparisons of this table (Holm). The speed-up is in training flops: how many times more the"
        " baseline needs for the same metric. Runs that diverged are counted, and are in no mean.",
        *(
            [
                f"Beside each row stands the step of the full size on {sweep.slice}, modelled from the TPU compiler's own"
                " schedule; nobody ran it."
            ]
            if sweep.full_size is not None
            else []
        ),
    ]


def _choice(sweep: sweep_lib.Sweep) -> str:
    """Returns who chose the values of tuned axes, in words."""
    if not sweep.tuned:
        return ""
    count = len(sweep.choosing_seeds)
    who = "all seeds" if count == sweep.seeds else f"{count} of the seeds, which are in the means"
    return f" Values of {', '.join(f'`{path}`' for path in sweep.tuned)} are chosen by {who}."


def conclusions(table: analysis.Table) -> list[str]:
    """Returns the findings, a line each, with whether they came out as the source has it."""
    words = {True: "reproduced", False: "not reproduced", None: "inconclusive"}
    return [f"- {finding.text} **{words[finding.holds]}**" for finding in table.findings()]


def markdown(table: analysis.Table, lines: Lines, pictures: Mapping[str, str]) -> str:
    """Returns the report in Markdown."""
    head, *rest = lines
    text = [f"# {table.sweep.name}", ""]
    for paragraph in introduction(table):
        text += [paragraph, ""]
    text += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    text += [f"| {' | '.join(cells)} |" for cells in rest]
    found = conclusions(table)
    text += ["", "## Findings", "", *found] if found else []
    for file, caption in pictures.items():
        text += ["", f"![{caption}]({file})", "", caption]
    text += ["", f"Written by `python -m experiments.run {table.sweep.name}`."]
    return "\n".join(text) + "\n"


def page(table: analysis.Table, lines: Lines, pictures: Mapping[str, str]) -> str:
    """Returns the report as a page; its figures lie beside it."""
    head, *rest = lines
    cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rest]
    body = "".join(f"<tr>{row}</tr>\n" for row in cells)
    paragraphs = "".join(f"<p>{_inline(text)}</p>\n" for text in introduction(table))
    found = "".join(f"<li>{_inline(line[2:])}</li>\n" for line in conclusions(table))
    drawn = "".join(
        f'<figure><img src="{file}" alt=""><figcaption>{_inline(caption)}</figcaption></figure>\n'
        for file, caption in pictures.items()
    )
    style = (
        "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.25em .6em;"
        "text-align:left}img{max-width:100%}"
    )
    name = html.escape(table.sweep.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{style}</style>\n'
        f"<h1>{name}</h1>\n{paragraphs}<table>\n{body}</table>\n"
        + (f"<h2>Findings</h2>\n<ul>{found}</ul>\n" if found else "")
        + f"{drawn}</html>\n"
    )


def _inline(text: str) -> str:
    """Returns a line of Markdown as HTML: bold and code."""
    escaped = html.escape(text)
    for mark, tag in (("**", "b"), ("`", "code")):
        parts = escaped.split(mark)
        escaped = "".join(
            f"<{tag}>{part}</{tag}>" if number % 2 else part for number, part in enumerate(parts)
        )
    return escaped


def latex(table: analysis.Table, lines: Lines) -> str:
    """Returns the table for a paper (booktabs); its caption says what intervals and p-values are."""
    head, *rest = lines
    body = [" & ".join(map(_tex, cells)) + r" \\" for cells in rest]
    caption = (
        f"{table.sweep.claim} ({table.sweep.source}). Means of {table.num_seeds} seeds with 95\\% intervals;"
        " differences paired by seed, p-values corrected by Holm's method."
    )
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
            r"\toprule",
            " & ".join(map(_tex, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_tex(caption, is_marked=True)}}}",
            rf"\label{{tab:{table.sweep.name}}}",
            r"\end{table}",
            "",
        ]
    )


def _tex(text: str, is_marked: bool = False) -> str:
    marks = "&_#" if is_marked else "&%_#"
    for mark in marks:
        text = text.replace(mark, f"\\{mark}")
    return text.replace("±", r"$\pm$").replace("<", "$<$").replace("^2", "$^2$")


def texts_of(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table for the terminal, its columns aligned."""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )
