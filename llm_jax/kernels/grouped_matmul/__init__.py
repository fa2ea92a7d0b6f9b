"""Rows grouped by expert times each group's own matrix, as dropless mixtures of experts need it."""
