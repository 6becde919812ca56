"""A piece's plan as data for the dump: stages, kernels with what they hold and cost, what was not fused and why.

Enters: a piece, a size, a target (no device needed). Leaves: `Dump`. Bytes and FLOPs are the fusion's own
(`cost.traffic`, `cost.flops`); a kernel's floor is the larger of bytes over the target's bandwidth and FLOPs over its
peak, what is predicted for it what it was chosen by.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from terrazzo.kernels.gemm_stream import asks_early
from terrazzo.kernels.target import Target
from terrazzo.lowering.choices import expected_us
from terrazzo.lowering.cost import flops, traffic
from terrazzo.lowering.depend import direct_reads
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.fuse import LAUNCH_US, Fused, Refusal
from terrazzo.lowering.group import Group
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.ir import Trace
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import Journal
from terrazzo.lowering.pipeline import plan as make_plan
from terrazzo.lowering.pipeline import trace as make_trace
from terrazzo.lowering.select import Kernel
from terrazzo.lowering.specialize import failed_guard
from terrazzo.lowering.values import Contract, Extern, Map, Reduce, Values
from terrazzo.tools.models import Piece

# Stages in the order in which they run: those of the trace, then those of one size.
STAGES = tuple("intake canonicalize specialize define hoist depend fuse narrow select schedule emit".split())


class Peaks(NamedTuple):
    """Dense FLOP/s: of 8-bit, 16-bit and TF32 tensor cores, and of fp32 units."""

    eight: float
    half: float
    tf32: float
    plain: float


# By architecture. Source: NVIDIA's datasheets of A100, which multiplies no eight-bit floats, H200 (SXM) and HGX B200.
# No kernel may beat a floor, so these are peaks: measured, an H200 reached 0.79e15 in a bf16 product of 8192 cubed
# (torch 2.11, 2026-11-23).
PEAKS = {
    80: Peaks(312e12, 312e12, 156e12, 19.5e12),
    90: Peaks(1979e12, 989e12, 494e12, 67e12),
    100: Peaks(4500e12, 2250e12, 1125e12, 75e12),
}


@dataclass(frozen=True)
class Held:
    """A value that a kernel computes: its node's name, the user's source line, and what kind of definition it is."""

    name: str
    source: str
    kind: str


@dataclass(frozen=True)
class KernelInfo:
    """One launch.

    Args:
        name: of the value it is known by.
        family, config, why: as selected; family is '' for an op that runs as itself, `config` then names the op.
        domain: rows and columns of each segment.
        holds: the values computed here. inlined: values computed here that every reader computes for itself.
        bytes, flops: of all segments. floor_us: least time on the target. bound: 'memory' or 'compute'.
        predicted_us: what it was chosen by, None for an op that runs as itself: a product's time as measured in a piece
            or as its family estimates it, another kernel's bytes and what one more launch costs.
        pdl: launched with programmatic dependent launch. early: it asks for its weights before it waits.
    """

    name: str
    family: str
    config: str
    why: str
    domain: tuple[tuple[int, int], ...]
    holds: tuple[Held, ...]
    inlined: tuple[Held, ...]
    bytes: int
    flops: int
    floor_us: float
    bound: str
    predicted_us: float | None
    pdl: bool
    early: bool


@dataclass(frozen=True)
class Dump:
    """A piece at one size.

    Args:
        label: the piece. size: of every symbol. target: planned for.
        stages: name, milliseconds and printed result, in the order in which they ran.
        ops: nodes of the piece that call something. computed: values that an unfused run computes, one kernel each.
        kernels: launches in order, ops that run as themselves among them.
        refusals: pairs of kernels that were considered and stayed two.
        retraced: the guard that failed for this size, '' when the trace for all sizes serves it.
        weight_bytes: matrices read once; 0 where the piece does not say.
        source: the generated module.
    """

    label: str
    size: int
    target: Target
    stages: tuple[tuple[str, float, str], ...]
    ops: int
    computed: int
    kernels: tuple[KernelInfo, ...]
    refusals: tuple[Refusal, ...]
    retraced: str
    weight_bytes: int
    source: str

    @property
    def ours(self) -> list[KernelInfo]:
        return [k for k in self.kernels if k.family]

    @property
    def foreign(self) -> list[KernelInfo]:
        return [k for k in self.kernels if not k.family]

    def totals(self) -> dict[str, Any]:
        """Sums over our kernels, and counts before and after fusion. What ops as themselves cost is not known."""
        return {
            "ops": self.ops,
            "computed": self.computed,
            "kernels": len(self.ours),
            "ops_as_themselves": len(self.foreign),
            "bytes": sum(k.bytes for k in self.ours),
            "flops": sum(k.flops for k in self.ours),
            "floor_us": sum(k.floor_us for k in self.ours),
            "predicted_us": sum(k.predicted_us or 0.0 for k in self.ours),
            "weight_bytes": self.weight_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON's types."""
        return {
            "piece": self.label,
            "size": self.size,
            "target": asdict(self.target),
            "stages": [{"name": n, "ms": ms, "text": text} for n, ms, text in self.stages],
            "totals": self.totals(),
            "kernels": [asdict(k) for k in self.kernels],
            "not_fused": [asdict(r) for r in self.refusals],
            "retraced": self.retraced,
            "source": self.source,
        }


