"""The dimensions of the models terrazzo is run on: published ones, a tiny twin of each for the CPU, and those of any
folder with the `config.json` of a model of these families."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from terrazzo.lowering.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """The Llama 3.1 frequency scaling: low frequencies divided by `factor`, high ones kept, the rest interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """One model's dimensions.

    `family` names the architecture ('llama', 'gemma2', 'gpt2', 'mixtral'); `layers` is the published depth, which a
    capture rarely needs. `soft_cap` bounds the attention scores (0 means none); `query_scale` multiplies them.
    """

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    soft_cap: float = 0.0
    query_scale: float = 0.0
    experts: int = 0
    experts_per_token: int = 0

    @property
    def q_size(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        """The factor on the attention scores."""
        return self.query_scale or self.head_dim**-0.5


# Published dimensions: each model's own config.json (Meta, Qwen, Google, OpenAI, Mistral AI).
_CONFIGS = {
    c.name: c
    for c in (
        ModelConfig(
            "llama-3.1-8b", "llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
            vocab=128256, max_positions=131072, norm_eps=1e-5, rope_theta=5e5,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        ),
        ModelConfig(
            "llama-3.2-1b", "llama", hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, intermediate=8192,
            vocab=128256, max_positions=131072, norm_eps=1e-5, rope_theta=5e5,
            rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        ),
        ModelConfig(
            "qwen3-8b", "llama", hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=12288,
            vocab=151936, max_positions=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
        ),
        ModelConfig(
            "gemma-2-9b", "gemma2", hidden=3584, layers=42, heads=16, kv_heads=8, head_dim=256, intermediate=14336,
            vocab=256000, max_positions=8192, norm_eps=1e-6, soft_cap=50.0, query_scale=256**-0.5,
        ),
        ModelConfig(
            "gpt2", "gpt2", hidden=768, layers=12, heads=12, kv_heads=12, head_dim=64, intermediate=3072,
            vocab=50257, max_positions=1024, norm_eps=1e-5,
        ),
        ModelConfig(
            "mixtral-8x7b", "mixtral", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
            vocab=32000, max_positions=32768, norm_eps=1e-5, rope_theta=1e6, experts=8, experts_per_token=2,
        ),
    )
}  # fmt: skip


def names() -> list[str]:
    """The models' names, in the order of the table above."""
    return list(_CONFIGS)


def config(name: str, tiny: bool = False) -> ModelConfig:
    """The dimensions of a model, or of its tiny twin (same structure, also reachable as `tiny-<name>`).

    Args:
        name: of the table above, or a folder with a `config.json` as transformers writes it.

    Raises:
        UserError: there is no such model, or the folder's is of another architecture.
    """
    if "/" in name:
        read = _read(Path(name) / "config.json")
        return _tiny(read) if tiny else read
    plain = name.removeprefix("tiny-")
    if plain not in _CONFIGS:
        near = difflib.get_close_matches(plain, _CONFIGS, n=3, cutoff=0.3) or list(_CONFIGS)
        remedy = f"A folder is given as ./{name}." if Path(name).is_dir() else f"Did you mean {', '.join(near)}?"
        raise UserError(f"model {name!r}", "there is no model of that name", stage="models", remedy=remedy)
    full = _CONFIGS[plain]
    return _tiny(full) if tiny or plain != name else full


# By the name of transformers' class, the family, and what transformers takes for entries that are not there.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("llama", {}),
    "Qwen3ForCausalLM": ("llama", {"head_dim": 128}),
    "Gemma2ForCausalLM": (
        "gemma2",
        {"head_dim": 256, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256},
    ),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}),
    "Qwen3MoeForCausalLM": (
        "mixtral",
        {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
}
# Where an architecture's entries have other names.
_NAMED = {"Qwen3MoeForCausalLM": {"intermediate_size": "moe_intermediate_size", "num_local_experts": "num_experts"}}

# Entries without which a file says too little, and those that with another value make another model of it.
_NEEDED = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"}
# Numbers that may be left out.
_COUNTS = ("num_key_value_heads", "head_dim", "max_position_embeddings", "num_local_experts", "num_experts_per_tok")
_PLAIN = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
# The same of one architecture.
_PLAIN_OF = {"Qwen3MoeForCausalLM": {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}}


def _read(path: Path) -> ModelConfig:
    """The dimensions in a file."""

    def refused(fact: str) -> UserError:
        remedy = f"There are {', '.join(_FAMILIES)}, without biases, in full rotation, scaled as Llama 3.1 or not."
        return UserError(f"model {str(path.parent)!r}", fact, stage="models", remedy=remedy)

    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise refused(f"its config.json cannot be read: {error}") from error
    written = {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}
    name = next(iter(written.get("architectures", ())), "not said")
    if name not in _FAMILIES:
        raise refused(f"its architecture is {name}")
    family, usual = _FAMILIES[name]
    read = {**usual, **{key: value for key, value in written.items() if value is not None or key not in _COUNTS}}
    named = {key: _NAMED.get(name, {}).get(key, key) for key in ("intermediate_size", "num_local_experts")}
    if missing := {named.get(key, key) for key in _NEEDED} - set(read):
        raise refused(f"its config.json lacks {', '.join(sorted(missing))}")
    known = _PLAIN | _PLAIN_OF.get(name, {})
    if other := [key for key, plain in known.items() if read.get(key, plain) != plain]:
        raise refused(f"it has {', '.join(other)}")
    counts = [named.get(key, key) for key in (*sorted(_NEEDED), *_COUNTS) if named.get(key, key) in read]
    if wrong := [f"{key} is {read[key]!r}" for key in counts if type(read[key]) is not int or read[key] < 1]:
        raise refused(f"{', '.join(wrong)}, which is no number from 1 on")
    heads, hidden = read["num_attention_heads"], read["hidden_size"]
    if heads % read.get("num_key_value_heads", heads) or ("head_dim" not in read and hidden % heads):
        raise refused(f"{heads} heads share no keys evenly, or no {hidden} columns")
    theta, scaling = _rope(read, refused)
    scalar = read.get("query_pre_attn_scalar")
    return ModelConfig(
        path.resolve().parent.name,
        family,
        hidden=hidden,
        layers=read["num_hidden_layers"],
        heads=heads,
        kv_heads=read.get("num_key_value_heads", heads),
        head_dim=read.get("head_dim", hidden // heads),
        intermediate=read[named["intermediate_size"]],
        vocab=read["vocab_size"],
        max_positions=read.get("max_position_embeddings", 8192),
        norm_eps=read.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=name.startswith("Qwen3"),
        soft_cap=read.get("attn_logit_softcapping", 0.0),
        query_scale=scalar**-0.5 if scalar else 0.0,
        experts=read.get(named["num_local_experts"], 0),
        experts_per_token=read.get("num_experts_per_tok", 0),
    )


def _rope(read: dict[str, Any], refused: Callable[[str], UserError]) -> tuple[float, RopeScaling | None]:
    """Its base and how it is scaled."""
    # Newer files keep both in one entry.
    rope = read.get("rope_parameters", {**read.get("rope_scaling", {}), "rope_theta": read.get("rope_theta")})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or 10_000.0
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or any(key not in rope for key in keys):
        raise refused(f"its positions are scaled as {kind!r}, or not all of that is said")
    return theta, RopeScaling(*(rope[key] for key in keys))


def _tiny(c: ModelConfig) -> ModelConfig:
    """The twin: grouped heads stay grouped, head sizes keep their order, Gemma keeps heads * head_dim != hidden."""
    head_dim = 16 if c.head_dim <= 64 else 32
    hidden = {"gemma2": 96}.get(c.family, 4 * head_dim)
    return replace(
        c,
        name=f"tiny-{c.name}",
        hidden=hidden,
        layers=3,
        heads=4,
        kv_heads=4 if c.kv_heads == c.heads else 2,
        head_dim=head_dim,
        intermediate=2 * hidden,
        vocab=256,
        max_positions=512,
        rope_scaling=c.rope_scaling and replace(c.rope_scaling, original_max_positions=128),
        query_scale=c.query_scale and head_dim**-0.5,
        experts=min(c.experts, 4),
        experts_per_token=min(c.experts_per_token, 2),
    )
