"""Random programs over a number of tokens: whatever a range's plans serve, and whatever they refuse, is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from terrazzo.runtime.compiled import CompiledPiece

from .equal import compare, copied, doubled, odd
from .test_fuzz import DRAWS
from .test_ranged import symbolic

EXAMPLES = int(os.environ.get("TERRAZZO_FUZZ", "180")) // 15
# Around the cuts that programs bring: small sizes, the bounds at which fusion is asked, a prime.
SIZES = (2, 3, 8, 9, 16, 17, 31)

# Each makes [tokens, 8] of values of that shape; the last ones hold the size where only exact plans can.
LINES = [
    "{a} + {b} * 0.5",
    "torch.tanh({a})",
    "torch.where({a} > {b}, {a}, -{b})",
    "{a} @ w",
    "F.silu(({a} @ wide)[:, :8]) * ({b} @ wide)[:, 8:]",
    "F.layer_norm({a}, (8,), bias)",
    "torch.softmax({a}, -1)",
    "torch.cat([{a}[:, 5:], {b}[:, :5]], 1)",
    "{a}.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)",
    "{a}.view(-1, 4, 2).flip(2).view(-1, 8) + bias",
    "({a} * {b}).sum(-1, keepdim=True) + {a}",
    "{a} - {a}.amax(-1, keepdim=True)",
    "F.embedding(ids, w) * {a}",
    "{a}.view(-1, 2, 4).transpose(0, 1).contiguous().transpose(0, 1).reshape(-1, 8)",
    "torch.sort({a}, -1).values",
    "{a} + {b}[:1]",
    "{a} + {b}[-1:]",
    "{a} - {b}.mean(0)",
    "{a}.flip(0)",
    "torch.cat([{a}, {b}], 0)[1 : {a}.shape[0] + 1]",
    "{a} / {a}.shape[0]",
    "{a} + torch.arange({a}.shape[0])[:, None].to({a}.device) / 64",
]


@st.composite
def token_programs(draw: Callable[[Any], Any]) -> str:
    """Two to five lines."""
    values, lines = ["x", "y"], []
    for number in range(draw(st.integers(2, 5))):
        a, b = (draw(st.sampled_from(values)) for _ in range(2))
        lines.append(f"v{number} = {draw(st.sampled_from(LINES)).format(a=a, b=b)}")
        values.append(f"v{number}")
    returned = draw(st.sampled_from([values[-1], f"{values[-1]}, {values[-2]}"]))
    # One argument alone holds the number of tokens: it is one symbol, however little the lines use.
    start = ["y = x.flip(1) * 0.5", "ids = (x[:, 0] > 0).long() + 3"]
    return "\n    ".join(["def fn(x, w, wide, bias):", *start, *lines, f"return {returned},"])


def arguments(size: int, seed: int = 0) -> list[torch.Tensor]:
    x = odd(size, 8, seed=100 * seed + size)
    return [x, odd(8, 8, seed=2) / 4, odd(8, 16, seed=3) / 4, odd(8)]


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(token_programs())
def test_random_programs_over_tokens(code: str) -> None:
    note(code)
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(code, scope)
    piece = CompiledPiece(symbolic(scope["fn"], arguments(23)))
    found = piece.ranged(SIZES[0], SIZES[-1])
    planned = set(piece.plans)
    for size in SIZES:
        right(piece, scope["fn"], size)
    served = {size for r in found if r.plan is not None for size in SIZES if r.lo <= size <= r.hi}
    assert {sizes[0] for sizes, _ in set(piece.plans) - planned}.isdisjoint(served), "a size was planned at its call"


def right(piece: CompiledPiece, fn: Callable[..., Any], size: int) -> None:
    """Asserts that the piece does what the function does; what errs too much is drawn again, as in test_fuzz.py."""
    for seed in range(DRAWS):
        ours, theirs, exactly = (copied(arguments(size, seed)) for _ in range(3))
        given = iter(by_name(piece, ours))
        args = [size if isinstance(v, torch.SymInt) else next(given) for v in piece.examples.values]
        results = tuple(piece(*args)), fn(*theirs), fn(*doubled(exactly))
        try:
            return compare(*results)
        except AssertionError as wrong:
            if seed == DRAWS - 1 or "max error" not in str(wrong):
                raise


def by_name(piece: CompiledPiece, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The arguments in the order in which the graph takes those it uses, which Dynamo calls L_x_ or L_args_0_."""
    held = dict(zip(("x", "w", "wide", "bias", "args_0", "args_1", "args_2", "args_3"), values * 2, strict=True))
    names = [n.name.strip("_").removeprefix("l_") for n in piece.graph.graph.nodes if n.op == "placeholder"]
    return [held[name] for name in names if name in held]
