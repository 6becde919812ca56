"""Tasks in processes of their own: one that hangs or brings its process down costs itself and nothing else."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

# A process that has touched CUDA cannot be forked.
SPAWN = multiprocessing.get_context("spawn")
# What a process without a task gets to end by itself.
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Done:
    """A task's end: its result, or what ended it instead."""

    task: Any
    result: Any = None
    ended_by: str = ""


@dataclass
class _Worker:
    work: Callable[..., Any]
    process: Any = None
    pipe: Connection | None = None
    task: Any = None
    deadline: float = 0.0
    finished: int = 0
    note: str = field(default="")

    def start(self) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(self.work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.finished = 0

    def give(self, task: Any, seconds: float) -> None:
        assert self.pipe is not None
        self.task, self.note, self.deadline = task, "", time.monotonic() + seconds
        self.pipe.send(task)

    def stop(self) -> None:
        """Lets an idle process end; ends one that is at work."""
        if self.process is None or self.pipe is None:
            return
        self.pipe.close()
        if self.task is None:
            self.process.join(PATIENCE_S)
        self.process.kill()
        self.process.join()
        self.process = None


def run(work: Callable[..., Any], tasks: Sequence[Any], procs: int, seconds: float, reuse: int = 25) -> Iterator[Done]:
    """Runs `work(task, note)` for every task and yields each as it ends.

    Args:
        work: a module-level function; `note(text)` tells how far it is, should it be ended.
        tasks: what can be sent to another process.
        procs: processes at a time.
        seconds: how long a task may take.
        reuse: tasks after which a process makes room for a fresh one, as compiled pieces stay in memory.
    """
    waiting = list(tasks)[::-1]
    workers = [_Worker(work) for _ in range(min(procs, len(waiting)))]
    try:
        while waiting or any(w.task is not None for w in workers):
            for worker in workers:
                if worker.task is None and waiting:
                    if worker.process is None or worker.finished >= reuse:
                        worker.stop()
                        worker.start()
                    worker.give(waiting.pop(), seconds)
            yield from _ended([w for w in workers if w.task is not None])
    finally:
        for worker in workers:
            worker.stop()


def _ended(busy: Sequence[_Worker]) -> Iterator[Done]:
    """Waits until something happens; what ended by it."""
    first = max(min(w.deadline for w in busy) - time.monotonic(), 0.0)
    heard = wait([w.pipe for w in busy if w.pipe is not None], timeout=first)
    for worker in busy:
        if worker.pipe in heard:
            try:
                kind, value = worker.pipe.recv()
            except EOFError:
                worker.process.join()
                yield _broken(worker, f"the process died ({worker.process.exitcode})")
                continue
            if kind == "note":
                worker.note = value
                continue
            yield Done(worker.task, value)
            worker.task, worker.finished = None, worker.finished + 1
        elif time.monotonic() >= worker.deadline:
            yield _broken(worker, "it took too long")


def _broken(worker: _Worker, why: str) -> Done:
    done = Done(worker.task, ended_by=f"{why}, at {worker.note or 'its start'}")
    worker.stop()
    worker.task = None
    return done


def _serve(work: Callable[..., Any], pipe: Connection) -> None:
    """What a process does: tasks as they come."""
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(("result", work(task, lambda text: pipe.send(("note", text)))))
