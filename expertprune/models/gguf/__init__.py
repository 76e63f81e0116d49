"""GGUF files: converted to folders of safetensors, and written from folders of safetensors."""

from __future__ import annotations

from expertprune.models.gguf.conversion import converted
from expertprune.models.gguf.writing import TYPES, Exported

__all__ = ["TYPES", "Exported", "converted"]
