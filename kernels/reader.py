"""A launch like the last one: what the C function gets, read from the arguments by code written for their kinds.

From one launch of a kernel to the next addresses and sizes change, little else. `launch.py` finds out what an argument
is by asking, one call after the other; where the host is slow, a model's prefill then waits for that. What `reader`
writes asks the same, in one expression, about arguments of the kinds that it was written for, and answers None to any
others, which then go the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

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
    if not args:
        return None
    writer = _Writer(iter(metas), {"here": torch.cuda.current_device, "device": device})
    try:
        names = [writer.argument(f"a{i}", arg) for i, arg in enumerate(args)]
    except _Otherwise:
        return None
    given = [names[o.number] if isinstance(o, Argument) else writer.held("k", o) for o in order]
    checks = " and ".join(["here() == device", f"len(args) == {len(args)}"])
    lines = [f"if not ({checks}): return None", f"{''.join(f'a{i}, ' for i in range(len(args)))}= args", *writer.lines]
    if writer.addresses:
        lines.append(f"if ({' | '.join(writer.addresses)}) & 15: return None")
    lines.append(f"return ({', '.join(given)},)")
    exec(_code("def read(args):\n" + "".join(f"    {line}\n" for line in lines)), writer.names)
    # What it looks names up in must not hold it as well.
    return writer.names.pop("read")


def kinds(args: tuple) -> tuple:
    """What a reader was written for, besides what can change the binary."""
    return tuple(kinds(arg) if type(arg) is tuple else type(arg) for arg in args)


class Argument:
    """The argument of this number, in a reader's `order`."""

    def __init__(self, number: int) -> None:
        self.number = number


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

    def argument(self, name: str, arg: Any, nested: bool = False) -> str:
        """Lines that check an argument; returns what is handed on for it."""
        kind = f"{name}.__class__ is {self.held('c', type(arg))}"
        if arg is None:
            self._unless(f"{name} is None")
        elif isinstance(arg, torch.Tensor):
            if arg.data_ptr() & 15:
                raise _Otherwise
            self._unless(f"{kind} and {name}.is_cuda and {name}.dtype is {self.held('d', arg.dtype)}")
            self.lines.append(f"p{name} = {name}.data_ptr()")
            self.addresses.append(f"p{name}")
            return f"p{name}"
        elif type(arg) is int and not nested and -I32 <= arg < I32:
            self._unless(f"{kind} and {-I32} <= {name} < {I32}")
        elif type(arg) is tuple:
            self._unless(f"{kind} and len({name}) == {len(arg)}")
            parts = [f"{name}_{i}" for i in range(len(arg))]
            if parts:
                self.lines.append(f"{''.join(f'{part}, ' for part in parts)}= {name}")
            handed = [self.argument(part, value, nested=True) for part, value in zip(parts, arg, strict=True)]
            return f"({''.join(f'{one}, ' for one in handed)})"
        elif type(arg) in DESCRIPTORS and not nested:
            base, block = self.held("d", arg.base.dtype), self.held("b", arg.block_shape[:])
            self._unless(f"{kind} and {name}.base.dtype is {base} and {name}.block_shape == {block}")
            self.lines.append(f"e{name} = {name}.__dict__.get('encoded')")
            self._unless(f"e{name} is not None and e{name}[0] is {self.held('m', next(self._metas))}")
            return f"*e{name}[1]"
        elif type(arg) in _PLAIN:
            self._unless(kind)
        else:
            raise _Otherwise
        return name

    def _unless(self, holds: str) -> None:
        self.lines.append(f"if not ({holds}): return None")


@cache
def _code(source: str) -> Any:
    """Kernels of one signature share the code."""
    return compile(source, "<terrazzo reader>", "exec")
