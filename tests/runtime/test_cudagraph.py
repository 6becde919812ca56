"""Weak references and real CUDA graphs: addresses, memory, replay with new inputs, host time."""

from __future__ import annotations

import ctypes
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from terrazzo.runtime import weak
from terrazzo.runtime.cudagraph import CUDA, StaleAddress, addresses, capture
from terrazzo.runtime.dispatcher import PiecewiseBackend
from terrazzo.runtime.weak import weak_ref

Pair = namedtuple("Pair", "q k")
BORROWERS = ["from the data pointer", "through the array interface"]


def views_of(base):
    """Views that differ in sizes, strides, offset and dtype."""
    return [
        base,
        base[:, 3:7],
        base[2:].t(),
        base.view(-1)[5],
        base[:0],
        base[:1].expand(9, -1),
        base.view(torch.int16),
    ]


def assert_same_view(new, old):
    for name in ("data_ptr", "storage_offset", "stride", "size"):
        assert getattr(new, name)() == getattr(old, name)(), name
    assert (new.dtype, new.device) == (old.dtype, old.device)
    assert torch.equal(new, old)


@pytest.fixture
def host_is_pool(monkeypatch):
    """Take host memory for a graph's pool, so that views and structures can be checked without a GPU."""

    def borrow(address, nbytes, device):
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8).untyped_storage()

    monkeypatch.setattr(weak, "_POOL_DEVICE", "cpu")
    monkeypatch.setattr(weak, "_borrow", borrow)


def test_weak_views_have_the_originals_metadata_and_memory(host_is_pool):
    base = torch.arange(60, dtype=torch.float32).view(6, 10)
    for old in views_of(base):
        assert_same_view(weak_ref(old), old)
    base += 1
    assert torch.equal(weak_ref(base), base)


def test_structures_keep_their_shape_and_shared_storages_stay_shared(host_is_pool):
    base = torch.zeros(4, 6)
    q, k = base.split(3, dim=1)
    value = (q, [k, None, 7], {"res": torch.ones(2)}, Pair(q, k), torch.Size([2, 3]), "layer.0")
    new = weak_ref(value)
    assert type(new) is tuple
    assert type(new[3]) is Pair
    assert new[1][1:] == [None, 7]
    assert new[4:] == value[4:]
    new[0][0, 0] = 5
    assert base[0, 0] == new[3].q[0, 0] == 5
    assert new[0].untyped_storage()._cdata == new[1][0].untyped_storage()._cdata
    assert new[2]["res"].untyped_storage()._cdata != new[0].untyped_storage()._cdata


def test_what_is_not_plain_device_memory_is_kept_as_it_is(host_is_pool):
    class Tagged(torch.Tensor):
        pass

    tagged = torch.zeros(2).as_subclass(Tagged)
    sparse = torch.eye(3).to_sparse()
    conjugated = torch.ones(2, dtype=torch.complex64).conj()
    empty = torch.zeros(0, 4)
    for value in (tagged, sparse, conjugated, empty, None, 3, "name"):
        assert weak_ref(value) is value


def test_host_tensors_stay_strong():
    x = torch.zeros(3)
    assert weak_ref((x,))[0] is x


def test_addresses_are_those_of_tensors_only():
    x, y = torch.zeros(2), torch.zeros(2)
    assert addresses((1, x, None, y, "name")) == (x.data_ptr(), y.data_ptr())


def test_graphs_are_refused_where_they_would_record_nothing():
    reason = CUDA.refusal((4, torch.zeros(3)))
    assert reason == ("no input is on a CUDA device" if torch.cuda.is_available() else "there is no CUDA device")


def test_a_stale_address_names_what_moved():
    error = StaleAddress("piece 2 of 3", (16, 32, 48), (16, 64))
    assert isinstance(error, AssertionError)
    assert "moved (by position among the tensors): [1]" in str(error)
    assert "3 tensors then, 2 now" in str(error)


