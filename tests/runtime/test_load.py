"""A plan's text as a module: its lines show in tracebacks, its bodies are one object per text."""

from __future__ import annotations

import inspect
import linecache
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from terrazzo.runtime import load as loading
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.load import load

BODY = """
import triton
import triton.language as tl


@triton.jit
def body(x):
    return x + {number}


def call(*args):
    return body, args, OBJECTS
"""


def plan(source, *objects):
    """What `load` reads of a plan."""
    return SimpleNamespace(source=source, objects=objects)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process in which nothing was loaded yet."""
    monkeypatch.setattr(loading, "_BODIES", {})


def test_call_takes_arguments_and_sees_the_plans_objects():
    marker = object()
    _, args, objects = load(plan(BODY.format(number=1), marker))(1, 2)
    assert args == (1, 2) and objects == (marker,)


def test_an_error_shows_the_line_of_the_text():
    source = "def call(*args):\n    first = args[0]\n    return first.no_such_attribute  # node: add_3\n"
    with pytest.raises(AttributeError) as raised:
        load(plan(source))(1)
    text = "".join(traceback.format_exception(raised.value))
    assert "return first.no_such_attribute  # node: add_3" in text
    assert "<terrazzo plan " in text and ", line 3, in call" in text


def test_the_text_survives_a_look_at_the_disk():
    # linecache forgets what it thinks is a changed file; plans have none.
    call = load(plan("def call(*args):\n    return args\n"))
    linecache.checkcache()
    assert inspect.getsource(call) == "def call(*args):\n    return args\n"


def test_other_texts_have_other_names():
    names = {load(plan(f"def call(*args):\n    return {n}\n")).__code__.co_filename for n in (1, 2, 2)}
    assert len(names) == 2


def test_equal_bodies_are_one_kernel(monkeypatch):
    # The interpreter's functions are of another class; the compiler's is what bodies are interned for.
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr("triton.jit", JITFunction)
    first, moved = BODY.format(number=1), "\n\n# Further down.\n" + BODY.format(number=1)
    bodies = [load(plan(text))()[0] for text in (first, moved, BODY.format(number=2))]
    assert bodies[0] is bodies[1] is not bodies[2]
    assert bodies[0].starting_line_number == bodies[2].starting_line_number == 1
    assert len({body.cache_key for body in bodies}) == 2


def test_a_real_plan_is_readable_where_it_runs(device):
    x = torch.randn(3, 5, device=device)
    piece = CompiledPiece(fx.symbolic_trace(lambda x: torch.softmax(x * 2, 1)), [x])
    piece(x)
    (loaded,) = piece.plans.values()
    assert "".join(linecache.getlines(loaded.call.__code__.co_filename)) == loaded.plan.source
    assert inspect.getsource(loaded.call) in loaded.plan.source + "\n"
