"""Kernels compiled by other processes: what they compile is found here, and nothing depends on them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from terrazzo.runtime import compilers

# A process that compiles for a device which is not there.
ALONE = """
import json, logging, os, sys, threading, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Device:
    launcher_cls = staticmethod(lambda source, metadata: None)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Device())
torch.cuda.current_device = lambda: 0
from terrazzo.kernels.launch import noting
from terrazzo.kernels.target import Target
from terrazzo.kernels.together import Compiling
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.runtime import compile_worker, compilers
from terrazzo.runtime.load import load
from terrazzo.runtime.lowered import planned_range
from terrazzo.runtime.warm import hollow
from terrazzo.tools.models import pieces

target = Target.named("h100")
Target.current = staticmethod(lambda device=None: target)

def launches():
    # Gluon's and Triton's kernels, with bodies from two plans.
    found = []
    graph = pieces("llama-3.1-8b", tiny=True)[1].graph
    for regime in planned_range(graph, Examples.of(graph, None), 60, 700, Options(target)):
        with noting() as noted:
            load(regime.plan)(*hollow(regime.plan.facts, regime.lo))
        found += noted
    return found

def opened(count):
    made = compilers.Compilers(count)
    made.greeting.join()
    return made

logging.basicConfig()
logging.getLogger("terrazzo").setLevel(logging.DEBUG)
compiled = []
triton.knobs.compilation.listener = lambda **said: compiled.append(said["cache_hit"])
"""


def alone(code, folder, **more):
    """What a process prints as JSON that runs this after `ALONE`, with Triton's cache in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True, env=environment, check=False, **more
    )


def said(done):
    # Shown where a test fails.
    print(done.stderr)
    assert done.returncode == 0
    return json.loads(done.stdout)


HITS = """
noted = launches()
others = opened(2)
Compiling([*noted, *noted], others.compiled).wait()
kinds = sorted({kernel.fn.is_gluon() for kernel, _ in noted})
print(json.dumps([kinds, len(noted), others.done, others.missed, compiled]))
"""


def test_what_others_compile_is_found_here_under_its_key(tmp_path):
    kinds, launched, done, missed, hits = said(alone(HITS, tmp_path))
    assert kinds == [False, True]
    # Every binary once, none of them here.
    assert 4 < done <= launched and missed == 0
    assert hits == [True] * done


CALLED = """
import importlib, pkgutil
import terrazzo.kernels
from triton.runtime.jit import JITCallable

names = [module.name for module in pkgutil.iter_modules(terrazzo.kernels.__path__, "terrazzo.kernels.")]
modules = map(importlib.import_module, names)
functions = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITCallable)}.values()
keys = [f.cache_key for f in functions]
print(json.dumps([len(keys), [f"{f.fn.__module__}.{f.fn.__name__}" for f in functions if f.used_global_vals]]))
"""


def test_no_key_depends_on_which_was_asked_for_first(tmp_path):
    # Triton takes a callee's globals into its caller's key, but only those of callees that have a key by then.
    found, reading = said(alone(CALLED, tmp_path))
    assert found > 80 and reading == []


OTHER_KEY = """
def otherwise(source, *more):
    # As if the function were another over there.
    kept, source.fn.hash = source.fn.cache_key, "another"
    try:
        return compilers.packed(source, *more)
    finally:
        source.fn.hash = kept

jobs = []
Compiling(launches()[:1], lambda *job: jobs.extend([compilers.packed(*job), otherwise(*job)])).wait()
compiled.clear()
print(json.dumps([[compile_worker.answer(job) for job in jobs], compiled]))
"""


def test_what_would_have_another_key_is_not_compiled(tmp_path):
    (right, wrong), hits = said(alone(OTHER_KEY, tmp_path))
    assert right == "" and "another key" in wrong and hits == [True]


NOT_SENT = """
kernel, args = launches()[0]
body = next(value for value in kernel.constexprs.values() if hasattr(value, "origin"))
del body.origin
others = opened(1)
Compiling([(kernel, args)], others.compiled).wait()
print(json.dumps([others.done, others.missed, compiled]))
"""


def test_a_function_that_is_not_to_be_found_over_there_is_compiled_here(tmp_path):
    assert said(alone(NOT_SENT, tmp_path)) == [0, 1, [False]]


FAILS = """
def fails(source):
    raise RuntimeError("not this one")

triton.backends.backends["nvidia"].compiler.make_cubin = lambda self, source, *more: fails(source)
noted = launches()[:2]
Compiling(noted).wait()
try:
    noted[0][0].precompile(*noted[0][1])
except RuntimeError as raised:
    print(json.dumps([str(raised), compiled]))
"""


def test_a_kernel_that_does_not_compile_is_logged_and_raises_when_it_is_needed(tmp_path):
    done = alone(FAILS, tmp_path)
    assert said(done) == ["not this one", []]
    assert done.stderr.count("was not compiled in the background: RuntimeError: not this one") == 2


PARSES = """
import ast
parse, failing = ast.parse, set()

def interrupted(text, *more, **named):
    # What Triton or terrazzo parses fails once, as it would if another thread had parsed meanwhile.
    if text not in failing and sys._getframe(1).f_code.co_filename.endswith(("/jit.py", "/parser.py")):
        failing.add(text)
        raise SystemError("AST constructor recursion depth mismatch")
    return parse(text, *more, **named)

ast.parse = interrupted
noted = launches()[:2]
Compiling(noted).wait()
functions = [f for kernel, _ in noted for f in (kernel.fn, *kernel.constexprs.values())]
keys = [function.cache_key for function in functions if isinstance(function, triton.JITFunction)]
print(json.dumps([len(failing), compiled, len(keys), [key for key in keys if "recursion" in key]]))
"""


