"""One operator in one dtype: every sample through Dynamo and as an ATen graph, against eager and fp64.

What is compared stands in compare.py. Six kinds of differences are none of ours and are counted, not hidden: an
operator that draws random numbers is compared in geometry where it draws others than eager under the same seed; strides
and shared memory may be those that torch's fake tensors promise where eager breaks that promise; a result may be, to
the last bit, that of torch's own trace, which is what comes to a compiler; on a GPU, it may be eager's on the CPU where
a CUDA kernel errs (embedding with max_norm and a weight with gaps); a sum of large terms that cancel may be off
by what the last bits of its arguments move it, although eager was luckier; and a case that Dynamo or `make_fx` cannot
take without us does not come to us.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools import compare, opdb
from terrazzo.tools.coverage import Coverage
from terrazzo.tools.device import HERE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}
PATHS = ("dynamo", "aten")

# How often the last bits of an argument are drawn anew.
DRAWS = 3

# The interpreter takes half a millisecond per program; beyond this many elements a sample is left to a GPU.
INTERPRETED_ELEMENTS = 20_000


@dataclass
class Result:
    """An operator in a dtype.

    Args:
        op, dtype: which.
        checks: comparisons made.
        failures: mismatches and crashes, each with its case.
        aside: what was not compared in full, by reason.
        whole: pieces that run as the graph they were, by reason.
        coverage: ATen ops lowered and passed through.
    """

    op: str
    dtype: str
    checks: int = 0
    failures: list[str] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    coverage: Coverage = field(default_factory=Coverage)


def check(
    op: str, dtype: str, paths: Sequence[str], samples: int, note: Callable[[str], None], only: str = ""
) -> Result:
    """Every case of an operator.

    Args:
        op: its name in the database.
        dtype: a key of `DTYPES`.
        paths: of `PATHS`.
        samples: how many samples at most, spread over all; 0 takes all.
        note: told of the case that comes next.
        only: the one case to run (`number:variant`); '' runs all.
    """
    result = Result(op, dtype)
    # Why a piece runs as the graph it was is counted here, not told again and again.
    logging.getLogger("terrazzo").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    try:
        found = list(opdb.cases(op, DTYPES[dtype], HERE))
    except Exception as error:
        result.aside[f"the database cannot make its samples: {type(error).__name__}"] += 1
        return result
    for case in _chosen(found, samples, result):
        label = f"{case.number}:{case.variant}"
        if only and only != label:
            continue
        references = _References(op, case)
        if not references.refused and not _tensors((references.given, references.eager)):
            references.refused = "it has nothing to do with tensors"
        if references.refused:
            result.aside[references.refused] += 1
            continue
        for path in paths:
            note(f"{label}:{path}")
            wrong = _check_case(case, path, references, result)
            if wrong:
                result.failures.append(f"{label}:{path} ({case}): {wrong}")
    return result


def _chosen(found: Sequence[opdb.Case], samples: int, result: Result) -> Iterator[opdb.Case]:
    count = max((c.number for c in found), default=-1) + 1
    kept = {i * count // samples for i in range(samples)} if 0 < samples < count else set(range(count))
    for case in found:
        if case.number not in kept:
            result.aside["samples left out, as asked"] += 1
        elif HERE.type == "cpu" and case.size > INTERPRETED_ELEMENTS:
            result.aside[f"more than {INTERPRETED_ELEMENTS} elements are too many to interpret"] += 1
        else:
            yield case


class _References:
    """What eager makes of a case, in its own dtype and in fp64, and whether it draws random numbers."""

    def __init__(self, op: str, case: opdb.Case) -> None:
        self.case = case
        self.refused = ""
        self.given = (case.args, case.kwargs)
        try:
            self.eager = _outcome(case.fn, compare.copied(self.given), 0)
        except Exception as error:
            self.refused = f"eager refuses: {type(error).__name__}"
            return
        unfilled = op.rpartition(".")[2] in opdb.UNFILLED
        with _Drawing() as drawing:
            _outcome(case.fn, compare.copied(self.given), 0)
        self.arbitrary = unfilled or drawing.draws
        self.why = "memory that nobody fills" if unfilled else "other random numbers than eager's"
        self.exact = None if self.arbitrary else self._exact()

    def _exact(self) -> Any:
        """In fp64; where the operator has no fp64, eager's: then floats may err by the rule's floor alone."""
        exact = self._widely(compare.copied(self.given))
        alike = exact is not None and [t.shape for t in _tensors(exact)] == [t.shape for t in _tensors(self.eager)]
        return exact if alike else self.eager

    def _widely(self, call: Any) -> Any:
        """The outcome of a call in fp64; None where the operator has no fp64."""
        torch.set_default_dtype(torch.float64)
        try:
            return _outcome(self.case.fn, compare.widened(call), 0)
        except Exception:
            return None
        finally:
            torch.set_default_dtype(torch.float32)

    def near(self, seed: int) -> Any:
        """Eager's structure with the exact numbers of arguments whose last bits are others: what rounding alone may do.
        None where that cannot be computed, and for narrower floats than fp32: between theirs a kernel rounds less."""
        call = compare.copied(self.given)
        generator = torch.Generator(HERE).manual_seed(seed)
        floats = [value for value in _tensors(call) if value.is_floating_point()]
        if any(value.dtype.itemsize < 4 for value in floats):
            return None
        for value in floats:
            noise = torch.rand(value.shape, generator=generator, device=HERE, dtype=torch.float64) * 2 - 1
            value.copy_(value.double() * (1 + torch.finfo(value.dtype).eps * noise))
        wide = self._widely(call)
        if wide is None:
            return None
        exact, structure = pytree.tree_flatten(wide)
        pairs = zip(exact, pytree.tree_leaves(self.eager), strict=True)
        alike = [a.to(b.dtype) if isinstance(b, torch.Tensor) and isinstance(a, torch.Tensor) else a for a, b in pairs]
        return pytree.tree_unflatten(alike, structure)

    def promised(self) -> Any:
        """What torch's fake tensors say of the result; None where they cannot."""
        given = compare.copied(self.given)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                args, kwargs = pytree.tree_map(
                    lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, given
                )
                return self.case.fn(*args, **kwargs), (args, kwargs)
        except Exception:
            return None

    def on_cpu(self) -> tuple[Any, Any] | None:
        """What eager makes of the case on the CPU, in its own dtype and in fp64; None where it refuses."""
        given = compare.copied(self.given, torch.device("cpu"))
        exact = self._widely(compare.copied(given))
        if exact is None:
            return None
        try:
            eager = _outcome(self.case.fn, given, 0)
        except Exception:
            return None
        return compare.copied(eager, HERE), compare.copied(exact, HERE)

    def traced(self) -> Any:
        """What torch makes of its own trace of the call, op by op; None where it cannot trace it. A trace may take
        another way than eager: of a condition number's singular values it computes the vectors as well."""
        call = compare.copied(self.given)
        try:
            graph, tensors, rebuilt = _recorded(self.case.fn, call, "fake")
            return rebuilt(_outcome(graph, (tensors, {}), 0)[0]), call
        except Exception:
            return None


