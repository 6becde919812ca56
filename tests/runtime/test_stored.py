"""Plans kept on disk: a second process loads them without tracing or planning, and never what it cannot trust."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import fx

from terrazzo.kernels.target import Target
from terrazzo.lowering.facts import Facts
from terrazzo.lowering.options import Options
from terrazzo.runtime import compiled, lowered
from terrazzo.runtime.cache import Shelf
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.stored import from_json, to_json
from terrazzo.runtime.warm import Warming, hollow, telling, warm
from terrazzo.tools.models import pieces
from terrazzo.tools.models.fakes import TensorSpec, with_fakes

LO, HI = 1, 40


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Forgets what was compiled; called again, it does so again."""

    def forget():
        monkeypatch.setattr(compiled, "_SHARED", {})

    forget()
    return forget


@pytest.fixture(scope="module")
def model(device):
    return pieces("llama-3.2-1b", tiny=True, device=device)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "terrazzo")


def ranged(piece, shelf):
    """The piece, ready for its range."""
    made = CompiledPiece(piece.graph, shelf=shelf)
    return made, made.ranged(LO, HI)


def outputs(made, piece, tokens, device):
    """What it returns, but for the buffer that attention will fill."""
    args = piece.make_inputs(tokens, device)
    results = next(n for n in piece.graph.graph.nodes if n.op == "output").args[0]
    empty = {n for n in piece.graph.graph.nodes if n.target in (torch.empty, torch.empty_like)}
    with torch.no_grad():
        got = made(*args)
    if isinstance(results, fx.Node):
        return [got]
    return [x for n, x in zip(results, got, strict=True) if not empty & {n, *n.all_input_nodes}]


def no_planning(monkeypatch):
    for stage in ("make_trace", "make_plan"):
        monkeypatch.setattr(lowered, stage, None)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_second_process_plans_nothing_and_computes_the_same(model, shelf, new_process, device, monkeypatch, index):
    piece = model[index]
    first, planned = ranged(piece, shelf)
    before = [outputs(first, piece, tokens, device) for tokens in (1, 7, 40)]
    new_process()
    no_planning(monkeypatch)
    second, kept = ranged(piece, shelf)
    assert second is not first and second.plans is not first.plans
    assert [(r.lo, r.hi, r.why, r.plan.source) for r in kept] == [(r.lo, r.hi, r.why, r.plan.source) for r in planned]
    assert second.summary() == "; ".join(part for part in first.summary().split("; ") if "(" not in part)
    for tokens, expected in zip((1, 7, 40), before, strict=True):
        torch.testing.assert_close(outputs(second, piece, tokens, device), expected, rtol=0, atol=0)


def test_the_facts_are_the_same_after_a_round_trip(model, shelf):
    _, planned = ranged(model[1], shelf)
    kept = from_json(json.loads(json.dumps(to_json(planned))))
    for a, b in zip(planned, kept, strict=True):
        assert isinstance(b.plan.facts, Facts)
        assert vars(a.plan.facts) | {"arguments": 0} == vars(b.plan.facts) | {"arguments": 0}
        assert telling(a.plan.facts, a.lo, a.hi) == telling(b.plan.facts, b.lo, b.hi)
        for size in (a.lo, a.hi):
            ours, theirs = hollow(a.plan.facts, size), hollow(b.plan.facts, size)
            geometry = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in ours]
            assert geometry == [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in theirs]


def test_a_plan_from_the_cache_has_no_stages_to_look_at(model, shelf, new_process):
    ranged(model[1], shelf)
    new_process()
    _, kept = ranged(model[1], shelf)
    with pytest.raises(compiled.UserError, match="from the cache"):
        _ = kept[0].plan.schedule


