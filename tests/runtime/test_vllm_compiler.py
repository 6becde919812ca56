"""terrazzo as vLLM's compiler: which sizes get a plan and when, what runs otherwise, what is said."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import fx

from terrazzo.lowering.errors import Unsupported
from terrazzo.runtime import compiled, compilers, lowered, vllm_compat, vllm_compiler
from terrazzo.runtime.vllm_compiler import Compiler
from terrazzo.tools.models import pieces

RANGE = SimpleNamespace(start=1, end=32)
ONE = SimpleNamespace(start=4, end=4)


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What was said, in a process in which nothing was compiled or said before."""
    monkeypatch.setattr(compiled, "_SHARED", {})
    monkeypatch.setattr(vllm_compat, "_said", set())
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Who has processes that compile; here they are none."""
    users = []
    monkeypatch.setattr(compilers, "open_for", users.append)
    monkeypatch.setattr(compilers, "close_for", users.remove)
    return users


def stand_in(monkeypatch, name, **held):
    """A module `vllm.compilation.<name>` that holds these, in a process without vLLM."""
    for package in ("vllm", "vllm.compilation"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        sys.modules[package].__path__ = []
    made = ModuleType(f"vllm.compilation.{name}")
    vars(made).update(held)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def capturing(monkeypatch):
    """vLLM's word on whether it may still capture."""
    return stand_in(monkeypatch, "monitor", cudagraph_capturing_enabled=True)


@pytest.fixture(scope="module")
def model(device):
    """The pieces of a model; two are equal but for their weights."""
    return pieces("llama-3.2-1b", tiny=True, device=device)


def compiler(compile_sizes=(), capture_sizes=(), folder=None):
    """A compiler that knows its configuration, and where vLLM keeps what it compiled."""
    made = Compiler()
    config = SimpleNamespace(compile_sizes=list(compile_sizes), cudagraph_capture_sizes=list(capture_sizes))
    limits = SimpleNamespace(max_num_batched_tokens=24)
    made.compute_hash(SimpleNamespace(compilation_config=config, scheduler_config=limits))
    made.initialize_cache(str(folder), folder is None, "backbone")
    return made


def compile_all(made, model, ranges=(RANGE, ONE)):
    """One callable for each piece, compiled as vLLM 0.22.1 calls it: for ranges and single sizes."""
    runs = []
    for index, piece in enumerate(model):
        given = [
            made.compile(piece.graph, [], {}, r, f"artifact_compile_range_{r.start}_subgraph_{index}") for r in ranges
        ]
        assert len({id(run) for run, _ in given}) == 1 and all(handle is None for _, handle in given)
        runs.append(given[0][0])
    return runs


def sizes(run):
    return [sizes[0] for sizes, _ in run.piece.plans]


def same(run, piece, tokens, device):
    """Asserts that the callable gives what the piece's graph gives."""
    agree(run, piece, piece.make_inputs(tokens, device))


def agree(run, piece, args):
    """The same for these arguments, except in the buffer that attention will fill."""
    unfilled = {n for n in piece.graph.graph.nodes if n.target in (torch.empty, torch.empty_like)}
    results = next(n for n in piece.graph.graph.nodes if n.op == "output").args[0]
    with torch.inference_mode():
        got = run(*args), piece.graph(*args)
    if isinstance(results, fx.Node):
        results, got = (results,), tuple((leaf,) for leaf in got)
    for node, ours, theirs in zip(results, *got, strict=True):
        assert ours.shape == theirs.shape
        if not unfilled & {node, *node.all_input_nodes}:
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_range_serves_its_sizes_and_compiles_nothing_more(model, device, capturing, monkeypatch):
    (run,) = compile_all(compiler(compile_sizes=[4], capture_sizes=[2, 8]), model[1:2])
    monkeypatch.setattr(lowered, "make_plan", None)
    for tokens in (32, 8, 3, 2, 4, 8, 1):
        same(run, model[1], tokens, device)
    assert run.piece.serving(32) is not None


