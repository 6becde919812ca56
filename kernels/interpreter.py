"""Makes Triton's interpreter tell the truth about small floats, so that kernels can be tested without a GPU.

Triton 3.6 keeps bf16 and fp8 as raw integers in numpy and then computes on those integers: sums, maxima and `tl.dot`
on bf16 are garbage, fp32 -> bf16 truncates, fp8 rounds wrongly. `repair()` replaces those parts, once per process:

- Casts among bf16, fp16, fp8 (e4m3, e5m2), fp32 and fp64 round to nearest even, or toward zero where asked; fp8
  saturates, as the GPU's `cvt.rn.satfinite` does.
- Arithmetic, reductions and scans on bf16 and fp8 compute in fp32 and round once at the end. A GPU rounds a bf16 sum
  after every addition: a kernel that widens first gets the same from both.
- `tl.dot` on bf16, fp16 and fp8 multiplies exactly and accumulates in fp32; fp32 operands are not cut down to tf32, as
  a GPU does by default (on an H200, K = 64, normal operands: errors up to 9e-3).
  What the NVIDIA backend refuses (K below 16, below 32 for 8-bit operands) is refused here as well.
- `tl.maximum`, `tl.minimum` and `tl.clamp` return the other operand for a NaN unless asked to propagate NaN. `tl.max`
  and `tl.min` drop NaN as well, here and on the GPU: only a row that is all NaN shows one.
- `libdevice` computes with torch, in fp32 or fp64 (`interpreter_libdevice.py`).
- Python floats arrive as fp32 and bools as i1, as in a launch.
- `gdc_wait` and `gdc_launch_dependents` do nothing: programs run one after another, what they wait for has happened.

Still refused: inline assembly, `tl.dot_scaled`, casts from one fp8 to the other (the NVIDIA backend aborts on them) and
atomics on bf16 other than add. Overflow checks on integers are off: they repeat every index computation in int64.

Measured on two x86-64 cores (triton 3.6.0, numpy 2.3.5): one program of a row-wise SiLU with a generated body takes
1.0 ms instead of 2.5; 0.9 of that is the overflow checks, 0.6 patching `triton.language` once per launch instead of
once per call of a device function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle as Handle

from .interpreter_libdevice import replacements

# What numpy has no type for, as torch knows it, and the integer its bits live in.
SMALL = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
}
_NUMPY_FLOATS = (tl.float16, tl.float32, tl.float64)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def widen(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The values behind `data`: fp32 for a small float's bits, `data` itself for everything else."""
    if dtype not in SMALL:
        return data
    # np.array copies: torch wants writable memory, and broadcast arrays are not.
    bits = torch.from_numpy(np.array(data, order="C"))
    return bits.view(SMALL[dtype][0]).to(torch.float32).numpy()


