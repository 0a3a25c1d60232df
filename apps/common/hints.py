"""Types of options: which values they allow, and how an error names them."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def accepts(hint: Any, value: Any) -> bool:
    """Return True if a value has exactly one of the types, or is one of the literals."""
    kinds = alternatives(hint)
    literals = [literal for kind in kinds if typing.get_origin(kind) is Literal for literal in typing.get_args(kind)]
    return type(value) in kinds or any(type(value) is type(literal) and value == literal for literal in literals)


def is_word(hint: Any, value: Any) -> bool:
    """Return True if a value is a word in place of a number, like "auto"."""
    return isinstance(value, str) and str not in alternatives(hint) and accepts(hint, value)


def described(hint: Any) -> str:
    """Return the wording of a type for an error."""

    def one(kind: Any) -> str:
        if typing.get_origin(kind) is Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        return "null" if kind is type(None) else str(kind.__name__)

    return " or ".join(map(one, alternatives(hint)))


def kinds(hint: Any) -> str:
    """Return the wording of a type for the help, where None is left out, and text and switches explain themselves."""
    names = {int: "whole number", float: "number"}
    words = [names[kind] for kind in alternatives(hint) if kind in names]
    literals = [kind for kind in alternatives(hint) if typing.get_origin(kind) is Literal]
    if literals and literals != [hint]:  # the parser shows the choices of an option that has no other values
        choices = [str(choice) for literal in literals for choice in typing.get_args(literal)]
        words.append(", ".join(choices) if words or len(choices) == 1 else f"one of {', '.join(choices)}")
    return " or ".join(words)


def shown(value: Any) -> str:
    """Return the wording of a value for an error."""
    return f"{value:g}" if isinstance(value, float) else str(value)
