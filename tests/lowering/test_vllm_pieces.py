"""vLLM's own dialect: its ops become kernels of ours with its cast points, whatever they do to their inputs."""

from __future__ import annotations

import pytest
import torch

from terrazzo.lowering.dialect import meaning
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.compare import widened

from . import vllm_pieces
from .equal import DEVICE, compare, copied, odd, traced
from .vllm_pieces import Middle, captured

HEADS, KV, HEAD, HIDDEN, INNER = 4, 2, 16, 64, 96
OPS = torch.ops.vllm_ir


def middle(qk_norm, tokens, dtype=torch.float32, head=HEAD, change=lambda model: model):
    """A middle piece and fresh arguments for it."""
    model = change(Middle(HIDDEN, INNER, HEADS, KV, head, qk_norm).to(dtype).requires_grad_(False)).to(DEVICE)
    attended, residual = odd(tokens, HEADS, head, dtype=dtype), odd(tokens, HIDDEN, dtype=dtype, seed=1)
    return captured(model, attended.to(DEVICE), residual.to(DEVICE), torch.arange(tokens, device=DEVICE))


def sound(results):
    """The results of eager, which are numbers all: that ours are lost in the same places would say little."""
    assert not any(made.isnan().any() for made in results[:3] + results[4:])
    return results


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_middle_piece_becomes_seven_kernels(qk_norm):
    graph, args = middle(qk_norm, 7)
    piece = CompiledPiece(graph)
    ours = copied(args)
    got = piece(*ours)
    compare(ours, args)
    expected = sound(graph(*copied(args)))
    compare(got[:3] + got[4:], expected[:3] + expected[4:], close=True)
    assert got[3].shape == expected[3].shape and got[3].stride() == expected[3].stride()
    assert piece.summary() == "(7,): 7 kernels, 0 ops as themselves"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_in_bfloat16_only_the_rotation_is_left_beside_the_products(qk_norm):
    graph, args = middle(qk_norm, 7, torch.bfloat16)
    piece = CompiledPiece(graph)
    got, expected, exact = piece(*copied(args)), sound(graph(*copied(args))), graph(*widened(copied(args)))
    compare(got[:3] + got[4:], expected[:3] + expected[4:], exact[:3] + exact[4:])
    assert piece.summary() == "(7,): 5 kernels, 0 ops as themselves"


@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_are_normed_and_rotated_in_their_products_epilogue(qk_norm):
    graph, args = middle(qk_norm, 7, torch.bfloat16, head=32)
    piece = CompiledPiece(graph)
    got, expected, exact = piece(*copied(args)), sound(graph(*copied(args))), graph(*widened(copied(args)))
    compare(got[:3] + got[4:], expected[:3] + expected[4:], exact[:3] + exact[4:])
    assert piece.summary() == "(7,): 4 kernels, 0 ops as themselves"


def test_a_quantised_layers_products_are_kernels():
    graph, args = middle(False, 7, torch.bfloat16, change=vllm_pieces.quantised)
    piece = CompiledPiece(graph)
    got, expected, exact = piece(*copied(args)), sound(graph(*copied(args))), graph(*widened(copied(args)))
    compare(got[:3] + got[4:], expected[:3] + expected[4:], exact[:3] + exact[4:])
    # Four products; attention's result, norm, gate, norm: each quantised; the rotation.
    assert piece.summary() == "(7,): 9 kernels, 0 ops as themselves"
    [loaded] = piece.plans.values()
    assert "clone" not in loaded.plan.source


def test_equal_pieces_share_their_plans():
    first, second = (CompiledPiece(middle(True, 7)[0]) for _ in range(2))
    args = middle(True, 7)[1]
    first(*args)
    second(*args)
    assert first.plans and first.plans is second.plans


@pytest.mark.parametrize("variance_size", [None, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_vllms_with_a_single_rounding(dtype, weighted, variance_size):
    x, residual = odd(64, 96, dtype=dtype), odd(64, 96, dtype=dtype, seed=1)
    weight = odd(96, dtype=dtype, seed=2) if weighted else None
    others = 1e-5, variance_size
    wide = None if weight is None else weight.float()
    alone, fused = meaning(OPS.rms_norm), meaning(OPS.fused_add_rms_norm.maybe_inplace)
    compare(alone(x, weight, *others), vllm_pieces.rms_norm(x.float(), wide, *others).to(dtype))
    normed, total = vllm_pieces.fused_add_rms_norm(x.float(), residual.float(), wide, *others)
    compare(fused(x, residual, weight, *others), (normed.to(dtype), total.to(dtype)))


@pytest.mark.parametrize("op", [OPS.fused_add_rms_norm, OPS.fused_add_rms_norm.maybe_inplace])
def test_inputs_that_are_given_away_are_left_alone(op):
    def fn(x, residual, weight):
        normed, total = op(x * 2, residual, weight, 1e-5, None)
        return normed + 1, total

    args = copied([odd(3, 8), odd(3, 8, seed=1), odd(8, seed=2)])
    ours = copied(args)
    piece = CompiledPiece(traced(fn, 3), ours)
    normed, total = vllm_pieces.fused_add_rms_norm(args[0] * 2, args[1], args[2], 1e-5)
    compare((piece(*ours), ours), ((normed + 1, total), args), close=True)
    assert "0 ops as themselves" in piece.summary()


def test_an_op_without_a_definition_is_itself_and_never_in_place():
    vllm_pieces.IR.define("terrazzo_twice(Tensor x) -> Tensor")
    vllm_pieces.IR.define("terrazzo_twice.maybe_inplace(Tensor(a0!) x) -> Tensor")
    op = OPS.terrazzo_twice
    assert meaning(op) is None and meaning(op.default) is None
    assert meaning(op.maybe_inplace) is op.default


def test_other_calls_mean_what_they_say():
    for target in (torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add, len, torch.Size):
        assert meaning(target) is None
