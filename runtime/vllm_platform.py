"""`Platform`: vLLM's CUDA platform with terrazzo as the compiler of its pieces.

One class serves both generations of vLLM; each calls what it knows:

    0.9.1 - 0.10.0   `get_piecewise_backend_cls`   the class that runs every piece: dispatcher.PiecewiseBackend
    0.12 and later   `get_compile_backend`         the compiler of every piece: vllm_compiler.VllmCompiler

and both let a platform settle what the configuration leaves open. A compiler other than Inductor gets opaque, mutating
ops from vLLM unless told otherwise: here layers take their native forms, so that pieces stay fusable. What terrazzo
does not do (LoRA, passes that belong to Inductor) is turned off or left to vLLM's own compiler, with one line each.

The class is made when it is first asked for, as its base is vLLM's; importing this module does not import vLLM.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from . import vllm_compat

COMPILER = "terrazzo.runtime.vllm_compiler.VllmCompiler"
DISPATCHER = "terrazzo.runtime.dispatcher.PiecewiseBackend"

# vLLM's CompilationMode.VLLM_COMPILE (CompilationLevel.PIECEWISE): the only mode that cuts a model into pieces.
PIECEWISE = 3


def __getattr__(name: str) -> Any:
    if name != "Platform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _platform()
    return made


def _platform() -> Any:
    from vllm.platforms.cuda import CudaPlatform

    class Platform(CudaPlatform):
        """vLLM's CUDA platform; see the module."""

        # Why the class that runs the pieces is vLLM's own after all.
        refused: str | None = None

        @classmethod
        def get_piecewise_backend_cls(cls) -> str:
            return super().get_piecewise_backend_cls() if cls.refused else DISPATCHER

        @classmethod
        def get_compile_backend(cls) -> str:
            return COMPILER

        @classmethod
        def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
            # Called by vLLMs whose own platforms have it.
            super().apply_config_platform_defaults(vllm_config)
            settle(vllm_config)

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
            if not compiles(vllm_config):
                return super().get_default_ir_op_priority(vllm_config)
            from vllm.config.kernel import IrOpPriorityConfig

            return IrOpPriorityConfig.with_default(["native"])

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            super().check_and_update_config(vllm_config)
            if hasattr(CudaPlatform, "get_piecewise_backend_cls"):
                cls.refused = settle_protocol(vllm_config)
            elif not hasattr(CudaPlatform, "apply_config_platform_defaults"):
                settle_late(vllm_config)

    if not any(hasattr(CudaPlatform, hook) for hook in ("get_piecewise_backend_cls", "get_compile_backend")):
        _say("is installed, but this version of vLLM lets no platform bring a compiler: it compiles with its own.")
    Platform.__qualname__, Platform.__module__ = "Platform", __name__
    return Platform


def compiles(vllm_config: Any) -> bool:
    """Whether terrazzo compiles this configuration's pieces; vLLM may not have chosen its mode yet."""
    config = vllm_config.compilation_config
    if config.mode is None:
        return config.backend == COMPILER and int(vllm_config.optimization_level) > 0
    return config.backend == COMPILER and int(config.mode) == PIECEWISE


def settle(vllm_config: Any) -> None:
    """Settle what the configuration leaves open, and hand it back to vLLM where terrazzo is not the one to compile."""
    config = vllm_config.compilation_config
    if not _ours(vllm_config, refusal(vllm_config)):
        return
    for switch in ("use_inductor_graph_partition",):
        _turn_off(config, switch)
    for switch in ("enable_sp", "fuse_gemm_comms"):
        _turn_off(config.pass_config, switch)
    if not {"all", "none"} & set(config.custom_ops):
        config.custom_ops.append("none")
    if getattr(config, "ir_enable_torch_wrap", True) is None:
        config.ir_enable_torch_wrap = True
    # Such an artifact holds Inductor's code for every piece; without one a warm start compiles through our cache.
    os.environ.setdefault("VLLM_USE_MEGA_AOT_ARTIFACT", "0")


def settle_late(vllm_config: Any) -> None:
    """The same for vLLMs that ask their platform only once everything is settled (0.12): what the user left open cannot
    be told from what vLLM then chose for a compiler that is not Inductor, all custom ops."""
    config = vllm_config.compilation_config
    why = refusal(vllm_config)
    if why is None and config.use_inductor_graph_partition:
        why = "use_inductor_graph_partition leaves the cutting to Inductor"
    if _ours(vllm_config, why):
        config.custom_ops[:] = ["none" if op == "all" else op for op in config.custom_ops]


def _ours(vllm_config: Any, why: str | None) -> bool:
    """Whether terrazzo compiles; where not, it says so, and a refusal hands the configuration back to vLLM."""
    config = vllm_config.compilation_config
    if config.backend != COMPILER:
        _say(f"is not used: compilation_config.backend is {config.backend!r}.", logging.INFO)
    elif why is not None:
        config.backend = "inductor"
        _say(f"is not used: {why}. vLLM compiles with its own compiler.")
    elif not compiles(vllm_config):
        _say("has nothing to compile: compilation is off in this configuration.", logging.INFO)
    else:
        return True
    return False


def settle_protocol(vllm_config: Any) -> str | None:
    """The same for 0.9.1 - 0.10.0; returns why terrazzo does not run this configuration's pieces, or None."""
    config = vllm_config.compilation_config
    why = refusal(vllm_config)
    if why is None and getattr(config.pass_config, "enable_sequence_parallelism", False):
        why = "sequence parallelism is a pass of vLLM's own compiler"
    if why is not None:
        _say(f"is not used: {why}. vLLM runs its own class.")
    elif not config.use_inductor and not {"all", "none"} & set(config.custom_ops):
        config.custom_ops.append("none")
    return why


def refusal(vllm_config: Any) -> str | None:
    """Why terrazzo leaves this configuration to vLLM's own compiler; None when it does not."""
    if getattr(vllm_config, "lora_config", None) is not None:
        return "LoRA adapters are served through ops that terrazzo was not proven with"
    mode = getattr(vllm_config.compilation_config, "mode", None)
    if mode is not None and int(mode) not in (0, PIECEWISE):
        return f"compilation_config.mode {int(mode)} does not cut the model into pieces"
    return None


def _turn_off(config: Any, switch: str) -> None:
    if getattr(config, switch, False):
        setattr(config, switch, False)
        _say(f"turns {switch} off: it is a pass of vLLM's own compiler.")


def _say(what: str, level: int = logging.WARNING) -> None:
    vllm_compat.say_once(level, what, f"terrazzo {what}")
