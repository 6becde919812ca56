"""terrazzo's dispatcher inside the real vLLM 0.10.0, on the CPU: its decorator, split, interpreter and counters.

`run.sh` makes the environment; without vLLM the module is skipped. The yardstick is vLLM's own backend class.

Source: vLLM's documentation on torch.compile integration (docs/design/torch_compile.md).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from terrazzo.runtime.dispatcher import PiecewiseBackend

pytest.importorskip("vllm.compilation", reason="tests/vllm/run.sh makes an environment that has vLLM")
platform010 = pytest.importorskip("platform010", reason="tests/vllm/run.sh puts the test platform on the path")

from harness010 import EMULATED, MAX_TOKENS, OURS, OWN, WORDS, Served, counted, serve  # noqa: E402
from vllm.compilation.counter import compilation_counter  # noqa: E402
from vllm.compilation.decorators import support_torch_compile  # noqa: E402

HIDDEN, INNER, LAYERS = 32, 48, 2
PIECES = LAYERS + 1


def mix(q, k, v, out):
    """Attend over the tokens given, without heads or a mask; stands for vLLM's attention op."""
    out.copy_((q @ k.T).softmax(-1) @ v)


OPS = torch.library.Library("terrazzo_vllm_test", "FRAGMENT")
OPS.define("mix(Tensor q, Tensor k, Tensor v, Tensor! out) -> ()")
OPS.impl("mix", mix, "CPU")
OPS._register_fake("mix", lambda q, k, v, out: None)


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


class Block(nn.Module):
    """Norm, attention over the tokens given, norm, gated MLP; the sum of the residual stream is passed beside."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ParameterList(torch.ones(HIDDEN) for _ in range(2))
        sizes = {"qkv": (HIDDEN, 3 * HIDDEN), "o": (HIDDEN, HIDDEN), "up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
        self.w = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, x, residual):
        residual = x if residual is None else x + residual
        q, k, v = self.w["qkv"](rms_norm(residual, self.norms[0])).chunk(3, dim=-1)
        out = torch.empty_like(q)
        torch.ops.terrazzo_vllm_test.mix(q, k, v, out)
        residual = residual + self.w["o"](out)
        gate, up = self.w["up"](rms_norm(residual, self.norms[1])).chunk(2, dim=-1)
        return self.w["down"](nn.functional.silu(gate) * up), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class Decoder(nn.Module):
    """A few blocks over an embedding, with the signature vLLM's decorator expects of a model."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, input_ids, positions):
        x, residual = self.words(input_ids) + torch.sin(positions.float()).unsqueeze(1), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x + residual


def decoder(backend=None, **options):
    return Served(
        lambda config: Decoder(vllm_config=config), backend, splitting_ops=["terrazzo_vllm_test.mix"], **options
    )


@pytest.mark.parametrize("compile_sizes", [[], [2, 4]])
def test_counts_and_ends_as_vllms_own_class_does(ended, compile_sizes):
    counts = {}
    for backend in (OWN, OURS):
        options = {"use_cudagraph": False, "compile_sizes": compile_sizes, "cudagraph_capture_sizes": [1, 2]}
        counts[backend] = serve(decoder(), decoder(backend, **options), [MAX_TOKENS, 4, 3, 2, 4, 2, 7, 1])
        assert len(ended) == 1
        ended.clear()
    # vLLM's eager compiler takes every general graph for both; the named sizes for vLLM's own class only.
    assert counts[OWN].pop("num_eager_compiles") == PIECES * (1 + len(compile_sizes))
    assert counts[OURS].pop("num_eager_compiles") == PIECES
    assert counts[OURS] == counts[OWN]
    assert counts[OURS]["num_backend_compilations"] == PIECES * (1 + len(compile_sizes))


def test_terrazzos_own_plans_serve_the_named_sizes(ended, monkeypatch):
    pytest.importorskip("terrazzo.runtime.compiled", reason="the compiler is not there")
    failed = []
    monkeypatch.setattr(PiecewiseBackend, "_fall_back", lambda piece, entry, error: failed.append(error))
    served = decoder(OURS, use_cudagraph=True, cudagraph_capture_sizes=[2, 4], compile_sizes=[4])
    serve(decoder(), served, [MAX_TOKENS, 4, 2, 4, 3])
    assert not failed


def test_captured_sizes_replay_with_new_inputs_and_others_run(ended):
    served = decoder(EMULATED, use_cudagraph=True, cudagraph_capture_sizes=[2, 4, 8], compile_sizes=[4])
    counts = serve(decoder(), served, [MAX_TOKENS, *[8, 4, 2] * 3, 7, 3, 8, 1, 2, MAX_TOKENS, 4])
    made = platform010.EmulatedBackend.made
    assert len(made) == PIECES
    assert counts["num_cudagraph_captured"] == PIECES * 3
    assert len(ended) == 1
    # No warm-up runs (vLLM's default outside its engine): the first of a size's four calls captures.
    assert [[g.replays for g in piece.graphs] for piece in made] == [[3, 3, 3]] * PIECES
    assert {pool for piece in made for pool in piece.pools} == {"the shared pool"}
    assert made[0].summary() == "piece 1 of 3: plan captured: 2 4 8"


def test_warm_up_runs_come_before_the_capture(ended):
    served = decoder(EMULATED, use_cudagraph=True, cudagraph_capture_sizes=[4], cudagraph_num_of_warmups=2)
    before = compilation_counter.clone()
    captured = []
    for size in (MAX_TOKENS, 4, 4, 4, 4):
        served(size)
        captured.append(counted(before).get("num_cudagraph_captured", 0))
    assert captured == [0, 0, 0, PIECES, PIECES]


def test_a_forward_pass_may_ask_for_no_graphs(ended):
    plain = decoder()
    served = decoder(EMULATED, use_cudagraph=True, cudagraph_capture_sizes=[4])
    for seed, skip in enumerate([False, True, False, True, False]):
        result = served(4, seed, skip_cuda_graphs=skip)
        torch.testing.assert_close(result, plain(4, seed))
    made = platform010.EmulatedBackend.made
    assert [[g.replays for g in piece.graphs] for piece in made] == [[1]] * PIECES


def test_debugging_refuses_a_replay_on_moved_inputs(ended, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    served = decoder(EMULATED, use_cudagraph=True, cudagraph_capture_sizes=[4])
    for _ in range(3):
        served(4)
    served.ids = served.ids.clone()
    with pytest.raises(AssertionError, match="input addresses are different"):
        served(4)
