"""What the GEMM families refuse and choose, the measured tables, the shared workspace, and jobs for the compiler."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import ceil

import pytest
import torch
import triton

from terrazzo.kernels import gemm_persistent, gemm_simple, gemm_skinny, gemm_stream, gemm_vendor, workspace
from terrazzo.kernels.gemm import GemmProblem, reference, tma_obstacle
from terrazzo.kernels.gemm_jobs import measured_problem, silu_mul_sample, store_sample
from terrazzo.kernels.gemm_persistent_table import vendor_us
from terrazzo.kernels.gemm_pick import pick
from terrazzo.kernels.target import NAMED, Target
from terrazzo.lowering.errors import Unsupported

H200 = Target.named("h200")
DENSE = GemmProblem(16, 4096, 4096, torch.bfloat16)
STREAM, PERSISTENT = pytest.param(gemm_stream, id="stream"), pytest.param(gemm_persistent, id="persistent")
TMA_FAMILIES = [STREAM, PERSISTENT, pytest.param(gemm_skinny, id="skinny")]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"batch": 2}, "batch is 2"),
        ({"aligned": False}, "not a multiple of 16 bytes"),
        ({"k": 4095}, "x's row stride of 8190 bytes"),
        ({"layout": "kn", "n": 4095}, "W's row stride of 8190 bytes"),
        ({"x_strides": (0, 1, 16)}, "x's innermost stride is 16"),
        ({"w_strides": (0, 1, 4096)}, "W's innermost stride is 4096"),
    ],
)
def test_tma_says_why_not(change: dict, fact: str) -> None:
    assert tma_obstacle(DENSE) is None
    problem = replace(DENSE, **change)
    assert fact in (tma_obstacle(problem) or "")
    name, _, why = pick(problem, H200)
    assert name == "gemm_simple"
    assert fact in why


def test_fp64_belongs_to_no_family() -> None:
    problem = replace(DENSE, m=100, dtype=torch.float64)
    families = (gemm_stream, gemm_skinny, gemm_persistent, gemm_simple)
    assert all("float64" in (family.supports(problem) or "") for family in families)
    with pytest.raises(Unsupported, match="float64"):
        pick(problem, H200)


def test_each_size_goes_to_its_family() -> None:
    names = [pick(replace(DENSE, m=m), H200)[0] for m in (1, 16, 64, 256, 8192)]
    assert names == ["gemm_stream"] * 3 + ["gemm_persistent"] * 2


@pytest.mark.parametrize(
    ("change", "target", "fact"),
    [
        ({}, "b200", "sm_100 has no products by warpgroups"),
        ({"dtype": torch.float32, "allow_tf32": True}, "h200", "float32 is not float16, bfloat16 or float8_e4m3fn"),
        ({"epilogue_itemsize": 8}, "h200", "the epilogue moves 8-byte elements"),
    ],
)
def test_where_w_cannot_be_asked_for_early(change: dict, target: str, fact: str) -> None:
    name, _, why = pick(replace(DENSE, **change), Target.named(target))
    assert name == "gemm_skinny" and f"not gemm_stream: {fact}" in why.replace("dtype torch.", "")


def test_the_interpreter_has_no_gluon() -> None:
    name, _, why = pick(replace(DENSE, n=64, k=64), Target.interpreter())
    assert name != "gemm_stream" and "Gluon has no interpreter" in why


def test_no_tma_before_hopper() -> None:
    name, _, why = pick(DENSE, Target.named("a100"))
    assert name == "gemm_simple"
    assert "sm_80 has no TMA" in why


@pytest.mark.parametrize("family", [STREAM, PERSISTENT])
def test_a_measured_size_gets_its_row(family) -> None:
    (n, k, kind), row = next(iter(family.CONFIGS["h200"].items()))
    for m, entry in row.items():
        problem = GemmProblem(m, n, k, torch.bfloat16, paired=kind == "pair", pair_offset=n)
        config, why = family.choose(problem, H200)
        assert config == entry.config
        assert entry.source in why and ("cuBLAS" in why) == (family is gemm_persistent)
        assert family.estimate_us(problem, config, H200) == entry.us


@pytest.mark.parametrize("family", [STREAM, PERSISTENT])
def test_every_row_can_be_launched(family) -> None:
    for name, table in family.CONFIGS.items():
        target = Target.named(name)
        for key, row in table.items():
            for m, entry in row.items():
                config, problem = entry.config, measured_problem(m, *key)
                where = f"{name}: {key} {m}: {config}"
                blocks = config.block_m, config.block_n, config.block_k
                assert all(block == triton.next_power_of_2(block) for block in blocks), where
                assert config.stages > 1 and config.warps in (4, 8), where
                assert family.smem_bytes(problem, config) <= target.smem_bytes, where


@pytest.mark.parametrize("family", TMA_FAMILIES)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 33, 64, 100, 128])
def test_other_sizes_get_a_config_that_fits(family, paired: bool, dtype: torch.dtype, m: int) -> None:
    problem = GemmProblem(m, 5120, 3584, dtype, paired=paired, pair_offset=5120, allow_tf32=True)
    if family is gemm_persistent:
        problem = replace(problem, m=problem.m * 80)
    config, why = family.choose(problem, H200)
    assert "no measurement" in why
    assert family.smem_bytes(problem, config) <= H200.smem_bytes
    assert family.estimate_us(problem, config, H200) >= problem.weight_bytes / H200.bandwidth_bytes_s * 1e6 * 0.9


def test_a_device_gets_its_own_rows_before_those_of_another() -> None:
    problem = GemmProblem(64, 14336, 4096, torch.bfloat16, paired=True, pair_offset=14336)
    for name, table in gemm_stream.CONFIGS.items():
        assert gemm_stream.measurement(problem, Target.named(name)) == table[14336, 4096, "pair"][64]
    # Measured on one only: the other takes the config, and its time by the ratio of their bandwidths.
    h100, only = Target.named("h100"), GemmProblem(64, 3584, 4096, torch.bfloat16)
    ours, theirs = (gemm_stream.measurement(only, target) for target in (H200, h100))
    assert ours is not None and theirs is not None and theirs.config == ours.config
    assert theirs.us == pytest.approx(ours.us * H200.bandwidth_bytes_s / h100.bandwidth_bytes_s)
    assert "on another device" in theirs.why(only) and "measured 12.0 us (" in ours.why(only)
    assert "measured 12.0 us with another epilogue (" in ours.why(replace(only, summed=32))


def test_another_kind_serves_where_its_own_was_not_measured() -> None:
    # A tile narrower than what its sums are over cannot.
    row = gemm_stream.CONFIGS["h200"][2048, 8192, "sum"]
    for m, part, expected in ((64, 32, row[64]), (64, 0, row[64]), (64, 64, None)):
        problem = GemmProblem(m, 2048, 8192, torch.bfloat16, summed=part)
        hit = gemm_stream.measurement(problem, H200)
        assert hit == expected


def test_most_rows_are_level_with_the_vendor() -> None:
    # Half of the rows at least are level with cuBLAS: a table that is not was measured wrongly, or chosen wrongly.
    # Between the powers of two, where cuBLAS has finer tiles, the vendor's own kernel is the one that is level.
    found = [entry for row in gemm_persistent.CONFIGS["h200"].values() for m, entry in row.items() if m <= 2048]
    rows = [entry for entry in found if entry.source == gemm_persistent.EVIDENCE]
    ratios = sorted(entry.us / entry.vendor_us for entry in rows)
    assert ratios[len(ratios) // 2] <= 1.01


def _rows(name: str) -> list[tuple[GemmProblem, gemm_stream.Config]]:
    """A device's rows for which there is a rule, which has no tokens beside a tile: the problem, and what was best."""
    found = [
        (measured_problem(m, *key), hit) for key, row in gemm_stream.CONFIGS[name].items() for m, hit in row.items()
    ]
    few = [(problem, hit.config) for problem, hit in found if problem.m <= gemm_stream.MOST_TOKENS]
    return [(problem, best) for problem, best in few if not best.extra_m]


