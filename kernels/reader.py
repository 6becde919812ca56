"""A launch like the last one: what the C function gets, read from the arguments by code written for their kinds.

From one launch of a kernel to the next addresses and sizes change, little else. `launch.py` finds out what an argument
is by asking, one call after the other; where the host is slow, a model's prefill then waits for that. What `reader`
writes asks the same, in one expression, about arguments of the kinds that it was written for, and answers None to any
others, which then go the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from .binary import DESCRIPTORS

# What passes as it is, once its type is known.
_PLAIN = (bool, float)
# An int of Python is an i32 to Triton below this; beyond, the parameter's type, and so the binary, is another.
I32 = 1 << 31

Read = Callable[[tuple], tuple | None]


def reader(args: tuple, order: Sequence[Any], metas: Sequence[Any], device: int) -> Read | None:
    """A function of a launch's arguments.

    Args:
        args: of a launch that was made.
        order: what each parameter of the kernel gets: `Argument(number)`, or a constexpr's value.
        metas: per descriptor what it is encoded by.
        device: of that launch.

    Returns:
        a function that gives what the C function takes for the parameters, for arguments of the same kinds on the same
        device, tensors at multiples of 16 bytes, descriptors already encoded; and None for any others. None where these
        arguments are not like that.
    """
    writer = _Writer(iter(metas), {"here": torch.cuda.current_device, "device": device})
    writer.unless("here() == device")
    try:
        handed = writer.parts("args", args)
    except _Otherwise:
        return None
    if writer.addresses:
        writer.unless(f"({' | '.join(writer.addresses)}) & 15 == 0")
    given = _tuple(handed[o.number] if isinstance(o, Argument) else writer.held("k", o) for o in order)
    lines = [*writer.lines, f"return {given}"]
    exec(_code("def read(args):\n" + "".join(f"    {line}\n" for line in lines)), writer.names)
    # What it looks names up in must not hold it as well.
    return writer.names.pop("read")


def kinds(args: tuple) -> tuple:
    """What a reader was written for, besides what can change the binary."""
    return tuple(kinds(arg) if type(arg) is tuple else type(arg) for arg in args)


class Argument(NamedTuple):
    """The argument of this number, in a reader's `order`."""

    number: int


class _Otherwise(Exception):
    """An argument that is read the long way."""


class _Writer:
    """The lines of a reader, the names they use, and the addresses they find."""

    def __init__(self, metas: Iterator[Any], names: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.addresses: list[str] = []
        self.names, self._metas = names, metas

    def held(self, kind: str, value: Any) -> str:
        """A name for a value that the reader compares with, or hands on."""
        name = f"{kind}{len(self.names)}"
        self.names[name] = value
        return name

    def parts(self, name: str, args: tuple, nested: bool = False) -> list[str]:
        """Lines that take a tuple apart and check what is in it; returns what is handed on for each."""
        self.unless(f"len({name}) == {len(args)}")
        names = [f"{name}_{i}" for i in range(len(args))]
        self.lines.append(f"{_tuple(names)} = {name}")
        return [self.argument(one, arg, nested) for one, arg in zip(names, args, strict=True)]

    def argument(self, name: str, arg: Any, nested: bool) -> str:
        """Lines that check an argument; returns what is handed on for it."""
        kind = f"{name}.__class__ is {self.held('c', type(arg))}"
        if arg is None:
            self.unless(f"{name} is None")
        elif isinstance(arg, torch.Tensor):
            if arg.data_ptr() & 15:
                raise _Otherwise
            self.unless(f"{kind} and {name}.is_cuda and {name}.dtype is {self.held('d', arg.dtype)}")
            self.lines.append(f"p{name} = {name}.data_ptr()")
            self.addresses.append(f"p{name}")
            return f"p{name}"
        elif type(arg) is int and not nested and -I32 <= arg < I32:
            self.unless(f"{kind} and {-I32} <= {name} < {I32}")
        elif type(arg) is tuple:
            self.unless(kind)
            return _tuple(self.parts(name, arg, nested=True))
        elif type(arg) in DESCRIPTORS and not nested:
            base, block = self.held("d", arg.base.dtype), self.held("b", arg.block_shape[:])
            self.unless(f"{kind} and {name}.base.dtype is {base} and {name}.block_shape == {block}")
            self.lines.append(f"e{name} = {name}.__dict__.get('encoded')")
            self.unless(f"e{name} is not None and e{name}[0] is {self.held('m', next(self._metas))}")
            return f"*e{name}[1]"
        elif type(arg) in _PLAIN:
            self.unless(kind)
        else:
            raise _Otherwise
        return name

    def unless(self, holds: str) -> None:
        """A line that sends arguments the long way unless this holds."""
        self.lines.append(f"if not ({holds}): return None")


def _tuple(parts: Iterable[str]) -> str:
    """A tuple of these, however few."""
    return f"({''.join(f'{part}, ' for part in parts)})"


@cache
def _code(source: str) -> Any:
    """Kernels of one signature share the code."""
    return compile(source, "<terrazzo reader>", "exec")
