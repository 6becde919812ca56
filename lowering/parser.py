"""CPython's parser while several threads use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# How often something is parsed before an error of the interpreter's own is one.
ATTEMPTS = 4


def retried(parses: Callable[[], Result]) -> Result:
    """What it returns. CPython 3.11 counts how deep `ast.parse` is for all threads together, and raises SystemError
    where that comes out wrong because two were at it (python/cpython#106905). Triton parses the functions that a kernel
    calls one by one, and says what went wrong in an error of its own, raised from that one or from None."""
    for _ in range(ATTEMPTS - 1):
        try:
            return parses()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SystemError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
    return parses()