def _same_tile(problem: GemmProblem, best: gemm_stream.Config) -> bool:
    """Whether the rule gives the tile that was best."""
    config = gemm_stream.alike(problem, H200)
    return (config.block_m, config.block_n) == (best.block_m, best.block_n)


def test_eight_bits_are_as_deep_as_their_bytes() -> None:
    # What tuning found for 8B at 128 tokens on an H200: down whole, pairs in two programs a multiprocessor.
    tile = gemm_stream.choose(GemmProblem(128, 4096, 14336, torch.float8_e4m3fn), H200)[0]
    assert tile == replace(tile, block_m=64, block_n=64, block_k=256, split_k=1)
    pair = GemmProblem(128, 14336, 4096, torch.float8_e4m3fn, paired=True, pair_offset=14336)
    assert gemm_stream.choose(pair, H200)[0] == gemm_stream.Config(128, 64, 128, 3, 4, 1)


def test_the_rule_is_near_the_table() -> None:
    # What other shapes get is what most of the measured ones have: the same tile, and nearly the same programs.
    rows = _rows("h200")
    for problem, best in rows:
        config = gemm_stream.alike(problem, H200)
        assert config.split_k <= 2 * best.split_k or best.split_k <= 2 * config.split_k
    assert sum(_same_tile(*row) for row in rows) >= 0.85 * len(rows)
    # It was fitted to an H200; an H100's rows are narrower at 64 tokens, and deep products have other tiles at 128.
    others = _rows("h100")
    assert sum(_same_tile(*row) for row in others) >= 0.75 * len(others)


