"""Our models equal Hugging Face's, by the goldens of every family."""

import pytest

from tests.convert import parity
from tests.golden.hf import goldens


@pytest.mark.parametrize("check", parity.CHECKS)
@pytest.mark.parametrize("name", goldens.NAMES)
def test_numbers_equal_hugging_faces(name, check):
    assert parity.CHECKS[check](name) <= parity.TOLERANCES[check]


@pytest.mark.parametrize("name", goldens.DECODERS)
def test_greedy_text_equals_hugging_faces(name):
    assert parity.greedy(name) == 0.0
