"""When a result is right: no further from an fp64 oracle than twice eager in the same dtype, plus a small floor.

The floor is derived, never tuned. It covers what eager may happen to get exactly right: one rounding to the result's
dtype (half an ulp) and four ulps of fp32 arithmetic, since the GPU's fast `exp2`, `rsqrt` and division err by up to two
ulps each (CUDA's programming guide) and a formula chains two of them. It scales with the oracle's largest magnitude for
the maximum and with its RMS for the RMS. Integers and bools have no floor: they must be equal.
"""

from __future__ import annotations

import torch

WORST = 5
_ARITHMETIC = 4 * torch.finfo(torch.float32).eps


def check(ours: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, *, what: str = "result") -> None:
    """Asserts that `ours` errs, in maximum and in RMS, by at most twice what eager does, plus the floor.

    Args:
        ours: the result under test.
        eager: the same computation by torch in the same dtype; same shape and dtype as `ours`.
        oracle: the same computation in float64 (integers: exact).
        what: named in the message.

    Raises:
        AssertionError: with max, RMS and the worst coordinates; NaN passes only where the oracle has NaN too.
    """
    assert ours.shape == oracle.shape, f"{what}: shape {tuple(ours.shape)}, the oracle has {tuple(oracle.shape)}"
    assert eager.shape == oracle.shape, f"{what}: eager's shape {tuple(eager.shape)} is not {tuple(oracle.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: dtype {ours.dtype}, eager has {eager.dtype}"
    if not oracle.numel():
        return
    if not ours.dtype.is_floating_point:
        wrong = (ours != oracle.to(ours)).nonzero()
        assert not len(wrong), f"{what}: {len(wrong)} of {ours.numel()} differ, first at {wrong[:WORST].tolist()}"
        return
    ours64, eager64, oracle64 = (x.detach().cpu().to(torch.float64) for x in (ours, eager, oracle))
    # What the dtype cannot hold is infinite in it.
    oracle64 = torch.where(oracle64.to(ours.dtype).isinf(), oracle64.sign() * torch.inf, oracle64)
    error, eager_error = _error(ours64, oracle64), _finite(_error(eager64, oracle64))
    relative = torch.finfo(ours.dtype).eps / 2 + _ARITHMETIC
    size, smallest = _finite(oracle64), torch.finfo(ours.dtype).tiny
    max_error, rms = error.max().item(), _rms(error)
    max_bound = 2 * eager_error.max().item() + relative * size.abs().max().item() + smallest
    rms_bound = 2 * _rms(eager_error) + relative * _rms(size) + smallest
    if max_error > max_bound or rms > rms_bound:
        raise AssertionError(_message(what, ours64, oracle64, error, (max_error, max_bound, rms, rms_bound)))


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


def _message(
    what: str, ours: torch.Tensor, oracle: torch.Tensor, error: torch.Tensor, numbers: tuple[float, float, float, float]
) -> str:
    max_error, max_bound, rms, rms_bound = numbers
    lines = [
        f"{what}: max error {max_error:.4g} (allowed {max_bound:.4g}), RMS {rms:.4g} (allowed {rms_bound:.4g}), "
        f"shape {tuple(ours.shape)}; worst:"
    ]
    for flat in error.flatten().topk(min(WORST, error.numel())).indices:
        at = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
        lines.append(f"  {list(at)}: ours {ours[at].item():.8g}, oracle {oracle[at].item():.8g}")
    return "\n".join(lines)
