"""What a checkpoint is worth: tasks, the metrics that others count by, and how sure one can be of them.

metrics      labels, texts and answers to scores, by scikit-learn, sacrebleu and rouge-score
bootstrap    confidence intervals, and the difference of two systems
predict      what a model says of each example of a split
tasks        the tasks of `python -m llm_jax.evaluate --tasks=...`
files        where scores go, and by which names
"""
