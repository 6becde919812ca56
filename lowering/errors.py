"""The errors terrazzo raises: one base, three branches.

`UserError`     what was asked for cannot be right (bad input, autograd, missing device): nothing was compiled.
`Unsupported`   terrazzo does not lower this: the caller falls back to the op itself, counts it and shows it.
`InternalError` an invariant of terrazzo does not hold: a defect of ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class TerrazzoError(Exception):
    """Base of every error terrazzo raises.

    Args:
        what: what failed, with the node's name where there is one.
        fact: the fact that made it fail, with its numbers.
        stage: the stage or part that found it.
        remedy: what to do next.
        source: the user's source line, where it is known.
    """

    def __init__(self, what: str, fact: str, *, stage: str, remedy: str = "", source: str = "") -> None:
        self.what, self.fact, self.stage, self.remedy, self.source = what, fact, stage, remedy, source
        where = f" ({source})" if source else ""
        then = f" {remedy}" if remedy else ""
        super().__init__(f"{what}{where}: {fact} [{stage}].{then}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception's own way is to call the class with its finished message: a pool of processes breaks on that.
        made = partial(type(self), stage=self.stage, remedy=self.remedy, source=self.source)
        return made, (self.what, self.fact), vars(self)


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that is kept, and of those that led to it: their frames hold a call's tensors."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        kept = left.pop()
        if kept is not None and id(kept) not in seen:
            seen.add(id(kept))
            kept.__traceback__ = None
            left += [kept.__cause__, kept.__context__]


class UserError(TerrazzoError):
    """The request itself is wrong: bad input, wrong device, autograd asked for."""


class Unsupported(TerrazzoError):
    """terrazzo does not lower this; the op runs as itself."""


class InternalError(TerrazzoError):
    """An invariant of terrazzo does not hold."""
