"""The dump: what it says of a piece is what the plan does, requests that cannot be right fail, and kernels compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import triton

from terrazzo.tools import dump_kernels
from terrazzo.tools.dump_kernels import main
from terrazzo.tools.dump_plan import PEAKS, STAGES
from terrazzo.tools.models import names, pieces, save_piece

LLAMA = ["--model", "tiny-llama-3.1-8b"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> list[str]:
    """Arguments for the tiny Llama's middle piece, saved: reading a file is faster than capturing a model."""
    path = tmp_path_factory.mktemp("pieces") / "llama.json"
    save_piece(pieces("tiny-llama-3.1-8b")[1], path)
    return ["--load", str(path)]


def dumped(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What the tool prints as JSON."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def both_sizes() -> list[dict[str, Any]]:
    """The middle piece of the 8B model at 16 and 2048 tokens, dumped by the command itself."""
    command = [sys.executable, "-m", "terrazzo.tools.dump_kernels", "--model", "llama-3.1-8b", "--size", "16,2048"]
    return json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def published(both_sizes) -> dict[str, Any]:
    """That piece at 16 tokens."""
    return both_sizes[0]


def test_the_published_piece_costs_what_its_weights_weigh(published):
    total = published["totals"]
    assert published["piece"] == "llama-3.1-8b piece 1 (middle)" and published["target"]["name"] == "h200"
    # o_proj, gate and up, down, qkv in bf16.
    weights = 2 * 4096 * (4096 + 2 * 14336 + 14336 + 6144)
    assert total["weight_bytes"] == weights
    assert weights < total["bytes"] < 1.05 * weights
    assert total["flops"] >= 16 * weights
    assert total["floor_us"] == pytest.approx(sum(k["floor_us"] for k in published["kernels"]))
    assert total["kernels"] < total["computed"] < total["ops"]


def test_a_floor_is_the_larger_of_bytes_and_flops(published):
    bandwidth = published["target"]["bandwidth_bytes_s"]
    for kernel in published["kernels"]:
        peak = PEAKS[90].half if kernel["family"].startswith("gemm") else PEAKS[90].plain
        memory_us, compute_us = kernel["bytes"] / bandwidth * 1e6, kernel["flops"] / peak * 1e6
        assert kernel["floor_us"] == pytest.approx(max(memory_us, compute_us))
        assert kernel["bound"] == ("compute" if compute_us > memory_us else "memory")


def test_what_is_predicted_is_near_the_floor_for_few_tokens(published):
    total = published["totals"]
    assert total["predicted_us"] == pytest.approx(sum(k["predicted_us"] for k in published["kernels"]))
    # Measured 109.8 us (H200); its weights alone take 101.4.
    assert total["floor_us"] < total["predicted_us"] < 1.2 * total["floor_us"]


def test_stages_and_kernels_are_those_of_the_plan(published):
    assert tuple(s["name"] for s in published["stages"]) == STAGES
    assert all(s["ms"] > 0 and s["text"] for s in published["stages"])
    for kernel in published["kernels"]:
        assert f"launch_{kernel['name'].lstrip('_')} = {kernel['family']}.prepare(" in published["source"]
        assert kernel["why"] and kernel["holds"]
    names = [held["name"] for kernel in published["kernels"] for held in kernel["holds"]]
    assert len(names) == len(set(names))
    assert {"layers.py"} == {held["source"].split(":")[0] for k in published["kernels"] for held in k["holds"]}


def test_every_refusal_names_two_kernels_and_a_reason(published):
    groups = {held["name"] for kernel in published["kernels"] for held in kernel["holds"]}
    assert published["not_fused"]
    for refusal in published["not_fused"]:
        assert {refusal["producer"], refusal["consumer"]} <= groups and refusal["reason"]


def test_a_large_size_is_bound_by_compute(both_sizes):
    small, large = both_sizes
    assert {k["bound"] for k in small["kernels"]} == {"memory"}
    assert {k["bound"] for k in large["kernels"] if k["family"].startswith("gemm")} == {"compute"}


def test_without_fusion_there_are_more_kernels_and_bytes(capsys, llama):
    (fused,), (alone,) = dumped(capsys, *llama), dumped(capsys, *llama, "--no-fuse")
    assert alone["totals"]["kernels"] > fused["totals"]["kernels"]
    assert alone["totals"]["bytes"] > fused["totals"]["bytes"]


def test_the_screen_holds_what_the_json_holds(capsys, llama):
    (dump,) = dumped(capsys, *llama)
    assert main(llama) == 0
    # Long lines are wrapped on the screen.
    text = " ".join(capsys.readouterr().out.split())
    for kernel in dump["kernels"]:
        assert kernel["name"] in text and all(clause in text for clause in kernel["why"].split("; "))
    # What is said of several kernels stands once, after their names.
    names = ", ".join(kernel["name"] for kernel in dump["kernels"])
    assert text.count("not gemm_simple: ") == text.count(f"{names}: not gemm_skinny: ") == 1
    assert all(f"{r['producer']} + {r['consumer']}: {r['reason']}" in text for r in dump["not_fused"])
    assert f"-> {len(dump['kernels'])} kernels" in text


@pytest.mark.parametrize("stage", ["fuse", "emit"])
def test_one_stage_is_printed(capsys, llama, stage):
    (dump,) = dumped(capsys, *llama)
    assert main([*llama, "--stage", stage]) == 0
    printed = capsys.readouterr().out
    assert {s["name"]: s["text"].strip() for s in dump["stages"]}[stage] == printed.strip()


def test_the_source_says_how_to_make_it_again(capsys):
    assert main([*LLAMA, "--size", "7", "--source"]) == 0
    source = capsys.readouterr().out
    compile(source, "plan", "exec")
    title = source.splitlines()[0]
    assert "--model tiny-llama-3.1-8b --piece 1 --size 7 --target h200 --source" in title


def test_ops_that_run_as_themselves_are_listed_with_the_reason(capsys, llama, tmp_path):
    mixtral = ["--load", str(tmp_path / "mixtral.json")]
    save_piece(pieces("tiny-mixtral-8x7b")[1], mixtral[1])
    (dump,) = dumped(capsys, *mixtral)
    assert main([*mixtral, "--ops"]) == 0
    text = capsys.readouterr().out
    foreign = [k for k in dump["kernels"] if not k["family"]]
    assert any(k["config"] == "terrazzo_models.experts.default" for k in foreign)
    assert all(k["config"] in text and k["why"] in text for k in foreign)
    assert main([*llama, "--ops"]) == 0
    assert "every op is in a kernel" in capsys.readouterr().out


def test_a_saved_piece_gives_the_same_kernels(capsys, llama):
    (loaded,), (made,) = dumped(capsys, *llama), dumped(capsys, *LLAMA)
    assert loaded["kernels"] == made["kernels"]


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--model", "lama-3.1-8b"], "llama-3.1-8b"),
        ([*LLAMA, "--stage", "fus"], "fuse"),
        ([*LLAMA, "--piece", "midle"], "middle"),
        ([*LLAMA, "--piece", "9"], "0, 1, 2, 3"),
        ([*LLAMA, "--target", "h20"], "h200"),
        ([*LLAMA, "--target", "h200", "--arch", "80"], "one of the two"),
        (["--load", "no such file"], "No such file"),
    ],
)
def test_a_request_that_cannot_be_right_gets_near_misses(capsys, arguments, near):
    assert main(arguments) == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model gpt2 --kernel mul_38", "--kernel mul_38: it chooses whose code is printed"),
        ("--model gpt2 --kernel mul_38 --stats", "Add --ptx or --sass"),
        ("--model gpt2 --range 1:64 --ptx --kernel mul_38", "--range with --ptx, --kernel: it prints regimes"),
        ("--model gpt2 --range 1:64 --size 16", "--range with --size: it prints regimes"),
        ("--all-models --piece 1", "--all-models with --piece: it compiles"),
        ("--all-models --source --ops --stage fuse", "--all-models with --source, --stage, --ops: it"),
        ("--all-models --range 1:64", "--all-models with --range: it compiles"),
        ("--all-models --size 0", "a model has one token at least"),
        ("--model gpt2 --range 0:64", "--range from 0: a model has one token at least"),
        ("--model gpt2 --stage fuse --source --stats", "--stage with --source, --stats: it prints a stage's result"),
        ("--model gpt2 --stage fuse --json", "--stage with --json: it prints a stage's result"),
        ("--model gpt2 --ops --stats --sass", "--ops with --stats, --sass: it lists ops"),
        ("--load piece.json --piece 0", "--load with --piece: a file holds one piece"),
        ("--load piece.json --dtype bf16", "--load with --dtype: a file holds one piece"),
        ("--model gpt2 --dtype fp8", "gpt2 in fp8"),
    ],
)
def test_what_would_be_ignored_is_refused(capsys, arguments, said):
    assert main(arguments.split()) == 2
    assert said in capsys.readouterr().err


