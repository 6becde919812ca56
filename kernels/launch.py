"""Launching: compile a kernel once per pointer alignment, then hand its cubin straight to the driver.

`JITFunction.run` derives a signature, a specialisation string and an options string on every call. A `Kernel` has its
constexprs and options fixed when it is made, so all that can still change the binary is what the arguments *are*: the
dtype and 16-byte alignment of each tensor, the block shape of each descriptor, the width of each int. A call builds
that key (two attribute reads per tensor), looks it up, and launches on the current stream (`binary.py`). A call like
the one before does not: code written for such arguments says that they are, and reads them (`reader.py`).

Rules for the kernels launched this way, from what Triton 3.6's `native_specialize_impl` does:
- Run-time ints are declared `do_not_specialize`, or 1 and multiples of 16 each compile a binary of their own.
- Ints inside a tuple are specialised whatever is declared; sizes therefore travel as parameters, tuples carry tensors.

Programmatic dependent launch: a kernel may start before the one before it has ended, once every program of that one has
said so. A kernel waits for the end of the one before it (`gdc_wait`) before it touches memory that a kernel may have
written or may still read, on every path; so ends are transitive along the stream. It may let its successor start before
it waits itself, and what a plan was given is then read across several kernels that all wait. The first kernel of a plan
(`leads`) is not like that: it waits, and only then lets the next one start, so that whatever ran before the plan has
ended before any other of its kernels begins. Where all that the plan was given to multiply by was there before any plan
ran (`Options.steady`), no kernel leads.

Under TRITON_INTERPRET=1 the call goes to the interpreter, whose small floats are repaired first.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from threading import get_ident
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITCallable

from ..lowering.errors import InternalError, UserError
from ..lowering.parser import retried
from .binary import DESCRIPTORS, Binary
from .reader import I32, Argument, Read, kinds, reader

_Tensor = torch.Tensor
_PLAIN = frozenset((int, tuple, bool, float, type(None), *DESCRIPTORS))

Grid = tuple[int, int, int]

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Compiled kernels by (fn, constexprs, options), then by the arguments' key: equal Kernels share them.
_COMPILED: dict[tuple, dict[tuple, Binary]] = {}

# Launches noted instead of made, by the thread that does; empty outside `noting`. A fork has none of those threads.
_noting: dict[int, list[tuple[Kernel, tuple]]] = {}
os.register_at_fork(after_in_child=_noting.clear)


def _parse(function: JITCallable, once: Callable[[JITCallable], Any] = JITCallable.parse) -> Any:
    return retried(lambda: once(function))


# Triton parses in whichever thread compiles or asks for a key, and where that fails it keeps half a key: a kernel may
# then find another's binary. So it parses again right there.
JITCallable.parse = _parse  # type: ignore[method-assign]


class _Again(NamedTuple):
    """What launches for arguments like those of a launch before."""

    read: Read
    launch: Callable[..., None]
    device: int
    stream: Callable[[int], int]


class Kernel:
    """A `@triton.jit` function with its constexprs and compile options fixed.

    Args:
        fn: the kernel.
        constexprs: every constexpr parameter's value; each must be hashable (bodies are `@triton.jit` functions).
        num_warps, num_stages: Triton's options.
        pdl: launch with programmatic dependent launch; the kernel itself executes `gdc_wait`.
        cooperative: launch as a cooperative grid (all programs resident), as grid barriers need.

    Equal arguments share compiled code within the process.
    """

    __slots__ = (
        "_compiled", "_last", "_names", "_order", "_readers", "constexprs", "fn", "interpreted", "options",
    )  # fmt: skip

    def __init__(
        self,
        fn: Any,
        constexprs: dict[str, Any],
        num_warps: int,
        num_stages: int = 3,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        self.fn = fn
        self.interpreted = not isinstance(fn, triton.JITFunction)
        self.constexprs = dict(constexprs)
        self.options = {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "launch_pdl": pdl,
            "launch_cooperative_grid": cooperative,
            # libdevice would flush denormal numbers to zero, which torch's own kernels do not.
            "enable_reflect_ftz": False,
        }
        names = list(inspect.signature(fn.fn).parameters)
        self._names = [name for name in names if name not in self.constexprs]
        # Launchers take the constexprs too, each at its parameter's place.
        number = count()
        self._order = [self.constexprs[n] if n in self.constexprs else Argument(next(number)) for n in names]
        # bool and int compare equal, so the values' types are part of the key.
        ordered = tuple((name, type(value), value) for name, value in sorted(self.constexprs.items()))
        self._compiled = _COMPILED.setdefault((fn, ordered, tuple(self.options.values())), {})
        self._last: _Again | None = None
        self._readers: dict[tuple, _Again | None] = {}

    def __call__(self, grid: Grid, *args: Any) -> None:
        """Launch on the current stream of the current device; a grid with a zero launches nothing.

        Args:
            grid: programs along x, y, z.
            args: the parameters that are not constexprs, in order: tensors, descriptors, ints, bools, None, tuples.

        Raises:
            UserError: a tensor is not on a CUDA device and the interpreter is off.
            InternalError: the kernel specialises on a run-time int.

        Cost: one key (two attribute reads and a call per tensor), one lookup, one launch; of a call like the one before
        one check and one launch.
        """
        if 0 in grid:
            return
        last, runtime = self._last, triton.knobs.runtime
        if last is not None and not _noting:
            flat = last.read(args)
            if flat is not None and not (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls):
                last.launch(grid, last.stream(last.device), flat)
                return
        if self.interpreted:
            self._interpret(grid, args)
            return
        if _noting and (noted := _noting.get(get_ident())) is not None:
            noted.append((self, args))
            return
        device, key, passed = _describe(args)
        binary = self._compiled.get(key)
        if binary is None:
            binary = self._loaded(key, args)
        bound = tuple(passed[o.number] if isinstance(o, Argument) else o for o in self._order)
        binary(grid, driver.active.get_current_stream(device), bound, runtime)
        known = key, kinds(args)
        if known not in self._readers:
            self._readers[known] = self._again(args, binary, device)
        self._last = self._readers[known]

    def precompile(self, *args: Any) -> Any:
        """Compile and load for arguments like these without launching; returns Triton's `CompiledKernel`.

        Tensors may be without memory (the meta device): they stand for aligned ones. The interpreter has nothing to
        compile: None is returned.
        """
        if self.interpreted:
            return None
        key = _describe(args, hollow=True)[1]
        return (self._compiled.get(key) or self._loaded(key, args)).compiled

    def wanting(self, args: tuple) -> tuple | None:
        """What the binary for arguments like these is known by in the process, where it is not loaded yet."""
        key = _describe(args, hollow=True)[1]
        return None if key in self._compiled else (id(self._compiled), key)

    def compile(self, args: tuple) -> Any:
        """Triton's kernel for these arguments, not loaded; inside its asynchronous mode a promise of one."""
        named = dict(zip(self._names, args, strict=True))
        self._refuse_specialised(named)
        return self.fn.warmup(grid=(1, 1, 1), **named, **self.constexprs, **self.options)

    def _loaded(self, key: tuple, args: tuple) -> Binary:
        compiled = self.compile(args)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        # Loads the module: cuModuleLoad must not happen for the first time inside a capture.
        compiled._init_handles()
        binary = self._compiled[key] = Binary(compiled)
        return binary

    def _refuse_specialised(self, named: dict[str, Any]) -> None:
        """An int that Triton specialises on is not in the key: 1 would run for 2."""
        loose = {param.name for param in self.fn.params if param.do_not_specialize}
        for name, value in named.items():
            if type(value) is int and name not in loose:
                raise InternalError(
                    f"kernel {self.fn.__name__}",
                    f"the run-time int `{name}` is specialised on",
                    stage="kernels.launch",
                    remedy=f"Add {name!r} to the kernel's do_not_specialize.",
                )

    def _again(self, args: tuple, binary: Binary, device: int) -> _Again | None:
        """How to launch for arguments like these, which were launched for; None where it is the long way only."""
        if binary.metas is None:
            return None
        read = reader(args, self._order, binary.metas, device)
        return read and _Again(read, binary.launch, device, driver.active.get_current_stream)

    def _interpret(self, grid: Grid, args: tuple) -> None:
        _repair()
        self.fn[grid](**dict(zip(self._names, args, strict=True)), **self.constexprs)


