"""Models as GGUF files: read as bases through transformers, and written from folders of safetensors."""

from expertprune.gguf_files.reading import converted
from expertprune.gguf_files.writing import TYPES, Exported, write_gguf

__all__ = ["TYPES", "Exported", "converted", "write_gguf"]
