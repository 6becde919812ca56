"""Nothing goes through Inductor: what each front door imports and calls while it compiles and runs.

Torch itself imports parts of `torch._inductor`, and no program that compiles can avoid it: `torch._dynamo` reads its
configuration and its helpers for devices, looking a backend up by name loads AOTAutograd with its cache (`codecache`,
and through it `codegen.common` and what describes compiled code), and `make_fx` ends each trace with
`fx_passes.dedupe_symint_uses`, a pass over FX. Allowed is therefore exactly what `torch.compile(backend="eager")` and
`make_fx` import where terrazzo is not; of what lowers, schedules or writes code for Inductor, nothing is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

DOORS = ("CompiledPiece", "PiecewiseBackend", "torch.compile")
# What turns a graph into Inductor's kernels.
COMPILER = (
    *("compile_fx", "compile_fx_ext", "graph", "lowering", "decomposition", "ir", "scheduler", "select_algorithm"),
    *("codegen.triton", "codegen.simd", "codegen.wrapper", "codegen.cpp", "kernel", "runtime.triton_heuristics"),
)

COMMON = """
import json, os, sys
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def compiled_by(backend):
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.RMSNorm(16), torch.nn.Linear(16, 8), torch.nn.SiLU()).to(device)
    x = torch.randn(4, 16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend=backend)(x), module(x))

def go_through(door):
    if door in ("eager", "inductor"):
        return compiled_by(door)
    if door == "make_fx":
        from torch.fx.experimental.proxy_tensor import make_fx
        return make_fx(lambda x: x + 1, tracing_mode="symbolic")(torch.randn(4, 16))
    if door == "torch.compile":
        return compiled_by("terrazzo")
    from terrazzo.tools.models import pieces
    from terrazzo.tools.stand_in import CompiledPiece, backend
    parts = pieces("llama-3.2-1b", tiny=True)
    args = parts[1].make_inputs(2, device)
    if door == "CompiledPiece":
        compiled = CompiledPiece(parts[1].graph)
        compiled(*args)
        assert "0 ops as themselves" in compiled.summary(), compiled.summary()
    else:
        made = backend(parts[1], len(parts), compile_sizes=[2])
        made(*args)
        made(*args)
        assert made.entries[2].state() == "plan", made.entries[2].state()
"""

# Whose statement or call brought each module of Inductor in.
IMPORTS = """
found = {}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch._inductor"):
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename or "importlib" in frame.f_globals.get("__name__", ""):
                frame = frame.f_back
            found[name] = frame.f_globals["__name__"]

sys.meta_path.insert(0, Finder())
for door in sys.argv[1:]:
    go_through(door)
print(json.dumps(found))
"""

# How often each door's code calls Inductor's entries, which refuse to work.
CALLS = """
import torch._inductor.compile_fx as inductor, torch._inductor.graph as graph
calls = {door: 0 for door in sys.argv[1:]}

def refuse(*args, **kwargs):
    calls[door] += 1
    raise RuntimeError("Inductor was called")

inductor.compile_fx = inductor.compile_fx_inner = graph.GraphLowering.__init__ = refuse
for door in calls:
    try:
        go_through(door)
    except Exception:
        if not calls[door]:
            raise
print(json.dumps(calls))
"""


@cache
def run(code: str, *doors: str):
    """What a process of its own prints after it went through these doors."""
    command = [sys.executable, "-c", COMMON + code, *doors]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_of_terrazzo_imports_inductor():
    imported = run(IMPORTS, *DOORS)
    assert imported, "torch imports its configuration: nothing seen means that nothing was watched"
    assert not {name: by for name, by in imported.items() if by.split(".")[0] != "torch"}


def test_only_what_torch_imports_without_us_is_imported():
    assert set(run(IMPORTS, *DOORS)) <= set(run(IMPORTS, "eager", "make_fx"))


def test_nothing_of_inductors_compiler_is_imported():
    # Some of these files do not exist in every version of torch; compile_fx and codegen.triton do.
    banned = {f"torch._inductor.{name}" for name in COMPILER}
    brought = {name for name in run(IMPORTS, *DOORS) if any(name == b or name.startswith(f"{b}.") for b in banned)}
    # Where a GPU is, torch 2.11 loads all of Inductor itself, whatever is compiled for: then only calls say anything.
    assert not brought - set(run(IMPORTS, "eager", "make_fx"))


def test_inductor_is_called_by_its_own_name_alone():
    # The last door shows that a call would be seen.
    calls = run(CALLS, *DOORS, "inductor")
    assert calls.pop("inductor") > 0
    assert calls == dict.fromkeys(DOORS, 0)
