"""What terrazzo touches of vLLM, each through one function that also works without vLLM.

vLLM is never imported first: when `vllm` is not in `sys.modules` nobody is there to be told, and every function below
does nothing or answers what vLLM's own default is. Its modules are looked up at each call, never kept, so it does not
matter whether vLLM or terrazzo is imported first.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Hashable
from types import ModuleType
from typing import Any

_said: set[Hashable] = set()


def _vllm(module: str) -> ModuleType | None:
    """Give `vllm.<module>` in a process that uses vLLM and has that module, else None."""
    if "vllm" not in sys.modules:
        return None
    try:
        return importlib.import_module(f"vllm.{module}")
    except ImportError:
        return None


def skip_cuda_graphs() -> bool:
    """Say whether the current forward pass asks for no CUDA graphs.

    On the path of every replay. False where no forward context is set, and in versions whose context lacks the field.
    """
    module = sys.modules.get("vllm.forward_context")
    if module is None:
        return False
    try:
        return getattr(module.get_forward_context(), "skip_cuda_graphs", False)
    except AssertionError:
        # vLLM asserts that a context is set; a piece called outside a forward pass has none.
        return False


def end_compilation(vllm_backend: Any, vllm_config: Any) -> None:
    """Tell vLLM that the last piece has nothing left to compile: its cache index is saved, its monitoring ends."""
    save = getattr(getattr(vllm_backend, "compiler_manager", None), "save_to_file", None)
    if save is not None:
        save()
    monitor = _vllm("compilation.monitor")
    if monitor is not None:
        monitor.end_monitoring_torch_compile(vllm_config)


def still_capturing() -> bool:
    """Say whether vLLM may yet capture CUDA graphs: until then it does not serve. True where it does not say."""
    return getattr(_vllm("compilation.monitor"), "cudagraph_capturing_enabled", True)


def count(counter: str) -> None:
    """Add one to a field of vLLM's `compilation_counter`; a version without the field is left alone."""
    module = _vllm("compilation.counter")
    counters = getattr(module, "compilation_counter", None)
    if hasattr(counters, counter):
        setattr(counters, counter, getattr(counters, counter) + 1)


def debugging() -> bool:
    """Say whether VLLM_LOGGING_LEVEL (vLLM's variable, default INFO) is DEBUG: replays then check addresses."""
    envs = _vllm("envs")
    level = getattr(envs, "VLLM_LOGGING_LEVEL", None) or os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    return level == "DEBUG"


def logger() -> logging.Logger:
    """Give the logger for terrazzo's runtime: below vLLM's, which is formatted, when vLLM has set one up."""
    if logging.getLogger("vllm").handlers:
        return logging.getLogger("vllm.terrazzo")
    return logging.getLogger("terrazzo.runtime")


def say_once(level: int, key: Hashable, message: str) -> None:
    """Log `message` unless this process has already logged something under `key`."""
    if key not in _said:
        _said.add(key)
        logger().log(level, message)
