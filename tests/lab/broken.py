"""Configs of a sweep whose runs fail or diverge."""

from tests.lab import sweeps

get_config = sweeps.BROKEN.get_config
