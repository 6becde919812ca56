"""Where vLLM finds terrazzo: the entry point `terrazzo` in the group `vllm.platform_plugins`.

    VLLM_PLUGINS=terrazzo vllm serve MODEL

turns it on. vLLM loads every installed plugin when that variable is unset, so being installed is not enough: without
its own name in the variable terrazzo stays out, and vLLM is what it was. vLLM calls this in each of its processes,
before it knows its platform: nothing heavy is imported here.

Source: vLLM's documentation on plugins (docs/design/plugin_system.md).
"""

from __future__ import annotations

import logging
import os
import sys

from . import vllm_compat

# vLLM's variable: the plugins to load, by name, separated by commas.
VARIABLE, NAME = "VLLM_PLUGINS", "terrazzo"


def register() -> str | None:
    """The qualified name of terrazzo's platform, or None to leave vLLM alone."""
    if NAME not in [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]:
        return None
    # vLLM's own test for a CUDA device; the caller is its module.
    ask = getattr(sys.modules.get("vllm.platforms"), "builtin_platform_plugins", {}).get("cuda")
    if ask is None or ask() is None:
        line = "terrazzo stays out: vLLM finds no CUDA device. It runs as it does without the plugin."
        vllm_compat.say_once(logging.WARNING, "no CUDA", line)
        return None
    return "terrazzo.runtime.vllm_platform.Platform"
