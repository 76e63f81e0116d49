"""The format's names for tensors."""

from __future__ import annotations

from typing import Any

from expertprune.arch import GgufForm


def name_map(form: GgufForm, layers: int) -> Any:
    """gguf's own table of names for an architecture with this many layers."""
    import gguf

    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[form.architecture]
    return gguf.get_tensor_name_map(architecture, layers)


def gguf_name(names: Any, form: GgufForm, name: str) -> str | None:
    """The format's name for a folder's tensor, or `None` where it has no place for it."""
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    local = (found or "").split(".", 2)[-1] if (found or "").startswith("blk.") else found
    return None if found is None or (found.endswith(".bias") and local not in form.biases) else found


def is_one_of(name: str, local: tuple[str, ...]) -> bool:
    """Whether a tensor, or a module, is one of those that a family names within a layer."""
    return any(name.endswith(f".{each}") for each in local)
