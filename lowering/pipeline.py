"""The stages, in order. This list is all there is:

    intake        the piece as functional ATen with symbolic sizes                 intake.py, dialect.py,
                                                                                   decompositions.py
    canonicalize  what says nothing is gone                                        canonicalize.py
    specialize    symbols become integers, guards are evaluated                    specialize.py
    define        each node an expression per element, views become offsets        define.py, rules_*.py
    hoist         norms before products scale what comes out of them               hoist.py
    depend        who needs whom, bytes on the edges                               depend.py
    fuse          values become kernels by what it saves, refusals with reasons    fuse.py, group.py
    narrow        what others only read rounded is stored rounded                  narrow.py
    select        family and config for these sizes                                select.py
    schedule      order and the life of buffers                                    schedule.py
    emit          one readable Python module                                       emit*.py, functions.py

The first two run once per piece, the others once per size, or per range of sizes (ranged.py). After each, `verify`
checks what the stage promises.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import sympy
from torch import fx

from . import verify
from .canonicalize import canonicalize
from .define import define
from .depend import barring, depend
from .emit import Plan, emit
from .errors import Unsupported
from .fuse import fuse
from .hoist import hoist
from .intake import Examples, intake
from .ir import Trace
from .narrow import narrow
from .options import Options
from .schedule import schedule
from .select import in_vain, select
from .size import Whole
from .specialize import specialize

# Calls of Python within one another: some seven for each op of a chain (`composer.py`), of which a kernel holds
# `BODY_LIMIT`.
DEPTH = 6000
# It is the process's limit: how many plan, and what it was before the first of them began.
_nesting = Lock()
_planning = _limit = 0


@dataclass
class Journal:
    """What each stage made, the last time where it ran twice, and how long it took, for whoever wants to look."""

    stages: list[tuple[str, Any, float]] = field(default_factory=list)

    def run(self, stage: Callable[..., Any], *args: Any) -> Any:
        """One stage, timed and verified."""
        start = time.perf_counter()
        result = stage(*args)
        spent = time.perf_counter() - start + sum(s for name, _, s in self.stages if name == stage.__name__)
        self.stages = [entry for entry in self.stages if entry[0] != stage.__name__]
        self.stages.append((stage.__name__, result, spent))
        verify.after(stage.__name__, result)
        return result

    def result(self, stage: str) -> Any:
        """What the stage of that name made."""
        return next(made for name, made, _ in self.stages if name == stage)


def trace(
    graph: fx.GraphModule,
    examples: Examples,
    binding: Mapping[sympy.Symbol, int] | None = None,
    journal: Journal | None = None,
) -> Trace:
    """The stages that run once for all sizes (or, with a binding, for sizes whose guards failed)."""
    journal = journal or Journal()
    return journal.run(canonicalize, journal.run(intake, graph, examples, binding))


def plan(
    traced: Trace,
    binding: Mapping[sympy.Symbol, Whole],
    options: Options,
    *,
    title: str = "a piece",
    misaligned: Collection[str] = (),
    journal: Journal | None = None,
) -> Plan:
    """The stages that run once per size.

    Args:
        traced: from `trace`.
        binding: an integer for each of its symbols, or a `Size` for a plan that serves a range (see ranged.py).
        options: target and switches.
        title: first line of the emitted module.
        misaligned: inputs whose memory does not start at a multiple of 16 bytes.
    """
    journal = journal or Journal()
    with _nested():
        return _planned(traced, binding, options, title, misaligned, journal)


def _planned(
    traced: Trace,
    binding: Mapping[sympy.Symbol, Whole],
    options: Options,
    title: str,
    misaligned: Collection[str],
    journal: Journal,
) -> Plan:
    concrete = journal.run(specialize, traced, binding)
    values = journal.run(define, concrete, options)
    vain: frozenset[str] = frozenset()
    while True:
        hoisted = journal.run(hoist, values, vain) if options.fuse else values
        fused = journal.run(fuse, journal.run(depend, hoisted), options)
        found = fused.stranded
        if found <= vain:
            selected = journal.run(select, journal.run(narrow, fused), options, misaligned)
            found = in_vain(selected, options)
        if found <= vain:
            break
        vain |= found
    if selected.vendors:
        # What cuBLAS leaves to a kernel of its own may join another one instead.
        fused = journal.run(fuse, barring(fused.dependencies, selected.vendors), options)
        selected = journal.run(select, journal.run(narrow, fused), options, misaligned)
    return journal.run(emit, journal.run(schedule, selected), title)


@contextmanager
def _nested() -> Iterator[None]:
    """Inside, expressions may be nested as deep as a kernel may be long.

    Raises:
        Unsupported: they are nested deeper.
    """
    global _planning, _limit
    with _nesting:
        _planning += 1
        if _planning == 1:
            _limit = sys.getrecursionlimit()
            sys.setrecursionlimit(max(_limit, DEPTH))
    try:
        yield
    except RecursionError:
        fact = f"ops that follow one another nest deeper than {DEPTH} calls"
        raise Unsupported("the piece", fact, stage="plan") from None
    finally:
        with _nesting:
            _planning -= 1
            if not _planning:
                sys.setrecursionlimit(_limit)
