"""A launch without Triton's own launcher: the C function gets what Triton would have given it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import driver

from terrazzo.kernels.binary import Binary
from terrazzo.kernels.tma import Descriptors, Place, descriptor

from .launchers import META, Launcher

QUIET = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is encoded, by the arguments of the driver's function."""
    made: list[tuple] = []

    def fill(*args: Any) -> str:
        made.append(args)
        return f"map {args[0]}"

    active = SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill))
    monkeypatch.setattr(type(driver), "active", active)
    return made


def compiled(run: Any) -> Any:
    return SimpleNamespace(run=run, function=7, packed_metadata=("packed",))


def described(rows: int = 8) -> Any:
    return descriptor(torch.zeros(rows, 64, dtype=torch.bfloat16), [8, 64], "x")


@pytest.mark.parametrize("descriptors", [True, False])
def test_the_function_gets_what_tritons_launcher_gives(descriptors: bool, encoded: list[tuple]) -> None:
    bound = ((described(), 64, 5) if descriptors else (64, 5)) + ("constexpr",)
    run = Launcher([META] if descriptors else [])
    made = Binary(compiled(run))
    made((1, 2, 3), 9, bound, QUIET)
    run(1, 2, 3, 9, 7, ("packed",), None, None, None, *bound)
    directly, through_triton = run.got
    assert directly == through_triton
    assert len(encoded) == 2 * descriptors and len(set(map(repr, encoded))) <= 1


def test_a_descriptor_is_encoded_once_for_each_kernel(encoded: list[tuple]) -> None:
    x = described()
    one, other = (Binary(compiled(Launcher([dict(META)]))) for _ in range(2))
    for made in (one, one, other, other):
        made((1, 1, 1), 0, (x, 64, 5), QUIET)
    assert len(encoded) == 2


def test_a_kernel_that_asks_for_scratch_is_launched_by_triton(encoded: list[tuple]) -> None:
    run = Launcher([], scratch=16)
    Binary(compiled(run))((1, 1, 1), 0, (64, 5), QUIET)
    assert len(run.got) == 1


def test_another_tritons_launcher_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Launcher([])
    run.launch = None
    monkeypatch.setattr("triton.__version__", "3.7.0")
    called = []
    Binary(compiled(lambda *args: called.append(args)))((1, 1, 1), 0, (64, 5), QUIET)
    assert called == [(1, 1, 1, 0, 7, ("packed",), None, None, None, 64, 5)]


@pytest.mark.gpu
def test_a_place_is_described_once_and_not_held() -> None:
    made: list[torch.Tensor] = []

    def describe(tensor: torch.Tensor) -> Any:
        made.append(tensor[:0])
        return descriptor(tensor, [8, 64], "x")

    descriptors = Descriptors(describe)
    x = torch.zeros(16, 64, dtype=torch.bfloat16, device="cuda")
    first = descriptors(x)
    assert descriptors(x) is first and descriptors(x[:8]) is not first and len(made) == 2
    assert isinstance(first.base, Place) and first.base.data_ptr() == x.data_ptr()


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fill(*args: Any) -> str:
        if not asked:
            raise RuntimeError("Triton Error [CUDA]: Failed to create tensor map descriptor: invalid device context")
        return "map"

    monkeypatch.setattr(type(driver), "active", SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append("memory"))
    Binary(compiled(Launcher([META])))((1, 1, 1), 0, (described(), 64, 5), QUIET)
    assert asked == ["memory"]