@pytest.mark.parametrize(
    ("n", "k", "paired"), [(1792, 4096, True), (3072, 1024, True), (512, 12288, False), (1024, 16384, False)]
)
@pytest.mark.parametrize("m", [64, 128])
def test_few_columns_fill_the_device(n: int, k: int, paired: bool, m: int) -> None:
    problem = GemmProblem(m, n, k, torch.bfloat16, paired=paired, pair_offset=n * paired)
    config = gemm_stream.alike(problem, H200)
    programs = ceil(n / config.block_n) * ceil(m / config.block_m) * config.split_k
    # Half as many as the narrowest tiles and four parts of K would be, or enough of them.
    most = ceil(n / 32) * ceil(m / 64) * 4
    assert programs >= min(0.6 * H200.sm_count, most / 2)


@pytest.mark.parametrize("kind", ["one", "pair", "sum"])
@pytest.mark.parametrize("target", [H200, replace(H200, sm_count=114)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_rule_gives_tiles_that_can_be(kind: str, target: Target, dtype: torch.dtype) -> None:
    for n in (*range(32, 5300, 32), 8192, 28672, 151936):
        for m in (0, 1, 8, 16, 33, 64, 65, 128):
            part = 0 if kind != "sum" else 32 if m <= 64 or n <= 2048 else 64 if n <= 4096 else 128
            problem = GemmProblem(
                m, n, 1024, dtype, paired=kind == "pair", pair_offset=n * (kind == "pair"), summed=part
            )
            config = gemm_stream.alike(problem, target)
            assert config.block_n >= part and gemm_stream.smem_bytes(problem, config) <= target.smem_bytes
            rows = config.block_m if config.tokens_first else config.block_n
            assert config.stages > 1 and (config.warps == 4 or rows == 128)


@pytest.mark.parametrize("target", NAMED.values(), ids=NAMED)
def test_tiles_hold_what_their_epilogue_sums(target: Target) -> None:
    for m, width, n in itertools.product((8, 64, 65, 128), (32, 64, 128), (2048, 4224, 4608, 5120)):
        for k, itemsize in ((512, 2), (4096, 2), (4096, 8), (14336, 2)):
            problem = GemmProblem(m, n, k, torch.bfloat16, summed=width, epilogue_itemsize=itemsize)
            family, config, why = pick(problem, target)
            assert config.block_n >= width, (family, str(config), why)
            pair = replace(problem, paired=True, pair_offset=n)
            assert pick(pair, target)[1].block_n >= width


def test_every_split_has_a_step_and_a_grid_holds_any_n() -> None:
    for n, k in ((768, 768), (512, 256), (512, 128), (4096, 14336)):
        config = gemm_stream.alike(GemmProblem(16, n, k, torch.bfloat16), H200)
        per_split = ceil(ceil(k / config.block_k) / config.split_k) * config.block_k
        assert (config.split_k - 1) * per_split < k
    launch = gemm_stream.prepare(store_sample, gemm_stream.Config(64, 32, 64, 3, 4, 1, True), replace(DENSE, k=64))
    wide = replace(launch.problem, n=2_200_000)
    launch.problem = wide
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64, 64), (wide.n, 64)))
    assert launch.arguments(x, w, ())[0] == (68750, 1, 1)


@pytest.mark.parametrize("family", [gemm_stream, gemm_skinny, gemm_persistent, gemm_simple])
def test_every_config_gives_a_job(family) -> None:
    jobs = list(family.compile_jobs(90))
    assert len({job.label for job in jobs}) == len(jobs) > 0
    for job in jobs:
        assert {*job.signature, *job.constexprs} == set(job.fn.arg_names)
    assert family is gemm_simple or not list(family.compile_jobs(80))


