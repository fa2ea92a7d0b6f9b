"""The ablation lab: from an idea to a table with statistics, and the compiled cost at scale beside it.

An ablation is a `Sweep` in `experiments/NAME/sweep.py`; `python -m experiments.run NAME` makes the runs it lacks and
writes its report.

sweep        what is compared: variants, grids, seeds, budgets, the metric and what counts
results      what is kept of a run, and whether it is of the settings and the program of now
runner       what is missing, in processes of this machine or on slices
statistics   paired differences, intervals, corrected p-values, verdicts, speed-ups
analysis     results to rows of a table; refusals of what is no fair comparison
cost         the full-size variant, compiled without a TPU
report       Markdown, HTML, LaTeX, figures
ledger       all of them in one table
"""