def test_ranges_beside_each_other_keep_their_plans(model, device, capturing, monkeypatch):
    low, high = SimpleNamespace(start=1, end=8), SimpleNamespace(start=9, end=32)
    (run,) = compile_all(compiler(), model[1:2], (low, high))
    monkeypatch.setattr(lowered, "make_plan", None)
    for tokens in (4, 8, 9, 32, 1):
        same(run, model[1], tokens, device)
        assert run.counts(tokens) != (0, 0)
    assert run.counts(33) == (0, 0)


def test_sizes_and_none_in_place_of_ranges_as_vllm_0_12_gives_them(model, device, capturing, monkeypatch):
    made, graph = compiler(compile_sizes=[4]), model[1].graph
    assert made.compile(graph, [], {}, None, "key")[0] is made.compile(graph, [], {}, 4, "key")[0]
    (run,) = made.pieces
    assert run.piece.serving(24) is not None and run.piece.serving(25) is None
    monkeypatch.setattr(lowered, "make_plan", None)
    same(run, model[1], 4, device)


@pytest.fixture
def without_ranges(monkeypatch):
    """Ranges for which no plan can be made."""
    monkeypatch.setattr(lowered, "regimes", lambda make, lo, hi, *rest: (lowered.Regime(lo, hi, None, "no"),))


def test_without_a_plan_for_the_range_named_sizes_get_their_own(model, device, capturing, without_ranges):
    (run,) = compile_all(compiler(compile_sizes=[4], capture_sizes=[2, 8]), model[1:2])
    for tokens in (9, 8, 3, 2, 4, 8):
        same(run, model[1], tokens, device)
    assert sizes(run) == [8, 2, 4]


def test_nothing_is_compiled_while_requests_wait(model, device, capturing, without_ranges):
    (run,) = compile_all(compiler(compile_sizes=[4], capture_sizes=[2, 8]), model[1:2])
    same(run, model[1], 8, device)
    capturing.cudagraph_capturing_enabled = False
    for tokens in (2, 8):
        same(run, model[1], tokens, device)
    assert sizes(run) == [8]
    # vLLM runs these before it serves, whether or not it captures any.
    same(run, model[1], 4, device)
    assert sizes(run) == [8, 4]


def test_an_input_at_another_alignment_runs_the_graph_once_vllm_serves(model, device, capturing, monkeypatch):
    piece = model[1]
    (run,) = compile_all(compiler(), [piece])
    capturing.cudagraph_capturing_enabled = False
    monkeypatch.setattr(lowered, "make_plan", None)
    same(run, piece, 4, device)
    args = piece.make_inputs(4, device)
    moved = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point())
    room = torch.empty(args[moved].numel() + 1, dtype=args[moved].dtype, device=device)
    args[moved] = room[1:].view(args[moved].shape).copy_(args[moved])
    agree(run, piece, args)


def test_one_line_says_what_it_came_to(model, device, capturing, said):
    made = compiler(capture_sizes=[4, 2])
    runs = compile_all(made, model)
    assert not said.messages
    for tokens in (4, 2):
        for run, piece in zip(runs, model, strict=True):
            same(run, piece, tokens, device)
    (line,) = said.messages
    kernels = sum(run.counts(4)[0] for run in runs)
    kinds = len({id(run.piece.plans) for run in runs})
    assert line.startswith(f"terrazzo: {len(model)} pieces ({kinds} different) compiled in ")
    assert line.endswith(f"; at 4 tokens {kernels} kernels, 0 ops as themselves") and kernels > len(model)


def test_processes_compile_from_the_compilers_first_moment_to_the_last_pieces_call(model, device, capturing, compiling):
    made = compiler()
    assert compiling == [made]
    runs = compile_all(made, model)
    for run, piece in zip(runs, model, strict=True):
        assert compiling == [made]
        same(run, piece, 4, device)
    assert compiling == []


def test_a_piece_waits_for_its_kernels_at_its_first_call_only(model, device, capturing):
    made = compiler()
    (run,) = compile_all(made, model[1:2])
    waited = []
    run.piece._warming = {asked: SimpleNamespace(finish=lambda: waited.append(1)) for asked in run.piece._regimes}
    for _ in range(2):
        same(run, model[1], 4, device)
        assert waited == [1]


