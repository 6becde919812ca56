"""A processor of logits that leaves a request one token: the one it is to emit next, by `extra_args["forced"]`.

In a file of its own, as vLLM's workers find it by name: `terrazzo.tools.vllm_forcing:Forcing`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forcing(AdapterLogitsProcessor):
    """Makes every request emit its own tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        forced: list[int] = (params.extra_args or {}).get("forced", [])

        def force(emitted: list[int], logits: torch.Tensor) -> torch.Tensor:
            only = torch.full_like(logits, float("-inf"))
            only[forced[len(emitted)]] = 0.0
            return only

        return force if forced else None
