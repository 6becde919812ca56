"""Models served through vLLM 0.10.0's compile path on the CPU, beside the same models run as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import vllm
from torch import nn

OWN = "vllm.compilation.cuda_piecewise_backend.CUDAPiecewiseBackend"
OURS = "terrazzo.runtime.dispatcher.PiecewiseBackend"
EMULATED = "platform010.EmulatedBackend"
MAX_TOKENS, WORDS = 16, 64

DECLARED = torch.library.Library("_C", "FRAGMENT")


def fit_to_this_torch() -> None:
    """Let vLLM's Python run without its compiled part, on a torch whose Dynamo passes one argument more.

    Its compile passes name ops of the compiled part when they are imported; they are declared here and never called.
    Its decorator replaces Dynamo's `inline_call` by a function of four arguments.
    """
    passes = Path(vllm.__file__).parent / "compilation"
    for name in {n for f in passes.glob("*.py") for n in re.findall(r"torch\.ops\._C\.(\w+)", f.read_text())}:
        if not hasattr(torch.ops._C, name):
            DECLARED.define(f"{name}() -> ()")

    from vllm.compilation import decorators

    def replace(target: Any, attribute: str, new: Any) -> Any:
        return mock.patch.object(target, attribute, lambda parent, f, args, kwargs, **_: new(parent, f, args, kwargs))

    decorators.patch = SimpleNamespace(object=replace)


fit_to_this_torch()

from vllm.compilation.counter import CompilationCounter, compilation_counter  # noqa: E402
from vllm.config import (  # noqa: E402
    CacheConfig,
    CompilationConfig,
    CompilationLevel,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402


class Served:
    """A model under one configuration, called as vLLM's runner does: with slices of buffers that never move.

    Args:
        make: (vllm_config) to the model, called with `input_ids`, `positions` and whatever `extra` holds.
        backend: qualified name of the class that runs the pieces; None for the model as it is.
        options: fields of CompilationConfig.
    """

    def __init__(
        self,
        make: Callable[[VllmConfig], nn.Module],
        backend: str | None = None,
        *,
        hf_config: Any = None,
        **options: Any,
    ) -> None:
        level = CompilationLevel.PIECEWISE if backend else CompilationLevel.NO_COMPILATION
        self.backend = backend
        options = {"level": level, "use_inductor": False, "custom_ops": ["none"]} | options
        self.config = VllmConfig(
            compilation_config=CompilationConfig(**options), cache_config=CacheConfig(block_size=16)
        )
        self.config.model_config = model_config(hf_config)
        torch.manual_seed(0)
        with set_current_vllm_config(self.config):
            self.model = make(self.config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            # Norm weights are vectors; everything else keeps activations near one in size.
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self.ids = torch.zeros(MAX_TOKENS, dtype=torch.long)
        self.positions = torch.arange(MAX_TOKENS)

    def __call__(self, size: int, seed: int = 0, *extra: Any, **context: Any) -> torch.Tensor:
        self.ids.copy_(torch.randint(WORDS, (MAX_TOKENS,), generator=torch.Generator().manual_seed(seed)))
        # The model is compiled at its first call, and asks the platform then.
        type(current_platform).backend = self.backend
        with torch.inference_mode(), set_forward_context(None, vllm_config=self.config, **context):
            return self.model(self.ids[:size], self.positions[:size], *extra).clone()


def model_config(hf_config: Any) -> Any:
    """Give what of vLLM's ModelConfig its models and its cache key read."""
    return SimpleNamespace(
        hf_config=hf_config,
        dtype=torch.float32,
        max_model_len=MAX_TOKENS,
        quantization=None,
        is_attention_free=False,
        use_mla=False,
        runner_type="generate",
        compute_hash=lambda: "terrazzo's tests",
    )


def counted(before: CompilationCounter) -> dict[str, int]:
    """Give how far vLLM's counters moved since `before`."""
    now = vars(compilation_counter)
    return {name: now[name] - was for name, was in vars(before).items() if now[name] != was}


def serve(plain: Served, served: Served, sizes: Sequence[int], *extra: Any) -> dict[str, int]:
    """Run `sizes`, each with inputs of its own, through both; results must agree. Gives what vLLM counted."""
    before = compilation_counter.clone()
    for seed, size in enumerate(sizes):
        torch.testing.assert_close(served(size, seed, *extra), plain(size, seed, *extra))
    return counted(before)
