"""The comparison inside vLLM: what it starts, what counts as agreement, what it shows. Engines are stand-ins."""

from __future__ import annotations

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from terrazzo.tools import vllm_engine, vllm_lab, vllm_process
from terrazzo.tools.vllm_engine import busy_us
from terrazzo.tools.vllm_lab import agree, agreement_table, failures, further, time_table, times
from terrazzo.tools.vllm_process import Run, environment

# Stands for an engine: what it is asked for, turned into results `gap` away from eager's.
STAND_IN = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
if "answers" in asked:
    # The two differ by a quarter, on a host that gets slower all the time.
    answers, turn = os.fdopen(asked["answers"], "w"), 0
    print(json.dumps({{"init_s": 20.0}}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "cores" in order:
            assert order["cores"] and not turn
            print("null", file=answers, flush=True)
            continue
        turn += 1
        if {gaps}[asked["contender"]] is None:
            sys.exit("out of memory")
        ms = (5.0 if asked["contender"] == "default" else 4.0) * turn
        print(ms if "time" in order else 4500.0, file=answers, flush=True)
    sys.exit()
name = asked["contender"]
gap = {gaps}[name]
if gap is None:
    sys.exit("out of memory")
if name == "eager":
    open(asked["tokens"], "w").close()
while not os.path.exists(asked["tokens"]):
    time.sleep(0.01)
assert (os.environ["VLLM_PLUGINS"] == "terrazzo") == (name == "terrazzo")
result = {{"tokens": [7, 9], "logprobs": [-1.0 - gap, -2.0], "likeliest": [7, 9 if gap < 1 else 8]}}
json.dump({{"start_s": 3.0, "said": [f"{{name}} compiled"], "results": [result]}}, open(asked["out"], "w"))
"""

BENCH = """
import json, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
json.dump({"init_s": 61.0, "compilation_time": 16.0}, open(options["--res"], "w"))
"""


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A lab whose engines are as far from eager as the mapping says; None for one that dies."""

    def with_gaps(**gaps):
        engine = tmp_path / "engine.py"
        engine.write_text(STAND_IN.format(gaps={"eager": 0.0, "fp32": -0.02, "default": 0.1, **gaps}))
        monkeypatch.setattr(vllm_process, "ENGINE", engine)
        bench = tmp_path / "bench.py"
        bench.write_text(BENCH)
        monkeypatch.setenv("LABMODELS", str(tmp_path / "models"))
        monkeypatch.setenv("LABBENCH", str(bench))
        return tmp_path

    return with_gaps


def screen(table):
    shown = io.StringIO()
    Console(width=160, file=shown).print(table)
    return shown.getvalue()


@pytest.mark.parametrize("jobs", [1, 4])
def test_each_contender_is_measured_against_eager(lab, jobs):
    results = agree(["a", "b"], ["FULL_AND_PIECEWISE", "NONE"], jobs, lab(terrazzo=0.08))
    assert len(results) == 2 * (2 + 2 * 2)
    ours = next(r for r in results if (r["model"], r["contender"], r["graphs"]) == ("b", "terrazzo", "NONE"))
    assert ours["max_difference"] == pytest.approx(0.08) and ours["mean_difference"] == pytest.approx(0.04)
    assert ours["mean_from_fp32"] == pytest.approx(0.05) and ours["likeliest"] == 1.0
    assert not failures(results) + further(results)
    assert "0.0800" in screen(agreement_table(results))


def test_further_from_eager_than_vllms_default_is_a_failure(lab):
    results = agree(["a"], ["NONE"], 2, lab(terrazzo=1.5))
    assert further(results) == ["a NONE: mean difference 0.75, vLLM's default has 0.05"]
    assert results[-1]["likeliest"] == 0.5


def test_what_is_not_a_number_agrees_with_nothing(lab):
    results = agree(["a"], ["NONE"], 2, lab(terrazzo=0.0))
    assert not further(results)
    results[-1]["mean_difference"] = float("nan")
    assert len(further(results)) == 1


def test_an_engine_that_dies_is_a_failure_with_its_last_words(lab):
    results = agree(["a"], ["NONE"], 2, lab(terrazzo=None))
    (line,) = failures(results)
    assert "out of memory" in line and line.startswith("a terrazzo NONE")
    assert "failed" in screen(agreement_table(results))


def test_what_finished_engines_found_is_kept(lab):
    work = lab(terrazzo=None)
    assert failures(agree(["a"], ["NONE"], 2, work))
    # The one that died runs again, the others do not: they would be further away now.
    work = lab(terrazzo=0.05, default=0.3)
    results = agree(["a"], ["NONE"], 2, work, known=True)
    assert not failures(results)
    assert {r["contender"]: r["mean_difference"] for r in results}["default"] == pytest.approx(0.05)


def test_no_two_engines_share_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    ours, theirs = (environment(Run("a", c), tmp_path) for c in ("terrazzo", "default"))
    assert ours["VLLM_PLUGINS"] == "terrazzo" and theirs["VLLM_PLUGINS"] == ""
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert ours[name] != theirs[name]


def test_times_are_taken_in_turn_and_shown_side_by_side(lab):
    results = times(["a"], [1, 8], lab(terrazzo=0.0))
    assert [r["contender"] for r in results] == ["default", "terrazzo"]
    default, ours = results
    assert default["ms"].keys() == ours["ms"].keys() == {"1", "8", "prefill2048", "loop"}
    # Four things are asked of each in a round, and the median of seven rounds is the fourth.
    assert default["ms"]["1"] == 65.0
    assert set(ours["ratio"].values()) == {1.25} and "ratio" not in default
    shown = screen(time_table(results))
    assert "65.00 / 4.50" in shown and "52.00 / 4.50, 1.25" in shown and shown.count("61.0") == 2


def test_rounds_are_as_many_as_asked_for_and_kept_one_by_one(lab):
    _, ours = times(["a"], [1], lab(terrazzo=0.0), rounds=3)
    assert ours["ratios"]["1"] == [1.25] * 3


def test_times_one_engine_after_the_other(lab):
    results = times(["a"], [1], lab(terrazzo=0.0), apart=True)
    assert all(r["ms"]["1"] > 0 and "ratio" not in r for r in results) and "1.25" not in screen(time_table(results))


def test_an_engine_that_dies_between_two_times_is_a_failure(lab):
    results = times(["a"], [1], lab(terrazzo=None))
    assert ["terrazzo's engine failed" in line for line in failures(results)] == [True, False]
    assert "out of memory" in failures(results)[1] and screen(time_table(results)).count("failed") == 2


def test_an_engine_that_left_a_child_behind_is_found_dead(lab, monkeypatch):
    work = lab(terrazzo=0.0)
    vllm_process.ENGINE.write_text(
        "import os, sys\nif os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\nsys.exit('gone')"
    )
    monkeypatch.setattr(vllm_process, "LOOK_S", 0.1)
    start = time.monotonic()
    run, gone = Run("a", "default"), pytest.raises(vllm_process.Died, match="gone")
    with vllm_process.Engine(run, run.order, work) as engine, gone:
        engine.answer()
    assert time.monotonic() - start < 60


def test_tokens_are_those_of_engines_given_the_same():
    one, two = Run("a", "eager"), Run("a", "eager", given='{"tensor_parallel_size": 2}')
    assert one.tokens == Run("a", "terrazzo", "NONE").tokens != two.tokens


def test_engines_of_several_gpus_get_more_cores():
    assert Run("a", "eager").gpus == 1 and Run("a", "eager", given='{"tensor_parallel_size": 2}').gpus == 2


def test_an_engine_and_its_children_move_to_their_cores(monkeypatch):
    class Process:
        """Has two threads, or ended meanwhile."""

        def __init__(self, pid=1):
            self.pid = pid

        def children(self, recursive):
            return [Process(2), Process(3)] if recursive else []

        def threads(self):
            if self.pid == 2:
                raise Gone
            return [SimpleNamespace(id=10 * self.pid), SimpleNamespace(id=10 * self.pid + 1)]

    class Gone(Exception):
        pass

    def affinity(thread, cores):
        if thread == 11:
            raise ProcessLookupError
        moved[thread] = cores

    moved = {}
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=Process, NoSuchProcess=Gone))
    monkeypatch.setattr("os.sched_setaffinity", affinity)
    vllm_engine._move([4, 5])
    assert moved == {10: [4, 5], 30: [4, 5], 31: [4, 5]}


def test_kernels_that_overlap_keep_the_gpu_busy_once():
    assert busy_us([]) == 0
    assert busy_us([(10, 14), (0, 3), (2, 5), (2, 4), (14, 15)]) == 5 + 5


def test_without_a_lab_it_says_what_is_missing(monkeypatch):
    for name in ("LABMODELS", "LABBENCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["vllm_lab"])
    with pytest.raises(vllm_lab.UserError, match="LABMODELS and LABBENCH"):
        vllm_lab.main()


def test_everything_as_json(lab, monkeypatch, capsys):
    work = lab(terrazzo=0.0)
    monkeypatch.setattr(sys, "argv", ["vllm_lab", "--models", "a", "--json", "--work", str(work / "logs")])
    assert vllm_lab.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(found[part]) for part in ("agree", "time")] == [4, 2]
    assert (work / "logs" / "a-terrazzo-FULL_AND_PIECEWISE.log").exists()
