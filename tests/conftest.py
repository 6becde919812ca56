"""What every test shares: a device, and Triton's interpreter where there is none.

Triton decides at import time whether `@triton.jit` interprets, so the choice stands here, before any test module is
imported.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess


def _has_cuda() -> bool:
    """Whether a CUDA device answers; asked of the driver first, because importing torch alone takes seconds."""
    smi = shutil.which("nvidia-smi")
    if smi is None or subprocess.run([smi, "-L"], capture_output=True, check=False).returncode:
        return False
    import torch

    return torch.cuda.is_available()


HAS_CUDA = _has_cuda()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where no device can run them."""
    if HAS_CUDA:
        return
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_device)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device kernels run on: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Gives every test the same random numbers and a log that is heard, whatever ran before it."""
    torch.manual_seed(0)
    # Libraries that configure logging switch loggers off that exist already.
    log = logging.getLogger("terrazzo")
    log.disabled, log.propagate = False, True
    log.setLevel(logging.NOTSET)
