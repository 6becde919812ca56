"""Stand-ins for Triton's launcher and for the C function under it, which note what they get."""

from __future__ import annotations

from typing import Any

from triton.backends.nvidia.driver import wrap_handle_tensordesc

META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [8, 64], "fp4_padded": False}


class Noting:
    """Callable, and no Python function, as what a C module holds."""

    def __init__(self) -> None:
        self.got: list[tuple] = []

    def __call__(self, *args: Any) -> None:
        self.got.append(args)


class Launcher:
    """As Triton's, around a function that notes what it gets.

    Args:
        metas: of its descriptors, which are its first parameters.
        scratch: bytes that its kernel asks for.
        noting: the function; by default one of its own.
    """

    launch_cooperative_grid, launch_pdl, profile_scratch_size = False, True, 0

    def __init__(self, metas: list[Any], scratch: int = 0, noting: Noting | None = None) -> None:
        self.launch: Any = noting or Noting()
        self.got: list[tuple] = self.launch.got
        if metas:
            signature = dict(enumerate(["tensordesc<bf16[8,64]>"] * len(metas) + ["*fp32", "i32"]))
            self.launch = wrap_handle_tensordesc(self.launch, signature, metas)
        self.global_scratch_size = scratch

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        fixed = (self.launch_cooperative_grid, self.launch_pdl, None, None)
        self.launch(x, y, z, stream, function, *fixed, *args)
