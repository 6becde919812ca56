"""One piece of a model between two attentions, with its inputs and the least work it can take."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from terrazzo.lowering.errors import UserError
from terrazzo.tools.models.fakes import SizeSpec, Spec, from_dim, placeholders, spec_of, symbols_of, to_dim
from terrazzo.tools.models.fill import draw
from terrazzo.tools.models.ops import EXPERTS

# Where a piece may stand in its model.
KINDS = ("first", "middle", "last")
_LINEARS = (F.linear, torch._C._nn.linear, torch._scaled_mm)


@dataclass(frozen=True)
class Piece:
    """A torch-level graph, as a compiler backend of vLLM receives it.

    model: the config's name. index: its place among the pieces. kind: 'first', 'middle' or 'last'.
    graph: every placeholder has `meta['example_value']` (a FakeTensor or SymInt, one ShapeEnv) and tensors
        `meta['fill']`; other nodes carry their values and stack traces as well.
    sym_shape_indices: which inputs are the number of tokens.
    """

    model: str
    index: int
    kind: str
    graph: fx.GraphModule
    sym_shape_indices: tuple[int, ...]

    def specs(self) -> list[Spec]:
        """The inputs as data, in order."""
        return [spec_of(node) for node in placeholders(self.graph)]

    def make_inputs(self, size: int, device: torch.device | str, seed: int = 0) -> list[Any]:
        """Inputs for `size` tokens at their true shapes and strides; equal seeds give equal inputs on equal devices."""
        made: list[Any] = []
        for index, spec in enumerate(self.specs()):
            if isinstance(spec, SizeSpec):
                made.append(_at(spec.value, size))
                continue
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + index)
            shape, stride = (tuple(_at(d, size) for d in dims) for dims in (spec.shape, spec.stride))
            made.append(draw(spec.fill, shape, stride, spec.dtype, device, generator))
        return made

    def flops(self, size: int) -> int:
        """Multiplications and additions of the matrix products for `size` tokens."""
        return sum(self.products(size).values())

    def products(self, size: int) -> dict[torch.dtype, int]:
        """The same by the weights' dtype; of experts only those that are chosen."""
        total: dict[torch.dtype, int] = defaultdict(int)
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and node.target in _LINEARS:
                weight = node.args[1].meta["example_value"]
                total[weight.dtype] += 2 * _rows(node.args[0], size) * weight.shape[0] * weight.shape[1]
            elif _is_experts(node):
                per_token = node.args[1].meta["example_value"].shape[1]
                for bank in (a.meta["example_value"] for a in node.args[3:]):
                    total[bank.dtype] += 2 * _rows(node.args[0], size) * per_token * bank.shape[1] * bank.shape[2]
        return dict(total)

    def weight_bytes(self, size: int = 1) -> int:
        """Bytes of all weight matrices a call reads; of expert banks at most `size` * experts per token experts.

        Embedding tables and caches are gathered from, not read, and left out.
        """
        read: dict[fx.Node, int] = {}
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and node.target in _LINEARS:
                read[node.args[1]] = _bytes(node.args[1])
            elif _is_experts(node):
                chosen = size * node.args[1].meta["example_value"].shape[1]
                for bank in node.args[3:]:
                    experts = bank.meta["example_value"].shape[0]
                    read[bank] = _bytes(bank) * min(experts, chosen) // experts
        return sum(read.values())


def kind_of(index: int, total: int) -> str:
    """What the `index`-th of `total` pieces is."""
    return "first" if index == 0 else "last" if index == total - 1 else "middle"


def piece_of(model: str, index: int, kind: str, graph: fx.GraphModule) -> Piece:
    """A piece of a graph such as a backend of torch.compile gets.

    Args:
        model: a name for reports.
        index: its place among the model's pieces; 0 for a graph that stands alone.
        kind: of `KINDS`; 'first' for a graph that stands alone.
        graph: every placeholder has `meta['example_value']`, a fake tensor or a size, as Dynamo leaves them;
            `meta['fill']`, a `Fill`, says how it is drawn (without one: normal numbers, or indices 0 and 1).

    Returns:
        A piece that holds this very graph.

    Raises:
        UserError: there is no such kind, or a placeholder has no value.
        Unsupported: a placeholder is neither a tensor nor a size, or a size is no sum, product or quotient of symbols.
    """
    if kind not in KINDS:
        raise UserError(f"piece of {model}", f"kind {kind!r} is none of {', '.join(KINDS)}", stage="models")
    for node in placeholders(graph):
        if "example_value" not in node.meta:
            raise UserError(f"input {node.name}", "it has no meta['example_value']", stage="models",
                            remedy="Take the graph that a backend of torch.compile gets.")  # fmt: skip
    specs = [spec_of(node) for node in placeholders(graph)]
    return Piece(model, index, kind, graph, tuple(i for i, s in enumerate(specs) if isinstance(s, SizeSpec)))


def _at(dim: Any, size: int) -> int:
    return from_dim(dim, dict.fromkeys(symbols_of(dim), size))


def _rows(node: fx.Node, size: int) -> int:
    rows = 1
    for extent in node.meta["example_value"].shape[:-1]:
        rows *= _at(to_dim(extent), size)
    return rows


def _bytes(node: fx.Node) -> int:
    value = node.meta["example_value"]
    return value.numel() * value.element_size()


def _is_experts(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in (EXPERTS, f"{EXPERTS}.default")
