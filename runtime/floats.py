"""Python floats among a graph's arguments become constants of the graph.

`torch.compile(dynamic=True)` hands over every float of a model (an epsilon, a scale, a dropout's probability) as a 0-d
fp64 tensor on the CPU, which the graph reads with `.item()`. Such a number hardly ever changes between calls, and the
graph in which it is a constant can be traced where torch asks what it is (whether a probability is 0), and lowered to
kernels that hold it. So there is one piece for each set of values. A number that has had more than `LIMIT` values stays
an argument that the piece reads at run time.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

# Values of one float that are compiled for. A schedule's steps are more than that, a handful of settings are not.
LIMIT = 4


class ByFloats:
    """A graph whose float arguments are bound at each call.

    Args:
        graph: as Dynamo made it.
        floats: positions of its arguments that are floats.
        make: a graph to what runs it; called once for each set of values.
    """

    def __init__(self, graph: fx.GraphModule, floats: Sequence[int], make: Callable[[fx.GraphModule], Any]) -> None:
        self.graph, self.make = graph, make
        self.bound = tuple(floats)
        self.seen: dict[int, set[bytes]] = {i: set() for i in floats}
        self.pieces: dict[tuple[tuple[int, ...], bytes], Any] = {}

    def __call__(self, *args: Any) -> Any:
        values = [args[i].item() for i in self.bound]
        # As bytes: −0 is not 0.
        piece = self.pieces.get((self.bound, struct.pack(f"{len(values)}d", *values)))
        return (piece or self._piece(values))(*args)

    def _piece(self, values: Sequence[float]) -> Any:
        for i, value in zip(self.bound, values, strict=True):
            self.seen[i].add(struct.pack("d", value))
        known = {i: v for i, v in zip(self.bound, values, strict=True) if len(self.seen[i]) <= LIMIT}
        self.bound = tuple(known)
        key = self.bound, struct.pack(f"{len(known)}d", *known.values())
        if key not in self.pieces:
            self.pieces[key] = self.make(with_floats(self.graph, known))
        return self.pieces[key]

    def summary(self) -> str:
        """What the pieces so far have to say."""
        return "; ".join(piece.summary() for piece in self.pieces.values()) or "not called yet"


def float_arguments(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Positions of the arguments that are Python floats: 0-d fp64 tensors on the CPU that are only read as numbers."""
    found = []
    for position, (node, value) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        plain = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64
        if plain and value.device.type == "cpu" and node.users and all(map(_reads, node.users)):
            found.append(position)
    return found


def with_floats(graph: fx.GraphModule, values: Mapping[int, float]) -> fx.GraphModule:
    """The graph with these arguments read as constants; it takes as many arguments as before."""
    made = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    placeholders = made.graph.find_nodes(op="placeholder")
    for position, value in values.items():
        for read in list(placeholders[position].users):
            for user in list(read.users):
                user.args, user.kwargs = _replaced(user.args, read, value), _replaced(user.kwargs, read, value)
            made.graph.erase_node(read)
    made.recompile()
    return made


def _replaced(arguments: Any, read: fx.Node, value: float) -> Any:
    return fx.map_arg(arguments, lambda node: value if node is read else node)


def _reads(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"
