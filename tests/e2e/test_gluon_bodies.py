"""Bodies compile in a Gluon kernel, where nothing may name a layout of its own; for sm_90, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from terrazzo.kernels.target import Target
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.tools.dump_compile import compile_launch, launches

H100 = Target.named("h100")


def exponents(p: torch.Tensor) -> torch.Tensor:
    return torch.arange(p.shape[1], device=p.device) % 3


def halves(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return p.view(p.shape[0], -1, 128).chunk(2, -1)


EPILOGUES = {
    "relu": torch.relu,
    "minus zero": lambda p: torch.clamp(p, min=-0.0) + torch.where(p > 1, p, -0.0),
    "two constants": lambda p: torch.where(p > 0, 1.0, -1.0),
    "shift": lambda p: (p.to(torch.int32) >> 2) + (p.to(torch.int32) << 2),
    "power of integers": lambda p: p.to(torch.int32) ** exponents(p).to(torch.int32),
    "integer division": lambda p: (p.to(torch.int32) // 7) + p.to(torch.int32) % 5,
    "floor division": lambda p: p // 0.3 + torch.remainder(p, 0.7),
    "erf, tanh, exp": lambda p: torch.nn.functional.gelu(p) + torch.tanh(p) * torch.exp(-p),
    "eight bits": lambda p: (torch.relu(p) * 0.25).clamp(-448, 448).to(torch.float8_e4m3fn),
    "bool": lambda p: torch.logical_and(p > 0, torch.isfinite(p)),
    "bias by row and column": lambda p: (
        p + p.new_ones(p.shape[1]) * 2 + torch.arange(p.shape[0], device=p.device)[:, None]
    ),
    "halves of heads": lambda p: torch.cat((halves(p)[0] - halves(p)[1], halves(p)[1] + halves(p)[0]), -1),
    "sums of heads": lambda p: (
        torch.cat((halves(p)[0] - halves(p)[1], halves(p)[1] * halves(p)[0].new_ones(64)), -1)
        * p.view(p.shape[0], -1, 128).float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt().to(p.dtype)
    ),
    "a half that is a constant": lambda p: torch.nn.functional.pad(halves(p)[0] - halves(p)[1], (0, 64), value=0.5),
}


# Accumulators leave few registers to many tokens' epilogues: a long formula keeps numbers in local memory there. Bytes
# a thread as compiled, and nothing for the others; floor division keeps 704 where it is not held.
SPILLED = {"power of integers": 272, "floor division": 168, "erf, tanh, exp": 40}
# A part would have to hold whole heads.
NOT_HELD = ("sums of heads",)
# Few tokens, in a streaming product; and many, in a product whose epilogue is held until the next tile.
SIZES = {16: "gemm_stream", 4096: "gemm_persistent"}


def compiled(epilogue: str, tokens: int) -> str:
    """What is wrong with the kernel of a product with this epilogue; '' when nothing is."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return EPILOGUES[epilogue](x @ w.t())

    x, w = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((tokens, 256), (4096, 256)))
    graph = torch.fx.experimental.proxy_tensor.make_fx(fn)(x, w)
    made = plan(trace(graph, Examples.of(graph, (x, w))), {}, Options(H100))
    (product,) = [k for k in made.schedule.launches() if k.family == SIZES[tokens]]
    if tokens > 16 and not product.config.held and epilogue not in NOT_HELD:
        return f"it is not held: {product.config}"
    found = [compile_launch(one, 90) for one in launches(made, H100)]
    spilled = [one for one in found if tokens > 16 and 0 < one.spills_bytes <= SPILLED.get(epilogue, 0)]
    return "; ".join(one.wrong for one in found if one.wrong and one not in spilled)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", SIZES)
def test_every_kind_of_epilogue_compiles(tokens: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("compiles") == len(EPILOGUES)


if __name__ == "__main__":
    wrong = {name: compiled(name, int(sys.argv[1])) for name in EPILOGUES}
    for name, why in wrong.items():
        print(f"{name}: {why or 'compiles'}")
    sys.exit(any(wrong.values()))
