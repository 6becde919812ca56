"""The demo's screen and the benchmark's tables; times themselves only where there is a GPU."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from rich.console import Console

from terrazzo.tools import bench, demo, measure
from terrazzo.tools.command import exit_status

RESULT = {"model": "m", "size": 1, "floor_us": 10.0, "layers": 8, "kernels": {}}


def shown(what) -> str:
    console = Console(file=io.StringIO(), width=120)
    what(console)
    return console.file.getvalue()


def test_the_demo_is_right_and_says_what_was_fused(device):
    made = demo.demo("llama-3.1-8b", tokens=3)
    assert made.ok and 0 < made.ratio <= 2
    assert [p.name for p in made.pieces] == ["0 first", "1 middle", "2 middle", "3 last"]
    for piece in made.pieces:
        assert piece.ok and 0 < piece.kernels < piece.ops and len(piece.launches) == piece.kernels + piece.foreign
        assert piece.state == ("plan captured" if device.type == "cuda" else "plan")
    text = shown(lambda console: demo.show(console, made, 1.0))
    assert "tiny-llama-3.1-8b, 3 tokens" in text and "mm + silu + mul" in text and "wrong" not in text


def test_the_demo_shows_what_is_wrong():
    pieces = [demo.Served("1 first", 9, 3, 0, 7.5, ok=False, state="plan")]
    text = shown(lambda console: demo.show(console, demo.Demo("m", 1, pieces, 9.0, ok=False), 1.0))
    assert text.count("wrong") == 2 and "7.50" in text


def test_eager_kernels_are_counted_without_views_and_bare_memory():
    with demo._Ops() as ops:
        x = torch.empty(4, 4)
        torch.nn.functional.relu(x.t().view(-1, 2) if x.t().is_contiguous() else x[1:]).add_(1)
    assert ops.count == 2


def test_a_piece_is_timed_beside_the_floor():
    result = RESULT | {"us": {"eager": 30.0, "inductor": 24.0, "terrazzo": 12.0}, "failures": []}
    text = shown(lambda console: console.print(bench.table([result])))
    assert "1.20" in text and "2.00" in text


def test_no_speed_up_is_shown_while_the_check_is_red():
    result = RESULT | {"us": {"eager": 30.0}, "failures": ["output 0: too far"]}
    text = shown(lambda console: console.print(bench.table([result])))
    assert text.count("wrong") == 2


def test_the_floor_is_bytes_or_flops(device):
    piece = bench.middle("llama-3.2-1b", tiny=True)
    target = measure.Target.named("h200")
    assert measure.floor_us(piece, 1, target) == piece.weight_bytes() / target.bandwidth_bytes_s * 1e6
    assert measure.floor_us(piece, 1 << 20, target) == piece.flops(1 << 20) / measure.PEAK_FLOPS * 1e6


def test_layers_share_activations_but_no_weight(device):
    piece = bench.middle("llama-3.2-1b", tiny=True)
    first, second = measure.layers_of(piece, 2, device)[:2]
    for a, b, spec in zip(first, second, piece.specs(), strict=True):
        if not isinstance(a, torch.Tensor):
            continue
        weight = a.shape[0] != 2 and spec.fill.kind != "rope"
        assert (a is not b) == weight and (not weight or not torch.equal(a, b))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert exit_status(bench.main) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_times_on_a_gpu_add_up(device, monkeypatch):
    monkeypatch.setattr(measure, "ROTATED_BYTES", 1)
    piece = bench.middle("llama-3.2-1b", tiny=True)
    (result,) = bench.bench_piece(piece, (3,), ("eager", "terrazzo"), ("terrazzo",))
    assert not result["failures"]
    kernels = result["kernels"]["terrazzo"]
    # CUPTI slows small kernels down; an order of magnitude is no noise.
    assert result["us"]["terrazzo"] / 10 < sum(k["adds_us"] for k in kernels) < 10 * result["us"]["terrazzo"]
    assert all(k["launch"] for k in kernels)
    host = measure.host_us(piece, 3, device)
    assert 0 < host["bare"] and host["dispatcher"] < host["bare"] + 100
