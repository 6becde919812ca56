"""Stand-ins for device functions under the interpreter: libdevice computed by torch, launch control a no-op.

Triton's own stubs return None when interpreted, so a kernel that calls one fails far from the cause. Here every name
has a stand-in: a torch function of the same meaning, or one that raises with the name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import cuda, libdevice
from triton.language.extra.cuda import gdc
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as stock

# Names torch and libdevice share.
_SAME = (
    "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc erfinv exp exp2 expm1 floor fmod hypot "
    "lgamma log log10 log1p log2 nextafter pow rsqrt sin sinh sqrt tan tanh trunc"
).split()
_OTHER: dict[str, Callable[..., torch.Tensor]] = {
    "div_rn": torch.div,
    "exp10": lambda x: torch.pow(10.0, x),
    "fast_cosf": torch.cos,
    "fast_dividef": torch.div,
    "fast_exp10f": lambda x: torch.pow(10.0, x),
    "fast_expf": torch.exp,
    "fast_log10f": torch.log10,
    "fast_log2f": torch.log2,
    "fast_logf": torch.log,
    "fast_powf": torch.pow,
    "fast_sinf": torch.sin,
    "fast_tanf": torch.tan,
    "fma": lambda x, y, z: torch.addcmul(z.double(), x.double(), y.double()),
    "nearbyint": torch.round,
    "rcp_rn": torch.reciprocal,
    "rint": torch.round,
    # Half away from zero; the fraction of a float is exact, adding 0.5 to it is not.
    "round": lambda x: torch.where((x - x.trunc()).abs() >= 0.5, x.trunc() + x.sign(), x.trunc()),
    "rsqrt_rn": torch.rsqrt,
    "saturatef": lambda x: torch.nan_to_num(x, nan=0.0).clamp(0, 1),
    "sqrt_rn": torch.sqrt,
}
_PREDICATES: dict[str, Callable[..., torch.Tensor]] = {
    "finitef": torch.isfinite,
    "isfinited": torch.isfinite,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "signbit": torch.signbit,
}


def _interpreted(name: str, compute: Callable[..., torch.Tensor], predicate: bool) -> Callable[..., tl.tensor]:
    """A device function that broadcasts its arguments and computes with torch.

    Raises:
        TypeError: no argument is fp32 or fp64; the GPU's libdevice has no other float types.
    """

    def function(*args: Any, _semantic: Any = None) -> tl.tensor:
        tensors = [x if isinstance(x, tl.tensor) else stock.interpreter_semantic.to_tensor(x) for x in args]
        floats = [x.dtype for x in tensors if x.dtype.is_floating()]
        if not floats or any(dtype not in (tl.float32, tl.float64) for dtype in floats):
            raise TypeError(f"libdevice.{name} takes fp32 or fp64, not {', '.join(str(x.dtype) for x in tensors)}")
        data = compute(*(torch.from_numpy(np.array(x.handle.data)) for x in tensors)).numpy()
        dtype = tl.int32 if predicate else max(floats, key=lambda ty: ty.primitive_bitwidth)
        handle = stock.TensorHandle(data.astype(stock._get_np_dtype(dtype)), dtype)
        block = any(x.type.is_block() for x in tensors)
        return tl.tensor(handle, tl.block_type(dtype, list(data.shape)) if block else dtype)

    function.__name__ = name
    return function


def _missing(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"libdevice.{name} has no counterpart in the interpreter")

    function.__name__ = name
    return function


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Launch control where programs run one after another."""


def replacements() -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    """Yields `(module, name, stand-in)` for everything to be replaced under the interpreter."""
    table = {name: (getattr(torch, name), False) for name in _SAME}
    table |= {name: (compute, False) for name, compute in _OTHER.items()}
    table |= {name: (compute, True) for name, compute in _PREDICATES.items()}
    functions = {name: _interpreted(name, compute, predicate) for name, (compute, predicate) in table.items()}
    for module in (libdevice, cuda_libdevice):
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ in (module.__name__, "triton.language.core"):
                yield module, name, functions.get(name) or _missing(name)
    for module in (cuda, gdc):
        for name in ("gdc_wait", "gdc_launch_dependents"):
            yield module, name, _nothing
