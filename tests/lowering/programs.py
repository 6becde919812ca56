"""Random programs for the fuzzer: a few inputs of odd geometry, then lines of torch that ran in eager.

A program is text, so that a failing one can be handed on. It is drawn line by line while it runs, so that every line is
one that eager accepts. What is drawn stays tame: no value beyond 64 in magnitude, no decision (a comparison, an argmax,
a truncation) on a number that was rounded, where one ulp could flip it. Floats are then a matter of error alone, and
integers and bools must be equal.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

DIMS = [0, 1, 2, 3, 5, 7, 8, 13, 16, 17]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NARROW = [torch.int32, torch.int8, torch.uint8]
LAYOUTS = ["contiguous", "transposed", "strided", "shifted", "expanded"]
LARGEST = 64.0
MOST_ELEMENTS = 5000


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int, exact: bool = False) -> torch.Tensor:
    """An input with the values of `seed`; `exact`: the same values in fp64 where they are floats."""
    generator = torch.Generator().manual_seed(seed)

    def filled(*sizes: int) -> torch.Tensor:
        values = torch.randint(-400, 401, sizes, generator=generator)
        whole = not dtype.is_floating_point and dtype != torch.bool
        made = values % 7 - 3 * dtype.is_signed if whole else values > 0 if dtype == torch.bool else values / 160
        made = made.to(dtype)
        return made.double() if exact and dtype.is_floating_point else made

    if layout == "transposed" and len(shape) > 1:
        return filled(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "strided" and shape:
        return filled(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "shifted" and shape:
        return filled(shape[0] + 1, *shape[1:])[1:]
    if layout == "expanded" and shape:
        return filled(*shape[1:]).expand(shape)
    return filled(*shape)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, gaps and shared elements of its memory included."""
    storage = tensor.untyped_storage().to(device=device)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]


@dataclass(frozen=True)
class Program:
    """Inputs (shape, dtype, layout), lines that assign to `v0`, `v1`, … or write in place, and what is returned."""

    inputs: tuple[tuple[tuple[int, ...], torch.dtype, str], ...]
    lines: tuple[str, ...]
    returned: tuple[str, ...]

    def arguments(self, seed: int, exact: bool = False) -> list[torch.Tensor]:
        return [drawn(*entry, seed * 100 + i, exact) for i, entry in enumerate(self.inputs)]

    @property
    def code(self) -> str:
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        return "\n    ".join([f"def fn({names}):", *self.lines, f"return {', '.join(self.returned)},"])

    def function(self, exact: bool = False) -> Callable[..., Any]:
        """The program; `exact`: with casts to floats made casts to fp64."""
        scope = _scope(exact)
        exec(self.code, scope)
        return scope["fn"]

    def script(self, seed: int) -> str:
        """A file that shows the failure alone."""
        drawings = ", ".join(f"drawn({s}, {d}, {la!r}, {seed * 100 + i})" for i, (s, d, la) in enumerate(self.inputs))
        return "\n".join(
            [
                "import os\n\nimport torch\nfrom torch import fx\nfrom torch.nn import functional as F\n",
                'device = torch.device("cuda" if torch.cuda.is_available() else "cpu")',
                'if device.type == "cpu":\n    os.environ.setdefault("TRITON_INTERPRET", "1")',
                "from terrazzo.runtime.compiled import CompiledPiece\n",
                "single, half, bfloat = torch.float32, torch.float16, torch.bfloat16\n\n",
                textwrap.dedent(inspect.getsource(drawn)) + "\n",
                self.code + "\n\n",
                textwrap.dedent(inspect.getsource(placed)) + "\n",
                f"def inputs():\n    return [placed(t, device) for t in [{drawings}]]\n\n",
                "ours, theirs = inputs(), inputs()",
                "got, wanted = CompiledPiece(fx.symbolic_trace(fn), ours)(*ours), fn(*theirs)",
                "for a, b in zip([*got, *ours], [*wanted, *theirs]):",
                "    print(tuple(a.shape), tuple(b.shape), a.stride(), b.stride(), a.dtype, b.dtype)",
                "    print((a.double() - b.double()).abs().max().item() if a.numel() else 'empty')",
            ]
        )


def _scope(exact: bool) -> dict[str, Any]:
    kinds = dict(zip(("single", "half", "bfloat"), [torch.float64] * 3 if exact else FLOATS, strict=True))
    return {"torch": torch, "F": F, **kinds}


