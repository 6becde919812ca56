"""A platform plugin for vLLM 0.10.0 that names the class its pieces run in, and that class over emulated graphs.

Source: vLLM's documentation on platform plugins (docs/design/plugin_system.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from terrazzo.runtime.cudagraph import GraphDriver
from terrazzo.runtime.dispatcher import PiecewiseBackend


def register() -> str:
    """Name the platform, as vLLM asks a plugin to."""
    return "platform010.CpuPlatform"


class CpuPlatform(Platform):
    """A CPU as far as vLLM knows; `backend` names the class that runs the pieces."""

    # Attention is an op of its own, at which graphs are split, on platforms that count as a CPU or as CUDA.
    _enum = PlatformEnum.CPU
    device_name = device_type = "cpu"
    dispatch_key = "CPU"
    backend = "terrazzo.runtime.dispatcher.PiecewiseBackend"

    @classmethod
    def get_piecewise_backend_cls(cls) -> str:
        return cls.backend

    def graph_pool_handle(self) -> str:
        return "the shared pool"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "cpu"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> None:
        return None

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        return "attention010.CausalBackend"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Leave the configuration as the test wrote it."""

    @classmethod
    def is_async_output_supported(cls, enforce_eager: bool | None) -> bool:
        return False


class EmulatedGraph:
    """What a CUDA graph does, on the host: a replay repeats the recorded call on the recorded tensors, in place."""

    recording: EmulatedGraph | None = None

    def __init__(self) -> None:
        self.call: Any = None
        self.replays = 0

    def replay(self) -> None:
        run, args, outputs = self.call
        self.replays += 1
        for ours, new in zip(_tensors(outputs), _tensors(run(*args)), strict=True):
            if ours.data_ptr() != new.data_ptr():
                ours.copy_(new)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]


class EmulatedBackend(PiecewiseBackend):
    """terrazzo's dispatcher with the piece itself as every plan, over emulated graphs; keeps all it made."""

    made: list[EmulatedBackend] = []  # noqa: RUF012

    def __init__(self, graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> None:
        self.pools: list[Any] = []
        self.graphs: list[EmulatedGraph] = []
        driver = GraphDriver(
            new_graph=EmulatedGraph,
            recording=self.record,
            refusal=lambda args: None,
            in_capture=lambda: False,
            weaken=lambda value: value,
        )
        plans = SimpleNamespace(at=lambda args: self.plan)
        super().__init__(graph, *args, compile_piece=lambda graph: plans, driver=driver, **kwargs)
        self.made.append(self)

    def plan(self, *args: Any) -> Any:
        output = self.graph(*args)
        if EmulatedGraph.recording is not None:
            EmulatedGraph.recording.call = self.graph, args, output
        return output

    @contextmanager
    def record(self, graph: EmulatedGraph, pool: Any) -> Iterator[None]:
        self.pools.append(pool)
        self.graphs.append(graph)
        EmulatedGraph.recording = graph
        yield
        EmulatedGraph.recording = None
