"""vLLM with terrazzo against vLLM as it comes: do they say the same, and how fast.

    python tools/vllm_lab.py                                    both, on the lab's models
    python tools/vllm_lab.py --agree --models llama-3.1-8b-l4 --graphs FULL_AND_PIECEWISE,PIECEWISE,NONE --jobs 6
    python tools/vllm_lab.py --time --models llama-3.1-8b --batches 1,8 --json
    python tools/vllm_lab.py --agree --models llama-3.1-8b --no-fp32 --given '{"tensor_parallel_size": 2}'

Needs a GPU, vLLM, and the lab's models: `$LABMODELS`, a folder with a folder for each, and `$LABBENCH`, its
`bench_vllm.py`. Each engine is a process of its own; those that are only compared may run side by side (`--jobs`).

agree   16 prompts of 5 to 700 tokens, 64 tokens each: vLLM without compilation decodes greedily, the others are made to
        emit the same tokens. Per contender: how far its log-probabilities of them are from those, how far from those in
        fp32, and how often another token was the likeliest. Fails where terrazzo is further away than vLLM's default by
        more than a tenth, in the mean over all steps.
time    a first start of each contender, then a second of both, which stay and are timed in turn: decode steps at
        several batch sizes, prefill of 2048 tokens, how long the GPU is busy meanwhile, and a loop of Python that says
        whether both had the same of their host. `--apart` times one engine after the other, where a GPU does not hold
        two. Only after the same model agreed, unless `--time` alone is
        asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from terrazzo.lowering.errors import UserError
from terrazzo.tools import vllm_process
from terrazzo.tools.command import exit_status, sizes
from terrazzo.tools.vllm_process import Run, to_its_end
from terrazzo.tools.vllm_turns import KV_GIB, LOOP, PREFILL, ROUNDS, in_turn

MODELS = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-8b", "qwen3-30b-a3b")
GRAPHS = ("FULL_AND_PIECEWISE", "PIECEWISE", "NONE")
BATCHES = (1, 8, 32, 128)
# How much further from eager than vLLM's default, in the mean, counts as worse: sums in another order differ by chance.
SLACK = 1.1


def agree(
    models: Sequence[str],
    graphs: Sequence[str],
    jobs: int,
    work: Path,
    known: bool = False,
    exact: bool = True,
    given: str = "{}",
) -> list[dict[str, Any]]:
    """How far each contender's log-probabilities are from those of vLLM without compilation.

    Args:
        models, graphs: folders of $LABMODELS, and kinds of CUDA graphs.
        jobs: engines side by side.
        work: where each leaves its results.
        known: an engine whose results are there is not run again.
        exact: with an engine in fp32, whose weights take twice the memory.
        given: what vLLM's `LLM` is given besides or instead (see vllm_engine.py), as JSON.

    Returns:
        Per model, contender and kind of graphs: max_difference and mean_difference from eager and mean_from_fp32 (nats;
        the last not a number where no engine of fp32 runs), likeliest (share of steps at which the likeliest token is
        the same), start_s, said; or `failed`, the end of what the engine wrote.
    """
    # The others wait for eager's tokens, so that comes first.
    runs = [Run(model, contender, "", given) for contender in ("eager", "fp32")[: 1 + exact] for model in models]
    runs += [Run(m, c, g, given) for m in models for g in graphs for c in ("default", "terrazzo")]
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(runs, pool.map(lambda run: _engine(run, work, known), runs), strict=True))
    plain = {(run.model, run.contender): made for run, made in found.items() if not run.graphs}
    return [
        {**vars(run), **_distance(made, plain[run.model, "eager"], plain.get((run.model, "fp32")))}
        for run, made in found.items()
    ]


def _engine(run: Run, work: Path, known: bool) -> dict[str, Any]:
    """What one engine found."""
    out = work / f"{run.name}.json"
    if known and out.exists():
        return json.loads(out.read_text())
    order = {**run.order, "graphs": run.graphs, "tokens": str(work / run.tokens), "out": str(out)}
    return to_its_end([str(vllm_process.ENGINE), json.dumps(order)], run, work, out)


def _distance(found: dict[str, Any], eager: dict[str, Any], exact: dict[str, Any] | None) -> dict[str, Any]:
    for one in (found, eager):
        if "failed" in one:
            return {"failed": one["failed"]}
    if any(ours["tokens"] != theirs["tokens"] for ours, theirs in zip(found["results"], eager["results"], strict=True)):
        return {"failed": "it did not emit the tokens that it was made to emit"}
    gaps = _gaps(found, eager)
    pairs = zip(found["results"], eager["results"], strict=True)
    same = [a == b for ours, theirs in pairs for a, b in zip(ours["likeliest"], theirs["likeliest"], strict=True)]
    return {
        "max_difference": max(gaps),
        "mean_difference": fmean(gaps),
        "mean_from_fp32": float("nan") if exact is None or "failed" in exact else fmean(_gaps(found, exact)),
        "likeliest": fmean(same),
        "start_s": found["start_s"],
        "said": [line for line in found["said"] if "terrazzo" in line],
    }


def _gaps(found: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How far apart two engines' log-probabilities are, step by step."""
    pairs = zip(found["results"], other["results"], strict=True)
    return [abs(a - b) for ours, theirs in pairs for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)]


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Engines that failed."""
    return [f"{r['model']} {r['contender']} {r['graphs']}: {r['failed']}" for r in results if "failed" in r]


def further(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where terrazzo is further from eager than vLLM's default."""
    found = []
    sound = [r for r in results if "failed" not in r]
    default = {(r["model"], r["graphs"]): r["mean_difference"] for r in sound if r["contender"] == "default"}
    for r in sound:
        other = default.get((r["model"], r["graphs"]))
        if r["contender"] != "terrazzo" or other is None:
            continue
        # Written so that what is not a number fails.
        if not r["mean_difference"] <= SLACK * other:
            gap = f"mean difference {r['mean_difference']:.3g}, vLLM's default has {other:.3g}"
            found.append(f"{r['model']} {r['graphs']}: {gap}")
    return found


