"""What shares a kernel and what does not, planned for an H200 without one: bundled models, and graphs of no model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from terrazzo.kernels.target import Target
from terrazzo.lowering.fuse import Fused
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import Journal, plan, trace
from terrazzo.lowering.select import reads_and_writes
from terrazzo.lowering.values import Contract
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.dump_plan import Dump, Held, describe, make
from terrazzo.tools.models import Piece, names, pieces

from .equal import DEVICE, compare, copied, odd, same, traced

H200 = Options(Target.named("h200"))
SIZE = 16


@cache
def published(name: str) -> list[Piece]:
    """First, two middle ones and last."""
    return pieces(name)


@cache
def dumped(name: str, index: int) -> tuple[Dump, Journal]:
    """A piece of a published model at 16 tokens."""
    piece, journal = published(name)[index], Journal()
    made, retraced = make(piece, SIZE, H200, "a title", journal)
    return describe(piece, SIZE, H200, made, retraced, journal), journal


def ops_of(held: Sequence[Held], journal: Journal) -> set[str]:
    """The ATen ops that these values came from, without casts."""
    nodes = {n.name: n.target.split(".")[1] for n in journal.result("canonicalize").nodes if "." in n.target}
    found = set()
    for entry in held:
        # A rule that defines several values names them after its node.
        name = entry.name.partition("#")[0]
        while name not in nodes:
            name = name.rpartition("_")[0]
        found.add(nodes[name])
    return found - {"_to_copy"}


NORM = {"pow", "mean", "add", "rsqrt", "mul"}
LAYER_NORM = {"var_mean", "add", "sub", "rsqrt", "mul"}
ROPE = {"index_select", "mul", "sub", "add", "cat"}
TANH_GELU = {"mul", "pow", "add", "tanh"}

Kernels = list[tuple[str, set[str]]]

PUT_INTO_RESIDUAL = ("gemm_stream", {"mm", "add"})
# It leaves the sums of squares and what is not yet scaled; the product after it scales its result.
LEAVES_SUMS = ("gemm_stream", {"mm", "add", "pow", "mean", "mul"})
NORMED = ("norm", NORM)
# The residual stream's first rows are stored on the way.
LOOKED_UP = ("norm", NORM | {"embedding"})
ROTATED = ("gemm_stream", {"mm"} | ROPE)
SCALED_ROTATED = ("gemm_stream", {"mm", "mean"} | ROPE)
NORMED_HEADS = ("gemm_stream", {"mm"} | NORM | ROPE)
LLAMA: Kernels = [LEAVES_SUMS, ("gemm_stream", {"mm", "mean", "silu", "mul"})]
LLAMAS_LAST: Kernels = [*LLAMA, PUT_INTO_RESIDUAL, NORMED]
GATED = ("gemm_stream", {"mm", "gelu", "mul"})
GEMMA: Kernels = [("gemm_stream", {"mm"}), NORMED, GATED, ("gemm_stream", {"mm"}), NORMED]
ADDED = ("gemm_stream", {"addmm", "add"})
GPT2: Kernels = [ADDED, ("rows", LAYER_NORM), ("gemm_stream", {"addmm", *TANH_GELU}), ADDED, ("rows", LAYER_NORM)]
ROUTED: Kernels = [
    PUT_INTO_RESIDUAL,
    NORMED,
    ("gemm_stream", {"mm"}),
    ("rows", {"amax", "sub", "exp", "sum", "div"}),
    ("", {"topk"}),
    ("rows", {"sum", "div"}),
    ("pointwise", set()),
    ("", {"experts"}),
    NORMED,
]

EXPECTED: dict[str, tuple[Kernels, Kernels, Kernels]] = {
    "llama-3.1-8b": (
        [LOOKED_UP, ROTATED],
        [*LLAMA, LEAVES_SUMS, SCALED_ROTATED],
        LLAMAS_LAST,
    ),
    "qwen3-8b": (
        [LOOKED_UP, NORMED_HEADS],
        [*LLAMA, LEAVES_SUMS, NORMED_HEADS],
        LLAMAS_LAST,
    ),
    "gemma-2-9b": (
        [LOOKED_UP, ROTATED],
        [*GEMMA, ROTATED],
        GEMMA,
    ),
    "gpt2": (
        [("rows", LAYER_NORM | {"embedding"}), ("gemm_stream", {"addmm"})],
        [*GPT2, ("gemm_stream", {"addmm"})],
        GPT2,
    ),
}  # fmt: skip
EXPECTED["llama-3.2-1b"] = EXPECTED["llama-3.1-8b"]
EXPECTED["mixtral-8x7b"] = (EXPECTED["llama-3.1-8b"][0], [*ROUTED, ROTATED], ROUTED)


def test_every_model_is_expected_here() -> None:
    assert sorted(EXPECTED) == sorted(names())


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("index", range(4))
def test_kernels_of_the_models_pieces(name: str, index: int) -> None:
    dump, journal = dumped(name, index)
    first, middle, last = EXPECTED[name]
    found = [(k.family, ops_of([*k.holds, *k.inlined], journal)) for k in dump.kernels]
    assert found == [first, middle, middle, last][index]


def test_a_middle_piece_of_llama_is_four_kernels_and_nothing_else() -> None:
    dump, journal = dumped("llama-3.1-8b", 1)
    assert (len(dump.ours), len(dump.foreign)) == (4, 0)
    _, gate_up, _, qkv = journal.result("select").kernels[:4]
    # One tile holds a gate column and the up column 14336 further on, or both halves of q's, k's and v's heads.
    assert (gate_up.group.pair, gate_up.group.cols) == (14336, 14336)
    assert (qkv.group.half, qkv.group.rows, qkv.group.cols) == (64, SIZE, 3072)
    # Halves of q, k and v, each where it belongs: v where the caller's view of the product lies.
    offsets = [store.offset.range for store in qkv.group.stores]
    v = [(5120, 15 * 6144 + 6079), (5184, 15 * 6144 + 6143)]
    assert offsets == v + [(0, 65471), (64, 65535), (0, 16319), (64, 16383)]


def test_many_tokens_leave_the_residual_to_the_norm() -> None:
    journal = Journal()
    make(published("llama-3.1-8b")[1], 2048, H200, "a title", journal)
    o_proj, norm, gate_up, down, last_norm, qkv = (k for k in journal.result("select").kernels if k.family)
    for product in (o_proj, down):
        assert product.problem.plain and [s.value for s in product.group.stores] == [product.group.contract.name]
    assert gate_up.group.pair and not gate_up.problem.plain
    for each in (norm, last_norm):
        # The sum that goes on as residual, and the rows that the next product reads: nothing else.
        assert len(each.group.stores) == 2 and {load.dtype for load in each.group.loads} == {torch.bfloat16}
    # RoPE, q and k, and what they were cut from stand in qkv's epilogue.
    assert qkv.problem.halves == 64 and len(qkv.group.stores) == 6


def test_what_cublas_leaves_to_a_kernel_of_its_own_joins_another() -> None:
    journal = Journal()
    # On an H100 cuBLAS is fastest for all four products.
    make(published("llama-3.1-8b")[1], 257, Options(Target.named("h100")), "a title", journal)
    selected = journal.result("select")
    kernels = [k for k in selected.kernels if k.family]
    vendors = [k for k in kernels if k.family == "gemm_vendor"]
    assert len(vendors) == 4 and all(k.problem.plain for k in vendors) and not selected.vendors
    # Residual and norm are one kernel behind o_proj and one behind down, which would be two each.
    assert [k.family for k in kernels if k not in vendors] == ["norm", "pointwise", "norm", "rope"]
    assert [name for name, _, _ in journal.stages].count("fuse") == 1
    barred = {r.producer for r in selected.fused.refusals if "cuBLAS computes" in r.reason}
    assert barred == {"mm_1", "mm_2"}


def test_a_product_reads_its_operand_from_memory_though_readers_could_compute_it() -> None:
    deps = fused_from(lambda x, w: ((x * 2) @ w, x * 2 + 1), (4096, 64), (64, 64)).dependencies
    [product] = [made for made in deps.values.definitions.values() if isinstance(made, Contract)]
    assert product.a.base in deps.inlined and product.a.base in deps.reads(product.name)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_kernel_that_stayed_apart_from_its_neighbour_has_a_reason(name: str) -> None:
    for index in range(4):
        fused: Fused = dumped(name, index)[1].result("fuse")
        assert_reasons(fused)


def assert_reasons(fused: Fused) -> None:
    """Every pair of kernels of which one reads what the other stores has its reason."""
    reasons = {(r.producer, r.consumer): r.reason for r in fused.refusals}
    ours = [g for g in fused.groups if g.kind in ("pointwise", "row", "gemm")]
    effects = [(g.name, *reads_and_writes(g, fused.values)) for g in ours]
    for producer, _, writes in effects:
        for consumer, reads, _ in effects:
            if producer != consumer and writes & reads:
                assert reasons[producer, consumer]
    assert all(reasons.values())


def fused_from(
    fn: Callable[..., Any], *shapes: tuple[int, ...], fuse: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Fused:
    """A function of tensors of these shapes, fused for an H200; the launches' text comes out twice the same."""
    args = [torch.empty(s, dtype=dtype) for s in shapes]
    sources, journals = [], []
    for _ in range(2):
        graph, journal = traced(fn, len(args)), Journal()
        made = plan(trace(graph, Examples.of(graph, args)), {}, replace(H200, fuse=fuse), journal=journal)
        sources.append(made.source)
        journals.append(journal)
    assert sources[0] == sources[1]
    if fuse:
        assert_reasons(journals[0].result("fuse"))
    return journals[0].result("fuse")


