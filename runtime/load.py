"""A plan's text becomes callable.

The text is executed in a module of its own. It was made in this process, or comes from a cache that nobody else may
write to (cache.py), or over a pipe from the process that started this one (compile_worker.py), so nobody else's code
can run here. Its lines are known to `linecache`, so that Triton finds the bodies' source and tracebacks show it. Bodies
that differ in names only are one and the same object in a process: kernels for two token counts, or of two pieces, that
differ in nothing but their arguments share one binary.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
from collections.abc import Callable, Iterator
from typing import Any

import triton

from ..lowering.emit import Plan, nameless
from ..lowering.parser import parse

_BODIES: dict[str, Any] = {}


def load(plan: Plan) -> Callable[..., tuple[Any, ...]]:
    """The plan's `call`: takes the piece's arguments and then the constants it holds, returns the leaves of its
    result."""
    module: dict[str, Any] = {"OBJECTS": plan.objects}
    for name in _executed(plan.source, ast.stmt, module):
        module[name] = _interned(module[name], plan.source)
    return module["call"]


def bodies(source: str) -> dict[str, Any]:
    """The `@triton.jit` functions of a plan's text by name, each as it stands there, without the launches."""
    module: dict[str, Any] = {}
    for name in _executed(source, (ast.Import, ast.ImportFrom, ast.FunctionDef), module):
        module[name] = _placed(module[name])
    return module


def origin(body: Any) -> tuple[str, str] | None:
    """The text of the plan that a body was loaded from, and the body's name there; None for another function."""
    return getattr(body, "origin", None)


def _executed(source: str, only: Any, module: dict[str, Any]) -> Iterator[str]:
    """Execute a text's statements of these kinds; yields the name of each decorated function when it is there."""
    name = f"<terrazzo plan {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module["__name__"] = "terrazzo_plan"
    for statement in parse(source, name).body:
        if not isinstance(statement, only):
            continue
        exec(compile(ast.Module([statement], []), name, "exec"), module)
        if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
            yield statement.name


def _interned(body: Any, source: str) -> Any:
    if not isinstance(body, triton.JITFunction):
        return body
    body.origin = source, body.__name__
    return _BODIES.setdefault(nameless(body.src), _placed(body))


def _placed(body: Any) -> Any:
    # Triton's cache key holds the line a function starts on; a body is the same wherever its module puts it.
    body.starting_line_number = 1
    return body