def make(piece: Piece, size: int, options: Options, title: str, journal: Journal) -> tuple[Plan, str]:
    """The plan of a piece, every symbol bound to `size`, as the runtime would make it.

    Args:
        piece: with fake inputs on any device.
        options: what to plan for.
        title: first line of the emitted module.
        journal: filled as stages run, so that it says how far a failure came.

    Returns:
        The plan, and the guard because of which the piece was traced anew for this size ('' when it was not).
    """
    examples = Examples.of(piece.graph, None)
    traced: Trace = make_trace(piece.graph, examples, journal=journal)
    binding = dict.fromkeys(traced.symbols, size)
    failed = failed_guard(traced, binding)
    if failed is not None:
        journal.stages.clear()
        traced = make_trace(piece.graph, examples, dict.fromkeys(examples.symbols(), size), journal)
        binding = {}
    return make_plan(traced, binding, options, title=title, journal=journal), failed or ""


def describe(piece: Piece, size: int, options: Options, plan: Plan, retraced: str, journal: Journal) -> Dump:
    """What `make` made, as data."""
    fused: Fused = journal.result("narrow")
    computed = [d for d in fused.values.definitions.values() if isinstance(d, (Map, Reduce, Contract, Extern))]
    return Dump(
        label=label(piece),
        size=size,
        target=options.target,
        stages=tuple((name, seconds * 1e3, stage_text(made)) for name, made, seconds in journal.stages),
        ops=sum(n.op.startswith("call") for n in piece.graph.graph.nodes),
        computed=len(computed),
        kernels=tuple(_kernel(k, k.name in plan.schedule.leading, fused, options) for k in plan.schedule.launches()),
        refusals=fused.refusals,
        retraced=retraced,
        weight_bytes=piece.weight_bytes(size),
        source=plan.source,
    )


def label(piece: Piece) -> str:
    """A piece by name."""
    return f"{piece.model} piece {piece.index} ({piece.kind})"


def stage_text(result: Any) -> str:
    """A stage's result for a reader; the last one is the module's text."""
    return result.source if isinstance(result, Plan) else str(result)


def _kernel(kernel: Kernel, leads: bool, fused: Fused, options: Options) -> KernelInfo:
    values = fused.values
    moved, work = sum(traffic(g, values) for g in kernel.segments), sum(map(flops, kernel.segments))
    memory_us = moved / options.target.bandwidth_bytes_s * 1e6
    compute_us = work / _peak(kernel.group, options) * 1e6
    foreign = kernel.group.foreign
    members = [n for g in kernel.segments for n in g.members]
    early = kernel.pdl and kernel.family == "gemm_stream" and asks_early(kernel.problem, leads)
    return KernelInfo(
        name=kernel.name,
        family=kernel.family,
        config=str(kernel.config) if foreign is None else foreign.node.target,
        why=kernel.why,
        domain=tuple((g.rows, g.cols) for g in kernel.segments) if foreign is None else (),
        holds=tuple(_held(n, values) for n in members),
        inlined=tuple(_held(n, values) for n in _inlined(members, fused)),
        bytes=moved,
        flops=work,
        floor_us=max(memory_us, compute_us),
        bound="compute" if compute_us > memory_us else "memory",
        predicted_us=_predicted_us(kernel, memory_us, options.target),
        pdl=kernel.pdl,
        early=early,
    )


def _predicted_us(kernel: Kernel, memory_us: float, target: Target) -> float | None:
    """What a launch was expected to take when it was chosen."""
    if not kernel.family:
        return None
    if kernel.group.contract is None:
        return memory_us + LAUNCH_US
    return expected_us(kernel.family, kernel.config, kernel.problem, target)


def _peak(group: Group, options: Options) -> float:
    """FLOP/s of the units that do this group's work."""
    peaks = PEAKS[options.target.arch]
    if group.contract is None:
        return peaks.plain
    itemsize = group.contract.a.layout.dtype.itemsize
    if itemsize <= 2:
        return peaks.eight if itemsize == 1 else peaks.half
    return peaks.tf32 if options.allow_tf32 else peaks.plain


def _held(name: str, values: Values) -> Held:
    made = values.definitions[name]
    return Held(name, made.source, type(made).__name__.lower())


def _inlined(members: list[str], fused: Fused) -> list[str]:
    """Values that the members read and that are computed on the spot, in the order of their definition."""
    values, shared = fused.values, fused.dependencies.inlined
    found: set[str] = set()
    stack = list(members)
    while stack:
        made = values.definitions[stack.pop()]
        # Operands of products and of ops that run as themselves are read from memory.
        for name in direct_reads(made, values) if isinstance(made, (Map, Reduce)) else ():
            if name in shared and name not in found and name not in members:
                found.add(name)
                stack.append(name)
    return [n for n in values.definitions if n in found]
