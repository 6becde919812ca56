"""Architectures of transformers in sizes that an interpreter can run: the table that conformance_models.py works off.

Each entry is a model type of transformers with a configuration of 2 layers or so and a few dozen channels, the class
that puts a head on it, and what it takes. Nothing is downloaded: weights are drawn, every one of them (a bias or a norm
weight that stays at its initial 0 or 1 would hide a wrong read).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from terrazzo.lowering.errors import UserError

VOCABULARY = 96
# Where a model's own numbers for special tokens lie outside the vocabulary.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BOTH = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    **SPECIAL,
}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
WINDOWS = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2,
    "num_labels": 5,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5}


def tokens(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Token ids, none of them the padding's."""
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=draw)}


def padded(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Token ids, and a mask that ends the last sequence two tokens early."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {**tokens(batch, length, draw), "attention_mask": mask}


def led(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Token ids, and a mask that begins the first sequence two tokens late, as generation pads."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :2] = 0
    return {**tokens(batch, length, draw), "attention_mask": mask}


def pairs(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """A padded source and a shorter target."""
    target = torch.randint(3, VOCABULARY, (batch, length - 2), generator=draw)
    return {**padded(batch, length, draw), "decoder_input_ids": target}


def speech(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """A spectrogram of fixed length and a target."""
    target = torch.randint(3, VOCABULARY, (batch, length), generator=draw)
    return {"input_features": torch.randn(batch, 8, 32, generator=draw), "decoder_input_ids": target}


def fixed_pixels(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Images of the size in the configuration, which the model insists on."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw)}


def pixels(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Images whose side is four times the length."""
    return {"pixel_values": torch.randn(batch, 3, 4 * length, 4 * length, generator=draw)}


def interpolated(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Images of any size, for which positions are interpolated."""
    return {**pixels(batch, length, draw), "interpolate_pos_encoding": True}


def captioned(batch: int, length: int, draw: torch.Generator) -> dict[str, Any]:
    """Images and texts."""
    return {**padded(batch, length, draw), **fixed_pixels(batch, length, draw)}


@dataclass(frozen=True)
class Architecture:
    """One entry.

    Args:
        kind: the heading it stands under.
        head: the class of transformers that makes the model from its configuration.
        config: what differs from the model type's defaults.
        inputs: (batch, length, generator) to arguments.
    """

    kind: str
    head: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, int, torch.Generator], dict[str, Any]] = tokens


def _decoder(config: Mapping[str, Any], inputs: Any = tokens, **more: Any) -> Architecture:
    return Architecture("decoder", "AutoModelForCausalLM", {**config, **more}, inputs)


def _encoder(head: str = "AutoModelForMaskedLM", **more: Any) -> Architecture:
    return Architecture("encoder", head, {**PLAIN, "type_vocab_size": 2, **more}, padded)


def _pair(config: Mapping[str, Any], inputs: Any = pairs, **more: Any) -> Architecture:
    return Architecture("encoder-decoder", "AutoModelForSeq2SeqLM", {**config, **more}, inputs)


def _experts(config: Mapping[str, Any] = EXPERTS, **more: Any) -> Architecture:
    return Architecture("mixture of experts", "AutoModelForCausalLM", {**config, **more})


def _state(config: Mapping[str, Any] = PLAIN, **more: Any) -> Architecture:
    return Architecture("state space", "AutoModelForCausalLM", {**config, **more})


def _vision(head: str, config: Mapping[str, Any], inputs: Any, **more: Any) -> Architecture:
    return Architecture("vision", head, {**config, **more}, inputs)


CLASSES = "AutoModelForImageClassification"
SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
TEXT_PART = {**PLAIN, "projection_dim": 16}
IMAGE_PART = {**PATCHES, "projection_dim": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip

TABLE: dict[str, Architecture] = {
    "llama": _decoder(GROUPED, led),
    "qwen2": _decoder(GROUPED),
    "qwen3": _decoder(GROUPED, led),
    "gemma": _decoder(GROUPED),
    "gemma2": _decoder(GROUPED, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": _decoder(GROUPED, **SLIDING),
    "mistral": _decoder(GROUPED, led, sliding_window=4),
    "phi": _decoder(PLAIN),
    "phi3": _decoder(PLAIN),
    "gpt2": _decoder(PLAIN, led),
    "gptj": _decoder(PLAIN, rotary_dim=4),
    "gpt_neo": _decoder(PLAIN, attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": _decoder(PLAIN),
    "opt": _decoder(PLAIN, led, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": _decoder(PLAIN, led),
    "falcon": _decoder(PLAIN),
    "olmo2": _decoder(GROUPED),
    "stablelm": _decoder(GROUPED),
    "starcoder2": _decoder(GROUPED),
    "cohere": _decoder(GROUPED),
    "granite": _decoder(GROUPED),
    "smollm3": _decoder(GROUPED, no_rope_layers=[1, 0]),
    "mpt": _decoder(PLAIN, max_seq_len=64),
    "nemotron": _decoder(GROUPED),
    "glm4": _decoder(GROUPED),
    "cohere2": _decoder(GROUPED, **SLIDING),
    "exaone4": _decoder(GROUPED, **SLIDING),
    "olmo3": _decoder(GROUPED, **SLIDING),
    "apertus": _decoder(GROUPED),
    "diffllama": _decoder(GROUPED),
    "doge": _decoder(GROUPED),
    "bert": _encoder(),
    "roberta": _encoder(),
    "electra": _encoder(embedding_size=16),
    "distilbert": _encoder(),
    "modernbert": _encoder(local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "deberta": _encoder(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    "deberta-v2": _encoder(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    "albert": _encoder(embedding_size=16),
    "mpnet": _encoder(),
    "convbert": _encoder(embedding_size=16),
    "roformer": _encoder(embedding_size=16),
    "fnet": _encoder(),
    "nystromformer": _encoder(),
    "t5": _pair({**PLAIN, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}),
    "bart": _pair(BOTH),
    "marian": _pair(BOTH),
    "pegasus": _pair(BOTH),
    "mbart": _pair(BOTH),
    "m2m_100": _pair(BOTH),
    "whisper": Architecture(
        "encoder-decoder",
        "AutoModelForSpeechSeq2Seq",
        {**BOTH, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64},
        speech,
    ),
    "mixtral": _experts(),
    "qwen2_moe": _experts(shared_expert_intermediate_size=24),
    "qwen3_moe": _experts(),
    "olmoe": _experts(),
    "deepseek_v3": _experts({**EXPERTS, **LATENT}),
    "gpt_oss": _experts({**EXPERTS, **SLIDING}),
    "glm4_moe": _experts({**EXPERTS, **LATENT}),
    "granitemoe": _experts(),
    "minimax": _experts(),
    "qwen3_next": _experts(
        layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=24, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "mamba": _state(),
    "mamba2": _state(num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=4),
    "falcon_mamba": _state(),
    "rwkv": _state(),
    "recurrent_gemma": _state(GROUPED, attention_window_size=4, num_hidden_layers=3, num_key_value_heads=1),
    "bamba": _state(
        GROUPED, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4, attn_layer_indices=[1]
    ),
    "falcon_h1": _state(
        GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
    ),
    "lfm2": _state(GROUPED, layer_types=["conv", "full_attention"]),
    "vit": _vision(CLASSES, PATCHES, interpolated),
    "deit": _vision("DeiTForImageClassification", PATCHES, fixed_pixels),
    "dinov2": _vision(CLASSES, PATCHES, pixels),
    "swin": _vision(CLASSES, WINDOWS, pixels),
    "beit": _vision(CLASSES, PATCHES, fixed_pixels),
    "regnet": _vision(CLASSES, STAGES, pixels, embedding_size=8, groups_width=4),
    "convnext": _vision(CLASSES, STAGES, pixels),
    "resnet": _vision(CLASSES, STAGES, pixels, embedding_size=8, layer_type="basic"),
    "segformer": _vision(
        "AutoModelForSemanticSegmentation",
        {**STAGES, "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
         "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
        pixels,
    ),
    "clip": _vision(
        "AutoModel", {"text_config": TEXT_PART, "vision_config": IMAGE_PART, "projection_dim": 16}, captioned
    ),
    "siglip": _vision("AutoModel", {"text_config": TEXT_PART, "vision_config": IMAGE_PART}, captioned),
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """An entry by name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TABLE:
        near = get_close_matches(name, TABLE, 3) or list(TABLE)
        raise UserError(f"model {name!r}", "it is not in the table", stage="tools", remedy=f"Try {', '.join(near)}.")
    return TABLE[name]


def model(name: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model with weights drawn from a fixed seed, for inference."""
    import transformers

    entry = architecture(name)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **entry.config)
    head = getattr(transformers, entry.head)
    made = (head.from_config(config) if entry.head.startswith("Auto") else head(config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return made.to(device=device, dtype=dtype)
