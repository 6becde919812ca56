"""terrazzo as the compiler of the real vLLM 0.22.1, on the CPU: its decorator, AOT compilation, split and backend.

`run.sh` makes the environment; without that vLLM the module is skipped. What it does not prove: CUDA graphs, vLLM's
compiled ops.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

pytest.importorskip("vllm.ir", reason="tests/vllm/run.sh makes an environment that has vLLM 0.22.1")
pytest.importorskip("platform022", reason="tests/vllm/run.sh puts the test platform on the path")

from vllm import ir
from vllm.compilation.counter import compilation_counter
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from terrazzo.lowering import dialect
from terrazzo.runtime import compiled, lowered, vllm_compat

HIDDEN, INNER, LAYERS, WORDS = 32, 48, 3, 64
PIECES = LAYERS + 1
EPSILON = 1e-5
# vLLM's passes that need its compiled part; terrazzo runs none of them.
PASSES = ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "fuse_rope_kvcache_cat_mla")


def mix(q, k, v, out):
    """Attend over the tokens given, without heads or a mask; stands for vLLM's attention op."""
    out.copy_((q @ k.T).softmax(-1) @ v)


OPS = torch.library.Library("terrazzo_vllm_test", "FRAGMENT")
OPS.define("mix(Tensor q, Tensor k, Tensor v, Tensor(a!) out) -> ()")
OPS.impl("mix", mix, "CPU")
OPS._register_fake("mix", lambda q, k, v, out: None)


class Norm(nn.Module):
    """As vLLM's RMSNorm calls vLLM's ops."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x, residual=None):
        if residual is None:
            return ir.ops.rms_norm(x, self.weight.data, EPSILON, None)
        return ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, self.weight.data, EPSILON, None)


class Block(nn.Module):
    """Norm, attention over the tokens given, norm, gated MLP; the sum of the residual stream is passed beside."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(Norm() for _ in range(2))
        sizes = {"qkv": (HIDDEN, 3 * HIDDEN), "o": (HIDDEN, HIDDEN), "up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
        self.w = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, x, residual):
        if residual is None:
            x, residual = self.norms[0](x), x
        else:
            x, residual = self.norms[0](x, residual)
        q, k, v = self.w["qkv"](x).split([HIDDEN] * 3, dim=-1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        torch.ops.terrazzo_vllm_test.mix(q, k, v, out)
        x, residual = self.norms[1](self.w["o"](out), residual)
        x = self.w["up"](x)
        half = x.shape[-1] // 2
        return self.w["down"](F.silu(x[..., :half]) * x[..., half:]), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0})
class Decoder(nn.Module):
    """A few blocks over an embedding, with the signature vLLM's decorator expects of a model."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, HIDDEN), Norm()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, input_ids):
        x, residual = self.words(input_ids), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.norm(x, residual)[0]


class Served:
    """The model under one configuration."""

    def __init__(self, **options):
        passes = dict.fromkeys(PASSES, False)
        self.config = VllmConfig(compilation_config=CompilationConfig(pass_config=passes, **options))
        self.config.model_config = SimpleNamespace(
            hf_config=None,
            dtype=torch.float32,
            quantization=None,
            runner_type="generate",
            model="terrazzo's tests",
            is_encoder_decoder=False,
            enforce_eager=False,
            compute_hash=lambda: "terrazzo's tests",
        )
        torch.manual_seed(0)
        with set_current_vllm_config(self.config):
            self.model = Decoder(vllm_config=self.config).eval().requires_grad_(False)

    def __call__(self, size, seed=0):
        ids = torch.randint(WORDS, (size,), generator=torch.Generator().manual_seed(seed))
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.config),
            set_forward_context(None, vllm_config=self.config),
        ):
            return self.model(ids)


def plain():
    return Served(mode=0)


def served(**options):
    return Served(mode=3, splitting_ops=["terrazzo_vllm_test::mix"], **options)


@pytest.fixture(autouse=True)
def said(monkeypatch, tmp_path, caplog):
    """What is said, in a process in which nothing was compiled yet and vLLM's caches are empty."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(compiled, "_SHARED", {})
    monkeypatch.setattr(vllm_compat, "_said", set())
    ir.set_default_torch_wrap(True)
    torch._dynamo.reset()
    # vLLM's loggers print by themselves and hand nothing on.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def agree(ours, theirs, sizes):
    for seed, size in enumerate(sizes):
        torch.testing.assert_close(ours(size, seed), theirs(size, seed))


def summary(said):
    (line,) = (m for m in said.messages if "kernels," in m)
    return line


def test_the_configuration_is_settled(said):
    config = served().config
    assert config.compilation_config.custom_ops == ["none"]
    assert config.compilation_config.ir_enable_torch_wrap is True
    assert config.kernel_config.ir_op_priority.fused_add_rms_norm == ["native"]


def test_named_sizes_run_kernels_and_nothing_as_itself(said):
    before = compilation_counter.clone()
    agree(served(compile_sizes=[4, 8]), plain(), [16, 8, 4, 5, 8, 1])
    assert compilation_counter.num_backend_compilations - before.num_backend_compilations == 3 * PIECES
    line = summary(said)
    assert line.startswith(f"terrazzo: {PIECES} pieces (3 different)") and " 0 ops as themselves" in line


def test_a_second_start_loads_dynamos_graph_and_the_plans(said, monkeypatch):
    agree(served(compile_sizes=[4]), plain(), [16, 4])
    first = summary(said)
    said.clear()
    compiled._SHARED.clear()
    vllm_compat._said.clear()
    monkeypatch.setattr(lowered, "make_trace", None)
    before = compilation_counter.clone()
    agree(served(compile_sizes=[4]), plain(), [16, 4])
    assert any("Directly load the compiled graph(s) for compile range (1, 2048)" in m for m in said.messages)
    assert compilation_counter.num_aot_artifacts_loaded - before.num_aot_artifacts_loaded == 1
    kernels = [line.partition("s: ")[2] for line in (first, summary(said))]
    assert kernels[0] == kernels[1]


def test_what_cannot_be_lowered_is_served_by_its_graph(said, monkeypatch):
    def fail(*args, **others):
        raise ValueError("broken")

    monkeypatch.setattr(lowered, "make_trace", fail)
    agree(served(compile_sizes=[4]), plain(), [16, 4])
    assert sum("broken" in m for m in said.messages) == PIECES


@pytest.mark.parametrize("variance_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definitions_are_vllms_own_with_a_single_rounding(dtype, variance_size):
    x, residual, weight = (torch.randn(7, 24, dtype=dtype) for _ in range(3))
    for name, args in {"rms_norm": (x,), "fused_add_rms_norm": (x, residual)}.items():
        op = ir.op.IrOp.registry[name]
        for w in (weight[0], None):
            wide = (*(a.float() for a in args), None if w is None else w.float())
            expected = op.impls["native"].impl_fn(*wide, EPSILON, variance_size)
            expected = tree_map(lambda t: t.to(dtype), expected)
            ours = dialect.meaning(op.torch_op)(*args, w, EPSILON, variance_size)
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
