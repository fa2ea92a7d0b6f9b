"""What the tests of checkpoints share."""

import pytest

from tests import helpers
from tests.checkpoint import states


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run's folder with checkpoints of steps 1, 2 and 3, and what steps 2 and 3 hold."""
    folder = tmp_path_factory.mktemp("three")
    config = helpers.tiny_run_config()
    mesh, rules = helpers.make_mesh()
    states.save(folder, config, mesh, rules, 1, 2, 3)
    return folder, {
        step: states.bits(states.random_state(config, mesh, rules, step)) for step in (1, 2, 3)
    }
