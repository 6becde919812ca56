"""Which family multiplies: the one that is expected to take least, among those that can."""

from __future__ import annotations

import importlib
from math import inf
from typing import Any

from ..lowering.errors import Unsupported
from .gemm import GemmProblem
from .target import Target

FAMILIES = ("gemm_stream", "gemm_skinny", "gemm_persistent", "gemm_simple", "gemm_vendor")


def pick(problem: GemmProblem, target: Target) -> tuple[str, Any, str]:
    """Choose family and config: the least estimated (or measured) time among the families that support the problem.

    Returns:
        family name, its config, and why, refusals of the other families included.

    Raises:
        Unsupported: no family takes the dtype.
    """
    timed: list[tuple[float, str, Any, str]] = []
    refused = []
    families = {name: importlib.import_module(f".{name}", __package__) for name in FAMILIES}
    lacks = {name: _lack(name, target) or family.supports(problem) for name, family in families.items()}
    for name, family in families.items():
        reason, streams = lacks[name], any(other == "gemm_stream" for _, other, _, _ in timed)
        if streams and name in ("gemm_skinny", "gemm_simple"):
            reason = "gemm_stream reads W as fast, and asks for it earlier"
        if streams and name in ("gemm_persistent", "gemm_vendor") and problem.leaves_parts:
            reason = "where no norm stands between products they were measured together, all of gemm_stream"
        if problem.bare and name != "gemm_vendor" and lacks["gemm_vendor"] is None:
            reason = "cuBLAS was chosen for it together with what follows, which is a kernel of its own"
        if reason is not None:
            refused.append(f"not {name}: {reason}")
            continue
        config, why = family.choose(problem, target)
        us = family.estimate_us(problem, config, target)
        if name == "gemm_stream" and us == inf:
            refused.append(f"not {name}: {problem.m} tokens, and it was not measured for so many on this device")
            continue
        timed.append((us, name, config, why))
    if not timed:
        raise Unsupported("GEMM", "; ".join(refused), stage="kernels.gemm", remedy="The op runs as itself.")
    _, best, config, why = min(timed, key=lambda entry: entry[0])
    slower = [f"{name} would take {us:.1f} us" for us, name, _, _ in timed if name != best]
    return best, config, "; ".join([why, *slower, *refused])


def _lack(family: str, target: Target) -> str | None:
    """What a family needs of a device and this one does not have, or None."""
    if family == "gemm_vendor" and target.arch < 90:
        return f"on sm_{target.arch} cuBLAS was never timed beside gemm_simple"
    if family != "gemm_simple" and target.arch < 90:
        # Tensor descriptors are TMA only from Hopper on.
        return f"sm_{target.arch} has no TMA"
    if family == "gemm_stream" and target.interpreted:
        return "Gluon has no interpreter"
    if family == "gemm_stream" and target.arch != 90:
        return f"sm_{target.arch} has no products by warpgroups"
    return None