def kinds(fused: Fused) -> list[str]:
    return [g.kind for g in fused.groups]


def reason(fused: Fused) -> str:
    """The one refusal there is."""
    [refusal] = fused.refusals
    return refusal.reason


def two_heads(x: Any, y: Any) -> Any:
    both = x + y
    return torch.softmax(both, -1), torch.log_softmax(both * 2, -1)


def statistics_of_the_operand(x: Any, w: Any, b: Any, g: Any) -> Any:
    return F.gelu(x @ w + b) * g * x.abs().mean(-1, keepdim=True)


def statistics_of_the_product(x: Any, w: Any, b: Any, g: Any) -> Any:
    h = x @ w + b
    return F.gelu(h) * g * h.abs().mean(-1, keepdim=True)


def standardized(x: Any) -> Any:
    centred = x - x.mean((1, 2), keepdim=True)
    return (centred * centred.pow(2).mean((1, 2), keepdim=True).rsqrt()).relu()


def halves(x: Any) -> Any:
    return x[:, 256:].softmax(-1) + x[:, :256].amax(-1, keepdim=True)


def tower(x: Any, y: Any, z: Any) -> Any:
    for _ in range(6):
        x = torch.where(x > y, x.tanh() * y, x.sin() + z)
    return x


def test_graphs_that_are_one_kernel() -> None:
    assert kinds(fused_from(two_heads, (64, 1000), (64, 1000))) == ["row"]
    assert kinds(fused_from(standardized, (64, 8, 128))) == ["row"]
    assert kinds(fused_from(halves, (64, 512))) == ["row"]
    assert kinds(fused_from(tower, (64, 512), (512,), (64, 1))) == ["pointwise"]
    assert kinds(fused_from(lambda x, y: x.tanh()[:, :8].sum(1) * y.sin().sum(1), (64, 512), (64, 8))) == ["row"]
    assert kinds(fused_from(lambda x: torch.cat([x.sin(), x[:, :7].cos()], 1)[:, ::2], (64, 512))) == ["pointwise"]


