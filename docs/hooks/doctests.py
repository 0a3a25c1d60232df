"""Doctests of docstrings as blocks of code: Markdown would take their prompts for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLES = re.compile(r"(?:^|(?<=\n\n))>>> .*?(?=\n\n|\Z)", re.DOTALL)


class Doctests(griffe.Extension):
    """Every paragraph that begins with a prompt."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLES.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
