"""What bounds the streaming product: a piece timed with parts of the kernel left out, so that results are wrong.

    python -m terrazzo.tools.ablate --models llama-3.1-8b --sizes 16,64,128

Each variant is a copy of the packages in which lines of `kernels/gemm_stream.py` are changed, and runs in a process of
its own: what is left out no longer takes time, and what then remains is the bound of the rest.

x          tokens are asked for once, not at each step
products   nothing is multiplied
both       neither
memory     the epilogue reads and stores nothing
epilogue   there is none
waits      no kernel waits for the one before it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

import terrazzo.tools.device as place  # before Triton is imported, whose interpreter it may choose
from terrazzo.lowering.errors import InternalError
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.bench import middle
from terrazzo.tools.command import exit_status, sizes
from terrazzo.tools.measure import chain, interleaved_us, layers_of

PACKAGES = ("lowering", "kernels", "runtime", "tools")
NEVER = "if gl.max(gl.max(total, 0), 0) == 0.12345: "
X = (
    ("        ask_x(descs, rows, ahead, ready, x_ring, free, BLOCK_M, EXTRA_M, there)\n", ""),
    (
        "mbarrier.expect(ready.index(free), STEP_BYTES, pred=there)",
        "mbarrier.expect(ready.index(free), STEP_BYTES - X_BYTES, pred=there)",
    ),
)
PRODUCTS = (
    ("            acc, extra = multiply_both(w, x, more, acc, extra, KN, NOTE)\n", "            pass\n"),
    ("            acc = multiply(w, x, acc, TOKENS_FIRST, KN)\n", "            pass\n"),
    (
        "            acc2, extra2 = multiply_both(w_ring.index(slot * ACCS + 1), x, more, acc2, extra2, KN, NOTE)\n",
        "            pass\n",
    ),
    ("            acc2 = multiply(w_ring.index(slot * ACCS + 1), x, acc2, TOKENS_FIRST, KN)\n", "            pass\n"),
    ("        acc, acc2, extra, extra2 = multiplied(acc, acc2, extra, extra2, SEPARATE, EXTRA_M, 1)\n", ""),
)
# The accumulators have to be needed for something.
EPILOGUE = tuple((f"finish(\n{call}", f"{NEVER}finish(\n{call}") for call in (
    "            total, total2, m0, n0,", "                total, total2, m0 + BLOCK_M, n0,",
))  # fmt: skip
MEMORY = (("(n < N // ACROSS) & own\n", "(n < N // ACROSS) & own & (m_size < 0)\n"),)
WAITS = (("griddepcontrol.wait; // $0", "mov.u32 $0, 0;"),)
# Files of `kernels`, and what stands in place of their lines.
VARIANTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "all": ("gemm_stream.py", ()),
    "x": ("gemm_stream.py", X),
    "products": ("gemm_stream.py", PRODUCTS),
    "both": ("gemm_stream.py", X + PRODUCTS),
    "memory": ("gemm_steps.py", MEMORY),
    "epilogue": ("gemm_stream.py", EPILOGUE),
    "waits": ("gemm_steps.py", WAITS),
}
WARM_S, REPLAYS = 0.5, 100


def changed(text: str, changes: tuple[tuple[str, str], ...]) -> str:
    """The text with each change made at the one place where it belongs.

    Raises:
        InternalError: the kernel no longer has such a place.
    """
    for old, new in changes:
        if text.count(old) != 1:
            raise InternalError("ablate", f"{text.count(old)} places read {old!r}", stage="tools",
                                remedy="Adapt VARIANTS to the kernel.")  # fmt: skip
        text = text.replace(old, new)
    return text


def copied(variant: str, folder: Path) -> None:
    """The packages under `folder`, the kernels changed."""
    ours, root = Path(__file__).resolve().parents[1], folder / "terrazzo"
    root.mkdir()
    for package in PACKAGES:
        if package == "kernels":
            shutil.copytree(ours / package, root / package)
        else:
            (root / package).symlink_to(ours / package)
    name, changes = VARIANTS[variant]
    file = root / "kernels" / name
    file.write_text(changed(file.read_text(), changes))


def timed(model: str, size: int) -> float:
    """Microseconds per piece, steadily."""
    piece = middle(model)
    layers = layers_of(piece, size, place.HERE)
    graph = chain(CompiledPiece(piece.graph, steady=True).at(layers[0]), layers)
    end = time.monotonic() + WARM_S
    while time.monotonic() < end:
        graph.replay()
        torch.cuda.synchronize()
    return interleaved_us({"piece": graph}, len(layers), REPLAYS)["piece"]


def run(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """The times of a variant by model and size, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copied(variant, Path(folder))
        asked = ["--models", options.models, "--sizes", ",".join(map(str, options.sizes)), "--here"]
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        said = subprocess.run(
            [sys.executable, "-m", "terrazzo.tools.ablate", *asked],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    return json.loads(said.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m terrazzo.tools.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama-3.1-8b,llama-3.2-1b", help="comma-separated")
    parser.add_argument(
        "--sizes", default="16,64,128", type=sizes, help="numbers of tokens, comma-separated, up to 128"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--turns", type=int, default=1, help="how often each variant runs, in turn")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")
    place.timing()
    cells = [(model, size) for model in options.models.split(",") for size in options.sizes]
    if options.here:
        with torch.no_grad():
            print(json.dumps({f"{model}, {size}": timed(model, size) for model, size in cells}))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants.split(",")}
    for _ in range(options.turns):
        for name, turns in found.items():
            turns.append(run(name, options))
            print(f"{name}: {turns[-1]}", file=sys.stderr, flush=True)
    table = Table("left out", *(f"{model}, {size}" for model, size in cells), title="us per piece")
    for name, turns in found.items():
        means = (fmean(turn[f"{model}, {size}"] for turn in turns) for model, size in cells)
        table.add_row("nothing" if name == "all" else name, *(f"{us:.1f}" for us in means))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