def times(
    models: Sequence[str],
    batches: Sequence[int],
    work: Path,
    apart: bool = False,
    given: str = "{}",
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """How fast each contender starts, decodes and prefills.

    Args:
        models: folders of $LABMODELS.
        batches: numbers of requests that decode at once.
        work: where logs and caches are.
        apart: one engine after the other, instead of both in turn.
        given: as for `agree`.
        rounds: as for `in_turn`.

    Returns:
        Per model and contender: first, what the lab's benchmark says of a start with empty caches, and what
        `vllm_turns.in_turn` finds in a second; or `failed`.
    """
    results = []
    for model in models:
        runs = [Run(model, contender, "", given) for contender in ("default", "terrazzo")]
        first = {run.contender: _first_start(run, work) for run in runs}
        found: dict[str, dict[str, Any]] = {}
        for group in [[run] for run in runs] if apart else [runs]:
            found |= in_turn(group, batches, work, rounds)
        for run in runs:
            failed = {k: v for k, v in first[run.contender].items() if k == "failed"}
            results.append({**vars(run), "first": first[run.contender], **found[run.contender], **failed})
    return results


def _first_start(run: Run, work: Path) -> dict[str, Any]:
    out = work / f"{run.name}-first.jsonl"
    command = [os.environ["LABBENCH"], "--model", run.folder, "--mode", "default", "--no-bench", "--no-prof"]
    command += ["--tag", run.name, "--res", str(out), "--prof-dir", str(work), "--kv-gib", str(KV_GIB)]
    command += ["--extra", run.given]
    return to_its_end(command, run, work, out)


def agreement_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per engine."""
    made = Table(title="log-probabilities of the same tokens, against vLLM without compilation", title_justify="left")
    for column in ("model", "graphs", "contender"):
        made.add_column(column, no_wrap=True)
    for column in ("largest", "mean", "likeliest the same", "mean from fp32", "start, s"):
        made.add_column(column, justify="right")
    for r in results:
        row = [r["model"], r["graphs"], r["contender"]]
        if "failed" in r:
            made.add_row(*row, "[red]failed[/]")
            continue
        numbers = f"{r['max_difference']:.4f}", f"{r['mean_difference']:.5f}", f"{r['likeliest']:.1%}"
        made.add_row(*row, *numbers, f"{r['mean_from_fp32']:.5f}", f"{r['start_s']:.0f}")
    return made


def time_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per model and contender: ms of a decode step and of a prefill, how long the GPU is busy, s to start."""
    columns = list(dict.fromkeys(what for r in results for what in r.get("ms", {}) if what != LOOP))
    made = Table(title="ms / of it with the GPU busy, default's / ours; start in s", title_justify="left")
    made.add_column("model", no_wrap=True)
    made.add_column("contender", no_wrap=True)
    for column in (*(c if c == PREFILL else f"B={c}" for c in columns), LOOP, "first start", "compiling", "second"):
        made.add_column(column, justify="right", no_wrap=True)
    for r in results:
        if "failed" in r:
            made.add_row(r["model"], r["contender"], "[red]failed[/]")
            continue
        row = [f"{r['ms'][c]:.2f} / {r['busy_us'][c] / 1e3:.2f}" for c in columns]
        row = [f"{text}, {r['ratio'][c]:.2f}" if "ratio" in r else text for c, text in zip(columns, row, strict=True)]
        row.append(f"{r['ms'][LOOP]:.2f}")
        first, second = r["first"], r["init_s"]
        row += [f"{first['init_s']:.1f}", f"{first['compilation_time']:.1f}", f"{second:.1f}"]
        made.add_row(r["model"], r["contender"], *row)
    return made


def _json(text: str) -> str:
    """A JSON object, as the `type` of an argument."""
    try:
        found = json.loads(text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {wrong}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return text


def _rounds(text: str) -> int:
    """A number of rounds, as the `type` of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agree", action="store_true", help="only whether they agree")
    parser.add_argument("--time", action="store_true", help="only times")
    parser.add_argument("--models", default=",".join(MODELS), help="folders of $LABMODELS, comma-separated")
    parser.add_argument("--graphs", default=GRAPHS[0], help=f"of {', '.join(GRAPHS)}, comma-separated")
    parser.add_argument("--batches", type=sizes, default=BATCHES, help="decode batch sizes to time, comma-separated")
    parser.add_argument(
        "--apart", action="store_true", help="time one engine after the other, where a GPU cannot hold two"
    )
    parser.add_argument(
        "--given", type=_json, default="{}", help="what vLLM's LLM is given besides or instead, a JSON object"
    )
    parser.add_argument(
        "--rounds", type=_rounds, default=ROUNDS, help="over all that is timed; more where the host decides"
    )
    parser.add_argument("--jobs", type=int, default=2, help="engines side by side while they are only compared")
    parser.add_argument("--no-fp32", action="store_true", help="for models whose weights do not fit in fp32")
    parser.add_argument("--work", type=Path, help="folder for logs and caches; by default one that goes away")
    parser.add_argument("--resume", action="store_true", help="keep what engines compared earlier left in --work")
    parser.add_argument("--json", action="store_true", help="results as JSON")
    options = parser.parse_args()
    if unknown := set(options.graphs.split(",")) - set(GRAPHS):
        parser.error(f"unknown kinds of graphs {sorted(unknown)}; there are {', '.join(GRAPHS)}")
    return options


def main() -> int:
    options = _arguments()
    missing = [name for name in ("LABMODELS", "LABBENCH") if name not in os.environ]
    if missing:
        fact = f"the environment does not set {' and '.join(missing)}"
        raise UserError("vllm_lab", fact, stage="tools", remedy="See the tool's header.")
    models, both = options.models.split(","), options.agree == options.time
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if both or options.agree:
            graphs, exact = options.graphs.split(","), not options.no_fp32
            found["agree"] = agree(models, graphs, options.jobs, work, options.resume, exact, options.given)
        wrong = failures(found.get("agree", [])) + further(found.get("agree", []))
        if (both and not wrong) or (options.time and not options.agree):
            found["time"] = times(models, options.batches, work, options.apart, options.given, options.rounds)
            wrong += failures(found["time"])
    _report(found, wrong, options.json)
    return int(bool(wrong))


def _report(found: dict[str, Any], wrong: Sequence[str], as_json: bool) -> None:
    for line in wrong:
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps(found))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    if "agree" in found:
        console.print(agreement_table(found["agree"]))
        for line in dict.fromkeys(line for r in found["agree"] for line in r.get("said", [])):
            console.print(line, highlight=False)
    if "time" in found:
        console.print(time_table(found["time"]))


if __name__ == "__main__":
    sys.exit(exit_status(main))
