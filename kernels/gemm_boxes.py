"""What one request of the streaming GEMM brings: boxes of x and of W, and TMA's descriptors of them.

TMA fills what lies beyond the end of a matrix with zeros, and takes longer for that than for reading: at 72 tokens in
tiles of 128, a product of 4096 columns and depth 14336 took 81 us instead of 49 (H100, torch 2.11, triton 3.6, bf16,
2026-11-26). So tiles of many rows come in halves, and where x has fewer rows than a tile, the second half ends with x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from .gemm import GemmProblem, type_name, w_block, whole_heads
from .gemm_steps import folds
from .gemm_stream_table import Config
from .ptx import MOST_COLUMNS
from .tma import descriptor


@cache
def layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a box in shared memory."""
    kind = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(box), kind)


def box_type(box: list[int], dtype: torch.dtype) -> str:
    """Triton's type of a descriptor of such boxes, for compile jobs."""
    return f"tensordesc<{type_name(dtype)}[{','.join(map(str, box))}],{layout(tuple(box), dtype)!r}>"


def x_box(config: Config) -> list[int]:
    """A tile of x, or the two halves of its rows."""
    if not folds(config.block_m):
        return [config.block_m, config.block_k]
    return [2, config.block_m // 2, config.block_k]


def extra_box(config: Config) -> list[int] | None:
    """The rows of x beside those."""
    return [config.extra_m, config.block_k] if config.extra_m else None


def takes_extra(problem: GemmProblem, config: Config) -> bool:
    """Whether the rows that the config has beside a tile, if any, can stand there: whole lines of shared memory, that
    one instruction can multiply."""
    line = config.block_k * problem.dtype.itemsize == 128
    return not config.extra_m or (line and config.tokens <= MOST_COLUMNS and not config.tokens_first)


def describe_x(x: torch.Tensor, box: list[int]) -> Any:
    """x [M, K], or as [halves of a tile, M, K], whose second half overlaps the first where M is less than a tile.

    Raises:
        Unsupported: base or row stride is not a multiple of 16 bytes.
    """
    made = descriptor(x, box[-2:], "x", layout(tuple(box), x.dtype))
    if len(box) == 3:
        half = box[1]
        (rows, depth), (stride, one) = made.shape, made.strides
        apart = min(rows, 2 * half) - half
        # Where not even one half is filled, there is no second.
        made.shape = [2, max(rows - half, half), depth] if apart > 0 else [1, rows, depth]
        made.strides, made.block_shape = [max(apart, 1) * stride, stride, one], box
    return made


def together(problem: GemmProblem, config: Config) -> bool:
    """Whether the columns of a pair are rows of one product: 16 of it are one warp's, of which a thread has one of the
    upper eight and that of the lower eight which belongs to it."""
    shares = problem.paired and problem.layout == "nk" and not config.tokens_first
    return shares and problem.n % 8 == 0 and 2 * config.block_n == 16 * config.warps


def w_box(problem: GemmProblem, config: Config) -> list[int]:
    """A tile of W; of pairs that share it, eight columns of the first and the eight that belong to them in turn; or,
    where heads are wider than it, as much of either half of one."""
    if together(problem, config):
        return [config.block_n // 8, 2, 8, config.block_k]
    if whole_heads(problem, config.block_n):
        return w_block(problem, config.block_n, config.block_k)
    return [2, config.block_n // 2, config.block_k]


def describe_w(w: torch.Tensor, box: list[int], problem: GemmProblem) -> Any:
    """W as it is stored, as [halves of heads, columns of a half, K], or as [eights, first or second of a pair, columns
    of eight, K].

    Raises:
        Unsupported: base or row stride is not a multiple of 16 bytes.
    """
    made = descriptor(w, box[-2:], "W", layout(tuple(box), w.dtype))
    if len(box) == 3:
        (rows, depth), (stride, one) = made.shape, made.strides
        halves = problem.halves
        made.shape, made.strides = [rows // halves, halves, depth], [halves * stride, stride, one]
        made.block_shape = box
    elif len(box) == 4:
        (_, depth), (stride, one) = made.shape, made.strides
        made.shape = [problem.n // 8, 2, 8, depth]
        made.strides, made.block_shape = [8 * stride, problem.pair_offset * stride, stride, one], box
    return made
