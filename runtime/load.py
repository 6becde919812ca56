"""A plan's text becomes callable.

The text is executed in a module of its own. It was made in this process, or comes from a cache that nobody else may
write to (cache.py), so nobody else's code can run here. Its lines are known to `linecache`, so that Triton finds the
bodies' source and tracebacks show it. Bodies that differ in names only are one and the same object in a process:
kernels for two token counts, or of two pieces, that differ in nothing but their arguments share one binary.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
from collections.abc import Callable
from typing import Any

import triton

from ..lowering.emit import Plan, nameless

_BODIES: dict[str, Any] = {}


def load(plan: Plan) -> Callable[..., tuple[Any, ...]]:
    """The plan's `call`: takes the piece's arguments and then the constants it holds, returns the leaves of its
    result."""
    name = f"<terrazzo plan {hashlib.sha256(plan.source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(plan.source), None, plan.source.splitlines(keepends=True), name)
    module: dict[str, Any] = {"__name__": "terrazzo_plan", "OBJECTS": plan.objects}
    for statement in ast.parse(plan.source, name).body:
        exec(compile(ast.Module([statement], []), name, "exec"), module)
        if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
            module[statement.name] = _interned(module[statement.name])
    return module["call"]


def _interned(body: Any) -> Any:
    if not isinstance(body, triton.JITFunction):
        return body
    # Triton's cache key holds the line a function starts on; a body is the same wherever its module puts it.
    body.starting_line_number = 1
    return _BODIES.setdefault(nameless(body.src), body)
