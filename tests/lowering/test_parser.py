"""Errors of CPython's own parser, when several threads are at it, are tried again; no others are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from terrazzo.lowering.parser import ATTEMPTS, retried


def failing(times: int, raises: Callable[[], None]) -> Callable[[], int]:
    """A function that raises so many times, and then returns how often it was called."""
    calls = 0

    def parse() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raises()
        return calls

    return parse


def itself() -> None:
    raise SystemError("AST constructor recursion depth mismatch")


def within() -> None:
    # As Triton has it: the call's error, caused by the function's, caused by the parser's.
    try:
        try:
            itself()
        except SystemError as cause:
            raise ValueError("in the function that is called") from cause
    except ValueError as cause:
        raise RuntimeError("at the call") from cause


def hidden() -> None:
    # As Triton has it where it thinks that its own file's line helps nobody.
    try:
        itself()
    except SystemError:
        raise RuntimeError("in a kernel") from None


def other() -> None:
    raise RuntimeError("a kernel that does not compile") from ValueError("its cause")


@pytest.mark.parametrize("raises", [itself, within, hidden])
def test_the_parsers_own_errors_are_tried_again(raises: Callable[[], None]) -> None:
    assert retried(failing(ATTEMPTS - 1, raises)) == ATTEMPTS
    with pytest.raises((SystemError, RuntimeError)):
        retried(failing(ATTEMPTS, raises))


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(RuntimeError, match="does not compile"):
        retried(failing(1, other))
