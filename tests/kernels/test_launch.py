"""The launcher: what reaches the kernel, what is refused, what shares compiled code; and the comparison rule itself."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from terrazzo.kernels.launch import Kernel, _walk
from terrazzo.kernels.target import Target
from terrazzo.lowering.errors import InternalError, UserError

from .oracle import check


@triton.jit
def double(i, mask, t):
    x, y = t
    tl.store(y + i, tl.load(x + i, mask=mask) * 2, mask=mask)


@triton.jit
def constexprs_last(t, n, body: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    body(i, i < n, t)


# do_not_specialize is given here, so that the function above can stand without it.
runtime_n = triton.jit(constexprs_last.fn, do_not_specialize=["n"])


@triton.jit(do_not_specialize=["n"])
def constexprs_between(x, BLOCK: tl.constexpr, n, ADD: tl.constexpr, y):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + ADD, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def optional(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n)
    if y is not None:
        v += tl.load(y + i, mask=i < n)
    tl.store(x + i, v, mask=i < n)


@pytest.mark.parametrize("n", [1, 7, 16, 17])
@pytest.mark.parametrize("offset", [0, 1])
def test_tuples_bodies_and_alignments(device, n, offset):
    kernel = Kernel(runtime_n, {"body": double, "BLOCK": 8}, num_warps=1)
    x = torch.randn(n + offset, device=device)[offset:]
    y = torch.full((n + offset,), torch.nan, device=device)[offset:]
    kernel((triton.cdiv(n, 8), 1, 1), (x, y), n)
    assert torch.equal(y, 2 * x)


def test_constexprs_need_not_come_last(device):
    kernel = Kernel(constexprs_between, {"BLOCK": 8, "ADD": 3}, num_warps=1)
    x, y = torch.randn(5, device=device), torch.full((5,), torch.nan, device=device)
    kernel((1, 1, 1), x, 5, y)
    assert torch.equal(y, x + 3)


def test_none_is_an_argument(device):
    kernel = Kernel(optional, {"BLOCK": 8}, num_warps=1)
    x, y = torch.ones(5, device=device), torch.ones(5, device=device)
    kernel((1, 1, 1), x, None, 5)
    kernel((1, 1, 1), x, y, 5)
    assert x.tolist() == [2.0] * 5


def test_empty_grid_launches_nothing(device):
    kernel = Kernel(runtime_n, {"body": double, "BLOCK": 8}, num_warps=1)
    kernel((0, 1, 1), "not even a valid argument")


def test_equal_kernels_share_compiled_code():
    def make(**changed):
        return Kernel(runtime_n, {"body": double, "BLOCK": 8} | changed, num_warps=1)

    assert make()._compiled is make()._compiled
    assert make()._compiled is not make(BLOCK=16)._compiled
    # 1 == True in Python, not to a compiler.
    assert make(BLOCK=1)._compiled is not make(BLOCK=True)._compiled
    assert make()._compiled is not Kernel(runtime_n, make().constexprs, num_warps=1, pdl=True)._compiled


def _described(*args):
    key = []
    _walk(args, key, nested=False, hollow=False)
    return tuple(key)


@pytest.mark.gpu
def test_key_changes_with_the_tensors(device):
    x = torch.zeros(64, 64, device=device)
    assert _described(x) == _described(torch.zeros(3, device=device))
    assert _described(x) != _described(x.half())
    assert _described(x) != _described(x.view(-1)[1:])
    assert _described((x, x)) != _described((x, x.view(-1)[1:]))
    assert _described((x,), x) != _described((x, x))
    assert _described(None) != _described(x)
    assert _described(torch.nn.Parameter(x)) == _described(x)


def test_key_changes_with_the_ints():
    assert _described(True) != _described(1)
    # Sizes: one binary until the type changes.
    assert _described(1) == _described(16) == _described(2**31 - 1)
    assert _described(1) != _described(2**31)
    # Triton specialises ints inside tuples whatever is declared.
    assert len({_described((1,)), _described((16,)), _described((17,))}) == 3
    x = torch.zeros(64, 64)
    wide, tall = (TensorDescriptor.from_tensor(x, block) for block in ([16, 64], [64, 16]))
    assert _described(wide) != _described(tall)


@pytest.mark.gpu
def test_specialised_int_is_refused(device):
    x = torch.zeros(8, device=device)
    kernel = Kernel(constexprs_last, {"body": double, "BLOCK": 8}, num_warps=1)
    with pytest.raises(InternalError, match="do_not_specialize"):
        kernel((1, 1, 1), (x, x), 8)


def test_cpu_tensors_are_refused():
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        _described((torch.zeros(8),))


@pytest.mark.gpu
def test_cpu_tensors_are_refused_after_compiling(device):
    x = torch.zeros(8)
    kernel = Kernel(runtime_n, {"body": double, "BLOCK": 8}, num_warps=1)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        kernel((1, 1, 1), (x, x), 8)
    kernel((1, 1, 1), (x.to(device), x.to(device)), 8)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        kernel((1, 1, 1), (x, x), 8)


@pytest.mark.gpu
def test_precompiled_kernel_is_captured(device):
    kernel = Kernel(runtime_n, {"body": double, "BLOCK": 1024}, num_warps=4)
    x, y = torch.randn(1000, device=device), torch.full((1000,), torch.nan, device=device)
    assert kernel.precompile((x, y), 1000) is kernel.precompile((x, y), 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel((1, 1, 1), (x, y), 1000)
    x.normal_()
    graph.replay()
    assert torch.equal(y, 2 * x)


def test_targets():
    assert Target.named("H200") == Target.named("h200")
    assert Target.named("h200").pdl
    assert not Target.named("a100").pdl
    assert not Target.interpreter().pdl
    with pytest.raises(UserError, match="h200"):
        Target.named("h20")


def test_current_target(device):
    target = Target.current(device)
    assert target.interpreted == (device.type == "cpu")
    assert target.arch >= 80


def test_check_refuses():
    x = torch.randn(4, 5, dtype=torch.float64)
    half, single = x.half(), x.float()
    check(half, half, x)
    check(torch.full((2,), torch.nan), torch.zeros(2), torch.full((2,), torch.nan, dtype=torch.float64))
    check(torch.tensor([torch.inf]).half(), torch.zeros(1).half(), torch.tensor([1e6], dtype=torch.float64))
    for wrong in (single + 1e-5, torch.where(single == single[1, 2], torch.nan, single), single * torch.inf):
        with pytest.raises(AssertionError, match="max error"):
            check(wrong, single, x)
    with pytest.raises(AssertionError, match=r"\[1, 2\]"):
        check(torch.where(single == single[1, 2], torch.nan, single), single, x)
    with pytest.raises(AssertionError, match="differ"):
        check(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="shape"):
        check(single, single, x[:1])
