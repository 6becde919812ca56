"""Times on a GPU: chains of a piece in CUDA graphs, the kernels inside one, and what a replay costs the host.

A chain is one graph over several layers, each with weights of its own, all layers together larger than the L2: what a
model's forward pass does to memory. Contenders are replayed in turn: clocks and temperature are the same for all.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from terrazzo.kernels.target import Target
from terrazzo.lowering.cost import flops, traffic
from terrazzo.lowering.errors import InternalError
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.lowered import Loaded
from terrazzo.tools.models.fakes import TensorSpec, symbols_of
from terrazzo.tools.models.fill import draw
from terrazzo.tools.models.piece import Piece
from terrazzo.tools.stand_in import backend

REPLAYS = 25
# Five times the 60 MB of an H200's L2, and enough layers that what a replay costs once does not show.
ROTATED_BYTES = 300_000_000
LAYERS = 8
# A bf16 product of 8192 x 8192 x 8192 on random data reaches this (H200, measured 2026-10-28).
PEAK_FLOPS = 790e12
# Cycles the device waits before a timed replay, about 100 us at 1.98 GHz: longer than the host takes to enqueue it.
HEAD_START = 200_000

Runner = Callable[..., Any]


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a layer, by its place.

    Args:
        name: as the driver knows it.
        launch: what it computes, where the plan says so.
        us: median duration, waiting for the kernel before included.
        adds_us: median time from the previous kernel's end to this one's: these add up to the piece's time.
        floor_us: bytes over bandwidth or FLOPs over peak, None where the plan does not say.
    """

    name: str
    launch: str
    us: float
    adds_us: float
    floor_us: float | None = None


def floor_us(piece: Piece, size: int, target: Target) -> float:
    """max(weight bytes / bandwidth of a copy, FLOPs of the products / their peak); activations are left out."""
    work = sum(flops / _peak(dtype) for dtype, flops in piece.products(size).items())
    return max(piece.weight_bytes(size) / target.bandwidth_bytes_s, work) * 1e6


def _peak(dtype: torch.dtype) -> float:
    """FLOP/s of a product of such operands; of eight-bit ones as many more as the datasheet has, not measured."""
    return PEAK_FLOPS * (2 if dtype.itemsize == 1 else 1)


def layers_of(piece: Piece, size: int, device: torch.device) -> list[list[Any]]:
    """Arguments for each layer: activations and the rotary cache shared, every weight its own."""
    count = max(LAYERS, math.ceil(ROTATED_BYTES / max(1, piece.weight_bytes(size))))
    first = piece.make_inputs(size, device)
    layers = [first]
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(count - 1):
        layers.append([_own(a, spec, generator) for a, spec in zip(first, piece.specs(), strict=True)])
    return layers


def _own(value: Any, spec: Any, generator: torch.Generator) -> Any:
    shared = not isinstance(spec, TensorSpec) or any(map(symbols_of, spec.shape)) or spec.fill.kind == "rope"
    if shared:
        return value
    return draw(spec.fill, tuple(value.shape), value.stride(), value.dtype, value.device, generator)


def chain(run: Runner, layers: Sequence[Sequence[Any]]) -> torch.cuda.CUDAGraph:
    """One graph over all layers; `run` is warmed up first."""
    for args in (layers[0], *layers):
        run(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in layers:
            run(*args)
    return graph


def interleaved_us(
    graphs: Mapping[str, torch.cuda.CUDAGraph], layers: int, replays: int = REPLAYS, pause_s: float = 0.0
) -> dict[str, float]:
    """Median time per layer of each graph, over `replays` rounds in which every graph is replayed once, in an order of
    the round's own: at the power limit a replay is slower for what ran before it. After a pause of some milliseconds
    it starts below that limit, as a prompt's prefill does on a GPU that was idle."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    torch.cuda.synchronize()
    names, order = list(graphs), random.Random(0)
    for _ in range(replays):
        for name in order.sample(names, len(names)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            time.sleep(pause_s)
            torch.cuda._sleep(HEAD_START)
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / layers)
    return {name: statistics.median(found) for name, found in times.items()}


def kernel_times(graph: torch.cuda.CUDAGraph, layers: int, loaded: Loaded | None = None) -> list[KernelTime]:
    """Every kernel of one layer, in order, by CUPTI over three replays.

    Args:
        graph: a chain.
        layers: how many layers it has.
        loaded: the plan, which names the launches and gives their floors.
    """
    replays = 3
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = [e for e in found.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.end)
    each, rest = divmod(len(events), replays * layers)
    if rest or not each:
        return _by_name(events, replays * layers)
    names = _launches(loaded) if loaded else []
    labels = names if len(names) == each else [("", None)] * each
    times = []
    for place, (launch, floor) in enumerate(labels):
        # The first kernel of all follows nothing.
        here = [(events[i - 1], events[i]) for i in range(place, len(events), each) if i]
        us = statistics.median(e.time_range.end - e.time_range.start for _, e in here)
        adds = statistics.median(e.time_range.end - before.time_range.end for before, e in here)
        times.append(KernelTime(here[0][1].name, launch, us, adds, floor))
    return times


def _by_name(events: Sequence[Any], runs: int) -> list[KernelTime]:
    """Sums per layer, where the kernels cannot be told apart by place."""
    names = dict.fromkeys(e.name for e in events)
    total = {n: sum(e.time_range.end - e.time_range.start for e in events if e.name == n) / runs for n in names}
    return [KernelTime(n, "", us, us) for n, us in total.items()]


def _launches(loaded: Loaded) -> list[tuple[str, float | None]]:
    """The plan's launches in order, each with its floor."""
    target, values = Target.current(), loaded.plan.schedule.values
    found: list[tuple[str, float | None]] = []
    for kernel in loaded.plan.schedule.launches():
        if not kernel.family:
            found.append((f"{kernel.name} (itself)", None))
            continue
        moved = sum(traffic(g, values) for g in kernel.segments) / target.bandwidth_bytes_s
        # The peak is that of the tensor cores, which only products use.
        work = sum(flops(g) / _peak(g.contract.a.layout.dtype) for g in kernel.segments if g.contract is not None)
        found.append((f"{kernel.name}: {kernel.family} {kernel.config}", max(moved, work) * 1e6))
    return found


def host_us(piece: Piece, size: int, device: torch.device) -> dict[str, float]:
    """Host time of one call of a piece: a replay through the dispatcher, of the bare graph, or launch by launch."""
    served = backend(piece, piece.index + 2, capture_sizes=[size], pool=torch.cuda.graph_pool_handle())
    args = piece.make_inputs(size, device)
    with torch.no_grad():
        # The general graph, one plain run of the plan, the capture.
        for _ in range(3):
            served(*args)
    captured = served.entries[size].captured
    if captured is None:
        raise InternalError("host_us", f"three calls captured nothing: {served.summary()}", stage="tools")
    run = CompiledPiece(piece.graph, steady=True).at(args)
    ways: dict[str, Callable[[], Any]] = {
        "dispatcher": lambda: served(*args),
        "bare": lambda: captured.replay(),
        "launched": lambda: run(*args),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPLAYS):
        for name, way in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            # Few enough that the launch queue never makes the host wait.
            for _ in range(100):
                way()
            times[name].append((time.perf_counter() - start) * 1e4)
    torch.cuda.synchronize()
    return {name: statistics.median(found) for name, found in times.items()}
