"""Random LoRA adapters of tiny bases, and experts of these to cut them along with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from expertprune.artifacts.expert import BaseRecord, Expert
from expertprune.artifacts.plan import Plan
from expertprune.models.base import ResolvedBase
from expertprune.spec.schema import Spec
from tests.oracle import exact, pruned

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base: Path, folder: Path, **config: Any) -> Path:
    """A random adapter of a base, as PEFT writes it."""
    torch.manual_seed(11)
    model = get_peft_model(exact(base), LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn_like(parameter)
                parameter.copy_(1 + noise.abs() if "magnitude" in name else noise)
    model.save_pretrained(folder)
    return folder


def with_adapter(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model, adapter).eval()


def expert_of(plan: Plan, base: ResolvedBase, folder: Path, method: str = "none") -> Path:
    """An expert that was not repaired, whose description names a method of repair."""
    name = Path(base.name).name
    data = {"name": folder.name, "base": name, "dimensions": {"language": "en"}, "budget": {"ffn": 0.25},
            "compensation": method}  # fmt: skip
    plan = replace(plan, name=folder.name, spec=Spec.model_validate(data).document())
    pruned(plan, base, folder)
    ancestor = Expert.load(base.folder).description if (base.folder / "expertprune.json").is_file() else None
    record = BaseRecord(model=name, digest=base.digest, tokenizer_digest=base.tokenizer_digest, revision=None,
                        trust_remote_code=False, weight_bytes=1)  # fmt: skip
    Expert(plan, record, {}, {}, None, ancestor, folder).save()
    return folder
