"""Run architectures of transformers, tiny and with drawn weights, through `torch.compile(backend="terrazzo")`.

    python -m terrazzo.tools.conformance_models                           every architecture in tiny_models.py
    python -m terrazzo.tools.conformance_models --models llama,t5 --json
    python -m terrazzo.tools.conformance_models --dtype bf16              on a GPU; mixtures of experts stay in fp32
    python -m terrazzo.tools.conformance_models --write docs/models.md

Each is compiled with `dynamic=True` and called at two lengths and two batch sizes; every tensor of its output is
compared with eager's by the rule of oracle.py. A line per model comes as soon as it is known. Without a GPU the kernels
are interpreted, in fp32.

Exit status: 0; 1 when a result is wrong, a model fails or one of its graphs was not compiled; 2 for a request that
cannot be right.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from terrazzo.tools.command import exit_status, parser_of, writable
from terrazzo.tools.coverage import Coverage
from terrazzo.tools.device import HERE, screen
from terrazzo.tools.models import DTYPES
from terrazzo.tools.oracle import judge
from terrazzo.tools.tiny_models import TABLE, architecture, model
from terrazzo.tools.wide_model import run_wide

# What a model of transformers can be in: layers of eight bits are those of tools/models alone.
WHOLE = [name for name, dtype in DTYPES.items() if dtype.itemsize > 1]
# Between them the results stand in a page.
MARKS = ("<!-- models -->", "<!-- /models -->")
# (batch, length) of the calls, in order; none equals a dimension of the models'.
SIZES = ((2, 7), (3, 7), (3, 11), (2, 11))


@dataclass
class Result:
    """What came of one architecture.

    Args:
        graphs, plans: Dynamo's graphs, and plans made of them for all sizes.
        dropped: why graphs run as the graphs they were.
        nodes, themselves: ATen nodes of all plans, and those among them that run as themselves.
        ops: how often each op runs as itself, and why.
        ratio: the largest error, in units of eager's: right to 2.
        failures: what is wrong.
    """

    model: str
    kind: str
    dtype: str
    graphs: int = 0
    plans: int = 0
    dropped: list[str] = field(default_factory=list)
    nodes: int = 0
    themselves: int = 0
    ops: dict[str, tuple[int, str]] = field(default_factory=dict)
    ratio: float = 0.0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.failures and not self.dropped

    @property
    def share(self) -> float:
        """Percent of the nodes that were lowered."""
        return 100 * (1 - self.themselves / self.nodes) if self.nodes else 0.0

    def line(self) -> str:
        state = "ok   " if self.ok else "WRONG"
        numbers = f"{self.graphs} graphs, {self.plans} plans, {self.share:5.1f} % of {self.nodes} nodes lowered, "
        numbers += f"error {self.ratio:.2f}, {self.seconds:.0f} s"
        own = ", ".join(f"{count} {op}" for op, (count, _) in self.ops.items())
        parts = [f"{state} {self.model}: {numbers}", *([f"itself: {own}"] if own else [])]
        return "; ".join([*parts, *(f"not compiled: {why}" for why in self.dropped), *self.failures])


class _Drops(logging.Handler):
    """Collects the reasons for which pieces run as the graphs they were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage().split(" runs as the graph it was: ")[-1].splitlines()[0])


def check(name: str, dtype: str = "fp32", sizes: Sequence[tuple[int, int]] = SIZES) -> Result:
    """One architecture at these sizes.

    Args:
        name: a key of `TABLE`.
        dtype: of `WHOLE`; a mixture of experts is run in fp32, since rounding to half precision alone changes
            which experts are chosen.
        sizes: (batch, length) of each call.
    """
    entry = architecture(name)
    dtype = "fp32" if entry.kind == "mixture of experts" else dtype
    result, started = Result(name, entry.kind, dtype), time.perf_counter()
    pieces: list[Any] = []
    drops = _Drops()
    logging.getLogger("terrazzo").addHandler(drops)
    try:
        _calls(result, pieces, sizes)
    except Exception as cause:
        result.failures.append(f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}")
    finally:
        logging.getLogger("terrazzo").removeHandler(drops)
        torch._dynamo.reset()
    result.dropped = drops.reasons
    _count(result, pieces)
    result.seconds = time.perf_counter() - started
    return result


def _calls(result: Result, pieces: list[Any], sizes: Sequence[tuple[int, int]]) -> None:
    dtype = DTYPES[result.dtype]
    made = model(result.model, dtype, HERE)
    terrazzo: Any = torch._dynamo.lookup_backend("terrazzo")

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        pieces.append(terrazzo(graph, inputs, **options))
        return pieces[-1]

    torch._dynamo.reset()
    compiled = torch.compile(made, backend=backend, dynamic=True)
    for batch, length in sizes:
        draw = torch.Generator().manual_seed(batch * 100 + length)
        inputs = {k: _moved(v, dtype) for k, v in TABLE[result.model].inputs(batch, length, draw).items()}
        with torch.no_grad():
            eager, ours = leaves(made(**inputs)), leaves(compiled(**inputs))
        oracle = leaves(run_wide(made, inputs))
        for what in ours.keys() ^ eager.keys():
            result.failures.append(f"{what} at {batch}x{length}: in one of the results alone")
        for what in ours.keys() & eager.keys():
            verdict = judge(ours[what], eager[what], oracle[what])
            result.ratio = max(result.ratio, verdict.ratio)
            if not verdict.ok:
                result.failures.append(f"{what} at {batch}x{length}: {verdict}")


