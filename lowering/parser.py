"""CPython's parser while several threads use it.

CPython of before 2024 counts how deep it is in a tree for all threads together, and raises SystemError where that comes
out wrong because two were at it (python/cpython#106905). Nothing is wrong with the text then, so it is parsed again.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# How often something is parsed before an error of the interpreter's own is one.
ATTEMPTS = 8


def retried(parses: Callable[[], Result]) -> Result:
    """What it returns, whatever other threads parse meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return parses()
        except SystemError:
            continue
    return parses()


def parse(source: str, filename: str = "<unknown>") -> ast.Module:
    """`ast.parse`, whatever other threads parse meanwhile."""
    return retried(lambda: ast.parse(source, filename))
