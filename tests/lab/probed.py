"""Configs of a sweep whose runs end with a probe."""

from tests.lab import sweeps

get_config = sweeps.PROBED.get_config
