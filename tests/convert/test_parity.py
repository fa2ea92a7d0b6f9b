"""Our models equal Hugging Face's, by the goldens of every family."""

import pytest

from tests.convert import parity
from tests.golden.hf import goldens

# Logits, states and files of all models each time. What writes compiles a program for a prompt and one for a
# step: of these some, and of gradients of experts one; the long tests do all.
_WRITING = ("gpt2", "gemma3", "t5_v1_1", "mixtral", "deepseek_v3", "marian")
_DEAR_GRADIENTS = ("qwen3_moe", "qwen3_moe_every_second", "olmoe", "deepseek_v2_experts")


def _marks(check, name):
    is_left = check == "greedy text" and name not in _WRITING
    is_dear = check == "gradients" and name in _DEAR_GRADIENTS
    return [pytest.mark.long] if is_left or is_dear else []


_CELLS = [
    pytest.param(check, name, marks=_marks(check, name))
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
