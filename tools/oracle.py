"""When a result is right: no further from an fp64 oracle than twice eager in the same dtype, plus a small floor.

The floor is derived, never tuned. It covers what eager may happen to get exactly right: one rounding to the result's
dtype (half an ulp) and four ulps of fp32 arithmetic, since the GPU's fast `exp2`, `rsqrt` and division err by up to two
ulps each (CUDA's programming guide) and a formula chains two of them. It scales with the oracle's largest magnitude for
the maximum and with its RMS for the RMS. Integers and bools have no floor: they must be equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

WORST = 5
_ARITHMETIC = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """How one result compares.

    Args:
        ratio: error in units of eager's error plus half the floor, the larger of maximum's and RMS's; right up to 2.
        max_error, max_bound, rms, rms_bound: what was measured and what is allowed.
        worst: the coordinates that err most, each with both values.
        mismatch: what makes a comparison meaningless (shape, dtype, unequal integers), else empty.
    """

    ratio: float = 0.0
    max_error: float = 0.0
    max_bound: float = 0.0
    rms: float = 0.0
    rms_bound: float = 0.0
    worst: tuple[str, ...] = ()
    mismatch: str = ""

    @property
    def ok(self) -> bool:
        return not self.mismatch and self.max_error <= self.max_bound and self.rms <= self.rms_bound

    def __str__(self) -> str:
        if self.mismatch:
            return self.mismatch
        errors = f"max error {self.max_error:.4g} (allowed {self.max_bound:.4g})"
        errors += f", RMS {self.rms:.4g} (allowed {self.rms_bound:.4g})"
        return "\n".join([f"{errors}; worst:" if self.worst else errors, *self.worst])


def judge(ours: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> Verdict:
    """Compares, in maximum and in RMS, the error of `ours` with that of `eager`.

    Args:
        ours: the result under test.
        eager: the same computation by torch in the same dtype; same shape and dtype as `ours`.
        oracle: the same computation in float64 (integers: exact).

    Returns:
        The verdict; NaN is right only where the oracle has NaN too.
    """
    for other, name in ((ours, "shape"), (eager, "eager's shape")):
        if other.shape != oracle.shape:
            return Verdict(math.inf, mismatch=f"{name} {tuple(other.shape)}, the oracle has {tuple(oracle.shape)}")
    if ours.dtype != eager.dtype:
        return Verdict(math.inf, mismatch=f"dtype {ours.dtype}, eager has {eager.dtype}")
    if not oracle.numel():
        return Verdict()
    if not ours.dtype.is_floating_point:
        wrong = (ours != oracle.to(ours)).nonzero()
        if not len(wrong):
            return Verdict()
        first = wrong[:WORST].tolist()
        return Verdict(math.inf, mismatch=f"{len(wrong)} of {ours.numel()} differ, first at {first}")
    return _judge_floats(ours.detach(), eager.detach().to(ours.device), oracle.detach().to(ours.device))


def _judge_floats(ours: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor) -> Verdict:
    dtype = ours.dtype
    ours, eager, oracle = (x.to(torch.float64) for x in (ours, eager, oracle))
    # What the dtype cannot hold is infinite in it.
    oracle = torch.where(oracle.to(dtype).isinf(), oracle.sign() * torch.inf, oracle)
    error, eager_error = _error(ours, oracle), _finite(_error(eager, oracle))
    relative = torch.finfo(dtype).eps / 2 + _ARITHMETIC
    size, smallest = _finite(oracle), torch.finfo(dtype).tiny
    max_error, rms = error.max().item(), _rms(error)
    max_bound = 2 * eager_error.max().item() + relative * size.abs().max().item() + smallest
    rms_bound = 2 * _rms(eager_error) + relative * _rms(size) + smallest
    ratio = 2 * max(max_error / max_bound, rms / rms_bound)
    wrong = max_error > max_bound or rms > rms_bound
    return Verdict(ratio, max_error, max_bound, rms, rms_bound, _worst(ours, oracle, error) if wrong else ())


def check(ours: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, *, what: str = "result") -> None:
    """Asserts what `judge` finds.

    Args:
        ours, eager, oracle: see `judge`.
        what: named in the message.

    Raises:
        AssertionError: with max, RMS and the worst coordinates.
    """
    verdict = judge(ours, eager, oracle)
    if not verdict.ok:
        raise AssertionError(f"{what}: shape {tuple(ours.shape)}, {verdict}")


def _error(x: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """|x - oracle|: zero where both are NaN or the same infinity, infinite where only one of them is."""
    same = (x == oracle) | (x.isnan() & oracle.isnan())
    return torch.where(same, 0.0, (x - oracle).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """The finite ones: eager's own overflow excuses none of ours, and an infinite oracle scales no floor."""
    kept = values[values.isfinite()]
    return kept if kept.numel() else values.new_zeros(1)


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _worst(ours: torch.Tensor, oracle: torch.Tensor, error: torch.Tensor) -> tuple[str, ...]:
    lines = []
    for flat in error.flatten().topk(min(WORST, error.numel())).indices:
        at = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
        lines.append(f"  {list(at)}: ours {ours[at].item():.8g}, oracle {oracle[at].item():.8g}")
    return tuple(lines)
