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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

DIMS = [0, 1, 2, 3, 5, 7, 8, 13, 16, 17]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "strided", "shifted", "expanded"]
LARGEST = 64.0
MOST_ELEMENTS = 5000


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int, exact: bool = False) -> torch.Tensor:
    """An input with the values of `seed`; `exact`: the same values in fp64 where they are floats."""
    generator = torch.Generator().manual_seed(seed)

    def filled(*sizes: int) -> torch.Tensor:
        values = torch.randint(-400, 401, sizes, generator=generator)
        made = values % 7 - 3 if dtype == torch.int64 else values > 0 if dtype == torch.bool else values / 160
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


def _floating(t: torch.Tensor) -> bool:
    return t.dtype.is_floating_point


def _fits(a: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Values that broadcast with `a`."""
    return lambda b: all(x == y or 1 in (x, y) for x, y in zip(a.shape[::-1], b.shape[::-1], strict=False))


KEEPING = ["{a}.abs()", "-{a}", "{a}.relu()", "{a}.clone()", "{a}.clamp(-1, 0.5)", "{a}.contiguous()"]
ROUNDING = [
    "{a}.tanh()", "{a}.sigmoid()", "F.silu({a})", "F.gelu({a})", "F.gelu({a}, approximate='tanh')", "{a}.pow(2)",
    "torch.rsqrt({a} * {a} + 1)", "torch.exp(-{a}.abs())", "{a} * 0.5 + 1", "1 / (1 + {a}.abs())",
    "torch.log1p({a}.abs())", "{a} - 0.25", "{a} / 3", "F.leaky_relu({a})", "2 - {a}", "F.softplus({a})",
]  # fmt: skip
INTEGRAL = [
    "-{a}", "{a} * 3 - 1", "{a} // 2", "{a} % 3", "{a}.abs()", "{a}.clamp(-3, 4)", "{a} & 5", "~{a}", "{a} ^ 2",
    "{a}.clone()", "{a}.bool()", "{a}.sign()",
]  # fmt: skip


def unary(m: Maker) -> None:
    a = m.pick()
    if _floating(m.values[a]):
        template = m.one([*KEEPING, *ROUNDING])
        m.add(template.format(a=a), a in m.exact and template in KEEPING)
    else:
        m.add(m.one(INTEGRAL).format(a=a), True)


def binary(m: Maker) -> None:
    a = m.pick()
    b = m.pick(_fits(m.values[a]))
    alike = m.values[a].dtype == m.values[b].dtype and a in m.exact and b in m.exact
    if alike and m.draw(st.booleans()):
        m.add(m.one(["{a} > {b}", "{a} == {b}", "{a} <= {b}", "{a}.ne({b})"]).format(a=a, b=b), True)
        return
    template = m.one(["{a} + {b}", "{a} - {b}", "{a} * {b}", "torch.maximum({a}, {b})", "torch.minimum({b}, {a})",
                      "{a} & {b}", "{a} | {b}", "torch.add({a}, {b}, alpha=2)", "{a} / (1.5 + {b}.abs())"])  # fmt: skip
    if "/" in template and not (_floating(m.values[a]) and _floating(m.values[b])):
        return
    m.add(template.format(a=a, b=b), alike and "mum" in template)


def where(m: Maker) -> None:
    c = m.pick(lambda t: t.dtype == torch.bool)
    if c is not None:
        a = m.pick(_fits(m.values[c]))
        b = m.pick(_fits(m.values[a]))
        alike = m.values[a].dtype == m.values[b].dtype and a in m.exact and b in m.exact
        m.add(m.one([f"torch.where({c}, {a}, {b})", f"{a}.masked_fill({c}, 1)"]), alike)


def cast(m: Maker) -> None:
    a = m.pick()
    # A copy even in the exact run, where all floats have one dtype.
    targets = [f"{a}.to({NAMES[d]}, copy=True)" for d in FLOATS if d != m.values[a].dtype]
    m.add(m.one([*targets, *([f"{a}.to(torch.int64)"] if a in m.exact else [])]), False)


def view(m: Maker) -> None:
    a = m.pick(lambda t: t.dim() > 0)
    if a is None:
        return
    t, d, e = m.values[a], m.dim(a), m.dim(a)
    start = m.draw(st.integers(0, t.shape[d]))
    stop = m.draw(st.integers(start, t.shape[d]))
    order = m.draw(st.permutations(range(t.dim())))
    cut = "slice(None), " * d
    options = [
        f"{a}.transpose({d}, {e})", f"{a}.permute({tuple(order)})", f"{a}[{cut}{start}:{stop}]",
        f"{a}[{cut}::{m.draw(st.integers(2, 3))}]", f"{a}.unsqueeze({d})", f"{a}.squeeze()", f"{a}[..., None]",
        f"{a}.flatten()", f"{a}.reshape({_refactored(m, t)})", f"{a}.view({_refactored(m, t)})",
        f"{a}.split([{start}, {t.shape[d] - start}], {d})[{m.draw(st.integers(0, 1))}]",
        f"{a}.chunk(2, {d})[0]", f"{a}[{cut}-1]", f"{a}.unsqueeze({d}).expand({_expanded(t, d)})",
        f"{a}.unbind({d})[0]", f"{a}.narrow({d}, {start}, {stop - start})",
    ]  # fmt: skip
    m.add(m.one([o.replace("slice(None)", ":") for o in options]), a in m.exact)


def _refactored(m: Maker, t: torch.Tensor) -> tuple[int, ...]:
    """Another shape of as many elements."""
    n = t.numel()
    first = m.draw(st.sampled_from([k for k in range(1, 18) if n % k == 0]))
    return (first, n // first)


def _expanded(t: torch.Tensor, d: int) -> tuple[int, ...]:
    return (*t.shape[:d], 3, *t.shape[d:])


def move(m: Maker) -> None:
    """Ops that move elements into memory of their own."""
    a = m.pick(lambda t: t.dim() > 0)
    if a is None:
        return
    t, d = m.values[a], m.dim(a)
    same_but = (*t.shape[:d], -1, *t.shape[d + 1 :])
    b = m.pick(lambda o: o.dim() == t.dim() and (*o.shape[:d], -1, *o.shape[d + 1 :]) == same_but)
    c = m.pick(lambda o: o.shape == t.shape)
    alike = {a, b, c} <= m.exact and len({m.values[n].dtype for n in (a, b, c)}) == 1
    m.add(m.one([f"torch.cat([{a}, {b}], {d})", f"torch.stack([{a}, {c}], {d})", f"torch.cat([{c}, {b}, {a}], {d})",
                 f"F.pad({a}, (1, 2))", f"{a}.flip({d})", f"{a}.roll(1, {d})", f"{a}.tril()",
                 f"{a}.repeat_interleave(2, {d})"]), alike)  # fmt: skip


def gather(m: Maker) -> None:
    a, i = m.pick(lambda t: t.dim() > 0), m.pick(lambda t: t.dtype == torch.int64)
    if a is None or i is None:
        return
    t, d, rank = m.values[a], m.dim(a), m.values[i].dim()
    # Of an index that is not contiguous, torch's own fake tensors predict other strides than eager on a CPU makes.
    i = i if m.values[i].is_contiguous() else f"{i}.contiguous()"
    index = f"{i} % {t.shape[d]}"
    options = [f"{a}.index_select({d}, ({index}).flatten())", f"torch.gather({a}, {d}, {index})"]
    options += [f"F.embedding({i} % {t.shape[0]}, {a})"]
    if rank:
        # With a single number from memory eager returns a view at an offset that depends on data.
        options.append(f"{a}[{i} % {t.shape[0]}]")
    m.add(m.one(options), a in m.exact)


def reduce(m: Maker) -> None:
    a = m.pick()
    t = m.values[a]
    dims = tuple(sorted(m.draw(st.sets(st.integers(0, t.dim() - 1), min_size=1)))) if t.dim() else ()
    keep = m.draw(st.booleans())
    last = list(t.shape[-1:])
    several, single = f"{dims}, keepdim={keep}", f"{dims[0] if dims else 0}"
    options = [f"{a}.amax({several})", f"{a}.amin({several})"]
    if _floating(t):
        # Of equal numbers the variance is 0 in eager and a rounding error squared in ours: no error relative to itself.
        sums = [f"{a}.sum({several})", f"{a}.mean({several})", f"F.softmax({a}, {single})", f"{a}.mean()",
                f"F.log_softmax({a}, {single})", f"1 + {a}.var({several}, correction=0)", f"{a}.logsumexp({dims})",
                f"F.layer_norm({a}, {last})", f"F.rms_norm({a}, {last}, eps=1e-5)"]  # fmt: skip
        options += sums
    else:
        options += [f"{a}.sum({several})", f"{a}.any({single})", f"{a}.all({single})", f"{a}.sum()"]
    if a in m.exact:
        options += [f"{a}.argmax({single})", f"{a}.argmin({single}, keepdim={keep})", f"{a}.max({single})[1]"]
    chosen = m.one(options)
    m.add(chosen, a in m.exact and "ama" in chosen or "amin" in chosen and a in m.exact)


def matmul(m: Maker) -> None:
    a = m.pick(lambda t: _floating(t) and t.dim() in (2, 3))
    if a is None:
        return
    t = m.values[a]
    b = m.pick(lambda o: o.dtype == t.dtype and o.dim() == 2 and t.shape[-1] in o.shape)
    bias = m.pick(lambda o: o.dtype == t.dtype and o.dim() == 1)
    options = [f"{a} @ {a}.transpose(-1, -2)"]
    if b is not None:
        options += [f"{a} @ {b}", f"{a} @ {b}.t()", f"F.linear({a}, {b})", f"torch.matmul({a}, {b}.contiguous())"]
        options += [f"F.linear({a}, {b}, {bias})", f"torch.addmm({bias}, {a}, {b})"] if bias else []
    m.add(m.one(options), False)


def in_place(m: Maker) -> None:
    a = m.pick()
    t = m.values[a]
    b = m.pick(lambda o: _fits(t)(o) and o.dim() <= t.dim())
    c = m.pick(lambda o: o.dtype == torch.bool and _fits(t)(o))
    if b is not None and m.draw(st.booleans()):
        method = m.one(["add_", "sub_", "mul_", "copy_"])
        kept = method == "copy_" and b in m.exact and m.values[b].dtype == t.dtype
        if method == "copy_" and not _floating(t) and _floating(m.values[b]) and b not in m.exact:
            return
        m.write(a, f"{method}({b})", b, kept)
    elif c is not None and m.draw(st.booleans()):
        m.write(a, f"masked_fill_({c}, 1)", c, True)
    else:
        m.write(a, m.one(["zero_()", "fill_(1)", "relu_()", "neg_()", "clamp_(-1, 1)"]), None, a in m.exact)


MOVES = [unary, binary, view, move, reduce, matmul, in_place, gather, where, cast, view, binary, unary, reduce]


@st.composite
def programs(draw: Callable[[Any], Any]) -> Program:
    """Programs of 6 to 15 lines."""
    p, q, r = (draw(st.sampled_from(DIMS)) for _ in range(3))
    shapes = [(p, q), (q,), (p, 1), (r, q), (p, q, r), (q, r), (), (1, p, q)]
    dtypes = [*FLOATS, *FLOATS, torch.int64, torch.bool]
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
        draw(st.sampled_from(MOVES))(maker)
    names = list(maker.values)
    returned = [names[-1], *draw(st.lists(st.sampled_from(names), max_size=2))]
    return Program(inputs, tuple(maker.lines), tuple(returned))
