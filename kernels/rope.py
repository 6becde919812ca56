"""RoPE: rotary position embedding of the q and the k heads of each token, in one launch.

    out[token, head, d] = x[d] * cos[token, d] + rotate(x)[d] * sin[token, d]
    neox: rotate(x) = (-x2, x1) for the halves x1, x2;  gptj: (-x[1], x[0], -x[3], x[2], …)
    partial: dimensions from `rotary` on pass unchanged

A row is one head of one token, `row = token * heads + head`: segment 0 holds q's rows, segment 1 k's. A program holds
several consecutive rows, so those of one token read its cos and sin from the L1 after the first. x's partner elements
are a second load of the same lines. The body may normalise the row over head_dim first (q/k norm).
Schedule: `segments.tiles` over whole rows. Why its own family: rows this short (head_dim is 64 to 512) want many rows
per program, where rows and norm count warps per row.
Bytes: q and k once in, once out; cos and sin once per token. FLOPs: 3 per element.
Source: RoFormer (arXiv 2104.09864); the two layouts are those of GPT-NeoX and GPT-J.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .segments import Problem, Segmented, Tile, obstacle, power_of_two, prepare_tiles, tile_jobs
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "prepare", "reference", "supports"]

Config = Tile

MAX_HEAD_DIM = 512

# Elements of a tile and warps: 8 elements per thread. Measured: neox, 32 q and 8 k heads of 128, bf16, NVIDIA H200,
# torch 2.11, triton 3.6, 2026-11-24, in a chain of launches (with PDL), by tokens:
#       1: 1.41 (0.90) us; 1 head of 1 warp 1.36 (0.89)        16: 1.51 (1.03); 2 heads of 1 warp 1.55 (1.08)
#      64: 1.63 (1.17); 4 heads of 2 warps 1.74 (1.27)
#    2048: 12.2 (13.1), floor 9.8; 16 heads of 4 warps 13.4 (12.7)
#    8192: 42.8 (50.0), floor 39.0; 16 heads of 4 warps 45.8 (45.1); 4 of 2 warps 51.3 (99.2): see segments.pdl_pays
ELEMENTS, WARPS = 1024, 4
CONFIGS: tuple[Config, ...] = tuple(Config(ELEMENTS // d, d, WARPS) for d in (64, 128, 256, 512))


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.cols > MAX_HEAD_DIM:
        return f"head_dim {problem.cols}; at most {MAX_HEAD_DIM}"
    return obstacle(problem)


def choose(problem: Problem, target: Target) -> tuple[Config, str]:
    """Return the tile for the problem and why."""
    width, rows = power_of_two(problem.cols), sum(problem.rows)
    block_r = min(ELEMENTS // width, power_of_two(max(rows, 1)))
    return Config(block_r, width, max(1, WARPS * block_r * width // ELEMENTS)), f"{block_r} heads per program"


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """RoPE in torch, in fp32, rounded once.

    Args:
        x: [tokens, heads, head_dim].
        cos, sin: [tokens, rotary / 2]; dimensions from `rotary` on pass unchanged.
        interleaved: partners are neighbours (gptj) instead of half a rotary apart (neox).
    """
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    c, s = cos.float()[:, None], sin.float()[:, None]
    x1, x2 = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((y.to(x.dtype), rest), -1)


@triton.jit
def sample(SEGMENT: tl.constexpr, row, col, mask, t):
    """neox, head_dim 128, 32 q and 8 k heads, t = (q, k, cos, sin, q out, k out): compile jobs are built with it."""
    HEADS: tl.constexpr = 32 if SEGMENT == 0 else 8
    x_ptr, out_ptr = t[SEGMENT], t[4 + SEGMENT]
    at = (row // HEADS) * 64 + col % 64
    x = tl.load(x_ptr + row * 128 + col, mask=mask).to(tl.float32)
    partner = tl.load(x_ptr + row * 128 + (col + 64) % 128, mask=mask).to(tl.float32)
    cos = tl.load(t[2] + at).to(tl.float32)
    sin = tl.load(t[3] + at).to(tl.float32)
    y = x * cos + tl.where(col < 64, -partner, partner) * sin
    tl.store(out_ptr + row * 128 + col, y.to(out_ptr.dtype.element_ty), mask=mask)


def prepare(
    body: Any, config: Config, *, pdl: bool = False, leads: bool = False, wide: bool | None = None
) -> Segmented:
    """Return the launch `prepared(t, rows, cols)`; rows are tokens * heads of each segment, cols is head_dim.

    Args:
        body: `@triton.jit` function `(SEGMENT: tl.constexpr, row, col, mask, t)`.
        config: the tile; `block_c >= cols`.
        pdl, leads: programmatic dependent launch (see launch.py).
        wide: int64 indices; None decides by the sizes of each call (see segments.py).
    """
    return prepare_tiles(body, config, whole=True, pdl=pdl, leads=leads, wide=wide)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """One job per entry of CONFIGS, for two segments; any architecture."""
    return tile_jobs("rope", sample, ("*bf16",) * 6, CONFIGS, whole=True, segments=2)
