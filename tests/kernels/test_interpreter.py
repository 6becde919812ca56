"""The repaired interpreter against torch. The same tests run on a GPU, so what they expect is what a GPU computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from terrazzo.kernels.interpreter import SMALL, repair, round_to, widen

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter itself")

repair()


@pytest.fixture(autouse=True)
def _on_device():
    """Tensors made in a test are where its kernels run."""
    with torch.device(DEVICE):
        yield


FLOATS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def cast_kernel(x, y, n, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(DTYPE, fp_downcast_rounding=ROUNDING)  # [BLOCK]
    tl.store(y + i, value, mask=i < n)


@triton.jit
def binary_kernel(x, y, z, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z + i, OP(tl.load(x + i), tl.load(y + i)))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def sub(a, b):
    return a - b


@triton.jit
def mul(a, b):
    return a * b


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def less(a, b):
    return (a < b).to(a.dtype)


@triton.jit
def negated(a, b):
    return -a


@triton.jit
def where_abs(a, b):
    return tl.where(a < b, tl.abs(a), b)


@triton.jit
def reduce_kernel(x, total, largest, where, running, N: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, N)
    v = tl.load(x + row * N + col)  # [N]
    tl.store(total + row, tl.sum(v, axis=0))
    tl.store(largest + row, tl.max(v, axis=0).to(v.dtype))
    tl.store(where + row, tl.argmax(v, axis=0))
    tl.store(running + row * N + col, tl.cumsum(v, axis=0))


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])  # [M, K]
    right = tl.load(b + k[:, None] * N + n[None, :])  # [K, N]
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right))


@triton.jit
def descriptor_kernel(a, b, t, BLOCK: tl.constexpr):
    block = a.load([0, 0])  # [BLOCK, BLOCK]
    b.store([0, 0], tl.dot(block, block.T).to(tl.bfloat16) + tl.load(t[0]))


@triton.jit
def libdevice_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    gdc_wait()
    v = tl.load(x + i)
    gdc_launch_dependents()
    tl.store(y + i, libdevice.tanh(v) + libdevice.pow(v, 2.0) + tl.erf(v))
    tl.store(y + BLOCK + i, libdevice.isnan(v).to(tl.float32))


@triton.jit
def scalar_kernel(out, scale, flag):
    tl.store(out, scale)
    if flag:
        tl.store(out + 1, scale * 3)


@triton.jit
def atomic_kernel(total, lock, old, n):
    i = tl.arange(0, 16)
    tl.atomic_add(total + i % 2, tl.full([16], 1.0, tl.bfloat16), mask=i < n)
    tl.store(old, tl.atomic_xchg(lock, 2.5))


@triton.jit
def unsupported_kernel(x):
    tl.store(x, libdevice.j0(tl.load(x)))


def every_float(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a format of at most 16 bits."""
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    every = torch.arange(-(2**15), 2**15).to(bits) if dtype.itemsize == 2 else torch.arange(256).to(bits)
    values = every.view(dtype)
    return values[torch.isfinite(values.float())]


