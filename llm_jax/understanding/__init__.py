"""What a model does with a text, what it has kept of its data, and what it cost.

subject        a checkpoint as something to look at, and the rows that it reads of a text
recording      what each attention of a forward pass was given, and the weights that it used
attention      maps of these weights: a page and pictures
tokens         the loss of each token of a text, and what the model expected instead: a page and JSON
occupations    who is said to do which work: names and sentences of `bias`
bias           how much likelier a sentence is with `he` than with `she`, by occupation
suffixes       the longest parts of a text that occur in another, by a suffix array
memorisation   what a model writes out of its training data
energy         energy and carbon of a run, from its hours and from assumptions that it names

`python -m llm_jax.understanding WHAT --workdir=...` is the command.
"""
