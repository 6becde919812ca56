"""Many kernels compiled side by side: noted launches become binaries and launchers while the caller goes on.

Triton's frontend is Python, so that a quarter of what a kernel takes to compile holds the interpreter's lock; planning
of what comes next holds it as well. So threads here ask somebody else first (`ahead`: another process that compiles the
same thing into Triton's cache on disk; `runtime/compilers.py`), and then let Triton compile, which finds the binary
there. Whoever is asked may fail, refuse or be missing: Triton then compiles here, so no result ever depends on it. The
launcher of each, which Triton makes with the C compiler at the first launch, is built at once as well.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import triton
from triton.runtime import driver

from .launch import Kernel, noting

log = logging.getLogger("terrazzo")

# Asked for the binary of a source, with options: true when Triton's cache holds it now.
Ahead = Callable[[Any, Any, dict[str, Any]], bool]

# On their way, by what each is known by in the process.
_promised: dict[tuple, Any] = {}
# Launchers that are built, or being built.
_launchers: set[str] = set()
_lock = threading.Lock()


def _forked() -> None:
    """A fork has none of the threads that would keep the promises, or that might hold the lock."""
    global _lock
    _promised.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


class Compiling:
    """Kernels that are being compiled in the background.

    A kernel that does not compile is logged and raises nothing here: `Kernel.precompile`, or its first launch, does.

    Args:
        noted: kernels and arguments, as `noting` gives them; what is launched often is compiled once.
        ahead: asked first.
    """

    def __init__(self, noted: Iterable[tuple[Kernel, tuple]], ahead: Ahead | None = None) -> None:
        wanted: dict[tuple, tuple[Kernel, tuple]] = {}
        for kernel, args in noted:
            known = kernel.wanting(args)
            if known is not None:
                wanted.setdefault(known, (kernel, args))
        self._promises = [(known, _promised[known]) for known in wanted if known in _promised]
        new = {known: launch for known, launch in wanted.items() if known not in _promised}
        if not new:
            return
        # With somebody to ask threads do little but wait.
        pool = ThreadPoolExecutor(min(len(new), cores() * (2 if ahead else 1)))
        with triton.AsyncCompileMode(cast(Any, _Asking(pool, ahead)), ignore_errors=True) as mode:
            for known, (kernel, args) in new.items():
                _promised[known] = kernel.compile(args)
                self._promises.append((known, _promised[known]))
            # Leaving the mode would wait for all of them.
            mode.raw_futures.clear()
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return once all of them are compiled, or have failed."""
        for known, promise in self._promises:
            if hasattr(promise, "result"):
                promise.result(ignore_errors=True)
            _promised.pop(known, None)
        self._promises.clear()


@contextmanager
def compiling_together(ahead: Ahead | None = None) -> Iterator[list[tuple[Kernel, tuple]]]:
    """Inside, launches are noted instead of made; at the end their kernels are compiled side by side.

    Tensors may be without memory, as for `Kernel.precompile`.

    Yields:
        the list that will hold kernel and arguments of each launch.
    """
    with noting() as noted:
        yield noted
    Compiling(noted, ahead).wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class _Asking:
    """The executor that Triton's asynchronous mode submits to: threads, each of which asks before it compiles."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: Ahead | None) -> None:
        self._pool, self._ahead = pool, ahead

    def submit(self, compile: Callable[[], Any]) -> Future:
        return self._pool.submit(self._work, compile)

    def _work(self, compile: Callable[[], Any]) -> Any:
        # Triton gives its executor a closure over what it is about to compile.
        held = inspect.getclosurevars(compile).nonlocals
        try:
            if self._ahead is not None and {"src", "target", "options"} <= held.keys():
                self._ahead(held["src"], held["target"], dict(vars(held["options"])))
            compiled = compile()
            _build_launcher(compiled)
        except Exception as cause:
            name = getattr(held.get("src"), "name", "a kernel")
            log.info("terrazzo: %s was not compiled in the background: %s: %s", name, type(cause).__name__, cause)
            log.debug("Where it failed:", exc_info=cause)
            raise
        return compiled


def _build_launcher(compiled: Any) -> None:
    """Put a binary's launcher, which Triton makes with the C compiler at the first launch, into Triton's cache."""
    # What its C source depends on: the parameters' types and which of them are constexprs.
    descriptors = getattr(compiled.metadata, "tensordesc_meta", None)
    key = repr((list(compiled.src.signature.values()), sorted(compiled.src.constants), descriptors))
    with _lock:
        if key in _launchers:
            return
        _launchers.add(key)
    driver.active.launcher_cls(compiled.src, compiled.metadata)
