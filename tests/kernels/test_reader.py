"""A launch like the one before gives the C function what the long way gives it, and any other goes the long way."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from terrazzo.kernels import launch
from terrazzo.kernels.binary import Binary
from terrazzo.kernels.launch import Kernel
from terrazzo.kernels.reader import Argument, reader
from terrazzo.kernels.tma import Place, descriptor

from .launchers import META, Launcher, Noting


class There(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


class Weight(There):
    """Another class, as parameters have."""


def there(*shape: int, dtype: torch.dtype = torch.float32, kind: type = There) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(kind)


def described(rows: int = 8) -> Any:
    made = descriptor(there(rows, 64, dtype=torch.bfloat16), [8, 64], "x")
    made.base = Place(made.base.data_ptr(), made.base.dtype)
    return made


@triton.jit(do_not_specialize=["n"])
def kernel_fn(x, w, t, n, flag, none, A: tl.constexpr, B: tl.constexpr):
    pass


@triton.jit(do_not_specialize=["n"])
def kernel_between(x, A: tl.constexpr, w, t, n, flag, B: tl.constexpr, none):
    pass


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Noting:
    """The C function of every kernel; nothing is compiled, and two devices are there."""
    noting = Noting()
    fill = itertools.count()
    active = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=lambda *args: f"map {args[0]} {next(fill)}"),
        get_current_stream=lambda device: 100 + device,
    )
    monkeypatch.setattr(type(driver), "active", active)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: noting.device)
    noting.device = 0  # type: ignore[attr-defined]

    def loaded(self: Kernel, key: tuple, args: tuple) -> Binary:
        descriptors = sum(type(arg) in launch.DESCRIPTORS for arg in args)
        run = Launcher([dict(META) for _ in range(descriptors)], noting=noting)
        made = self._compiled[key] = Binary(SimpleNamespace(run=run, function=key, packed_metadata=("packed",)))
        return made

    monkeypatch.setattr(Kernel, "_loaded", loaded)
    return noting


def made(fn: Any = kernel_fn) -> Kernel:
    """A kernel that no other shares code with."""
    kernel = Kernel(fn, {"A": 3, "B": "body"}, num_warps=4)
    kernel.interpreted, kernel._compiled = False, {}
    return kernel


def like(kind: str) -> tuple:
    """Arguments of one kind: the same in what matters, new in what does not."""
    x = described(40) if kind == "descriptors" else there(5)
    w = described(8) if kind == "descriptors" else there(7, kind=Weight)
    t = (there(3), None, there(2, dtype=torch.bfloat16)) if kind != "empty" else ()
    return x, w, t, 77, True, None


KINDS = ("tensors", "descriptors", "empty")


@pytest.mark.parametrize("fn", [kernel_fn, kernel_between])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_launch_gets_what_the_first_would(fn: Any, kind: str, noting: Noting, monkeypatch: Any) -> None:
    kernel = made(fn)
    first, second = like(kind), like(kind)
    for args in (first, second):
        kernel((1, 2, 3), *args)
    # A descriptor that nobody encoded went the long way; now none does.
    walked = []
    monkeypatch.setattr(launch, "_walk", lambda *args, walk=launch._walk: walked.append(args) or walk(*args))
    for args in (first, second):
        kernel((1, 2, 3), *args)
    assert not walked
    long = made(fn)
    for args in (first, second):
        long((1, 2, 3), *args)
        long._last = None
    assert walked
    again, expected = noting.got[2:4], noting.got[4:]
    # The two kernels' descriptors are encoded apart.
    strip = [[a for a in call if not (isinstance(a, str) and a.startswith("map"))] for call in again + expected]
    assert strip[:2] == strip[2:]
    assert [len(a) for a in again] == [len(a) for a in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_changes_the_binary_goes_the_long_way(kind: str, noting: Noting) -> None:
    x, w, t, n, flag, none = like(kind)
    changed: dict[str, tuple] = {
        "dtype": (there(5, dtype=torch.float16), w, t, n, flag, none),
        "unaligned": (there(6)[1:], w, t, n, flag, none),
        "in a tuple": (x, w, (*t, there(1)), n, flag, none),
        "wide": (x, w, t, 1 << 31, flag, none),
        "none": (x, w, t, n, flag, there(1)),
        "int": (x, w, t, n, 1, none),
        "block": (descriptor(there(8, 64, dtype=torch.bfloat16), [16, 64], "x"), w, t, n, flag, none),
        "tuple for a tensor": ((x,), w, t, n, flag, none),
    }
    for name, args in changed.items():
        kernel = made()
        for _ in range(2):
            kernel((1, 1, 1), x, w, t, n, flag, none)
        kernel((1, 1, 1), *args)
        function = [call[4] for call in noting.got[-3:]]
        assert function[0] == function[1] != function[2], name
        # And back.
        kernel((1, 1, 1), x, w, t, n, flag, none)
        assert noting.got[-1][4] == function[0], name


def test_another_device_and_hooks_go_the_long_way(noting: Noting, monkeypatch: Any) -> None:
    kernel, args = made(), like("tensors")
    for noting.device in (0, 0, 1, 0):  # type: ignore[attr-defined]
        kernel((1, 1, 1), *args)
    assert [call[3] for call in noting.got] == [100, 100, 101, 100]
    heard = []
    binary = next(iter(kernel._compiled.values()))
    binary.compiled.launch_metadata = lambda *args: None
    binary.compiled.run = SimpleNamespace(launch=None)
    monkeypatch.setattr(binary.compiled, "run", lambda *args: heard.append(args))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    kernel((1, 1, 1), *args)
    assert len(heard) == 1 and len(noting.got) == 4


@pytest.mark.parametrize("before", [0, 2])
def test_what_a_thread_notes_is_its_own_and_others_launch(before: int, noting: Noting) -> None:
    kernel, args = made(), like("tensors")
    for _ in range(before):
        kernel((1, 1, 1), *args)
    with launch.noting() as outer:
        kernel((1, 1, 1), *args)
        with launch.noting() as inner:
            kernel((1, 1, 1), *args)
        other = threading.Thread(target=kernel, args=((1, 1, 1), *args))
        other.start()
        other.join()
        kernel((1, 1, 1), *args)
    assert (len(outer), len(inner), len(noting.got)) == (2, 1, before + 1)
    kernel((1, 1, 1), *args)
    assert len(noting.got) == before + 2


def test_a_tensor_elsewhere_is_refused_after_one_that_was_there(noting: Noting) -> None:
    kernel, (x, w, t, *rest) = made(), like("tensors")
    for _ in range(2):
        kernel((1, 1, 1), x, w, t, *rest)
    with pytest.raises(launch.UserError, match="TRITON_INTERPRET=1"):
        kernel((1, 1, 1), torch.zeros(5), w, t, *rest)


def test_classes_that_change_once_are_read_from_then_on(noting: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, (x, _, *rest) = made(), like("tensors")
    for w in (there(7, kind=Weight), there(7), there(7)):
        kernel((1, 1, 1), x, w, *rest)
    monkeypatch.setattr(launch, "_walk", None)
    kernel((1, 1, 1), x, there(7), *rest)
    assert len({call[4] for call in noting.got}) == 1


def test_a_kernel_without_arguments_is_launched(noting: Noting) -> None:
    @triton.jit
    def nothing(A: tl.constexpr):
        pass

    kernel = Kernel(nothing, {"A": 1}, num_warps=4)
    kernel.interpreted, kernel._compiled = False, {}
    for _ in range(2):
        kernel((1, 1, 1))
    assert len(noting.got) == 2


def test_what_no_reader_is_written_for() -> None:
    order = [Argument(0)]
    for arg in (there(6)[1:], (1,), 1 << 31, "text"):
        assert reader((arg,), order, (), 0) is None
