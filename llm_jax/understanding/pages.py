"""HTML pages that hold their data and need nothing from elsewhere."""

import json
import pathlib
from typing import Any

_PLACE = "/*DATA*/null"


def render(template: str, data: dict[str, Any]) -> str:
    """Returns the page `template` of this folder with its data in it.

    Args:
      template: name of an HTML file whose script reads `const data = /*DATA*/null;`.
      data: what JSON can express.
    """
    text = (pathlib.Path(__file__).parent / template).read_text()
    # A text that is looked at may hold the end of a script, or a line separator that ends a string in one.
    found = json.dumps(data).replace("<", "\\u003c")
    before, place, behind = text.partition(_PLACE)
    assert place, template
    return before + found + behind