class _Drawing(TorchDispatchMode):
    """Notices ops that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.draws |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _outcome(fn: Callable[..., Any], call: Any, seed: int) -> Any:
    """(result, arguments as the call left them)."""
    torch.manual_seed(seed)
    args, kwargs = call
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs), call


def _check_case(case: opdb.Case, path: str, references: _References, result: Result) -> str:
    """What is wrong with a case on a path; '' when nothing is."""
    call = compare.copied(references.given)
    run = _Dynamo(case.fn) if path == "dynamo" else _Aten(case.fn)
    try:
        ours = run(call)
    except _NotOurs as cause:
        result.aside[str(cause)] += 1
        return ""
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        return f"crash: {type(error).__name__} at {where}: {' '.join(str(error).split())[:600]}"
    for piece in run.pieces:
        if piece.refusal:
            result.whole[piece.refusal] += 1
        for loaded in piece.plans.values():
            result.coverage.add(loaded.plan.schedule.values)
    if not run.pieces:
        result.aside["nothing was left to compile"] += 1
    result.checks += 1
    if HERE.type == "cuda" and result.op.strip("_") in DIVISIONS:
        by_zero = _one_answer(ours), _one_answer(references.eager)
        if compare.difference(ours, references.eager, references.exact) and compare.difference(*by_zero) is None:
            result.aside["64-bit division by zero, which eager's CUDA kernels answer now -1, now 2**32 - 1"] += 1
            return ""
    return _compare(ours, references, result)


# Whose quotients or remainders by a whole 0 CUDA leaves open.
DIVISIONS = ("remainder", "rmod", "mod", "fmod", "floor_divide", "rfloordiv", "floordiv", "div_floor_rounding",
             "div_trunc_rounding")  # fmt: skip


def _one_answer(tree: Any) -> Any:
    """Results with either answer to a 64-bit division by zero as -1."""

    def leaf(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.dtype == torch.int64
        return torch.where(value == 2**32 - 1, -1, value) if whole else value

    return pytree.tree_map(leaf, tree)


def _compare(ours: Any, references: _References, result: Result) -> str:
    wrong = compare.difference(ours, references.eager, references.exact)
    if wrong is None:
        return ""
    if references.arbitrary:
        result.aside[references.why] += 1
        return compare.placing(ours, references.eager) or ""
    if compare.difference(ours, references.eager, references.exact, placing=False) is None:
        promised = references.promised()
        if promised is not None and compare.placing(ours, promised) is None:
            result.aside["strides or sharing as torch's fake tensors promise, not as eager has them"] += 1
            return ""
    traced = references.traced()
    if traced is not None and compare.difference(ours, traced, None) is None:
        result.aside["as torch's own trace of it computes, which is not as eager does"] += 1
        return ""
    other = references.on_cpu() if HERE.type == "cuda" else None
    if other is not None and compare.difference(ours, *other, placing=False) is None:
        result.aside["as eager computes it on the CPU, which is not what its CUDA kernel does"] += 1
        return compare.placing(ours, references.eager) or ""
    for seed in range(DRAWS):
        near = references.near(seed)
        if near is not None and compare.difference(ours, near, references.exact, placing=False) is None:
            result.aside["no further off than the last bits of its arguments move it"] += 1
            return compare.placing(ours, references.eager) or ""
    return wrong


class _NotOurs(Exception):
    """Why a case cannot come to us."""


class _Dynamo:
    """A function through `torch.compile`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.pieces: list[CompiledPiece] = []

    def __call__(self, call: Any) -> Any:
        def backend(graph: fx.GraphModule, examples: Any) -> Any:
            piece = terrazzo(graph, examples)
            assert isinstance(piece, CompiledPiece)
            self.pieces.append(piece)
            return piece

        spare = compare.copied(call)
        try:
            return self._run(backend, call)
        except Exception:
            if self._alone(spare):
                raise
            raise _NotOurs("Dynamo cannot take it, whatever the backend") from None

    def _run(self, backend: Any, call: Any) -> Any:
        fn = self.fn
        torch._dynamo.reset()
        return _outcome(torch.compile(lambda *a, **k: fn(*a, **k), backend=backend, dynamic=False), call, 0)

    def _alone(self, call: Any) -> bool:
        """Whether Dynamo takes the function without us."""
        try:
            self._run("eager", call)
        except Exception:
            return False
        return True