def hard_floats(dtype: torch.dtype) -> torch.Tensor:
    """fp32 values where rounding can go wrong: each value of `dtype`, midpoints of neighbours, and next to those."""
    values = every_float(dtype).float().sort().values
    middle = (values[1:] + values[:-1]) / 2
    toward = torch.tensor([torch.inf, -torch.inf])
    near = [torch.nextafter(middle, t.expand_as(middle)) for t in toward]
    return torch.cat([values, middle, *near])


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    y = torch.full_like(x, 0, dtype=torch.float32).to(dtype)
    triton_dtype = FLOATS.get(dtype, tl.float32)
    cast_kernel[(triton.cdiv(x.numel(), 65536),)](x, y, x.numel(), triton_dtype, rounding, 65536)
    return y


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = hard_floats(dtype)
    assert torch.equal(cast(x, dtype).float(), x.to(dtype).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_widening_is_exact(dtype):
    x = every_float(dtype)
    assert torch.equal(cast(x, torch.float32), x.float())


@pytest.mark.parametrize(
    ("source", "target"),
    [pair for pair in itertools.permutations(FLOATS, 2) if pair != FP8 and pair != FP8[::-1]],
    ids=str,
)
def test_casts_between_small_floats(source, target):
    x = every_float(source)
    x = x[x.float().abs() <= torch.finfo(target).max]
    assert torch.equal(cast(x, target).float(), x.float().to(target).float())


@only_interpreted
@pytest.mark.parametrize(("source", "target"), [FP8, FP8[::-1]], ids=str)
def test_what_the_compiler_aborts_on_is_refused(source, target):
    with pytest.raises(InterpreterError, match="go through fp32"):
        cast(every_float(source), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_toward_zero(dtype):
    x = hard_floats(dtype)
    y = cast(x, dtype, "rtz").float()
    nearest = x.to(dtype)
    stepped = (nearest.view(torch.int16) - (nearest.float().abs() > x.abs()).to(torch.int16)).view(dtype)
    assert torch.equal(y, stepped.float())
    assert (y.abs() <= x.abs()).all()


def test_fp8_saturates_and_keeps_nan():
    x = torch.tensor([1e6, -1e6, torch.inf, torch.nan])
    assert cast(x, torch.float8_e4m3fn).float().tolist()[:3] == [448, -448, 448]
    assert cast(x, torch.float8_e5m2).float().tolist()[:3] == [57344, -57344, 57344]
    assert all(cast(x, dtype).float()[3].isnan() for dtype in FLOATS)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_fp64_rounds_once(dtype):
    # Just above the midpoint of 1 and its successor by less than fp32 can hold: rounding twice would go down to 1.
    ulp = float(torch.finfo(SMALL[dtype][0]).eps)
    x = np.array([1 + ulp / 2 + 2.0**-40, 1 + ulp / 2, 1 + ulp / 2 - 2.0**-40])
    assert widen(round_to(x, dtype), dtype).tolist() == [1 + ulp, 1, 1]


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        (add, torch.add),
        (sub, torch.sub),
        (mul, torch.mul),
        (maximum, torch.fmax),
        (less, lambda a, b: (a < b).to(a.dtype)),
        (negated, lambda a, b: -a),
        (where_abs, lambda a, b: torch.where(a < b, a.abs(), b)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bf16_arithmetic(op, reference):
    x, y = torch.randn(2, 4096, dtype=torch.float32).mul(100).bfloat16()
    x[0], y[1] = torch.nan, torch.nan
    z = torch.empty_like(x)
    binary_kernel[(1,)](x, y, z, op, 4096)
    torch.testing.assert_close(z, reference(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reductions(dtype):
    if not INTERPRETED and dtype != torch.float32:
        pytest.skip("a GPU rounds sums of small floats after every addition")
    x = torch.randn(3, 512).to(dtype)
    total, largest = torch.empty(3, dtype=dtype), torch.empty(3, dtype=dtype)
    where, running = torch.empty(3, dtype=torch.int32), torch.empty_like(x)
    reduce_kernel[(3,)](x, total, largest, where, running, 512)
    wide = x.double()
    assert torch.equal(largest, x.max(1).values)
    assert torch.equal(where.long(), x.float().argmax(1))
    # One rounding of a sum whose fp32 error is bounded by 512 units of fp32 precision of the summed magnitudes.
    bound = 512 * 2.0**-24 * wide.abs().sum(1, keepdim=True)
    for got, exact in ((total[:, None], wide.sum(1, keepdim=True)), (running, wide.cumsum(1))):
        assert ((got.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + bound).all()


def test_max_drops_a_nan():
    x = torch.randn(1, 512).bfloat16()
    x[0, 7] = torch.nan
    outputs = (
        torch.empty(1).bfloat16(),
        torch.empty(1).bfloat16(),
        torch.empty(1, dtype=torch.int32),
        torch.empty_like(x),
    )
    reduce_kernel[(1,)](x, *outputs, 512)
    assert outputs[0].isnan()
    assert outputs[1] == x.float().nan_to_num(-torch.inf).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype):
    if not INTERPRETED and dtype == torch.float32:
        pytest.skip("a GPU cuts fp32 operands down to tf32")
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    c = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, c, 32, 16, 64)
    exact = a.double() @ b.double()
    # 64 products, each addition at most half a unit of fp32 precision of the summed magnitudes off.
    assert ((c - exact).abs() <= 64 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()


@only_interpreted
def test_dot_refuses_what_the_compiler_refuses():
    a, b = torch.randn(16, 8).bfloat16(), torch.randn(8, 16).bfloat16()
    with pytest.raises(InterpreterError, match="K >= 16"):
        dot_kernel[(1,)](a, b, torch.empty(16, 16), 16, 16, 8)


@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_descriptors_carry_bf16(padding):
    a, b, bias = torch.randn(13, 32).bfloat16(), torch.zeros(16, 16).bfloat16(), torch.ones(1).bfloat16()
    source = TensorDescriptor(a, [13, 16], [32, 1], [16, 16], padding)
    descriptor_kernel[(1,)](source, TensorDescriptor.from_tensor(b, [16, 16]), (bias,), 16)
    padded = torch.full((16, 16), torch.nan if padding == "nan" else 0.0)
    padded[:13] = a[:, :16].float()
    expected = (padded @ padded.T).bfloat16() + bias
    torch.testing.assert_close(b, expected, rtol=2.0**-8, atol=2.0**-8, equal_nan=True)


def test_libdevice_and_launch_control():
    x = torch.randn(128)
    x[5] = torch.nan
    y = torch.empty(256)
    libdevice_kernel[(1,)](x, y, 128)
    torch.testing.assert_close(y[:128], x.tanh() + x.pow(2) + x.erf(), equal_nan=True)
    assert y[128:].nonzero().flatten().tolist() == [5]


@only_interpreted
def test_libdevice_refuses_bf16():
    with pytest.raises(TypeError, match="fp32 or fp64"):
        libdevice_error(libdevice_kernel, torch.randn(128).bfloat16(), torch.empty(256), 128)


def libdevice_error(kernel, *args) -> None:
    """Launches and raises what the interpreter's error was raised from."""
    try:
        kernel[(1,)](*args)
    except InterpreterError as error:
        raise error.__cause__ from None


@only_interpreted
def test_a_function_without_counterpart_raises():
    with pytest.raises(NotImplementedError, match=r"libdevice\.j0"):
        libdevice_error(unsupported_kernel, torch.zeros(1))


def test_floats_arrive_as_fp32_and_bools_as_bools():
    out = torch.zeros(2, dtype=torch.float64)
    scalar_kernel[(1,)](out, 0.1, True)
    assert out[0] == float(np.float32(0.1))
    assert out[1] == float(np.float32(0.1) * np.float32(3))
    out.zero_()
    scalar_kernel[(1,)](out, 0.1, False)
    assert out[1] == 0


def test_atomics():
    total, lock, old = torch.zeros(2).bfloat16(), torch.full((1,), 1.5), torch.empty(1)
    atomic_kernel[(2,)](total, lock, old, 11)
    assert total.tolist() == [12, 10]
    assert (old.item(), lock.item()) == (2.5, 2.5)


@only_interpreted
def test_repair_twice_is_repair_once():
    builder = type(triton.runtime.interpreter.interpreter_builder)
    repair()
    assert type(triton.runtime.interpreter.interpreter_builder) is builder
