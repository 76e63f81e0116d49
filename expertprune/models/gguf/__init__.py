"""GGUF files: read as bases through transformers, and written from folders of safetensors."""

from __future__ import annotations

from expertprune.models.gguf.reading import converted
from expertprune.models.gguf.writing import TYPES, Exported

__all__ = ["TYPES", "Exported", "converted"]
