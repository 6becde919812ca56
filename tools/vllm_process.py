"""vLLM engines as processes: each in an environment of its own, run to its end or asked one thing after the other."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

ENGINE = Path(__file__).with_name("vllm_engine.py")
# For one engine's work, and for one answer, the first of which is that it has started.
TIMEOUT_S = 900
# How often is it looked whether one that says nothing is still there.
LOOK_S = 1.0
# Of a log, what is shown where an engine failed.
LAST_LINES = 12


@dataclass(frozen=True)
class Run:
    """One engine: a model, who compiles it, with which CUDA graphs, and what else vLLM's `LLM` is given, as JSON."""

    model: str
    contender: str
    graphs: str = ""
    given: str = "{}"

    @property
    def name(self) -> str:
        given = re.sub(r"\W+", "-", self.given).strip("-")
        return "-".join(filter(None, (self.model, self.contender, self.graphs, given)))

    @property
    def order(self) -> dict[str, Any]:
        """What every engine is started with."""
        return {"model": self.folder, "contender": self.contender, "given": json.loads(self.given)}

    @property
    def tokens(self) -> str:
        """Name of the file with the tokens that all contenders emit."""
        return replace(self, contender="tokens", graphs="").name

    @property
    def gpus(self) -> int:
        """How many share each layer."""
        return int(json.loads(self.given).get("tensor_parallel_size", 1))

    @property
    def folder(self) -> str:
        """Of the model's configuration."""
        return str(Path(os.environ["LABMODELS"]) / self.model)


class Died(Exception):
    """An engine ended, or said nothing for too long; the last it wrote."""


def environment(run: Run, work: Path) -> dict[str, str]:
    """The environment an engine starts in: only terrazzo's has its plugin, and each has caches of its own."""
    cache = work / "cache" / run.name
    caches = {
        "VLLM_CACHE_ROOT": cache,
        "TRITON_CACHE_DIR": cache / "triton",
        "TORCHINDUCTOR_CACHE_DIR": cache / "torch",
    }
    plugins = "terrazzo" if run.contender == "terrazzo" else ""
    return {**os.environ, **{name: str(folder) for name, folder in caches.items()}, "VLLM_PLUGINS": plugins}


def to_its_end(command: Sequence[str], run: Run, work: Path, out: Path) -> dict[str, Any]:
    """What a process leaves in `out`; or `failed`, the end of what it wrote."""
    log = work / f"{run.name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                # Safe paths: a tool of ours must not be found where vLLM imports somebody else's module.
                [sys.executable, "-P", *command],
                env=environment(run, work),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {TIMEOUT_S} s; {_end_of(log)}"}
    if code or not out.exists():
        return {"failed": f"exit status {code}; {_end_of(log)}"}
    return json.loads(out.read_text())


class Engine:
    """An engine that answers, a line of JSON for a line of JSON, until it is left.

    Args:
        run: which one.
        order: what it is started with; the first answer is about its start.
        work: where its log goes.
    """

    def __init__(self, run: Run, order: Mapping[str, Any], work: Path) -> None:
        self.log = work / f"{run.name}-serving.log"
        answers, theirs = os.pipe()
        command = [sys.executable, "-P", str(ENGINE), json.dumps({**order, "answers": theirs})]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment(run, work), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                pass_fds=(theirs,), text=True,
            )  # fmt: skip
        os.close(theirs)
        self._answers = os.fdopen(answers)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        # Its pipes as well.
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._answers.close()

    def ask(self, what: Mapping[str, Any]) -> Any:
        """The answer.

        Raises:
            Died: there is none.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except OSError as gone:
            raise Died(_end_of(self.log)) from gone
        return self.answer()

    def answer(self) -> Any:
        """The next answer.

        Raises:
            Died: there is none.
        """
        end = time.monotonic() + TIMEOUT_S
        # One line for one order, so nothing waits in the buffer of what is read. Where it dies, a process that it
        # forked may keep the pipe open.
        while not select.select([self._answers], [], [], LOOK_S)[0]:
            if self._process.poll() is not None or time.monotonic() > end:
                raise Died(_end_of(self.log))
        if not (line := self._answers.readline()):
            raise Died(_end_of(self.log))
        return json.loads(line)


def _end_of(log: Path) -> str:
    return f"{log}: " + "\n".join(log.read_text().splitlines()[-LAST_LINES:])