def test_of_all_models_those_without_a_form_in_the_dtype_are_left_out(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(dump_kernels, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(dump_kernels, "_whole_model", lambda name, *others: asked.append((name, *others)) or [])
    assert main(["--all-models", "--dtype", "fp8", "--size", "1,2048", "--json"]) == 0
    told = capsys.readouterr()
    assert {name for name, *_ in asked} == {*names()} - {"gpt2"}
    assert all((sizes, dtype) == ([1, 2048], "fp8") for _, sizes, _, dtype in asked)
    assert json.loads(told.out) == [] and told.err.startswith("left out: gpt2 in fp8") and told.err.count("\n") == 1


def test_a_size_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main([*LLAMA, "--size", "1,x"])
    assert left.value.code == 2
    assert "'1,x'" in capsys.readouterr().err


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="this process compiles")
def test_an_interpreting_process_does_not_compile(capsys, llama):
    assert main([*llama, "--stats"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_kernels_of_a_piece_compile(llama):
    """For every architecture: the interpreter accepts kernels that the compiler refuses."""
    code = "import sys\nfrom terrazzo.tools.dump_kernels import main\n"
    code += f"sys.exit(any([main([*{llama!r}, '--arch', str(a), '--ptx', '--json']) for a in (80, 90, 100)]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = done.stdout
    for arch in (80, 90, 100):
        (dump,), end = json.JSONDecoder().raw_decode(text)
        text = text[end:].lstrip()
        assert dump["target"]["arch"] == arch
        assert [s["kernel"] for s in dump["compiled"]] == [k["name"] for k in dump["kernels"]]
        for stats in dump["compiled"]:
            assert stats["registers"] > 0 and not stats["spills_bytes"] and not stats["wrong"]
            assert f".target sm_{arch}" in stats["code"]


def test_a_range_names_its_regimes_and_configs(capsys, llama):
    dump = dumped(capsys, *llama, "--range", "1:64")[0]
    assert dump["regimes"][0] == ["1", ""] and dump["regimes"][-1][0].endswith("-64")
    rows = [row for row in dump["rows"] if row["regime"] == dump["regimes"][-1][0]]
    assert {row["family"] for row in rows} >= {"gemm_stream"}
    # Configs of one launch follow one another without a gap, up to the last size.
    for kernel in {row["kernel"] for row in rows}:
        spans = [tuple(map(int, row["sizes"].split("-"))) for row in rows if row["kernel"] == kernel]
        assert all(before[-1] + 1 == after[0] for before, after in pairwise(spans))
        assert spans[-1][-1] == 64
    assert main([*llama, "--range", "1:64"]) == 0
    assert "regimes" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["16", "9:3", "a:b"])
def test_a_range_that_is_none_is_refused(llama, text):
    with pytest.raises(SystemExit) as refused:
        main([*llama, "--range", text])
    assert refused.value.code == 2