def test_kernels_compile_and_have_keys_of_their_own_though_other_threads_parse(tmp_path):
    failed, hits, keys, half = said(alone(PARSES, tmp_path))
    assert failed > 10 and hits == [False, False] and keys > 2 and half == []


GONE = """
noted = launches()[:3]
others = opened(1)
others._process.kill()
for worker in others._idle:
    worker.close()
binaries = len({kernel.wanting(args) for kernel, args in noted})
Compiling(noted, others.compiled).wait()
print(json.dumps([others.done, others.missed, compiled, binaries]))
"""


def test_where_nobody_is_left_kernels_are_compiled_here(tmp_path):
    done, missed, hits, binaries = said(alone(GONE, tmp_path))
    assert (done, missed) == (0, binaries) and hits == [False] * binaries


ENDED = """
early, busy = compilers.Compilers(2), opened(1)
# Before any of them is ready, and while one of them compiles.
early.close()
early.greeting.join()
(worker,) = busy._idle
compiling = Compiling(launches()[:1], busy.compiled)
while busy._idle:
    pass
busy.close()
compiling.wait()
ended = [others._process.wait(20) for others in (early, busy)]
print(json.dumps([ended, early.ready(), busy.ready(), early._idle + busy._idle, worker.closed, compiled]))
"""


def test_they_end_when_closed_however_early_or_busy(tmp_path):
    assert said(alone(ENDED, tmp_path, timeout=100)) == [[0, 0], False, False, [], True, [True]]


def test_they_end_with_the_process_even_when_it_is_killed(tmp_path):
    # Whoever is left holds the end of the error stream that is read here; the fork holds their pipes, and not that.
    code = """
others = opened(2)
if os.fork() == 0:
    os.closerange(0, 3)
    threading.Event().wait(70)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    assert alone(code, tmp_path, timeout=60).returncode == -9


def test_they_neither_import_vllm_nor_touch_a_gpu(tmp_path):
    code = """
from terrazzo.runtime import compile_worker
print(json.dumps([[name for name in sys.modules if name.split(".")[0] == "vllm"], torch.cuda.is_initialized()]))
"""
    assert said(alone(code, tmp_path)) == [[], False]


@pytest.fixture
def started(monkeypatch):
    """Stand-ins for processes, as they are started."""
    made = []

    class Stand:
        def __init__(self, count):
            made.append(self)
            self.closed, self.there = False, True

        def ready(self):
            return self.there

        def compiled(self, *job):
            return True

        def close(self):
            self.closed = True

    monkeypatch.setattr(compilers, "Compilers", Stand)
    monkeypatch.setattr(compilers, "INTERPRETED", False)
    monkeypatch.setattr(compilers, "_open", None)
    monkeypatch.setattr(compilers, "_users", type(compilers._users)())
    return made


class User:
    """Somebody who compiles."""


def test_they_are_started_once_and_end_with_their_last_user(started, monkeypatch):
    monkeypatch.setattr(compilers, "_end_when_idle", lambda processes: None)
    first, second = User(), User()
    assert compilers.asked() is None
    for user in (first, second, first):
        compilers.open_for(user)
    (others,) = started
    assert compilers.asked() == others.compiled
    others.there = False
    assert compilers.asked() is None
    compilers.close_for(first)
    assert not others.closed
    del second
    compilers.close_for(first)
    assert others.closed and compilers.asked() is None


class Clock:
    """Time that passes while somebody sleeps, during which `busy` is asked for something, so many times."""

    def __init__(self, busy, times):
        self.now, self.busy, self.times = 100.0, busy, times

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.times -= 1
        if self.times >= 0:
            self.busy.used = self.now - 1.0


class Inline:
    """A thread that runs where it is started."""

    def __init__(self, target, args, name, daemon):
        self.target, self.args = target, args

    def start(self):
        self.target(*self.args)


def test_users_that_never_come_do_not_keep_them(started, monkeypatch):
    first, second = User(), User()
    for user in (first, second):
        compilers.open_for(user)
    (others,) = started
    others.used = 100.0
    monkeypatch.setattr(compilers, "time", Clock(others, 3))
    monkeypatch.setattr(compilers, "threading", SimpleNamespace(Thread=Inline))
    compilers.close_for(first)
    # Three times somebody came shortly before the end.
    assert others.closed and compilers.time.now == 100.0 + 4 * compilers.IDLE_S - 3 * 1.0
    assert compilers.asked() is None
    compilers.open_for(second)
    assert len(started) == 2


def test_where_they_cannot_be_started_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(compilers, "INTERPRETED", False)
    monkeypatch.setattr(compilers, "_open", None)
    monkeypatch.setattr(compilers, "_users", type(compilers._users)())
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with caplog.at_level(logging.INFO):
        compilers.open_for(User())
    assert compilers.asked() is None
    assert ["no processes that compile" in line for line in caplog.messages] == [True]


def test_the_interpreter_needs_none(started, monkeypatch):
    monkeypatch.setattr(compilers, "INTERPRETED", True)
    compilers.open_for(User())
    assert started == []
