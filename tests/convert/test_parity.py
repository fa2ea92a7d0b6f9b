"""Our models equal Hugging Face's, by the goldens of every family."""

import pytest

from tests.convert import parity
from tests.golden.hf import goldens

_CELLS = [
    (check, name)
    for name in goldens.NAMES
    for check, of in parity.CHECKS.items()
    if name in of.names
]


@pytest.mark.parametrize("check, name", _CELLS)
def test_equals_hugging_face(check, name):
    assert parity.CHECKS[check].compare(parity.load(name)) <= parity.CHECKS[check].tolerance


def test_the_table_has_every_variant():
    text = parity.TABLE.read_text()
    assert all(f"| {name} | same |" in text for name in goldens.NAMES)
