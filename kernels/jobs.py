"""What a kernel family gives to be compiled ahead of time, without a device and without tensors.

Every family file provides `compile_jobs(arch) -> Iterable[CompileJob]`: one job for every entry of its `CONFIGS` that
may run on that architecture, with the argument types and alignments `prepare` launches it with. `tools/sass.py`
compiles them and reads registers, spills and shared memory out of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>", "constexpr"; a tuple argument is the tuple of its elements' types.
SignatureType = str | tuple["SignatureType", ...]


@dataclass(frozen=True)
class CompileJob:
    """One kernel with one config, as the compiler sees it.

    Args:
        family: the family's file name without its ending, for example `gemm_skinny`.
        label: the config in a few characters, unique within family and architecture.
        fn: the `@triton.jit` function.
        signature: type of every parameter that is not a constexpr, by name.
        constexprs: value of every constexpr by name; a value may itself be a `@triton.jit` function (a body).
        num_warps: warps per program.
        num_stages: software pipeline depth.
        divisible: names of the arguments that are multiples of 16 (pointers: 16-byte aligned). A tuple's name stands
            for all its elements. Descriptors need no entry: they are aligned by construction.
        spill_bound_bytes: local memory per thread this config may use; 0 unless a measurement shows that spilling pays.
    """

    family: str
    label: str
    fn: Any
    signature: Mapping[str, SignatureType]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    spill_bound_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.family} {self.label}"