def narrow(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Rounds fp32 values to nearest even into a small float's bits; fp8 saturates. Inverse of `widen`."""
    small, bits = SMALL[dtype]
    wide = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if bits == torch.uint8:
        limit = torch.finfo(small).max
        wide = wide.clamp(-limit, limit)
    return wide.to(small).view(bits).numpy()


def _to_odd(values: np.ndarray) -> np.ndarray:
    """fp64 to fp32 rounding to odd, after which a second rounding to fewer bits is as good as one from fp64.

    Source: S. Boldo, G. Melquiond, "When double rounding is odd", 2005.
    """
    rounded = values.astype(np.float32)
    bits = np.array(rounded).view(np.uint32)
    bits = bits - (np.abs(rounded.astype(np.float64)) > np.abs(values)).astype(np.uint32)
    bits = bits | (rounded.astype(np.float64) != values).astype(np.uint32)
    return np.where(np.isfinite(values), bits.view(np.float32), rounded)


def round_to(values: np.ndarray, dtype: tl.dtype, toward_zero: bool = False) -> np.ndarray:
    """Rounds fp32 or fp64 values to any float type and returns its numpy representation (bits for small floats)."""
    if dtype in SMALL:
        result = narrow(_to_odd(values) if values.dtype == np.float64 else values, dtype)
    else:
        result = np.asarray(values.astype(stock._get_np_dtype(dtype)))
    if not toward_zero:
        return result
    # One step back where rounding moved away from zero: float bits order like their magnitudes.
    away = np.abs(widen(result, dtype).astype(np.float64)) > np.abs(values.astype(np.float64))
    bits = result.view(f"u{result.dtype.itemsize}")
    return (bits - away.astype(bits.dtype)).view(result.dtype)


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    if not all(dtype in SMALL or dtype in _NUMPY_FLOATS for dtype in (source, target)):
        return _STOCK_CONVERT_FLOAT(data, source, target, rounding)
    if source != target and rounding is None and all(dtype.primitive_bitwidth == 8 for dtype in (source, target)):
        raise TypeError(f"{source} to {target} has no rounding; the NVIDIA backend aborts on it: go through fp32")
    values = widen(data, source)
    return round_to(
        values.astype(np.float32) if values.dtype == np.float16 else values,
        target,
        toward_zero=rounding == stock._ir.ROUNDING_MODE.RTZ,
    )


class ExactBuilder(stock.InterpreterBuilder):
    """The interpreter's builder with small floats computed in fp32; everything else is inherited."""

    def __init__(self) -> None:
        super().__init__()
        self.configure()

    def configure(self) -> None:
        """Sets the options that differ from the stock interpreter's; also used on an instance made before."""
        self.options = stock.InterpreterOptions(
            sanitize_overflow=False,
            allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
        )
        self.codegen_fns["min_dot_size"] = min_dot_size(None)

    def get_all_ones_value(self, type: tl.dtype) -> Handle:
        # Minus one in a type without minus one.
        if not type.scalar.is_int():
            return super().get_all_ones_value(type)
        return Handle(np.array([-1]).astype(stock._get_np_dtype(type)), type.scalar)

    def get_bf16(self, value: float) -> Handle:
        return Handle(narrow(np.array([value]), tl.bfloat16), tl.bfloat16)

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in SMALL:
            values = widen(src.data, source)
        elif target in SMALL:
            # Integers go through fp64, which holds all of them up to 2**53.
            values = src.data.astype(
                np.float32 if src.data.dtype.kind == "f" and src.data.itemsize <= 4 else np.float64
            )
        else:
            return super().cast_impl(src, dst_type)
        if target in SMALL:
            return Handle(round_to(values, target), target)
        return Handle(values.astype(stock._get_np_dtype(target)), target)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        dtype = lhs.dtype.scalar
        if dtype not in SMALL:
            made = super().binary_op(lhs, rhs, op)
            # The stock one keeps the operands' dtype, and a scalar answer becomes a number when it is spread.
            return Handle(made.data, tl.int1) if op in _COMPARISONS else made
        result = op(widen(lhs.data, dtype), widen(rhs.data, dtype))
        return Handle(result, tl.int1) if op in _COMPARISONS else Handle(narrow(result, dtype), dtype)

    def unary_op(self, arg: Handle, op: Any) -> Handle:
        dtype = arg.dtype.scalar
        if dtype not in SMALL:
            return super().unary_op(arg, op)
        return Handle(narrow(op(widen(arg.data, dtype)), dtype), dtype)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Handle, low: Handle, high: Handle, propagate_nans: Any) -> Handle:
        if propagate_nans == tl.PropagateNan.ALL:
            return self.binary_op(self.binary_op(arg, low, np.maximum), high, np.minimum)
        return self.create_minnumf(self.create_maxnumf(arg, low), high)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        dtype = z.dtype.scalar
        # A product of two fp32 numbers is exact in fp64.
        exact = widen(x.data, dtype).astype(np.float64) * widen(y.data, dtype) + widen(z.data, dtype)
        return Handle(round_to(exact, dtype), dtype)

    def create_erf(self, arg: Handle) -> Handle:
        return Handle(torch.erf(torch.from_numpy(np.array(arg.data))).numpy(), arg.dtype.scalar)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int) -> Handle:
        dtype = d.dtype.scalar
        acc = widen(d.data, dtype)
        wide = np.float32 if acc.dtype == np.float16 else acc.dtype
        left, right = (widen(x.data, x.dtype.scalar).astype(wide) for x in (a, b))
        result = np.matmul(left, right) + acc.astype(wide)
        return Handle(narrow(result, dtype) if dtype in SMALL else result.astype(acc.dtype), dtype)

    def create_umulhi(self, lhs: Handle, rhs: Handle) -> Handle:
        # The stock version extends the sign of int32 operands; the operation is unsigned.
        unsigned = np.dtype(f"u{lhs.data.dtype.itemsize}")
        left, right = (Handle(x.data.view(unsigned), lhs.dtype) for x in (lhs, rhs))
        return Handle(super().create_umulhi(left, right).data.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_descriptor_load(self, desc: Any, indices: list, cache_modifier: Any, eviction_policy: Any) -> Handle:
        dtype = desc.base.dtype.element_ty
        if desc.padding != stock._ir.PADDING_OPTION.PAD_NAN or dtype not in SMALL:
            return super().create_descriptor_load(desc, indices, cache_modifier, eviction_policy)
        pointers, inside = desc.materialize_pointers(indices)
        other = Handle(narrow(np.full(inside.shape, np.nan), dtype), dtype)
        mask = Handle(inside, tl.int1)
        return self.create_masked_load(pointers, mask, other, cache_modifier, eviction_policy, is_volatile=False)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        kinds, dtype = stock._ir.ATOMIC_OP, val.dtype.scalar
        if dtype in SMALL:
            if op != kinds.FADD:
                raise NotImplementedError(f"atomic {op} on {dtype} in interpreter mode")
            return self._atomic_add_small(ptr, val, mask)
        if op == kinds.XCHG and val.data.dtype.kind == "f":
            # The exchange moves bits; the stock one knows integers only.
            bits = Handle(val.data.view(f"u{val.data.itemsize}"), dtype)
            return Handle(super().create_atomic_rmw(op, ptr, bits, mask, sem, scope).data.view(val.data.dtype), dtype)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def _atomic_add_small(self, ptr: Handle, val: Handle, mask: Handle) -> Handle:
        """One element after another: two lanes may add to the same address."""
        dtype = val.dtype.scalar
        pointers, lanes = (np.broadcast_to(x.data, val.data.shape).ravel() for x in (ptr, mask))
        values, old = val.data.ravel(), np.zeros(val.data.size, val.data.dtype)
        one = np.ones(1, bool)
        for i in np.flatnonzero(lanes):
            here = np.array(pointers[i : i + 1])
            old[i : i + 1] = stock._interpreter.load(here, one, old[i : i + 1], old.dtype)
            total = widen(old[i : i + 1], dtype) + widen(values[i : i + 1], dtype)
            stock._interpreter.store(here, narrow(total, dtype), one)
        return Handle(old.reshape(val.data.shape), dtype)


def _widen_tensor(x: tl.tensor) -> tl.tensor:
    if x.dtype not in SMALL and x.dtype != tl.float16:
        return x
    data = widen(x.handle.data, x.dtype).astype(np.float32)
    return tl.tensor(Handle(data, tl.float32), tl.block_type(tl.float32, list(x.shape)))


def _round_tensor(x: tl.tensor, dtype: tl.dtype) -> tl.tensor:
    if x.dtype == dtype or (dtype not in SMALL and dtype != tl.float16):
        return x
    handle = Handle(round_to(x.handle.data, dtype), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(x.shape)) if x.shape else dtype)