def test_a_row_statistic_of_the_operand_scales_in_the_epilogue() -> None:
    fused = fused_from(statistics_of_the_operand, (64, 512), (512, 1024), (1024,), (64, 1024))
    assert kinds(fused) == ["row", "gemm"]
    assert len(fused.groups[1].members) == 5
    assert "operands of %mm are read from memory" in reason(fused)


def test_a_row_statistic_of_the_product_needs_its_whole_row() -> None:
    fused = fused_from(statistics_of_the_product, (64, 512), (512, 1024), (1024,), (64, 1024))
    assert kinds(fused) == ["gemm", "row"]
    assert "a reduction needs the whole row, a GEMM tile holds only some of its columns" in reason(fused)
    # The bias is added in the tile, everything else once the row is complete.
    assert [len(g.members) for g in fused.groups] == [2, 5]


@pytest.mark.parametrize(
    ("fn", "fact"),
    [
        (lambda x, w: F.silu((x @ w)[:, ::2]) * (x @ w)[:, 1::2], "away from the tile"),
        (lambda x, w: (x @ w).t().contiguous(), "away from the tile"),
        (lambda x, w: (x @ w).relu() @ w.t(), "operands of %mm_1 are read from memory"),
        (lambda x, w: torch.softmax(x @ w, -1), "needs the whole row"),
        (lambda x, w: (x @ w).amax(0), "needs the whole row"),
    ],
)
def test_what_a_tile_does_not_hold(fn: Callable[..., Any], fact: str) -> None:
    fused = fused_from(fn, (64, 512), (512, 1024))
    assert any(fact in r.reason for r in fused.refusals), fused