@pytest.mark.gpu
@pytest.mark.parametrize("borrower", BORROWERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_weak_device_views(borrower, dtype, monkeypatch):
    if borrower == BORROWERS[1]:
        monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    base = torch.randint(0, 2, (6, 10), device="cuda").to(dtype)
    for old in (base, base[:, 3:7], base[2:].t(), base.view(-1)[5], base[:0]):
        new = weak_ref(old)
        assert new.data_ptr() == old.data_ptr()
        assert (new.stride(), new.shape, new.dtype) == (old.stride(), old.shape, old.dtype)
        assert torch.equal(new.float(), old.float())


@pytest.mark.gpu
def test_weak_references_free_their_memory():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    big = torch.empty(1 << 20, device="cuda")
    small = weak_ref((big, big[5:]))
    del big
    assert torch.cuda.memory_allocated() == before
    assert small[1].numel() == (1 << 20) - 5
    del small
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("borrower", BORROWERS)
@pytest.mark.parametrize("last", [False, True])
def test_capture_records_and_replay_computes(borrower, last, monkeypatch):
    if borrower == BORROWERS[1]:
        monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    x, w = torch.randn(8, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    run = lambda x: (torch.tanh(x @ w)[:, ::2], x.sum(1))  # noqa: E731
    run(x)
    captured, output = capture(run, (x,), torch.cuda.graph_pool_handle(), CUDA, first=False, last=last)
    addressed = [t.data_ptr() for t in output]
    del output
    for seed in range(3):
        x.copy_(torch.randn(8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        captured.replay()
        assert [t.data_ptr() for t in captured.output] == addressed
        for ours, theirs in zip(captured.output, run(x), strict=True):
            assert torch.equal(ours, theirs)


def chain(pool, sizes, width):
    """Three pieces on one pool, each a linear layer and a residual; the plan of a size is the piece itself."""
    config = SimpleNamespace(
        compile_sizes=[], cudagraph_capture_sizes=sizes, use_cudagraph=True, cudagraph_num_of_warmups=1
    )
    weights = [torch.randn(width, width, device="cuda") / width**0.5 for _ in range(3)]

    def piece(n, x, w):
        return torch.relu(x @ w) + x, n

    plans = SimpleNamespace(at=lambda args: piece)
    backends = [
        PiecewiseBackend(
            fx.symbolic_trace(piece),
            SimpleNamespace(compilation_config=config),
            pool,
            i,
            3,
            [0],
            piece,
            None,
            compile_piece=lambda graph: plans,
        )
        for i in range(3)
    ]

    def model(pieces, n, x):
        for run, w in zip(pieces, weights, strict=True):
            x, _ = run(n, x, w)
        return x

    return backends, piece, model


@pytest.mark.gpu
def test_pieces_that_share_a_pool_replay_right_with_new_inputs():
    width, sizes = 256, [1, 2, 4, 8]
    backends, piece, model = chain(torch.cuda.graph_pool_handle(), sizes, width)
    buffers = torch.zeros(16, width, device="cuda")
    model(backends, 16, buffers)
    for size in reversed(sizes):
        for _ in range(2):
            model(backends, size, buffers[:size])
    assert all(entry.captured for backend in backends for entry in backend.entries.values())
    for seed, size in enumerate([1, 8, 2, 8, 4, 1, 5, 16]):
        torch.manual_seed(seed)
        buffers.normal_()
        expected = model([piece] * 3, size, buffers[:size])
        assert torch.equal(model(backends, size, buffers[:size]), expected)


@pytest.mark.gpu
def test_captured_outputs_do_not_hold_the_pool():
    width = 1024
    backends, _, model = chain(torch.cuda.graph_pool_handle(), [256, 512], width)
    x = torch.randn(512, width, device="cuda")
    # The first capture also allocates cuBLAS's workspace for the capture stream, which stays.
    for size in (512, 256, 256, 512):
        model(backends, size, x[:size])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    # The capture run: what it returns is freed with the caller's reference.
    model(backends, 512, x)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_replay_costs_the_host_at_most_five_microseconds_more_than_the_graph():
    backends, _, _ = chain(torch.cuda.graph_pool_handle(), [4], 64)
    backend, args = backends[0], (4, torch.zeros(4, 64, device="cuda"), torch.zeros(64, 64, device="cuda"))
    for _ in range(4):
        backend(*args)
    replay = backend.entries[4].captured.replay

    def median_us(call, arguments):
        laps = []
        for _ in range(500):
            start = time.perf_counter()
            call(*arguments)
            laps.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
        return sorted(laps)[250]

    bare, ours = median_us(replay, ()), median_us(backend, args)
    print(f"host time per replay: graph alone {bare:.2f} us, through the dispatcher {ours:.2f} us")
    assert ours - bare <= 5.0