@contextmanager
def noting() -> Iterator[list[tuple[Kernel, tuple]]]:
    """Inside, this thread's launches are noted instead of made, kernel and arguments of each."""
    thread = get_ident()
    outer = _noting.get(thread)
    noted = _noting[thread] = []
    try:
        yield noted
    finally:
        if outer is None:
            _noting.pop(thread, None)
        else:
            _noting[thread] = outer


def _describe(args: tuple, hollow: bool = False) -> tuple[int, tuple, list]:
    """One pass over the arguments; `hollow` ones may have no memory.

    Returns:
        the current device; the key: everything that can change the binary or where it is loaded; the arguments as the
        launcher takes them, tensors as addresses (given a tensor, Triton's launcher asks the driver about its pointer).
    """
    try:
        device = torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise _needs_gpu(str(error).splitlines()[0]) from error
    key: list = [device]
    passed = _walk(args, key, False, hollow)
    return device, tuple(key), passed


def _walk(args: tuple, key: list, nested: bool, hollow: bool) -> list:
    """Appends what of `args` can change the binary to the key; returns them as the launcher takes them."""
    passed = []
    for arg in args:
        # Exact types first: `isinstance(…, torch.Tensor)` goes through a metaclass and costs twice as much.
        kind = type(arg)
        if kind is _Tensor or (kind not in _PLAIN and isinstance(arg, _Tensor)):
            if not (arg.is_cuda or (hollow and arg.is_meta)):
                raise _needs_gpu(f"an argument of shape {tuple(arg.shape)} is on {arg.device}")
            address = arg.data_ptr()
            key.append(arg.dtype)
            if address & 15:
                key.append("unaligned")
            passed.append(address)
            continue
        if kind is int:
            key.append("i32" if -I32 <= arg < I32 else "i64")
            if nested:
                # Ints inside a tuple are specialised on 1 and on divisibility by 16.
                key.append((arg == 1, arg & 15 == 0))
        elif kind is tuple:
            key.append(len(arg))
            arg = tuple(_walk(arg, key, True, hollow))
        elif kind in DESCRIPTORS:
            # A layout follows from dtype and block.
            key.append((arg.base.dtype, tuple(arg.block_shape)))
        else:
            key.append(kind)
        passed.append(arg)
    return passed


def _needs_gpu(fact: str) -> UserError:
    return UserError(
        "kernel launch",
        fact,
        stage="kernels.launch",
        remedy="Move the tensors to a CUDA device, or set TRITON_INTERPRET=1 before triton is imported.",
    )


@cache
def _repair() -> None:
    from .interpreter import repair

    repair()
