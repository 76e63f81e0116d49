"""Tokenizers as data: which pieces a token needs, what must stay, and the same tokenizer with fewer tokens.

Everything is read from `tokenizer.json` and written back as one; no tokenizer's code is run to decide anything.
"""

from expertprune.tokenizing.companions import Renumbering, write_tokenizer
from expertprune.tokenizing.essentials import essential_ids
from expertprune.tokenizing.trimming import Trimmed, trimmed
from expertprune.tokenizing.vocabulary import Kind, Vocabulary, read_vocabulary

__all__ = [
    "Kind",
    "Renumbering",
    "Trimmed",
    "Vocabulary",
    "essential_ids",
    "read_vocabulary",
    "trimmed",
    "write_tokenizer",
]
