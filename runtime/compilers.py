"""Processes that compile kernels for this one, so that Triton's frontend does not hold its interpreter's lock.

    compilers.open_for(user)      # early: they import while a model is loaded
    ask = compilers.asked()       # for `kernels/together.py`; None where there are none
    compilers.close_for(user)     # they end with their last user, or once one is done and they have had nothing to do
                                  # for a while, and with this process however it ends

What goes over is what Triton is about to compile: function, signature, constants, options, target, and the key that the
binary will have in Triton's cache on disk. A function goes as its module and name, a generated body as its plan's text.
What comes back is whether the binary is in that cache now; this process then finds it there as it would find one of
last week. So nothing depends on a worker: where one fails, is gone, is not ready yet or would make another key, Triton
compiles here, counted and said once.

One process is started, which imports and then forks the others: importing costs seconds, a fork milliseconds. It is a
program of its own (`compile_worker.py`), not a fork of this process, whose threads and CUDA context no fork survives,
and not `multiprocessing`'s, which would run the caller's main module again. It never imports vLLM nor touches a GPU.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any

import triton
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key, triton_key

from ..kernels.launch import INTERPRETED
from ..kernels.together import Ahead, cores
from .load import origin
from .vllm_compat import logger

# With eight the last of an 8B model's 65 binaries would be there 0.5 to 0.9 s later, with fifteen 0 to 0.3 s earlier
# (simulated with the times of planning and of each binary on a CPU, 2026-11-27; docs/perf-log.md).
MOST = 12
# Kernels take seconds; a worker that says nothing for so long is not waited for.
PATIENCE_S = 300

# vLLM makes a compiler for a class that is compiled and one for its base class, and only one of them ever compiles. So
# once a user is done, the others have so long to come with something: a model's graphs follow one another in seconds.
IDLE_S = 60.0

_open: Compilers | None = None
# Of changes to it, which a thread that waits for the processes to be idle makes as well.
_changing = threading.Lock()
_users: weakref.WeakSet[Any] = weakref.WeakSet()


def open_for(user: Any) -> None:
    """Start the processes, where none run, for whoever will compile; the interpreter needs none."""
    global _open
    if INTERPRETED:
        return
    _users.add(user)
    with _changing:
        if _open is None:
            try:
                _open = Compilers(min(cores(), MOST))
            except Exception as cause:  # a start without them is slower, nothing else
                logger().info("terrazzo: no processes that compile: %s: %s", type(cause).__name__, cause)


def close_for(user: Any) -> None:
    """`user` compiles no more. With the last one the processes end, or when the others leave them idle."""
    _users.discard(user)
    processes = _open
    if processes is None:
        return
    if not _users:
        _end(processes)
    else:
        threading.Thread(target=_end_when_idle, args=(processes,), name="terrazzo-compilers-idle", daemon=True).start()


def _end(processes: Compilers) -> None:
    global _open
    with _changing:
        if _open is not processes:
            return
        _open = None
    processes.close()


def _end_when_idle(processes: Compilers) -> None:
    while _open is processes and (left := IDLE_S - (time.monotonic() - processes.used)) > 0:
        time.sleep(left)
    _end(processes)


def asked() -> Ahead | None:
    """What asks an open process; None where there is none, or none that has imported what it needs by now."""
    processes = _open
    return processes.compiled if processes is not None and processes.ready() else None


class Compilers:
    """So many processes.

    Args:
        count: of them, besides the one that they are forked from.
    """

    def __init__(self, count: int) -> None:
        self.done = self.missed = 0
        # When somebody last asked for something or got it, by the clock that only goes forward.
        self.used = time.monotonic()
        self._free = threading.Condition()
        self._idle: list[Connection] = []
        self._alive, self._pid, self._closed = 0, os.getpid(), False
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [there.fileno() for _, there in pairs]
        # What is importable here is so there; one thread is enough for each.
        path = os.pathsep.join(sys.path)
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # Python 3.12 warns of a fork beside threads that some library may have started; none of them compiles.
        worker = ["-P", "-W", "ignore::DeprecationWarning", "-m", "terrazzo.runtime.compile_worker"]
        command = [sys.executable, *worker, str(os.getpid()), *map(str, theirs)]
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        connections = [Connection(here.detach()) for here, _ in pairs]
        for _, there in pairs:
            there.close()
        self.greeting = threading.Thread(
            target=self._greet, args=(connections,), name="terrazzo-compilers", daemon=True
        )
        self.greeting.start()

    def ready(self) -> bool:
        """Whether one of them is; none is for a fork of this process."""
        return self._pid == os.getpid() and self._alive > 0

    def compiled(self, source: Any, target: Any, options: dict[str, Any]) -> bool:
        """Have one of them compile into Triton's cache; may be called from many threads.

        Args:
            source: Triton's `ASTSource`, or Gluon's. target: Triton's `GPUTarget`. options: the backend's, by name.

        Returns:
            whether the binary is there; where not, it was counted and nobody else is asked.
        """
        self.used = time.monotonic()
        try:
            job = packed(source, target, options)
        except Exception as cause:  # whatever Triton of another version does otherwise
            return self._miss(f"{source.name} cannot be sent: {type(cause).__name__}: {cause}")
        with self._free:
            self._free.wait_for(lambda: self._idle or self._alive <= 0)
            if not self._idle:
                return self._miss("none of them is left")
            worker = self._idle.pop()
        try:
            worker.send_bytes(job)
            if not worker.poll(PATIENCE_S):
                raise TimeoutError(f"nothing was heard for {PATIENCE_S} s")
            said = worker.recv_bytes().decode()
        except (OSError, EOFError) as cause:
            worker.close()
            with self._free:
                self._alive -= 1
                self._free.notify_all()
            return self._miss(f"one of them is gone: {type(cause).__name__} {cause}")
        with self._free:
            self._take_in(worker)
            self.done += not said
            self.used = time.monotonic()
        return self._miss(f"{source.name}: {said}") if said else True

    def close(self) -> None:
        """End them, once what they do is done, and say what it came to."""
        if self.done:
            said = "terrazzo: %d binaries came from %d processes beside this one, %d were compiled in it"
            logger().info(said, self.done, self._alive, self.missed)
        with self._free:
            idle, self._idle, self._alive, self._closed = self._idle, [], 0, True
            self._free.notify_all()
        for worker in idle:
            worker.close()
        # Each ends at the end of its pipe, and the first one with them.
        threading.Thread(target=self._process.wait, name="terrazzo-compilers-end", daemon=True).start()

    def _greet(self, connections: list[Connection]) -> None:
        """Take each process in once it says that it is ready; meanwhile compute what every key here needs."""
        triton_key()
        for worker in connections:
            try:
                worker.recv_bytes()
            except (OSError, EOFError):
                worker.close()
                continue
            with self._free:
                self._alive += not self._closed
                self._take_in(worker)

    def _take_in(self, worker: Connection) -> None:
        """One that has nothing to do is free for the next job, or ends, where all of them shall."""
        if self._closed:
            worker.close()
        else:
            self._idle.append(worker)
            self._free.notify()

    def _miss(self, why: str) -> bool:
        if not self.missed:
            logger().info("terrazzo: kernels are compiled in this process where others cannot: %s", why)
        self.missed += 1
        return False


def packed(source: Any, target: Any, options: dict[str, Any]) -> bytes:
    """What a worker needs to compile this, and under which key it will be looked for."""
    backend = make_backend(target)
    variables = triton.knobs.cache.dir, dict(os.environ)
    key = get_cache_key(source, backend, backend.parse_options(dict(options)), environment_variables())
    given = source.fn, source.signature, source.constants, source.attrs
    held = io.BytesIO()
    _Packer(held).dump((given, target, options, variables, sha256(key.encode()).hexdigest()))
    return held.getvalue()


def environment_variables() -> dict[str, str]:
    """Those that change what Triton makes, as it counts them."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return get_cache_invalidating_env_vars()


class _Packer(pickle.Pickler):
    """Functions for the compiler go by where they stand."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, triton.runtime.jit.JITCallable):
            return None
        if (text := origin(value)) is not None:
            return "plan", *text
        module, name = value.fn.__module__, value.fn.__name__
        if getattr(sys.modules.get(module), name, None) is not value:
            raise pickle.PicklingError(f"{value!r} is not what its module calls {name}")
        return "module", module, name
