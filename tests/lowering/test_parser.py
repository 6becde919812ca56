"""Errors of CPython's own parser, when several threads are at it, are tried again; no others are."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from terrazzo.lowering.parser import ATTEMPTS, parse, retried


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


def other() -> None:
    raise SyntaxError("no Python")


def test_the_parsers_own_errors_are_tried_again() -> None:
    assert retried(failing(ATTEMPTS - 1, itself)) == ATTEMPTS
    with pytest.raises(SystemError):
        retried(failing(ATTEMPTS, itself))


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(SyntaxError):
        retried(failing(1, other))


def test_a_text_is_parsed_under_its_files_name() -> None:
    assert isinstance(parse("1").body[0], ast.Expr)
    with pytest.raises(SyntaxError) as raised:
        parse("1 +", "<a plan>")
    assert raised.value.filename == "<a plan>"
