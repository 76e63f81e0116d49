"""Tiny random models of every family, saved as ordinary folders: for the oracle, never for claims about quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from expertprune.arch import family_of
from expertprune.models.passes import TextRun

WORDS = ["the", "heart", "pumps", "blood", "a", "judge", "reads", "law",
         "we", "sum", "numbers", "und", "der", "Arzt", "is"]  # fmt: skip
WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OF_GEMMA = {
    "head_dim": 4,
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "pad_token_id": 1,
}
ROUTED = {"num_experts": 6, "num_experts_per_tok": 2}
SHARED = {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {**SHARED, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
# By family: what its config says beside the widths. Gemma's window is shorter than the tests' texts, and the scale of its
# attention logits is not the one that follows from the width of a head.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma3": OF_GEMMA,
    # eager attention is the only one that caps
    "gemma2": {
        **OF_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "attn_implementation": "eager",
    },
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 4, "attention_bias": True},
    "phi3": {"pad_token_id": 1},
    "olmo2": {"pad_token_id": 1},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {**ROUTED, "pad_token_id": 1},
    "qwen2_moe": {**ROUTED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**ROUTED, "head_dim": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 6, "routed_scaling_factor": 1.5,
                    "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 6, "n_group": 2, "topk_group": 1,
                    "num_mtp_layers": 0},
    "glm4_moe": {**SHARED, "head_dim": 4, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True,
                 "pad_token_id": 1, "num_mtp_layers": 0},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
                     "tie_word_embeddings": False},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": 4,
                "attn_implementation": "eager"},
    "qwen3_next": {**ROUTED, "head_dim": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
                   "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
                   "linear_value_head_dim": 4},
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of a family (or `model_type`), float32; `changes` go into its config.

    All its parameters are random, biases and norms included, so that a forgotten one shows.
    """
    name = family.removesuffix("_text")
    config = CONFIG_MAPPING["gemma3_text" if name == "gemma3" else name](**{**WIDTHS, **FAMILIES[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            neutral = 0 if family.startswith("gemma") else 1  # Gemma's norms multiply by 1 + weight
            parameter.copy_(neutral + 0.1 * noise if "norm" in name else 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # stored, though no gradient changes it
                buffer.copy_(0.3 * torch.randn_like(buffer))
    return model


def as_run(model: Any) -> TextRun:
    """How an evaluation runs a model in memory; it brings batches of its own."""
    return TextRun(model, family_of(model.config.model_type), (), ())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 64 ids."""
    names = ["<s>", "</s>", "<unk>", *WORDS]
    names += [f"w{i}" for i in range(64 - len(names))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def save_tiny(
    folder: Path, family: str = "llama", max_shard_size: str = "1GB", dtype: Any = None, **changes: Any
) -> Path:
    """Save a tiny model and tokenizer into a folder; a small `max_shard_size` such as `"20KB"` makes several files."""
    model = tiny_model(family, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, sentences: int = 12, seed: int = 0) -> Path:
    """A JSONL corpus of random sentences over the tiny tokenizer's words, all different."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = [*WORDS, *(f"w{i}" for i in range(64 - 3 - len(WORDS)))]
    with path.open("w") as file:
        for _ in range(sentences):
            length = int(torch.randint(6, 20, (1,), generator=generator))
            words = [vocabulary[int(i)] for i in torch.randint(0, len(vocabulary), (length,), generator=generator)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path
