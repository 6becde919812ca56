"""Architectures of transformers through the backend: four of the table, and that the tool sees what is wrong."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from terrazzo.lowering.errors import UserError
from terrazzo.runtime import compiled
from terrazzo.tools import conformance_models, tiny_models
from terrazzo.tools.conformance_models import MARKS, WHOLE, Result, check, leaves, main, page

SIZES = ((2, 7), (3, 9))
# What may run as itself in them: attention, convolutions, and the choice of experts with their product.
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
OWN = {
    "llama": {ATTENTION},
    "bert": {ATTENTION},
    "mixtral": {
        ATTENTION, "aten.topk.default", "aten.sort.default", "aten.histc.default",
        "transformers.grouped_mm_fallback.default",
    },
    "convnext": {"aten.convolution.default"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(compiled, "_SHARED", {})


def on_cpu(name):
    """On a GPU attention is one op of torch's own, whose name depends on the sizes."""
    return OWN[name] if not torch.cuda.is_available() else None


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", OWN)
def test_a_model_at_two_lengths_and_two_batch_sizes(name):
    found = check(name, sizes=SIZES)
    assert found.ok, found.line()
    assert found.graphs == 1 and found.plans == len(SIZES)
    assert on_cpu(name) is None or found.ops.keys() <= on_cpu(name)
    assert found.share >= (90 if name in ("mixtral", "convnext") else 97), found.line()


def small(monkeypatch, model):
    """A table of one entry: a linear layer whose result the model may spoil."""
    entry = tiny_models.Architecture("decoder", "", {}, lambda batch, length, draw: {"x": torch.ones(batch, length, 4)})
    monkeypatch.setitem(tiny_models.TABLE, "small", entry)
    monkeypatch.setattr(conformance_models, "model", lambda name, dtype, device: model.to(device, dtype))


class Spoiled(torch.nn.Module):
    """Wrong where it is compiled."""

    def forward(self, x):
        return {"logits": x * 2 + 1e-4 * torch.compiler.is_compiling()}


class Broken(torch.nn.Module):
    """Its graph cannot be traced: a size depends on data."""

    def forward(self, x):
        return {"logits": x[x > 0]}


def test_a_wrong_result_is_seen(monkeypatch):
    small(monkeypatch, Spoiled())
    found = check("small", sizes=SIZES)
    assert not found.ok and "max error" in found.failures[0] and found.line().startswith("WRONG small")


def test_a_graph_that_was_not_compiled_is_seen(monkeypatch):
    small(monkeypatch, Broken())
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = check("small", sizes=SIZES[:1])
    assert not found.ok and not found.failures and "depends on data" in found.dropped[0]


def test_the_exit_status_and_the_json(monkeypatch, capsys):
    results = {"llama": Result("llama", "decoder", "fp32"), "gpt2": Result("gpt2", "decoder", "fp32", failures=["x"])}
    monkeypatch.setattr(conformance_models, "check", lambda name, dtype: results[name])
    for names, status in (("llama", 0), ("llama,gpt2", 1)):
        monkeypatch.setattr(sys, "argv", ["conformance_models", "--models", names, "--json"])
        assert main() == status
        assert [r["model"] for r in json.loads(capsys.readouterr().out)] == names.split(",")


def test_unknown_names_get_the_near_misses(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["conformance_models", "--models", "mixtrall"])
    with pytest.raises(UserError, match="Try mixtral"):
        main()


@pytest.mark.parametrize("arguments", ["--json /nonexistent/x", "--write /nonexistent/x"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_run(monkeypatch, arguments):
    monkeypatch.setattr(conformance_models, "check", None)
    monkeypatch.setattr(sys, "argv", ["conformance_models", "--models", "llama", *arguments.split()])
    with pytest.raises(UserError, match="it cannot be written: No such file"):
        main()


def test_whole_models_have_no_eight_bits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conformance_models", "--dtype", "fp8"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'fp8'" in capsys.readouterr().err and "fp8" not in WHOLE


def test_results_replace_what_stood_between_the_marks():
    once = page([Result("llama", "decoder", "fp32", nodes=4, themselves=1)], "# Page\n\ntext\n")
    again = page([Result("gpt2", "decoder", "fp32")], f"{once}after\n")
    assert "| llama | decoder | 0 | 0 | 4 | 75.0 % |" in once and once.startswith("# Page\n\ntext\n")
    assert "llama" not in again and "gpt2" in again and again.endswith(f"{MARKS[1]}\nafter\n")


def test_tensors_are_found_wherever_they_stand():
    x, y = torch.ones(1), torch.zeros(1)
    assert leaves({"a": (x, [None, {"b": y}]), "c": 3}) == {"a.0": x, "a.1.1.b": y}