@pytest.mark.parametrize("damage", ["cut", "not a plan", "another shape"])
def test_what_is_damaged_is_planned_again_and_kept_again(model, shelf, new_process, device, damage, caplog):
    piece = model[1]
    first, _ = ranged(piece, shelf)
    expected = outputs(first, piece, 5, device)
    (path,) = shelf.folder.iterdir()
    whole = path.read_text()
    if damage == "cut":
        path.write_text(whole[: len(whole) // 2])
    else:
        shelf.write(
            path.stem, {"not a plan": 1} if damage == "not a plan" else [[1, 40, "", ["", {"arguments": [[1]]}]]]
        )
    new_process()
    second, _ = ranged(piece, shelf)
    torch.testing.assert_close(outputs(second, piece, 5, device), expected, rtol=0, atol=0)
    assert path.read_text() == whole
    assert any(r.levelno == logging.WARNING for r in caplog.records)


def test_an_entry_that_others_may_write_to_is_not_run(model, shelf, new_process, monkeypatch):
    ranged(model[1], shelf)
    (path,) = shelf.folder.iterdir()
    value = shelf.read(path.stem)
    value[0][3][0] = "raise SystemExit('run')\n"
    shelf.write(path.stem, value)
    path.chmod(0o666)
    new_process()
    made, _ = ranged(model[1], shelf)
    assert "kernels" in made.summary()


@pytest.mark.parametrize("change", ["range", "options", "dtype"])
def test_another_range_target_or_dtype_is_another_entry(model, shelf, device, change):
    ranged(model[1], shelf)
    (first,) = shelf.folder.iterdir()
    options = Options(Target.interpreter(), pdl=False) if change == "options" else None
    graph = model[1].graph
    if change == "dtype":
        graph = pieces("llama-3.2-1b", tiny=True, dtype=torch.float32, device=device)[1].graph
    CompiledPiece(graph, shelf=shelf, options=options).ranged(LO, HI + (change == "range"))
    assert len(list(shelf.folder.iterdir())) == 2 and first.exists()


def test_an_equal_piece_with_other_names_plans_for_itself(shelf, new_process, device):
    def graph(name):
        made = fx.Graph()
        x = made.placeholder(name)
        made.call_method("add_", (x, 1))
        made.output(made.call_function(torch.mul, (x, 2)))
        return fx.GraphModule(torch.nn.Module(), made)

    spec = TensorSpec(("s", 8), (8, 1), torch.float32, device)
    for name in ("first", "second"):
        new_process()
        made = CompiledPiece(with_fakes(graph(name), [spec]), shelf=shelf)
        made.ranged(2, 9)
        x = torch.zeros(3, 8, device=device)
        torch.testing.assert_close(made(x), torch.full_like(x, 2))
        torch.testing.assert_close(x, torch.ones_like(x))
        assert [a.name for a in made.serving(3).facts.arguments] == [name]


def test_what_cannot_be_written_down_is_not_kept(shelf, device):
    class Held(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Buffer(torch.ones(8, device=device))

    def graph(other):
        made = fx.Graph()
        x = made.placeholder("x")
        made.output(made.call_function(torch.add, (x, other(made))))
        return fx.GraphModule(Held(), made)

    spec = TensorSpec(("s", 8), (8, 1), torch.float32, device)
    example = next(iter(with_fakes(graph(lambda made: 1), [spec]).graph.nodes)).meta["example_value"]
    piece = CompiledPiece(graph(lambda made: made.get_attr("w")), [example], shelf=shelf)
    piece.ranged(2, 9)
    torch.testing.assert_close(piece(torch.ones(3, 8, device=device)), torch.full((3, 8), 2.0, device=device))
    assert not shelf.folder.exists()


def test_an_op_that_needs_memory_leaves_its_plans_kernels_to_the_first_calls(caplog):
    caplog.set_level(logging.INFO)
    facts = Facts((), (), None, 1, 1, False, (), 1)

    def call():
        raise RuntimeError("no data on the meta device")

    plan = compiled.Plan("", facts)
    warm(plan, call, torch.device("cpu"))
    assert "1 ops as themselves" in caplog.text and "no data on the meta device" in caplog.text
    # Told of more meanwhile, and asked twice.
    warming = Warming(torch.device("cpu"))
    for _ in range(2):
        warming.begin(compiled.Plan("", Facts((), (), None, 1, 0, False, (), 1)), call, 1, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no data"):
            warming.finish()
    with pytest.raises(RuntimeError, match="no data"):
        warm(compiled.Plan("", Facts((), (), None, 1, 0, False, (), 1)), call, torch.device("cpu"))
