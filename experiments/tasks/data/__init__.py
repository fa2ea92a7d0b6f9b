"""Real data for tasks, out of published packages: `python -m experiments.tasks.data NAME`.

Each module says what its data are, under which licence, how they are split and what was done against leaks. What
they are not is committed: users download them.

    FOLDER/NAME/{train,validation,test}.jsonl   an example a line
    FOLDER/NAME/about.json                      counts, checksums, source, licence, what leaked
"""
