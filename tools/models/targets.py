"""The names of what a stored graph may call, and nothing else.

An op of an allowed namespace, a function of torch or `operator` from a fixed list, a tensor method from a fixed list:
a name is looked up in these tables only, so that a file cannot name anything that runs code of its own choosing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from terrazzo.lowering.errors import Unsupported, UserError

_NAMESPACES = frozenset({"aten", "prims", "_C", "vllm", "vllm_ir", "terrazzo", "terrazzo_models"})
# Ops of those namespaces that reach outside of their tensors.
_REFUSED_OPS = frozenset({"from_file"})

_FUNCTIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "operator",
        operator,
        "abs add and_ eq floordiv ge getitem gt iadd imul invert isub itruediv le lt matmul mod mul ne neg or_ pow "
        "sub truediv xor",
    ),
    (
        "torch",
        torch,
        "Size _scaled_mm abs add addmm amax arange bmm cat chunk clamp cos div einsum empty empty_like exp flatten "
        "full full_like gather index_select layer_norm log matmul max maximum mean min minimum mm mul neg ones "
        "ones_like permute pow reciprocal relu repeat_interleave reshape rms_norm rsqrt scatter sigmoid sin softmax "
        "split sqrt squeeze stack sub sum tanh topk transpose unbind unsqueeze where zeros zeros_like",
    ),
    ("torch._C._nn", torch._C._nn, "gelu linear pad silu softplus"),
    (
        "torch.nn.functional",
        torch.nn.functional,
        "embedding gelu layer_norm linear pad relu rms_norm silu softmax softplus",
    ),
    ("torch._C._autograd", torch._C._autograd, "_get_data_attr"),
)
_METHODS = frozenset(
    "abs add add_ amax argmax bool chunk clamp clamp_ clone contiguous copy_ cos cumsum detach dim div div_ double exp "
    "expand fill_ flatten float gather half index_select int long max mean min mul mul_ narrow neg new_empty numel "
    "permute pow reciprocal repeat_interleave reshape rsqrt scatter sigmoid sin size softmax split sqrt square squeeze "
    "stride sub sub_ sum t tanh to topk transpose type_as unbind unflatten unsqueeze view zero_".split()
)


def _table() -> Mapping[str, Callable[..., Any]]:
    return {
        f"{prefix}:{name}": getattr(module, name)
        for prefix, module, listed in _FUNCTIONS
        for name in listed.split()
        if hasattr(module, name)
    }


_BY_NAME = _table()
_BY_FUNCTION = {function: name for name, function in reversed(list(_BY_NAME.items()))}


def name_of(node: fx.Node) -> str:
    """The stored name of a node's target.

    Raises:
        Unsupported: the tables have no name for it.
    """
    target = node.target
    if node.op in ("placeholder", "output"):
        return str(target)
    if node.op == "call_method" and target in _METHODS:
        return str(target)
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            name = f"ops:{target}"
            target_of(node.op, name)
            return name
        if target in _BY_FUNCTION:
            return _BY_FUNCTION[target]
    raise Unsupported(f"node {node.name}", f"{node.op} of {target} has no stored form", stage="store",
                      source=node.meta.get("stack_trace") or "")  # fmt: skip


def target_of(op: str, name: str) -> Any:
    """What a stored name stands for.

    Raises:
        UserError: the name is not in the tables, or names an op that is not registered.
    """
    if op in ("placeholder", "output") and name.isidentifier():
        return name
    if op == "call_method" and name in _METHODS:
        return name
    if op == "call_function" and name in _BY_NAME:
        return _BY_NAME[name]
    if op == "call_function" and name.startswith("ops:"):
        return _registered(name)
    raise UserError(f"target {name!r}", f"no {op} of that name is allowed", stage="store",
                    remedy="Read only pieces that were saved by terrazzo.")  # fmt: skip


def _registered(name: str) -> Any:
    namespace, _, rest = name.removeprefix("ops:").partition(".")
    op, _, overload = rest.partition(".")
    if namespace not in _NAMESPACES or op in _REFUSED_OPS:
        raise UserError(f"op {name!r}", "not of an allowed namespace, or refused by name", stage="store")
    found = getattr(getattr(torch.ops, namespace), op, None)
    found = getattr(found, overload, None) if overload and found is not None else found
    if not isinstance(found, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        raise UserError(f"op {name!r}", "it is not registered in this process", stage="store",
                        remedy="Import the package that registers it first.")  # fmt: skip
    return found
