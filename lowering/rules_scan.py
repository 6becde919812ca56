"""Lowering rules: running sums and products along one dimension."""

from __future__ import annotations

import torch

from ..kernels.rows import LOOP_FROM
from .affine import contiguous_strides, linear, variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import cast, load
from .ir import Node
from .rules_pointwise import arithmetic
from .values import Layout

aten = torch.ops.aten

KINDS = {aten.cumsum: "running_sum", aten.cumprod: "running_prod"}


@rule(aten.cumsum.default, aten.cumprod.default)
def running(d: Definer, node: Node) -> None:
    """A row is scanned whole, in registers."""
    layout, source = Layout.of(node.spec), d.layout(node.args[0])  # type: ignore[arg-type]
    index = variables(source.shape)
    dtype = arithmetic(layout.dtype)
    value = cast(cast(d.read(node.args[0], index), layout.dtype), dtype)
    if not source.shape:
        d.map(node, value)
        return
    axis = node.args[1] % len(source.shape)
    if source.shape[axis] > LOOP_FROM:
        raise Unsupported(node.name, f"a scan of more than {LOOP_FROM} elements fits no registers", stage="define")
    name = f"{node.name}_running"
    made = Layout.contiguous(source.shape, dtype, layout.device)
    d.reduce(name, node, KINDS[node.op.overloadpacket], value, source.shape, (axis,), made)
    d.map(node, load(name, linear(index, contiguous_strides(source.shape)), dtype))