NAMES = {torch.float32: "single", torch.float16: "half", torch.bfloat16: "bfloat"}


@dataclass
class Maker:
    """A program while it is drawn: the values of its names so far, and which of them hold no rounded number."""

    draw: Callable[[Any], Any]
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def pick(self, fits: Callable[[torch.Tensor], bool] = lambda t: True, exact: bool = False) -> str | None:
        """A name whose value fits."""
        names = [n for n, t in self.values.items() if fits(t) and (n in self.exact or not exact)]
        return self.draw(st.sampled_from(names[::-1])) if names else None

    def one(self, options: list[str]) -> str:
        return self.draw(st.sampled_from(options))

    def dim(self, a: str) -> int:
        return self.draw(st.integers(0, self.values[a].dim() - 1))

    def add(self, expression: str, exact: bool) -> None:
        """A new value, if eager accepts it and it is tame."""
        try:
            made = eval(expression, _scope(False), dict(self.values))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return
        if not isinstance(made, torch.Tensor) or not _tame(made):
            return
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.values[name] = made
        if exact or not made.dtype.is_floating_point:
            self.exact.add(name)

    def write(self, a: str, method: str, operand: str | None, exact: bool) -> None:
        """A write in place, if eager accepts it; reading what overlaps the target is eager's own undefined case."""
        target = self.values[a]
        # An input whose elements share memory is written through a view in eager; no plan does that (`intake`).
        if any(_overlaps(t) for n, t in self.values.items() if n[0] == "x" and _storage(t) == _storage(target)):
            return
        if _overlaps(target):
            return
        for name in [operand] if operand else []:
            other = self.values[name]
            if _storage(other) == _storage(target) and not _same_place(other, target):
                return
        line = f"{{}}.{method}"
        try:
            trial = eval(line.format("_trial"), _scope(False), {**self.values, "_trial": target.clone()})
            if not _tame(trial):
                return
            eval(line.format(a), _scope(False), dict(self.values))
        except (RuntimeError, IndexError, TypeError):
            return
        self.lines.append(line.format(a))
        if not exact and target.dtype.is_floating_point:
            self.exact -= {n for n, t in self.values.items() if _storage(t) == _storage(target)}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())


def _tame(made: torch.Tensor) -> bool:
    if made.numel() > MOST_ELEMENTS or made.dim() > 4:
        return False
    return bool(made.isfinite().all() and (made.double().abs() <= LARGEST).all())


def floating(t: torch.Tensor) -> bool:
    return t.dtype.is_floating_point


def fits(a: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Values that broadcast with `a`."""
    return lambda b: all(x == y or 1 in (x, y) for x, y in zip(a.shape[::-1], b.shape[::-1], strict=False))


@st.composite
def programs(draw: Callable[[Any], Any], moves: Sequence[Callable[[Maker], None]]) -> Program:
    """Programs of 6 to 15 lines, each drawn by one of the moves."""
    p, q, r = (draw(st.sampled_from(DIMS)) for _ in range(3))
    shapes = [(p, q), (q,), (p, 1), (r, q), (p, q, r), (q, r), (), (1, p, q)]
    dtypes = [*FLOATS, *FLOATS, torch.int64, torch.int64, torch.bool, torch.bool, *NARROW]
    count = draw(st.integers(2, 4))
    # One dtype comes more than once, so that matrix products find their operands.
    usual = draw(st.sampled_from(FLOATS))
    chosen = [usual, *(draw(st.sampled_from([*dtypes, usual, usual, usual])) for _ in range(count - 1))]
    inputs = tuple((draw(st.sampled_from(shapes)), d, draw(st.sampled_from(LAYOUTS))) for d in chosen)
    maker = Maker(draw)
    for i, entry in enumerate(inputs):
        if math.prod(entry[0]) <= MOST_ELEMENTS:
            maker.values[f"x{i}"] = drawn(*entry, seed=i)
            maker.exact.add(f"x{i}")
    wanted = draw(st.integers(6, 15))
    for _ in range(2 * wanted):
        if len(maker.lines) == wanted:
            break
        draw(st.sampled_from(moves))(maker)
    names = list(maker.values)
    returned = [names[-1], *draw(st.lists(st.sampled_from(names), max_size=2))]
    return Program(inputs, tuple(maker.lines), tuple(returned))