def test_what_goes_wrong_while_kernels_compile_leaves_the_graph(model, device, capturing, said):
    def fail():
        raise RuntimeError("the driver says no")

    (run,) = compile_all(compiler(), model[1:2])
    run.piece._warming = {asked: SimpleNamespace(finish=fail) for asked in run.piece._regimes}
    for _ in range(2):
        same(run, model[1], 4, device)
    (warning,) = [r.getMessage() for r in said.records if r.levelno == logging.WARNING]
    assert "the driver says no" in warning and run.counts(4) == (0, 0)


def test_a_piece_is_traced_before_it_runs_and_inside_dynamo(model, device, monkeypatch):
    traced, runs = [], []
    make_trace = lowered.make_trace
    monkeypatch.setattr(lowered, "make_trace", lambda *args: traced.append(1) or make_trace(*args))

    def backend(graph, example_inputs):
        runs.append(compiler().compile(graph, example_inputs, {}, RANGE)[0])
        assert traced
        return runs[0]

    x = torch.randn(5, 8, device=device)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(lambda x: (x * 2).relu() + 1, backend=backend)(x)
    torch.testing.assert_close(result, (x * 2).relu() + 1)
    assert runs[0].piece.serving(5) is not None


@pytest.mark.parametrize("where", ["make_trace", "make_plan"])
@pytest.mark.parametrize("error", [ValueError("broken"), Unsupported("it", "is odd", stage="test")])
def test_a_piece_that_fails_runs_as_its_graph_with_one_warning(model, device, monkeypatch, said, where, error):
    def fail(*args, **others):
        raise error

    monkeypatch.setattr(lowered, where, fail)
    (run,) = compile_all(compiler(compile_sizes=[4, 8]), model[1:2])
    for tokens in (4, 8, 4):
        same(run, model[1], tokens, device)
    assert "1 pieces as their graphs" in said.messages[-1]
    warnings = [r.getMessage() for r in said.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and ("broken" in warnings[0] or "is odd" in warnings[0])


def test_a_second_start_loads_by_the_handles_of_the_first(model, device, monkeypatch, tmp_path):
    piece = model[1]
    _, handle = compiler(folder=tmp_path).compile(piece.graph, [], {}, RANGE, "artifact")
    assert handle == ("artifact", str(tmp_path / "terrazzo"))
    monkeypatch.setattr(compiled, "_SHARED", {})
    monkeypatch.setattr(lowered, "make_plan", None)
    same(compiler(folder=tmp_path).load(handle, piece.graph, [], 1, RANGE), piece, 5, device)


def test_without_vllms_cache_nothing_is_kept(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compiler().compile(model[1].graph, [], {}, RANGE, "artifact")[1] is None
    assert not list(tmp_path.iterdir())


def test_a_piece_without_a_size_is_compiled_at_its_first_call(device):
    def traced(x):
        return x * 2 + 1

    graph = fx.symbolic_trace(traced)
    x = torch.randn(3, device=device)
    run, _ = compiler().compile(graph, [x], {}, RANGE)
    torch.testing.assert_close(run(x), x * 2 + 1)
    assert run.counts(None) == (1, 0)


def test_versions_and_configurations_have_hashes_of_their_own(monkeypatch):
    limits = SimpleNamespace(max_num_batched_tokens=24)
    config = SimpleNamespace(compilation_config=None, scheduler_config=limits)
    before = Compiler().compute_hash(config)
    assert before == Compiler().compute_hash(config)
    monkeypatch.setattr(vllm_compiler.importlib.metadata, "version", lambda name: "another")
    assert Compiler().compute_hash(config) != before


def test_vllm_gets_a_compiler_of_its_own_kind(monkeypatch):
    interface = type("CompilerInterface", (), {"compile": None, "initialize_cache": None})
    stand_in(monkeypatch, "compiler_interface", CompilerInterface=interface)
    monkeypatch.delitem(vars(vllm_compiler), "VllmCompiler", raising=False)
    made = vllm_compiler.VllmCompiler()
    assert isinstance(made, interface) and isinstance(made, Compiler)
    assert type(made).compile is Compiler.compile and made.name == "terrazzo"
    assert vllm_compiler.VllmCompiler is type(made)
