"""A piece as JSON: a list of nodes with named targets, so that reading a file runs nothing the file brings along.

`targets` resolves the names. Values of inputs are stored as their specs; every other value is derived again on reading.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from terrazzo.lowering.errors import TerrazzoError, Unsupported, UserError
from terrazzo.tools.models.fakes import Dim, SizeSpec, Spec, TensorSpec, retarget, spec_of, with_fakes
from terrazzo.tools.models.fill import Fill
from terrazzo.tools.models.piece import KINDS, Piece, piece_of
from terrazzo.tools.models.targets import name_of, target_of

FORMAT = "terrazzo-piece-1"

# A stack trace keeps the last three parts of a path, so that equal pieces give equal files on every machine.
_SOURCE = re.compile(r'File "[^"]*?((?:[^"/]+/){0,2}[^"/]+)"')
_TORCH_NAMES = ("strided", "contiguous_format", "preserve_format", "channels_last")


def save_piece(piece: Piece, path: str | Path) -> None:
    """Writes a piece.

    Raises:
        Unsupported: the graph has a target or an argument that the format has no name for.
    """
    names: dict[str, str] = {}
    data = {
        "format": FORMAT,
        "model": piece.model,
        "index": piece.index,
        "kind": piece.kind,
        "nodes": [_node_to_json(node, names) for node in piece.graph.graph.nodes],
    }
    Path(path).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def load_piece(path: str | Path, device: torch.device | str | None = None) -> Piece:
    """Reads a piece, with fake values on the device it was saved for, or on `device`.

    Raises:
        UserError: the file is not a piece, or names something that is not allowed.
    """
    try:
        data = json.loads(Path(path).read_text())
        if data["format"] != FORMAT or data["kind"] not in KINDS:
            raise UserError(f"piece {path}", f"format {data['format']!r}, kind {data['kind']!r}; expected "
                            f"{FORMAT!r} and one of {KINDS}", stage="store")  # fmt: skip
        graph, specs = _graph_of(data["nodes"])
        if device is not None:
            specs = [s if isinstance(s, SizeSpec) else replace(s, device=torch.device(device)) for s in specs]
            retarget(graph, torch.device(device))
        return piece_of(str(data["model"]), int(data["index"]), data["kind"], with_fakes(graph, specs))
    except TerrazzoError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"piece {path}", f"damaged: {type(e).__name__}: {e}", stage="store",
                        remedy="Save it again.") from e  # fmt: skip


def _node_to_json(node: fx.Node, names: dict[str, str]) -> dict[str, Any]:
    """One node; `names` gives symbols their stored names, in the order in which they turn up."""
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": name_of(node)}
    if node.op == "placeholder":
        data["value"] = _spec_to_json(spec_of(node), names)
    else:
        data["args"] = [_to_json(a, node) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {k: _to_json(v, node) for k, v in node.kwargs.items()}
    if node.meta.get("stack_trace"):
        data["stack_trace"] = _SOURCE.sub(r'File "\1"', node.meta["stack_trace"])
    return data


def _graph_of(nodes: list[dict[str, Any]]) -> tuple[fx.GraphModule, list[Spec]]:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    specs: list[Spec] = []
    for data in nodes:
        target = target_of(data["op"], data["target"])
        args = tuple(_from_json(a, made) for a in data.get("args", []))
        kwargs = {k: _from_json(v, made) for k, v in data.get("kwargs", {}).items()}
        node = graph.create_node(data["op"], target, args, kwargs, name=data["name"])
        if "stack_trace" in data:
            node.meta["stack_trace"] = str(data["stack_trace"])
        if node.op == "placeholder":
            specs.append(_spec_from_json(data["value"]))
        made[data["name"]] = node
    graph.lint()
    return fx.GraphModule({}, graph), specs


def _spec_to_json(spec: Spec, names: dict[str, str]) -> dict[str, Any]:
    if isinstance(spec, SizeSpec):
        return {"size": _renamed(spec.value, names)}
    return {
        "shape": [_renamed(d, names) for d in spec.shape],
        "stride": [_renamed(d, names) for d in spec.stride],
        "dtype": _short(spec.dtype),
        "device": str(spec.device),
        "fill": [spec.fill.kind, *map(float, spec.fill.values)],
        **({"parameter": True} if spec.parameter else {}),
    }


def _spec_from_json(data: Mapping[str, Any]) -> Spec:
    if "size" in data:
        return SizeSpec(_dim(data["size"]))
    kind, *values = data["fill"]
    shape, stride = (tuple(map(_dim, data[key])) for key in ("shape", "stride"))
    fill = Fill(str(kind), tuple(map(float, values)))
    parameter = data.get("parameter") is True
    return TensorSpec(shape, stride, _dtype(data["dtype"]), torch.device(data["device"]), fill, parameter)


def _renamed(dim: Dim, names: dict[str, str]) -> Dim:
    if isinstance(dim, list):
        return [dim[0], *(_renamed(d, names) for d in dim[1:])]
    return names.setdefault(dim, f"s{len(names)}") if isinstance(dim, str) else dim


def _dim(data: Any) -> Dim:
    if isinstance(data, int) or (isinstance(data, str) and data.isidentifier()):
        return data
    if isinstance(data, list) and data[0] in ("add", "mul", "floordiv"):
        return [data[0], *map(_dim, data[1:])]
    raise ValueError(f"size {data!r}")


def _to_json(value: Any, node: fx.Node) -> Any:
    """One argument. What JSON lacks becomes an object with one key that says what it is."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case tuple():
            return {"tuple": [_to_json(v, node) for v in value]}
        case list():
            return [_to_json(v, node) for v in value]
        case slice():
            return {"slice": [_to_json(v, node) for v in (value.start, value.stop, value.step)]}
        case torch.dtype():
            return {"dtype": _short(value)}
        case torch.device():
            return {"device": str(value)}
        case torch.memory_format() | torch.layout() if _short(value) in _TORCH_NAMES:
            return {"torch": _short(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise Unsupported(f"node {node.name}", f"argument {value!r} has no stored form", stage="store")


def _from_json(data: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(data, list):
        return [_from_json(d, made) for d in data]
    if not isinstance(data, dict):
        return data
    [(kind, value)] = data.items()
    match kind:
        case "node":
            return made[value]
        case "tuple":
            return tuple(_from_json(d, made) for d in value)
        case "slice":
            return slice(*(_from_json(d, made) for d in value))
        case "float":
            return float(value)
        case "dtype":
            return _dtype(value)
        case "device":
            return torch.device(value)
        case "ellipsis":
            return Ellipsis
        case "torch" if value in _TORCH_NAMES:
            return getattr(torch, value)
    raise ValueError(f"argument {data!r}")


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return found
