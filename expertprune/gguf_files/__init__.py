"""Models as GGUF files: read as bases through transformers, and written from folders of safetensors."""

from expertprune.gguf_files.exporting import FORMATS, export
from expertprune.gguf_files.reading import converted
from expertprune.gguf_files.writing import TYPES, Exported

__all__ = ["FORMATS", "TYPES", "Exported", "converted", "export"]
