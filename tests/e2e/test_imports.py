"""What importing terrazzo brings along: never vLLM, never Inductor's code generation."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import pytest

import terrazzo.kernels
import terrazzo.lowering
import terrazzo.runtime

UNWANTED = ("vllm", "torch._inductor.codegen", "torch._inductor.compile_fx", "torch._inductor.lowering")
PACKAGES = (terrazzo.lowering, terrazzo.kernels, terrazzo.runtime)

# Torch itself may import parts of Inductor; what it brought before terrazzo was imported is its own affair.
CODE = """
import importlib, sys
import torch, triton, torch._dynamo
before = set(sys.modules)
for name in sys.argv[2:]:
    importlib.import_module(name)
unwanted = sys.argv[1].split(",")
print([m for m in sys.modules if m not in before and any(m == u or m.startswith(u + ".") for u in unwanted)])
"""


def modules_of(package) -> list[str]:
    """Every module of a package, without importing any."""
    return [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_importing_brings_neither_vllm_nor_inductor(package):
    names = modules_of(package)
    assert names
    command = [sys.executable, "-c", CODE, ",".join(UNWANTED), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[]"


def test_the_check_itself_sees_inductor():
    command = [sys.executable, "-c", CODE, ",".join(UNWANTED), "torch._inductor.compile_fx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch._inductor.compile_fx" in done.stdout


@pytest.mark.parametrize(
    "tool",
    ["bench_range", "check", "conformance", "conformance_models", "demo", "demo_text", "tune_gemm", "tune_piece"],
)
def test_a_tool_that_runs_pieces_starts_without_a_gpu_and_without_settings(tool):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"terrazzo.tools.{tool}", "--help"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