def test_workspace_grows_and_keeps_what_it_replaced(device: torch.device) -> None:
    slot = 7
    first = workspace.get(device, 10, 4, slot)
    assert workspace.get(device, 5, 2, slot) is first
    assert not first.counters.any()
    larger = workspace.get(device, first.partials.numel() + 1, 4, slot)
    assert larger.partials.numel() > first.partials.numel()
    assert workspace.get(device, 10, 4, slot) is larger
    # A captured graph may still use the first one: nothing may take its memory.
    assert any(kept is first for kept in workspace._replaced)
    assert workspace.get(device, 10, 4, slot + 1) is not larger


@pytest.mark.gpu
def test_workspace_does_not_grow_inside_a_capture(device: torch.device) -> None:
    slot = 9
    held = workspace.get(device, 10, 4, slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert workspace.get(device, 10, 4, slot) is held
        with pytest.raises(Exception, match="while a CUDA graph is being captured"):
            workspace.get(device, held.partials.numel() + 1, 4, slot)


def plain(m: int, n: int, k: int) -> GemmProblem:
    return GemmProblem(m, n, k, torch.bfloat16, plain=True)


def test_the_vendor_is_taken_where_it_is_faster_with_the_epilogue_after_it() -> None:
    assert pick(plain(333, 4096, 14336), H200)[0] == "gemm_vendor"
    assert pick(plain(16, 4096, 14336), H200)[0] == "gemm_stream"
    assert pick(replace(plain(333, 4096, 14336), dtype=torch.float32), H200)[0] == "gemm_persistent"
    assert pick(plain(333, 64, 64), Target.interpreter())[0] != "gemm_vendor"
    # At 256 tokens the two kernels are measured level: what the epilogue moves again decides.
    assert pick(replace(plain(256, 4096, 12288), plain=False), H200)[0] == "gemm_persistent"
    glu = replace(plain(333, 14336, 4096), paired=True, pair_offset=14336, plain=False, rounds=True)
    family, _, why = pick(glu, H200)
    assert family == "gemm_vendor" and "the kernel of the epilogue after it" in why
    assert pick(replace(glu, rounds=False), H200)[0] == "gemm_persistent"
    assert "28672 apart" in (gemm_vendor.supports(replace(glu, pair_offset=28672)) or "")
    assert pick(replace(glu, m=2048), H200)[0] == "gemm_persistent"


def test_a_pair_that_cublas_computes_stays_its_own() -> None:
    whole = replace(plain(576, 28672, 4096), bare=True)
    name, _, why = pick(whole, H200)
    assert name == "gemm_vendor" and "together with what follows" in why
    # Its time is the one beside the pair's, which is the same product for it.
    pair = GemmProblem(640, 14336, 4096, torch.bfloat16, paired=True, pair_offset=14336)
    known = gemm_persistent.CONFIGS["h200"][14336, 4096, "pair"][640].vendor_us
    assert vendor_us(plain(640, 28672, 4096), H200) == vendor_us(pair, H200) == known
    # What cuBLAS refuses, ours take.
    assert pick(replace(whole, dtype=torch.float32), H200)[0] == "gemm_persistent"


def test_what_was_not_taken_is_named_with_its_time() -> None:
    why = pick(plain(333, 4096, 14336), H200)[2]
    assert "gemm_persistent would take" in why and "not gemm_stream: 333 tokens" in why


def test_the_vendors_time_lies_between_its_measurements() -> None:
    row = gemm_persistent.CONFIGS["h200"][4096, 14336, "one"]
    assert vendor_us(plain(512, 4096, 14336), H200) == row[512].vendor_us
    between = vendor_us(plain(1536, 4096, 14336), H200)
    assert between == pytest.approx((row[1024].vendor_us + row[2048].vendor_us) / 2)
    # A tile of 128 rows more than 512 tokens fill, and as many as 640 do.
    assert vendor_us(plain(520, 4096, 14336), H200) == row[640].vendor_us
    assert vendor_us(plain(16384, 4096, 14336), H200) == pytest.approx(2 * row[8192].vendor_us)
    assert vendor_us(plain(512, 4097, 14336), H200) is None


def test_a_size_that_fills_as_many_tiles_as_a_measured_one_is_that_size() -> None:
    row = gemm_persistent.CONFIGS["h200"][4096, 14336, "one"]
    for m, same in ((130, 136), (300, 320), (340, 384), (1010, 1024)):
        problem = replace(plain(m, 4096, 14336), plain=False)
        config, why = gemm_persistent.choose(problem, H200)
        assert config == row[same].config and f"at {same} tokens, which fill as many tiles of 64" in why
        assert gemm_persistent.estimate_us(problem, config, H200) == row[same].us


def test_a_size_between_two_measured_ones_is_weighed_by_its_waves() -> None:
    problem = replace(plain(1500, 4096, 14336), plain=False)
    config, why = gemm_persistent.choose(problem, H200)
    row = gemm_persistent.CONFIGS["h200"][4096, 14336, "one"]
    assert config in [hit.config for hit in row.values()] and "by the waves" in why
    assert row[1024].us <= gemm_persistent.estimate_us(problem, config, H200) <= row[2048].us


def test_narrower_tiles_count_as_less_than_a_wave_where_each_program_gets_one() -> None:
    whole = gemm_persistent.Config(128, 256, 64, 4, 8)
    halves, quarters = replace(whole, tail_n=128), replace(whole, tail_n=64)

    def us(m: int, config: gemm_persistent.Config) -> float:
        return gemm_persistent.estimate_us(GemmProblem(m, 4352, 2048, torch.bfloat16), config, H200)

    # 17 columns of tiles on 132 multiprocessors: 153 tiles are a wave and 21, 187 a wave and 55, 255 one and 123.
    assert us(1100, quarters) < us(1100, halves) < us(1100, whole)
    assert us(1400, halves) < us(1400, whole) == us(1400, quarters)
    assert us(1900, whole) == us(1900, halves) == us(1900, quarters)


def test_small_tiles_wait_for_their_predecessor() -> None:
    small, large = gemm_persistent.Config(64, 128, 64, 8, 4), gemm_persistent.Config(128, 256, 64, 4, 8)
    assert not gemm_persistent.starts_early(DENSE, small)
    assert gemm_persistent.starts_early(DENSE, large)
    for config, early in ((small, False), (large, True)):
        made = gemm_persistent.prepare(store_sample, config, DENSE, pdl=True)
        assert made.kernel.options["launch_pdl"] is early
        assert made.kernel.constexprs["PDL"]


@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_the_vendors_product_is_written_where_it_is_wanted(layout: str, device: torch.device) -> None:
    problem = GemmProblem(7, 24, 16, torch.bfloat16, layout, plain=True)
    x, w = (torch.randn(*shape).to(device, torch.bfloat16) for shape in ((7, 32), problem.w_shape))
    y = torch.full((7, 24), float("nan"), dtype=torch.bfloat16, device=device)
    gemm_vendor.prepare(None, gemm_vendor.Config(), problem)(x[:, ::2], torch.nn.Parameter(w), (y,))
    torch.testing.assert_close(y, reference(problem, x[:, ::2], w))


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("n", [24, 2056])
def test_the_vendors_product_gets_its_epilogue(layout: str, paired: bool, n: int, device: torch.device) -> None:
    problem = GemmProblem(7, n, 16, torch.bfloat16, layout, paired, n if paired else 0)
    # W is wider than what is used of it.
    wide = replace(problem, n=problem.w_columns + 8, paired=False)
    x, w = (torch.randn(*shape).to(device, torch.bfloat16) for shape in ((7, 16), wide.w_shape))
    y = torch.full((7, 4096), float("nan"), dtype=torch.bfloat16, device=device)
    body = silu_mul_sample if paired else store_sample
    gemm_vendor.prepare(body, gemm_vendor.Config(), problem)(x, w, (y,))
    glu = (lambda gate, up: torch.nn.functional.silu(gate) * up) if paired else None
    torch.testing.assert_close(y[:, :n], reference(problem, x, w, glu), atol=0.02, rtol=0.02)
    assert y[:, n:].isnan().all()


def test_rows_that_share_memory_are_not_loaded_wide() -> None:
    """Windows of a vector: rows as well as columns have stride 1, and only every fourth row starts at 16 bytes."""
    problem = replace(DENSE, x_strides=(0, 1, 1), w_strides=(0, 1, 1))
    config, _ = gemm_simple.choose(problem, H200)
    launch = gemm_simple.prepare(None, config, problem)
    assert launch.kernel(problem.x_strides, problem.w_strides).constexprs["STRIDE_FACTOR"] == 1
    assert launch.kernel((0, 4096, 1), (0, 4096, 1)).constexprs["STRIDE_FACTOR"] == 16
    assert launch.kernel((0, 4096, 1), (0, 1, 4096)).constexprs["STRIDE_FACTOR"] == 16