def test_two_products_that_meet() -> None:
    fused = fused_from(lambda x, w, v: F.silu(x @ w) * (x @ v), (64, 512), (512, 1024), (512, 1024))
    assert kinds(fused) == ["gemm", "gemm"]
    assert sorted(len(g.members) for g in fused.groups) == [1, 3]


def test_halves_of_one_product_are_paired_whichever_comes_first() -> None:
    fused = fused_from(lambda x, w: F.silu((h := x @ w)[:, 1024:]) * h[:, :1024], (64, 512), (512, 2048))
    assert kinds(fused) == ["gemm"]
    assert fused.groups[0].pair == 1024


def test_reductions_of_other_dimensions_stay_apart() -> None:
    fused = fused_from(lambda x: x - x.sum(0) - x.sum(1, keepdim=True), (512, 512))
    assert kinds(fused) == ["row", "row"]
    assert "reduces other dimensions" in reason(fused)


def test_nothing_is_fused_around_what_runs_as_itself() -> None:
    def fn(x: Any) -> Any:
        y = x.tanh()
        return y.exp() + torch.sort(y)[0]

    fused = fused_from(fn, (64, 512))
    assert kinds(fused) == ["pointwise", "extern", "item", "pointwise"]
    assert "another kernel between the two" in reason(fused)


def test_what_has_one_reader_is_never_stored() -> None:
    for fn in (two_heads, tower, standardized, halves):
        shapes = [(64, 8, 512) if fn is standardized else (64, 512)] * fn.__code__.co_argcount
        fused = fused_from(fn, *shapes)
        assert {s.value for g in fused.groups for s in g.stores} == fused.dependencies.pinned


@pytest.mark.parametrize("fn", [two_heads, standardized, statistics_of_the_product, tower])
def test_without_fusion_every_value_is_its_own_kernel_and_right(fn: Callable[..., Any]) -> None:
    shapes: list[tuple[int, ...]] = {
        two_heads: [(5, 7), (5, 7)],
        standardized: [(5, 2, 3)],
        statistics_of_the_product: [(5, 7), (7, 6), (6,), (5, 6)],
        tower: [(5, 7), (7,), (5, 1)],
    }[fn]
    apart = fused_from(fn, *shapes, fuse=False, dtype=torch.float32)
    assert not apart.refusals
    assert all(len(g.members) == 1 for g in apart.groups)
    assert len(apart.groups) > len(fused_from(fn, *shapes, dtype=torch.float32).groups)
    args = [odd(*s, seed=i) for i, s in enumerate(shapes)]
    ours, theirs, exactly = copied(args), copied(args), [a.double().to(DEVICE) for a in args]
    options = replace(Options(Target.current(DEVICE)), fuse=False)
    piece = CompiledPiece(traced(fn, len(args)), ours, options=options)
    compare((piece(*ours), ours), (fn(*theirs), theirs), (fn(*exactly), exactly))
    assert all(k.family for loaded in piece.plans.values() for k in loaded.plan.schedule.launches())


def test_equal_pieces_give_equal_text_in_every_process() -> None:
    command = [sys.executable, "-m", "terrazzo.tools.dump_kernels", "--model", "tiny-qwen3-8b", "--source"]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert "def call(" in first
    assert first == second


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b"])
def test_a_piece_planned_twice_has_the_same_text(name: str) -> None:
    again, _ = make(published(name)[1], SIZE, H200, "a title", Journal())
    assert again.source == dumped(name, 1)[0].source


def test_layers_share_their_bodies() -> None:
    def fn(x: Any, *weights: Any) -> Any:
        for w in weights:
            x = torch.softmax(torch.nn.functional.linear(x, w).relu(), -1) + 1
        return x.exp()

    x, weights = odd(3, 8), [odd(8, 8, seed=i) for i in range(4)]
    piece = same(lambda x, a, b, c, d: fn(x, a, b, c, d), x, *weights)
    (loaded,) = piece.plans.values()
    assert loaded.plan.facts.kernels == 8
    # A product, rows, and the last rows, which end in exp.
    assert loaded.plan.source.count("@triton.jit") == 3
    # The five others say whose body theirs is.
    assert loaded.plan.source.count("does this as well, but for the names in it:") == 5


def test_a_chain_of_slices_does_not_double_with_every_link() -> None:
    x = odd(1, 3, 3, 3, 3)
    piece = same(lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1), mode="circular"), x)
    (loaded,) = piece.plans.values()
    assert max(len(line) for line in loaded.plan.source.splitlines()) < 4000
