"""A launch whose config depends on the size that runs: prepared launches, looked up by the number of tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any


class BySize:
    """Prepared launches of one body.

    Args:
        table: the largest size that a launch serves, in rising order, and the launch's number.
        launches: prepared by their families.
    """

    __slots__ = ("bounds", "launches")

    def __init__(self, table: Mapping[int, int], *launches: Callable[..., None]) -> None:
        self.bounds = list(table)
        self.launches = [launches[number] for number in table.values()]

    def __call__(self, size: int, *args: Any) -> None:
        """Launch what serves this many tokens."""
        self.launches[bisect_left(self.bounds, size)](*args)
