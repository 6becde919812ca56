"""What the tests inside vLLM share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """Collects the configurations for which vLLM is told that compilation is over; its caches go to a folder apart."""
    import platform010

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    told: list = []
    monkeypatch.setattr("vllm.compilation.monitor.end_monitoring_torch_compile", told.append)
    monkeypatch.setattr("vllm.compilation.cuda_piecewise_backend.end_monitoring_torch_compile", told.append)
    monkeypatch.setattr("vllm.compilation.backends.global_graph_pool", None)
    platform010.EmulatedBackend.made.clear()
    return told
