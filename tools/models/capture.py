"""A model's torch-level graph as Dynamo gives it to a compiler backend, and its cut at the attention op.

enters   a model's config: the model is built on the meta device, so dimensions cost no memory
leaves   one graph with every tensor of the model as an input; after the cut, submodules, each attention alone in one
Source of the cut: what vLLM's `split_graph` does with its splitting ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from terrazzo.lowering.errors import InternalError
from terrazzo.tools.models import ops
from terrazzo.tools.models.architectures import fills, skeleton
from terrazzo.tools.models.config import ModelConfig
from terrazzo.tools.models.fakes import HINT, SizeSpec, placeholders, retarget, spec_of, with_fakes
from terrazzo.tools.models.fill import Fill

IDS, POSITIONS, TOKENS = "input_ids", "positions", "tokens"


@dataclass(frozen=True)
class Captured:
    """A whole graph and, per input, what to pass: IDS, POSITIONS, TOKENS or a tensor's qualified name."""

    graph: fx.GraphModule
    arguments: tuple[str, ...]


def capture(c: ModelConfig, layers: int, dtype: torch.dtype, device: torch.device) -> Captured:
    """The model's graph for any number of tokens, with fake values on `device`.

    Cost: 0.5-1.6 s per model on two CPU cores (torch 2.13), 0.6-1.8 s with torch 2.11 and 4.4 s for the first one in
    a process there (three layers, 2026-11-24); no memory for weights. Forgets what Dynamo has compiled so far in this
    process, since the models share code and would otherwise run into its limit of recompilations.
    """
    model = skeleton(c, layers, dtype, "meta")
    graph, values, inputs = _trace(model)
    known = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    known |= {id(inputs[0]): IDS, id(inputs[1]): POSITIONS}
    arguments = [known[id(v)] if isinstance(v, torch.Tensor) else TOKENS for v in values]
    _merge_tokens(graph, arguments)
    rules = fills(model) | {IDS: Fill("below", (c.vocab,)), POSITIONS: Fill("arange", (c.max_positions,))}
    specs = [spec_of(node) for node in placeholders(graph)]
    specs = [
        s if isinstance(s, SizeSpec) else replace(s, device=device, fill=rules[name])
        for s, name in zip(specs, arguments, strict=True)
    ]
    retarget(graph, device)
    with_fakes(graph, specs)
    return Captured(graph, tuple(arguments))


def _trace(model: torch.nn.Module) -> tuple[fx.GraphModule, tuple[Any, ...], tuple[torch.Tensor, ...]]:
    """Dynamo's graph, the values it was called with, and the model's own two inputs."""
    inputs = (torch.empty(HINT, dtype=torch.int32, device="meta"), torch.empty(HINT, dtype=torch.int64, device="meta"))
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    graphs: list[fx.GraphModule] = []
    called: list[tuple[Any, ...]] = []

    def backend(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            called.append(args)
            return graph(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    if len(graphs) != 1 or len(called) != 1:
        raise InternalError("capture", f"{len(graphs)} graphs and {len(called)} calls, expected one", stage="models")
    for node in graphs[0].graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("example_value", "stack_trace", "nn_module_stack")}
    return graphs[0], called[0], inputs


def _merge_tokens(graph: fx.GraphModule, arguments: list[str]) -> None:
    """Leaves one size input: Dynamo makes one per input tensor and then proves them equal.

    Raises:
        InternalError: two size inputs stand for different sizes.
    """
    sizes = [n for n, name in zip(placeholders(graph), arguments, strict=True) if name == TOKENS]
    names = {spec.value for n in sizes if isinstance(spec := spec_of(n), SizeSpec)}
    if len(names) != 1:
        raise InternalError("capture", f"sizes {sorted(map(str, names))}, expected one", stage="models")
    for extra in sizes[1:]:
        arguments.pop(placeholders(graph).index(extra))
        extra.replace_all_uses_with(sizes[0])
        graph.graph.erase_node(extra)
    graph.graph.lint()
    graph.recompile()


def split(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """Cuts at attention: each attention op alone in a submodule, everything between two of them in another.

    Returns:
        the module that calls the submodules in order, and the names of those without attention, in order.
    """
    part = 0
    parts: dict[fx.Node, int] = {}
    cuts: set[int] = set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if is_attention(node):
            parts[node] = part + 1
            cuts.add(part + 1)
            part += 2
        else:
            parts[node] = part
    whole = split_module(graph, graph, lambda node: parts[node], keep_original_order=True)
    names = [n.target for n in whole.graph.find_nodes(op="call_module")]
    return whole, [name for name in names if int(name.removeprefix("submod_")) not in cuts]


def is_attention(node: fx.Node) -> bool:
    """Whether the node is the op a model is cut at."""
    return node.op == "call_function" and str(node.target) in (ops.ATTENTION, f"{ops.ATTENTION}.default")