def _moved(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(HERE, dtype) if value.is_floating_point() else value.to(HERE)


def leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a model's output by where it stands, those that a cache holds included."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    inner: dict[str, Any] = {}
    if isinstance(value, Mapping):
        inner = dict(value)
    elif isinstance(value, (list, tuple)):
        inner = {str(i): v for i, v in enumerate(value)}
    elif type(value).__module__.startswith("transformers.cache_utils"):
        inner = vars(value)
    return {k: v for name, part in inner.items() for k, v in leaves(part, f"{path}.{name}".lstrip(".")).items()}


def _count(result: Result, pieces: Sequence[Any]) -> None:
    """Graphs, plans, and which ops run as themselves."""
    result.graphs = len(pieces)
    compiled = [one for piece in pieces for one in getattr(piece, "pieces", {0: piece}).values()]
    found = Coverage()
    for loaded in {id(plan): plan for piece in compiled for plan in piece.plans.values()}.values():
        result.plans += 1
        found.add(loaded.plan.schedule.values)
    own = {op: (reasons.total(), reasons.most_common(1)[0][0]) for op, reasons in found.passed.items()}
    result.ops = dict(sorted(own.items(), key=lambda item: (-item[1][0], item[0])))
    result.themselves = sum(count for count, _ in own.values())
    result.nodes = found.lowered.total() + result.themselves


def check_all(names: Sequence[str], dtype: str) -> Iterator[Result]:
    """One after another."""
    for name in names:
        yield check(name, dtype)


def table(results: Sequence[Result]) -> Table:
    """A row per model; 'error' is in units of eager's: right to 2."""
    made = Table(title="transformers through torch.compile(backend='terrazzo', dynamic=True)", title_justify="left")
    for column in ("model", "graphs", "plans", "nodes", "lowered", "error", "s"):
        made.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    made.add_column("ops that run as themselves")
    made.add_column("")
    for r in results:
        own = ", ".join(f"{count} {op.removeprefix('aten.')}" for op, (count, _) in r.ops.items())
        state = "[green]ok[/]" if r.ok else "[red]wrong[/]"
        made.add_row(
            r.model, str(r.graphs), str(r.plans), str(r.nodes), f"{r.share:.1f} %", f"{r.ratio:.2f}",
            f"{r.seconds:.0f}", own, state,
        )  # fmt: skip
    return made


def page(results: Sequence[Result], text: str) -> str:
    """A page of the documentation with the results between its two marks, which are put at its end if it has none."""
    head = "| model | kind | graphs | plans | nodes | lowered | error | ops that run as themselves |"
    rows = [head, "|---|---|---:|---:|---:|---:|---:|---|"]
    for r in results:
        own = ", ".join(f"{count} `{op.removeprefix('aten.')}`" for op, (count, _) in r.ops.items())
        state = f"{r.ratio:.2f}" if r.ok else "wrong"
        rows.append(
            f"| {r.model} | {r.kind} | {r.graphs} | {r.plans} | {r.nodes} | {r.share:.1f} % | {state} | {own} |"
        )
    if MARKS[0] not in text:
        text = f"{text}\n{MARKS[0]}\n{MARKS[1]}\n".lstrip()
    before, rest = text.split(MARKS[0], 1)
    return before + "\n".join([MARKS[0], *rows, MARKS[1]]) + rest.split(MARKS[1], 1)[1]


def _arguments() -> argparse.Namespace:
    parser = parser_of("conformance_models", __doc__)
    parser.add_argument("--models", default="all", help="names, comma-separated, or 'all' (default)")
    parser.add_argument("--dtype", choices=WHOLE, default="fp32", help="of a model's weights (default: fp32)")
    parser.add_argument("--write", type=Path, help="a page of the documentation to put the results into")
    parser.add_argument("--json", nargs="?", const="-", help="results as JSON, on the screen or to a file")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    names = list(TABLE) if options.models == "all" else options.models.split(",")
    for name in names:
        architecture(name)
    writable(options.json)
    writable(options.write and str(options.write))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = []
    for result in check_all(names, options.dtype):
        results.append(result)
        print(result.line(), file=sys.stderr, flush=True)
        if options.json not in (None, "-"):
            # What is known so far, should the rest not be reached.
            with open(options.json, "w") as file:
                json.dump([asdict(r) for r in results], file)
    if options.write:
        known = options.write.read_text() if options.write.exists() else ""
        options.write.write_text(page(results, known))
    wrong = sum(not r.ok for r in results)
    if options.json == "-":
        print(json.dumps([asdict(r) for r in results]))
        return int(wrong > 0)
    screen().print(table(results))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(exit_status(main))