class _Aten:
    """A function as the ATen graph that `make_fx` records."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.pieces: list[CompiledPiece] = []

    def __call__(self, call: Any) -> Any:
        try:
            graph, tensors, rebuilt = _recorded(self.fn, call, "real")
        except Exception as error:
            raise _NotOurs(f"make_fx cannot record it: {type(error).__name__}") from None
        piece = CompiledPiece(graph, compare.copied(tensors))
        self.pieces.append(piece)
        return rebuilt(_outcome(piece, (tensors, {}), 0)[0]), call


def _recorded(
    fn: Callable[..., Any], call: Any, mode: Literal["real", "fake"]
) -> tuple[fx.GraphModule, list[Any], Callable[[Any], Any]]:
    """The graph of a call, of its tensors alone; these; and what makes the call's result of the graph's."""
    leaves, structure = pytree.tree_flatten(call)
    places = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)]
    shape: list[Any] = []

    def flat(*tensors: torch.Tensor) -> list[Any]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        args, kwargs = pytree.tree_unflatten(given, structure)
        made, out = pytree.tree_flatten(fn(*args, **kwargs))
        shape.append(out)
        return made

    torch.manual_seed(0)
    with torch.no_grad(), _quiet():
        graph = make_fx(flat, tracing_mode=mode)(*_tensors(compare.copied(call)))
    return graph, [leaves[p] for p in places], lambda made: pytree.tree_unflatten(list(made), shape[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
