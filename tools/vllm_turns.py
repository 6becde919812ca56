"""vLLM's engines timed in turn on one GPU and on the same cores: what a process gets of its host differs from minute to
minute and from core to core, and so both see the same of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from terrazzo.tools.vllm_process import Died, Engine, Run

ROUNDS = 7
PREFILL = "prefill2048"
# A loop of Python, by which to tell whether the engines had the same of their host.
LOOP = "loop"
# Cores that the engines share while they are timed, for each GPU: the processes of several wait for one another by
# looking again and again.
CORES = 4
# Cache of keys and values of a timed engine: enough for 128 requests, beside 61 GB of weights.
KV_GIB = 4


def in_turn(runs: Sequence[Run], batches: Sequence[int], work: Path, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Engines that exist at the same time, each idle while another one is timed.

    Args:
        runs: the engines; they have to fit on the GPU together.
        batches: numbers of requests that decode at once.
        work: where logs and caches are.
        rounds: over all sizes, each contender first in every other one.

    Returns:
        Per contender: init_s; ms, of decode steps by the number of requests and of a prefill of 2048 tokens, medians
        over rounds, and of a loop of Python beside them; busy_us, for how long the GPU is busy meanwhile; and for all
        but the first contender `ratios`, each round's time of the first over its own, and `ratio`, their median. Or
        `failed`, the end of what the engine wrote.
    """
    asked = [*map(str, batches), PREFILL]
    timed = [*asked, LOOP]
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as open_engines:
        engines: dict[str, Engine] = {}
        for run in runs:
            engine = open_engines.enter_context(Engine(run, {**run.order, "kv_gib": KV_GIB}, work))
            try:
                found[run.contender] = engine.answer()
                # Its start had all of them.
                engine.ask({"cores": sorted(os.sched_getaffinity(0))[: CORES * run.gpus]})
            except Died as reason:
                return _failed(runs, run.contender, reason)
            engines[run.contender] = engine
        try:
            for number in range(rounds):
                for what in timed:
                    for name in list(engines)[:: -1 if number % 2 else 1]:
                        times[name, what].append(engines[name].ask({"time": what}))
            for name, engine in engines.items():
                found[name]["busy_us"] = {what: engine.ask({"busy": what}) for what in asked}
        except Died as reason:
            return _failed(runs, name, reason)
    first = runs[0].contender
    for name, one in found.items():
        one["ms"] = {what: median(times[name, what]) for what in timed}
        if name != first:
            one["ratios"] = {what: _ratios(times, first, name, what) for what in timed}
            one["ratio"] = {what: median(each) for what, each in one["ratios"].items()}
    return found


def _failed(runs: Sequence[Run], dead: str, reason: Died) -> dict[str, dict[str, Any]]:
    return {r.contender: {"failed": str(reason) if r.contender == dead else f"{dead}'s engine failed"} for r in runs}


def _ratios(times: Mapping[tuple[str, str], Sequence[float]], first: str, other: str, what: str) -> list[float]:
    return [a / b for a, b in zip(times[first, what], times[other, what], strict=True)]
