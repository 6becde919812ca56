"""The check of whole pieces: it passes what is right, and turns red on every kind of wrong."""

from __future__ import annotations

import json
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from terrazzo.lowering.errors import Unsupported, UserError
from terrazzo.tools import check, wide
from terrazzo.tools.command import exit_status
from terrazzo.tools.models import Piece, pieces
from terrazzo.tools.piece_check import CompiledPiece, check_piece, sharing

SIZE = 3


@cache
def middle(device: torch.device) -> tuple[Piece, CompiledPiece]:
    piece = pieces("gpt2", tiny=True, device=device, layers=2)[1]
    return piece, CompiledPiece(piece.graph)


def sabotaged(compiled, change):
    """The compiled piece with something done to its arguments and outputs after each run."""

    def at(args):
        run = compiled.at(args)
        calls = []

        def call(*now):
            calls.append(1)
            return change(list(run(*now)), now, len(calls))

        return call

    return SimpleNamespace(at=at, serving=compiled.serving, summary=compiled.summary, refusal=compiled.refusal)


def scaled(outputs, args, call):
    outputs[0].mul_(1.05)
    return outputs


def one_nan(outputs, args, call):
    outputs[0][-1, -1, -1] = torch.nan
    return outputs


def unstable(outputs, args, call):
    if call == 2:
        outputs[0][0, 0, 0] = torch.nextafter(outputs[0][0, 0, 0], outputs[0].new_tensor(1e3))
    return outputs


def unshared(outputs, args, call):
    return [o.clone(memory_format=torch.preserve_format) for o in outputs]


def restrided(outputs, args, call):
    last = outputs[-1]
    wide_rows = last.new_empty(last.shape[0], last.shape[1] + 8)
    return [*outputs[:-1], wide_rows[:, : last.shape[1]].copy_(last)]


def careless(outputs, args, call):
    next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3).zero_()
    return outputs


def vandal(outputs, args, call):
    next(a for a in args if isinstance(a, torch.nn.Parameter) or (isinstance(a, torch.Tensor) and a.dim() == 1)).add_(1)
    return outputs


def test_a_right_piece_passes(device):
    piece, compiled = middle(device)
    result = check_piece(piece, compiled, SIZE, device)
    assert result.ok, result.failures
    assert result.kernels > 0 and result.foreign == 0
    assert 0 < result.ratio <= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled, "output 0: max error"),
        (one_nan, "output 0: max error inf"),
        (unstable, "a second run differs in 1 of"),
        (unshared, "memory shared by outputs: []"),
        (restrided, "eager has"),
        (careless, "has changed, eager leaves it alone"),
        (vandal, "has changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_kind_of_wrong_is_seen(device, change, said):
    piece, compiled = middle(device)
    result = check_piece(piece, sabotaged(compiled, change), SIZE, device)
    assert any(said in failure for failure in result.failures), result.failures


def test_memory_read_before_it_is_written_is_seen(device):
    piece, compiled = middle(device)

    def stale(outputs, args, call):
        outputs[0].add_(torch.empty_like(outputs[0]))
        return outputs

    result = check_piece(piece, sabotaged(compiled, stale), SIZE, device)
    assert any("output 0: max error inf" in failure for failure in result.failures)


def test_a_piece_that_is_not_compiled_is_wrong(device):
    piece, _ = middle(device)
    itself, said = (lambda args: piece.graph.forward), (lambda: "runs as the graph it was")
    own = SimpleNamespace(at=itself, serving=lambda size: None, summary=said)
    assert check_piece(piece, own, SIZE, device).failures == ["not compiled: it runs as the graph it was"]


def test_a_fallback_is_reported_with_its_cause(device, monkeypatch):
    piece, _ = middle(device)
    compiled = CompiledPiece(piece.graph)
    monkeypatch.setattr(compiled, "_shared", lambda args: (_ for _ in ()).throw(Unsupported("x", "no way", stage="y")))
    (failure,) = check_piece(piece, compiled, SIZE, device).failures
    assert failure.startswith("not compiled") and "no way" in failure


def test_an_error_is_reported_with_its_place(device):
    piece, compiled = middle(device)

    def broken(outputs, args, call):
        raise RuntimeError("no luck")

    (failure,) = check_piece(piece, sabotaged(compiled, broken), SIZE, device).failures
    assert failure.startswith("RuntimeError at test_check.py:") and failure.endswith("no luck")


def test_the_wide_run_rounds_nowhere():
    graph = fx.symbolic_trace(lambda x: (x.to(torch.bfloat16).float() + torch.ones(3, dtype=torch.float16)).half())
    x = torch.rand(3) + 1e-12
    (exact,) = wide.run_wide(graph, [x]).outputs
    assert exact.dtype is torch.float64 and torch.equal(exact, x.double() + 1)


def test_unfilled_memory_is_recognised_and_filled_memory_is_not():
    def f(x):
        bare, half = x.new_empty(4), x.new_empty(2, 2)
        half.select(0, 0).copy_(x)
        return bare.view(2, 2), half, x * torch.nan

    found = wide.run_wide(fx.symbolic_trace(f), [torch.zeros(2)])
    bare, half, computed = (found.unfilled(o) for o in found.outputs)
    assert bare.all() and half.tolist() == [[False, False], [True, True]] and computed is None


def test_rows_that_a_router_may_send_either_way_are_undecided():
    graph = fx.symbolic_trace(lambda x: torch.topk(x.bfloat16(), 2)[1])
    x = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0001, 1.0], [1.0, 2.0, 3.0]])
    assert wide.undecided(wide.run_eager(graph, [x]), wide.run_wide(graph, [x])).tolist() == [False, True, False]
    assert wide.undecided(wide.run_eager(fx.symbolic_trace(lambda x: -x), [x]), wide.Outcome((), ())) is None


