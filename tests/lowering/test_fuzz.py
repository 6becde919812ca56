"""Random programs, compiled against eager; and, one by one, those that once came out wrong.

    make fuzz FUZZ=2000 SEED=1      more of them than in the usual run, and others with every seed

A failure prints a script that shows it alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, seed, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.compare import difference

from .equal import compare, copied, odd, same, traced
from .moves import MOVES
from .programs import Program, programs

# Of these, 144 differ (hypothesis likes to vary what it had); 9.5 s on one of two cores (torch 2.13, 2026-11-24).
EXAMPLES = int(os.environ.get("TERRAZZO_FUZZ", "180"))
# 0 draws the same programs every time.
SEED = int(os.environ.get("TERRAZZO_FUZZ_SEED", "0"))
# Floats of a small result may err more than twice as much as eager's by eager's luck; not for every draw of the values.
DRAWS = 3


@functools.cache
def run(program: Program) -> None:
    """Asserts that the program compiled does what it does in eager.

    Values that err too much are drawn again: what is wrong by more than eager's luck is wrong in every draw.
    """
    fn = program.function()
    piece = CompiledPiece(traced(fn, len(program.inputs)), program.arguments(0))
    for draw in range(1, DRAWS + 1):
        ours, theirs = copied(program.arguments(draw)), copied(program.arguments(draw))
        exactly = copied(program.arguments(draw, exact=True))
        with torch.no_grad():
            try:
                eager = fn(*theirs)
            except RuntimeError:
                # It did not with the numbers that it was drawn with: a mask had fewer ones.
                reject()
            results = (piece(*ours), ours), (eager, theirs), (program.function(exact=True)(*exactly), exactly)
        # Nothing can trace a view of what torch's fake tensors place otherwise than eager.
        assert piece.plans or promised(program) is None, "it fell back to the graph it was"
        try:
            compare(*results)
            return
        except AssertionError as wrong:
            if "strides" in str(wrong) and as_promised(program, results[0][0]):
                wrong_values = difference(*results, placing=False)
                assert wrong_values is None, wrong_values
                return
            if draw == DRAWS or "max error" not in str(wrong):
                raise


def as_promised(program: Program, ours: Any) -> bool:
    """Whether our results are placed as torch's fake tensors say. Eager breaks that promise here and there: in a sum of
    an expanded and a transposed tensor, in a number to a tensor's power."""
    said = promised(program)
    return said is not None and all(a.stride() == b.stride() for a, b in zip(ours, said, strict=True))


def promised(program: Program) -> Any:
    """The program's results as torch's fake tensors have them; None where they cannot run it."""
    arguments = copied(program.arguments(1))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        given = [mode.from_tensor(t) for t in arguments]
        try:
            return program.function()(*given)
        except (RuntimeError, ValueError):
            return None


@pytest.mark.filterwarnings("ignore:var")
@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    derandomize=SEED == 0,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(programs(MOVES))
def test_random_programs(program: Program) -> None:
    note(program.script(1))
    run(program)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        # An index that falls was divided as Triton divides: towards zero.
        (lambda x: x.abs().flatten().flip(0), (odd(3, 2).t(),)),
        # An index computed from sizes alone is a number.
        (lambda x: x.roll(1, 0)[0].abs(), (odd(2, 1, dtype=torch.int64),)),
        # With a square weight, what makes a product's operand fits its tiles, and was computed after it was read.
        (lambda x, w: x.tanh() @ w, (odd(5, 7), odd(7, 7))),
        (lambda x: x @ (x / 3).t(), (odd(1, 1),)),
        # A value with gaps in eager has none in ours, and views of it are at other offsets.
        (lambda x, y: (x.copy_(y)[-1] + 1, x.split([1, 3])[1] * 2), (odd(4, 7)[:, 1::2], odd(4, 3))),
        (
            lambda x, y: (x.copy_(y).permute(2, 0, 1)[1:] * 1, x[:, ::2, 1] * 1),
            (odd(8, 5, 9)[1::2, :, ::3], odd(4, 5, 3)),
        ),
        (lambda x: x[::2].clone().narrow(0, 3, 1) * 2, (odd(7, 0),)),
        (lambda x: x[::2].clone().narrow(0, 3, 1) * 2, (odd(0).expand(7, 0),)),
        (lambda x, y: (x.expand(4, 3).clone()[1:, 1] * 2, x.expand(4, 3).add(y)[2]), (odd(3), odd(1))),
        # A single number has no dimension to be flipped along, and may be all the same.
        (lambda x: x.abs().flip(-1) * 2, (odd(),)),
        # A comparison of two single numbers was a number in the interpreter.
        (lambda x, y: (x <= x) | y, (odd(1, 1), odd(3, 4, dtype=torch.bool))),
    ],
)
def test_what_once_was_wrong(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    same(fn, *args)


def test_a_row_of_equal_numbers_is_its_mean(device: torch.device) -> None:
    same(lambda x: torch.nn.functional.layer_norm(x, [3]), torch.ones(2, 3, device=device))


def test_a_gather_that_only_eager_understands_runs_as_itself() -> None:
    same(lambda x, i: torch.gather(x, 0, i), odd(13), torch.tensor(3), itself=True)


def test_an_input_whose_elements_share_memory_is_written_by_its_own_graph() -> None:
    fn = traced(lambda x: x.unbind(0)[0].relu_(), 1)
    ours, theirs = odd(1).expand(4), odd(1).expand(4)
    compare((CompiledPiece(fn, [ours])(ours), ours), (fn(theirs), theirs))


def test_the_script_of_a_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program = Program((((3, 2), torch.float16, "transposed"),), ("v0 = x0.to(single, copy=True)",), ("v0",))
    exec(program.script(1), {})
    assert capsys.readouterr().out.count("0.0") == 2