class _Widened:
    """Reductions and scans over small floats: compute in fp32, round once at the end."""

    def apply_impl(self, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        results = super().apply_impl(tuple(_widen_tensor(x) for x in inputs))  # type: ignore[misc]
        results = list(results) if isinstance(results, list | tuple) else [results]
        # An arg-reduction's index has no counterpart of its own among the inputs' small floats.
        return [
            _round_tensor(r, x.dtype) if r.dtype == tl.float32 else r for r, x in zip(results, inputs, strict=False)
        ]


class ExactReduceOps(_Widened, stock.ReduceOps):
    """`tl.reduce` with small floats widened."""


class ExactScanOps(_Widened, stock.ScanOps):
    """`tl.associative_scan` with small floats widened; sums and products in the steps of a GPU's scan, log2 of the
    length, as one after the other they would lose more digits."""

    def cumsum(self, input: Any) -> list[tl.tensor]:
        return [self.to_tensor(self._steps(np.add, input.handle.data), dtype=input.dtype)]

    def cumprod(self, input: Any) -> list[tl.tensor]:
        return [self.to_tensor(self._steps(np.multiply, input.handle.data), dtype=input.dtype)]

    def _steps(self, combine: Any, data: np.ndarray) -> np.ndarray:
        made, reach = np.moveaxis(np.array(data), self.axis, 0), 1
        while reach < len(made):
            made = np.concatenate([made[:reach], combine(made[reach:], made[:-reach])])
            reach *= 2
        return np.moveaxis(made, 0, self.axis)


def _implicit_cvt(arg: Any) -> Any:
    """Turns a launch argument into what the kernel sees: floats are fp32, bools i1, everything else as before."""
    if isinstance(arg, bool):
        return tl.tensor(Handle(np.array([arg]), tl.int1), tl.int1)
    if isinstance(arg, float):
        return tl.tensor(Handle(np.array([arg], np.float32), tl.float32), tl.float32)
    return _STOCK_IMPLICIT_CVT(arg)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _STOCK_PATCH_LANG_TENSOR(tensor, scope)
    # A one-element array is no index for numpy 2.4 and later; its item is.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_lang(fn: Any) -> Any:
    """Patches `triton.language` for one module of kernels, once per launch."""
    names = fn.__globals__
    if id(names) in _PATCHED:
        return stock._LangPatchScope()
    _PATCHED.add(id(names))
    # `from … import gdc_wait` bound the function that cannot be interpreted.
    for name, value in list(names.items()):
        original, function = _REPLACED.get(id(value), (None, None))
        if original is value and function is not None:
            names[name] = function
    return _STOCK_PATCH_LANG(fn)


class ExactGridExecutor(stock.GridExecutor):
    """Runs a grid without numpy's warnings: masked lanes divide by zero on a GPU, too, and nobody hears of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
        finally:
            _PATCHED.clear()


_STOCK_CONVERT_FLOAT = stock._convert_float
_STOCK_IMPLICIT_CVT = stock._implicit_cvt
_STOCK_PATCH_LANG = stock._patch_lang
_STOCK_PATCH_LANG_TENSOR = stock._patch_lang_tensor
# Modules (by the identity of their globals) patched in the running launch.
_PATCHED: set[int] = set()
# Device functions the interpreter cannot run, by identity, and what stands in for each; kept alive, so that no other
# object takes the identity over.
_REPLACED: dict[int, tuple[Any, Any]] = {}


def repair() -> None:
    """Installs everything above in this process; a second call, or one without TRITON_INTERPRET=1, does nothing."""
    if not triton.knobs.runtime.interpret or stock.InterpreterBuilder is ExactBuilder:
        return
    stock.InterpreterBuilder = ExactBuilder
    # Kernels rewritten earlier hold a reference to this very object: it changes its class and stays itself.
    stock.interpreter_builder.__class__ = ExactBuilder
    stock.interpreter_builder.configure()
    stock.ReduceOps, stock.ScanOps, stock.GridExecutor = ExactReduceOps, ExactScanOps, ExactGridExecutor
    stock._convert_float, stock._implicit_cvt = _convert_float, _implicit_cvt
    stock._patch_lang, stock._patch_lang_tensor = _patch_lang, _patch_lang_tensor
    for module, name, function in replacements():
        original = getattr(module, name)
        _REPLACED[id(original)] = (original, function)
        setattr(module, name, function)