def test_sharing_names_owner_and_distance():
    x, y = torch.zeros(4), torch.zeros(4)
    outcome = wide.Outcome((x[2:], y, y[1:], torch.zeros(4)), (x,))
    assert sharing(outcome) == ["output 0 is input 0 + 8", "output 2 is output 1 + 4"]


def test_the_tool_reports_and_exits(device, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "--models", "gpt2", "--tiny", "--sizes", "1", "--procs", "1", "--json"])
    assert check.main() == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["piece"], r["failures"]) for r in results] == [("middle", []), ("first", []), ("last", [])]


def test_the_tool_exits_1_when_something_is_wrong(monkeypatch, capsys):
    wrong = check.Result("gpt2", "last", 1, failures=["output 0: too far"])
    monkeypatch.setattr(check, "check_all", lambda *args: iter([wrong]))
    monkeypatch.setattr(sys, "argv", ["check", "--models", "gpt2"])
    assert check.main() == 1
    shown = capsys.readouterr()
    assert "1 checks, 1 wrong" in shown.out and "gpt2 last at 1: output 0: too far" in shown.err


def nothing_is_run(*args):
    raise AssertionError("it was run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--json /nonexistent/x", "it cannot be written: No such file"),
        ("--models llama-3.1-8b,gpt2 --dtype fp8", "gpt2 in fp8"),
        ("--models llama-3.1-8b,gpt", "Did you mean gpt2?"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused_before_anything_is_run(monkeypatch, arguments, said):
    monkeypatch.setattr(check, "check_all", nothing_is_run)
    monkeypatch.setattr(sys, "argv", ["check", *arguments.split()])
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        check.main()


@pytest.mark.parametrize("text", ["5", "9:3", "a:b", "0:5"])
def test_a_range_that_is_none_is_refused(monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["check", "--range", text])
    with pytest.raises(SystemExit) as refused:
        check.main()
    assert refused.value.code == 2 and repr(text) in capsys.readouterr().err


def test_of_all_models_those_without_a_form_in_the_dtype_are_left_out(monkeypatch, capsys):
    asked = []

    def noted(models, *others):
        asked.extend(models)
        return iter([check.Result(model, "last", 1) for model in models])

    monkeypatch.setattr(check, "check_all", noted)
    monkeypatch.setattr(sys, "argv", ["check", "--dtype", "fp8"])
    assert exit_status(check.main) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert "gpt2" not in asked and len(asked) == len(check.names()) - 1
    assert len(said) == 1 and "gpt2 in fp8" in said[0]


def test_what_is_known_so_far_is_in_the_file(monkeypatch, tmp_path):
    def broken(*args):
        yield check.Result("gpt2", "last", 1)
        raise RuntimeError("no luck")

    monkeypatch.setattr(check, "check_all", broken)
    monkeypatch.setattr(sys, "argv", ["check", "--models", "gpt2", "--json", str(tmp_path / "known.json")])
    with pytest.raises(RuntimeError):
        check.main()
    assert [r["model"] for r in json.loads((tmp_path / "known.json").read_text())] == ["gpt2"]
