"""A whole model as its pieces and what joins them, with real weights, beside the eager model it must agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from terrazzo.tools.models.architectures import initialize, skeleton
from terrazzo.tools.models.capture import IDS, POSITIONS, TOKENS, capture, split
from terrazzo.tools.models.config import config
from terrazzo.tools.models.piece import Piece, kind_of, piece_of

PieceRunner = Callable[[Piece, list[Any]], Any]


@dataclass(frozen=True)
class Whole:
    """model: the eager module. split: calls the pieces and attentions in order. arguments: what each of its inputs is
    (see `Captured`). pieces: the compiled ones by submodule name, in order.
    """

    model: nn.Module
    split: fx.GraphModule
    arguments: tuple[str, ...]
    pieces: dict[str, Piece]


def build(
    name: str,
    tiny: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int = 3,
    seed: int = 0,
) -> nn.Module:
    """The eager model with random weights: `forward(input_ids, positions)`, both [tokens] of ints -> [tokens, hidden].

    On 'meta' nothing is drawn and nothing allocated.
    """
    model = skeleton(config(name, tiny), layers, dtype, device)
    return model if torch.device(device).type == "meta" else initialize(model, seed)


# By the names that commands use.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def pieces(
    name: str,
    *,
    tiny: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int = 3,
) -> list[Piece]:
    """The layers + 1 pieces between the attentions, with fake values on `device` (which need not exist here).

    Cost: see `capture`.
    """
    return list(_cut(name, tiny, dtype, device, layers)[2].values())


def whole(
    name: str,
    *,
    tiny: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int = 3,
    seed: int = 0,
) -> Whole:
    """Pieces, what joins them, and the eager model on a device that does exist."""
    graph, arguments, cut = _cut(name, tiny, dtype, device, layers)
    return Whole(build(name, tiny, dtype, device, layers, seed), graph, arguments, cut)


def run_eagerly(piece: Piece, args: list[Any]) -> Any:
    """The piece's own ops, one by one."""
    return piece.graph(*args)


def run_whole(parts: Whole, piece_runner: PieceRunner, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The model's hidden states, with every piece run by `piece_runner` and every attention as it is.

    Args:
        parts: from `whole`.
        piece_runner: given a piece and its inputs, returns what the piece's graph returns (a tensor or a tuple).
        input_ids, positions: [tokens], on the model's device.
    """
    tensors = dict(parts.model.named_parameters()) | dict(parts.model.named_buffers())
    given = tensors | {IDS: input_ids, POSITIONS: positions, TOKENS: input_ids.shape[0]}
    with torch.no_grad():
        return _Joiner(parts, piece_runner).run(*(given[name] for name in parts.arguments))[0]


class _Joiner(fx.Interpreter):
    def __init__(self, parts: Whole, piece_runner: PieceRunner) -> None:
        super().__init__(parts.split)
        self.pieces, self.piece_runner = parts.pieces, piece_runner

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.pieces:
            return self.piece_runner(self.pieces[target], list(args))
        return super().call_module(target, args, kwargs)


def _cut(
    name: str, tiny: bool, dtype: torch.dtype, device: torch.device | str, layers: int
) -> tuple[fx.GraphModule, tuple[str, ...], dict[str, Piece]]:
    c = config(name, tiny)
    captured = capture(c, layers, dtype, _indexed(device))
    graph, names = split(captured.graph)
    cut = {}
    for position, part in enumerate(names):
        piece = graph.get_submodule(part)
        assert isinstance(piece, fx.GraphModule)
        cut[part] = piece_of(c.name, position, kind_of(position, len(names)), piece)
    return graph, captured.arguments, cut


def _indexed(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors name it."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device
