"""What a kernel compiles to, without a GPU: registers, local memory, shared memory, PTX and SASS.

    python -m terrazzo.tools.sass --all --arch 90              every config of every kernel family
    python -m terrazzo.tools.sass --family rows --arch 80      one family
    python -m terrazzo.tools.sass --jobs mine.py --arch 90     a file of yours that defines compile_jobs(arch)
    … --match 128x64 --show sass                               the code of what matches

The compiler asks no driver whether a kernel fits, so the limits stand here and are checked: shared memory against the
architecture, local memory (spills) against the bound that the job or the architecture states. Exit status 1 when a job
breaks one or does not compile.

Compiling and interpreting cannot share a process: `compile_for` refuses under TRITON_INTERPRET=1;
`compile_isolated` and the command line work from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import terrazzo.kernels
from terrazzo.kernels.jobs import CompileJob, SignatureType
from terrazzo.lowering.errors import UserError
from terrazzo.tools.command import exit_status, number

# Opt-in shared memory one block may use, per architecture. Source: CUDA C++ Programming Guide, technical specifications
# per compute capability (163 KB and 227 KB).
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
# Local memory per thread that passes beyond a job's own bound: configs were measured on sm_90, where none may spill; on
# the others the same tiles may cost a few registers around the main loop (16 bytes at most, as compiled by triton 3.6).
SPILL_BOUND_BYTES = {80: 16, 90: 0, 100: 16}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel compiled to.

    Args:
        registers: per thread.
        spills_bytes: local memory per thread: spilled registers and indexed local arrays.
        shared_bytes: shared memory per program, static and dynamic.
        ptx: the PTX text.
        cubin: the binary.
        seconds: compile time; milliseconds when Triton's cache on disk had the kernel.
    """

    registers: int
    spills_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes
    seconds: float

    @cached_property
    def sass(self) -> str:
        """The machine code, disassembled when first asked for."""
        return _cuobjdump(self.cubin, "-sass")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a job, what it compiled to, and what is wrong with that (empty when nothing is)."""

    family: str
    label: str
    arch: int
    registers: int = 0
    spills_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    wrong: str = ""
    code: str = ""


def compile_for(
    fn: Any,
    signature: Mapping[str, SignatureType],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Sequence[str] = (),
) -> Report:
    """Compiles one kernel for an architecture that need not be present.

    Args:
        fn: a `@triton.jit` or `@gluon.jit` function.
        signature: types of the parameters that are not constexprs, as in `CompileJob`.
        constexprs: values of the others; `@triton.jit` functions are values too.
        arch: 80, 90 or 100.
        num_warps, num_stages: Triton's options.
        divisible: arguments that are multiples of 16; a tuple's name stands for all its elements.

    Raises:
        UserError: the process interprets, or a parameter is missing from both mappings or named in neither's function.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if triton.knobs.runtime.interpret:
        raise UserError(
            "compile_for",
            "TRITON_INTERPRET=1 is set, and what was decorated under it cannot be compiled",
            stage="tools.sass",
            remedy="Call compile_isolated, which compiles in another process.",
        )
    types, constants, attributes = _resolve(fn.arg_names, signature, constexprs, divisible)
    language = GluonASTSource if fn.is_gluon() else ASTSource
    source = language(fn=fn, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_reflect_ftz": False}
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise UserError("cuobjdump -res-usage", f"prints no usage: {usage[-200:]!r}", stage="tools.sass")
    registers, stack, local = (int(number) for number in found.groups())
    return Report(registers, stack + local, compiled.metadata.shared, compiled.asm["ptx"], cubin, seconds)


def compile_job(job: CompileJob, arch: int) -> Report:
    """`compile_for` with a job's fields."""
    return compile_for(
        job.fn, job.signature, job.constexprs, arch, job.num_warps, job.num_stages, divisible=job.divisible
    )


def compile_isolated(jobs: str | Path, arch: int, match: str = "", show: str = "") -> list[Row]:
    """Compiles in a process of its own, whatever mode this one is in.

    Args:
        jobs: a family's name, "all", or a Python file that defines `compile_jobs(arch)`.
        arch: 80, 90 or 100.
        match: only jobs whose family and label contain this.
        show: "ptx" or "sass" to get the code in `Row.code`.
    """
    which = ["--all"] if jobs == "all" else ["--jobs" if str(jobs).endswith(".py") else "--family", str(jobs)]
    command = [sys.executable, "-m", "terrazzo.tools.sass", *which, "--arch", str(arch), "--match", match, "--json"]
    done = subprocess.run(
        [*command, *(["--show", show] if show else [])],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise UserError("compiling in a process of its own", done.stderr.strip()[-2000:], stage="tools.sass")
    return [Row(**row) for row in json.loads(done.stdout)]


def families() -> list[str]:
    """Names of the kernel files that provide `compile_jobs`, in alphabetical order."""
    names = [module.name for module in pkgutil.iter_modules(terrazzo.kernels.__path__)]
    return [name for name in sorted(names) if hasattr(_load(name), "compile_jobs")]


def sample(jobs: Sequence[CompileJob], limit: int) -> list[int]:
    """Indices of at most `limit` jobs: the first, the last, and evenly spaced ones between; the same every time."""
    if limit <= 0 or len(jobs) <= limit:
        return list(range(len(jobs)))
    if limit == 1:
        return [0]
    return sorted({round(i * (len(jobs) - 1) / (limit - 1)) for i in range(limit)})


def _resolve(
    parameters: Sequence[str],
    signature: Mapping[str, SignatureType],
    constexprs: Mapping[str, Any],
    divisible: Iterable[str],
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types by name, constants by path and attributes by path, as Triton's `ASTSource` wants them.

    A path is the parameter's index, then indices into tuples.
    """
    given = [*signature, *constexprs, *divisible]
    unknown = [name for name in given if name not in parameters]
    missing = [name for name in parameters if name not in signature and name not in constexprs]
    if unknown or missing:
        fact = f"parameters are {', '.join(parameters)}; unknown: {unknown}, without a type: {missing}"
        raise UserError("a kernel's signature", fact, stage="tools.sass", remedy="Correct the job.")
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(parameters):
        if name in constexprs:
            types[name] = "constexpr"
            constants[(index,)] = constexprs[name]
            continue
        types[name] = signature[name]
        for path, leaf in _leaves(signature[name], (index,)):
            if leaf == "constexpr":
                # An absent tensor: None is a constant to Triton.
                constants[path] = None
            elif name in divisible and (leaf.startswith("*") or leaf in ("i32", "i64")):
                attributes[path] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _leaves(kind: SignatureType, path: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], str]]:
    if isinstance(kind, str):
        yield path, kind
        return
    for index, item in enumerate(kind):
        yield from _leaves(item, (*path, index))


def _cuobjdump(cubin: bytes, *options: str) -> str:
    """Output of the cuobjdump in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


@cache
def _load(name: str) -> Any:
    """A family's module by name, or a file's by path."""
    if not name.endswith(".py"):
        return importlib.import_module(f"terrazzo.kernels.{name}")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise UserError(name, "is no Python file", stage="tools.sass")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def _jobs(name: str, arch: int) -> list[CompileJob]:
    return list(_load(name).compile_jobs(arch))


def _compile_row(name: str, index: int, arch: int, show: str) -> Row:
    """One job, by its place: jobs hold functions and cannot travel between processes."""
    job = _jobs(name, arch)[index]
    try:
        report = compile_job(job, arch)
    except Exception as error:  # whatever the compiler throws is this row's result
        lines = str(error).strip().splitlines() or [""]
        return Row(job.family, job.label, arch, wrong=f"{type(error).__name__}: {lines[-1]}")
    limit, bound = SHARED_LIMIT_BYTES[arch], max(job.spill_bound_bytes, SPILL_BOUND_BYTES[arch])
    wrong = []
    if report.shared_bytes > limit:
        wrong.append(f"{report.shared_bytes} bytes of shared memory, the limit is {limit}")
    if report.spills_bytes > bound:
        wrong.append(f"{report.spills_bytes} bytes of local memory per thread, the bound is {bound}")
    return Row(
        job.family,
        job.label,
        arch,
        report.registers,
        report.spills_bytes,
        report.shared_bytes,
        round(report.seconds, 3),
        "; ".join(wrong),
        getattr(report, show) if show else "",
    )


def compile_rows(names: Sequence[str], arch: int, limit: int = 0, match: str = "", show: str = "") -> list[Row]:
    """Compiles the jobs of families or files in a process pool, one process per core; rows in the jobs' order.

    Args:
        names: family names or paths of Python files.
        arch: 80, 90 or 100.
        limit: at most so many jobs per name, as `sample` picks them; 0 for all.
        match: only jobs whose family and label contain this.
        show: "ptx" or "sass" to keep the code.
    """
    chosen = []
    for name in names:
        jobs = _jobs(name, arch)
        picked = [(name, index) for index in sample(jobs, limit) if match in str(jobs[index])]
        chosen += picked
    if not chosen:
        return []
    workers = min(len(os.sched_getaffinity(0)), len(chosen))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_compile_row, name, index, arch, show) for name, index in chosen]
        return [future.result() for future in futures]


def print_table(rows: Sequence[Row]) -> None:
    """One line per job, what is wrong in the last column."""
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "config", "sm", *("regs", "local B", "smem B", "s"), "wrong")
    for column in table.columns[3:7]:
        column.justify = "right"
    for row in rows:
        numbers = (row.registers, row.spills_bytes, row.shared_bytes, f"{row.seconds:.1f}")
        style = "red" if row.wrong else None
        table.add_row(row.family, row.label, str(row.arch), *(str(n) for n in numbers), row.wrong, style=style)
    console = Console()
    # A log has no width; 80 columns break every label.
    (console if console.is_terminal else Console(width=150)).print(table)
    for row in rows:
        if row.code:
            print(f"// {row.family} {row.label} sm_{row.arch}\n{row.code}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Before anything imports triton; the pool's processes inherit it.
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(prog="python -m terrazzo.tools.sass", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every kernel family")
    which.add_argument("--family", help="one kernel family")
    which.add_argument("--jobs", help="a Python file that defines compile_jobs(arch)")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT_BYTES), default=90)
    parser.add_argument("--match", default="", help="only jobs whose family and label contain this")
    parser.add_argument("--sample", type=partial(number, least=0), default=0,
                        help="at most so many configs per family, evenly spaced; 0: all")  # fmt: skip
    parser.add_argument("--show", choices=("ptx", "sass"), default="", help="print the code as well")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    known = [] if options.jobs else families()
    if options.family and options.family not in known:
        parser.error(f"no kernel family {options.family!r}; there are: {', '.join(known)}")
    if options.jobs and not Path(options.jobs).is_file():
        parser.error(f"there is no file {options.jobs}")
    names = known if options.all else [options.family or str(Path(options.jobs).resolve())]
    rows = compile_rows(names, options.arch, options.sample, options.match, options.show)
    if not rows:
        parser.error(f"no job matches {options.match!r}")
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        print_table(rows)
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
