"""PyTorch's operator database: a fixed part of it on every run, and the checks' own conscience."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools import compare, operators, pool
from terrazzo.tools.op_check import PATHS, Result, check

# Operators of every kind, and those that were wrong once. `make conformance` runs them all, with every sample.
PART = """
    __rmod__ addmm addmv amax aminmax any arange argmin as_strided as_strided/partial_views atan2 baddbmm bfloat16
    bitwise_left_shift bucketize cat clamp copysign cummax cumsum diagonal_scatter diff div/floor_rounding dot
    expand_as fill flip fmod gather ge index_add index_put isin kron linalg.vector_norm log_softmax logaddexp
    logical_xor masked_fill masked_scatter matmul max/reduction_with_dim mean mode mul nan_to_num narrow
    nn.functional.avg_pool2d nn.functional.batch_norm nn.functional.binary_cross_entropy
    nn.functional.cosine_similarity nn.functional.cross_entropy nn.functional.embedding nn.functional.gelu
    nn.functional.glu nn.functional.interpolate/bilinear nn.functional.layer_norm
    nn.functional.linear nn.functional.max_unpool2d/grad nn.functional.one_hot
    nn.functional.pad/reflect nn.functional.pixel_shuffle nn.functional.rms_norm nn.functional.smooth_l1_loss norm
    permute pow prod remainder repeat_interleave roll scatter scatter_reduce/amax searchsorted select_scatter sgn
    sigmoid slice_scatter softmax/with_dtype sort split squeeze/multiple std_mean sum take_along_dim tril trunc unfold
    unique var_mean view view_as_complex where xlogy
""".split()


def quiet(text: str) -> None:
    """Nobody asks how far it is."""


@pytest.mark.parametrize("op", PART)
def test_a_part_of_the_database(op: str) -> None:
    for dtype, paths in (("float32", PATHS), ("int64", ["aten"])):
        result = check(op, dtype, paths, 1, quiet)
        assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("dtype", ["bfloat16", "bool"])
@pytest.mark.parametrize("op", PART[::6])
def test_other_dtypes(op: str, dtype: str) -> None:
    result = check(op, dtype, ["aten"], 1, quiet)
    assert not result.failures, "\n".join(result.failures)


def shifted(out: Any) -> Any:
    return [out[0] + 1e-3 * torch.ones_like(out[0])] if isinstance(out, (list, tuple)) else out


def transposed(out: Any) -> Any:
    return [out[0].t().contiguous().t()]


def narrowed(out: Any) -> Any:
    return [out[0].double()]


@pytest.mark.parametrize("spoil", [shifted, transposed, narrowed])
def test_what_is_wrong_is_found(spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = CompiledPiece.__call__
    monkeypatch.setattr(CompiledPiece, "__call__", lambda self, *args: spoil(right(self, *args)))
    result = check("tril", "float32", ["aten"], 0, quiet)
    assert any("result 0" in failure for failure in result.failures)


def test_a_crash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Any, *args: Any) -> Any:
        raise KeyError("lost")

    monkeypatch.setattr(CompiledPiece, "__call__", crash)
    result = check("exp", "float32", PATHS, 2, quiet)
    assert len(result.failures) >= 4 and all("crash: KeyError" in failure for failure in result.failures)


def test_what_is_not_compared_is_counted() -> None:
    result = check("exp", "float32", ["aten"], 1, quiet)
    assert result.checks and result.aside["samples left out, as asked"]
    assert check("nn.functional.dropout", "float32", ["aten"], 1, quiet).failures == []
    assert "eager refuses" not in " ".join(result.aside)
    assert check("nonzero", "float32", ["aten"], 1, quiet).whole


def test_widening_keeps_gaps() -> None:
    x = torch.arange(8.0)[1::2]
    wide = compare.widened((x, x[1:]))
    assert wide[0].stride() == (2,) and wide[0].dtype == torch.float64
    assert compare.sharing(wide) == [0, 0]
    assert wide[0].as_strided((8,), (1,), 0).tolist() == list(range(8))


def work(task: str, note: Callable[[str], None]) -> Any:
    note("its middle")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        time.sleep(600)
    return Result(task, "float32")


def test_tasks_that_die_or_hang_cost_themselves_alone() -> None:
    done = {d.task: d for d in pool.run(work, ["a", "die", "b", "hang", "c"], procs=2, seconds=20)}
    assert all(done[t].result.op == t and not done[t].ended_by for t in "abc")
    assert done["die"].ended_by == "the process died (-9), at its middle"
    assert done["hang"].ended_by == "it took too long, at its middle"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "terrazzo.tools.conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_streams_its_results_and_goes_on_where_it_stopped(tmp_path: Any) -> None:
    path = tmp_path / "found.jsonl"
    first = run_tool("--ops", "exp", "--dtypes", "float32", "--samples", "1", "--json", str(path))
    assert first.returncode == 0, first.stderr
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["coverage"]["lowered"]["aten.exp.default"] >= 1
    again = run_tool("--ops", "exp,sin", "--dtypes", "float32", "--samples", "1", "--json", str(path), "--resume")
    assert again.returncode == 0 and "2 operators" in again.stdout
    assert len(path.read_text().splitlines()) == 2


def test_a_name_that_nothing_has_gets_its_neighbours() -> None:
    done = run_tool("--ops", "cumsun")
    assert done.returncode and "cumsum" in done.stderr


def test_the_page_names_every_core_operator_and_what_becomes_of_it() -> None:
    found = list(operators.core())
    text = operators.PAGE.read_text()
    assert not [o.name for o in found if o.why != operators.OLD and f"| `{o.name}` | {o.how} |" not in text]
    assert operators.share(found) >= 0.9
