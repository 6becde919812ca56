"""terrazzo's platform for vLLM 0.22.1 where there is no CUDA: what it settles and names, over no device of vLLM's."""

from __future__ import annotations

from typing import Any

from vllm.platforms.interface import Platform, PlatformEnum

from terrazzo.runtime import vllm_platform


def register() -> str:
    """Name the platform, as vLLM asks a plugin to."""
    return "platform022.CpuPlatform"


class CpuPlatform(Platform):
    """A CPU as far as vLLM knows, whose pieces terrazzo compiles."""

    _enum = PlatformEnum.CPU
    device_name = device_type = "cpu"
    dispatch_key = "CPU"

    @classmethod
    def get_compile_backend(cls) -> str:
        return vllm_platform.COMPILER

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        vllm_platform.settle(vllm_config)

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
        from vllm.config.kernel import IrOpPriorityConfig

        return IrOpPriorityConfig.with_default(["native"])

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Bring no implementation: there is no compiled part of vLLM here."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Leave the configuration as the test wrote it."""

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return False
