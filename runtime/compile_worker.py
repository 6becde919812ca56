"""The other end of `compilers.py`: a process that compiles kernels into Triton's cache on disk, for another process.

    python -m terrazzo.runtime.compile_worker PID FD…

imports what compiling needs, then forks itself once for each descriptor and waits. Each child answers jobs on its own
until the pipe ends, until process PID is gone (a fork of that one may hold the pipe's other end open), or until it was
not asked for half an hour. No CUDA, no vLLM: what is here is Triton's compiler and the kernels.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_key, triton_key

from ..lowering.choices import EARLY, WAITING
from .compilers import environment_variables
from .load import bodies

# How often it looks whether the process it works for is still there, and how long it waits to be asked.
LOOK_S, IDLE_S = 1.0, 1800.0


def answer(job: bytes) -> str:
    """Compile what was asked; returns nothing, or why Triton's cache does not hold it."""
    try:
        (fn, *given), target, options, (folder, variables), key = _Unpacker(io.BytesIO(job)).load()
        if os.environ != variables:
            os.environ.clear()
            os.environ.update(variables)
        triton.knobs.cache.dir = folder
        source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, *given)
        backend = make_backend(target)
        own = get_cache_key(source, backend, backend.parse_options(dict(options)), environment_variables())
        if sha256(own.encode()).hexdigest() != key:
            return "its binary would have another key"
        triton.compile(source, target=target, options=options)
    except Exception as cause:  # the other process compiles it again, and shows what it raises
        return f"{type(cause).__name__}: {cause}"
    return ""


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, where: Any) -> Any:
        kind, place, name = where
        return _bodies(place)[name] if kind == "plan" else getattr(import_module(place), name)


@cache
def _bodies(source: str) -> dict[str, Any]:
    return bodies(source)


def serve(pipe: Connection, gone: Callable[[], bool]) -> None:
    """Answer jobs until the pipe ends or `gone()`."""
    pipe.send_bytes(b"ready")
    idle = 0.0
    while idle < IDLE_S and not gone():
        if not pipe.poll(LOOK_S):
            idle += LOOK_S
            continue
        idle = 0.0
        pipe.send_bytes(answer(pipe.recv_bytes()).encode())


def main(arguments: Sequence[str]) -> None:
    """Import, fork, and wait for the children."""
    parent, pipes = int(arguments[0]), [int(fd) for fd in arguments[1:]]
    # An interrupt in a terminal is meant for the process it works for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for family in {*EARLY, *WAITING}:
        import_module(f"terrazzo.kernels.{family}")
    # Reads the whole compiler, once for all children.
    triton_key()
    gc.collect()
    gc.freeze()
    first, children = os.getpid(), 0
    for fd in pipes:
        children += 1
        if os.fork():
            continue
        for other in pipes:
            if other != fd:
                os.close(other)
        try:
            with suppress(OSError, EOFError):
                serve(Connection(fd), lambda: os.getppid() != first)
        finally:
            # Whatever this process inherited is the first one's to clean up.
            os._exit(0)
    for fd in pipes:
        os.close(fd)
    while children and os.getppid() == parent:
        time.sleep(LOOK_S)
        while children and os.waitpid(-1, os.WNOHANG)[0]:
            children -= 1


if __name__ == "__main__":
    main(sys.argv[1:])
