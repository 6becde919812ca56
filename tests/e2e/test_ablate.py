"""The ablation's changes still fit the kernel, and what they make compiles for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from terrazzo.lowering.errors import InternalError
from terrazzo.tools.ablate import VARIANTS, changed, copied

COMPILED = """
import sys
from terrazzo.kernels import gemm_stream
from terrazzo.kernels.target import Target
from terrazzo.lowering.options import Options
from terrazzo.tools.dump_compile import compile_launch, launches
from terrazzo.tools.dump_plan import Journal, make
from terrazzo.tools.models import pieces
assert gemm_stream.__file__.startswith(sys.argv[1]), gemm_stream.__file__
target = Target.named("h100")
plan, _ = make(pieces("llama-3.2-1b")[1], 16, Options(target, steady=True), "", Journal())
print([one for one in (compile_launch(launch, 90).wrong for launch in launches(plan, target)) if one])
"""


# The others are parts of these.
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"all", "x", "products"}))
def test_a_variant_compiles(variant, tmp_path):
    copied(variant, tmp_path)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    # A kernel that was decorated under the interpreter cannot be compiled.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path)], env={**kept, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1:] == ["[]"], said.stdout + said.stderr


def test_a_change_that_no_longer_fits_is_an_error():
    assert changed("a b", (("a", "c"),)) == "c b"
    for text in ("b", "a a"):
        with pytest.raises(InternalError, match="places read"):
            changed(text, (("a", "c"),))
