"""Tokenizers as data: the pieces that a token needs, the tokens that must stay, the same tokenizer
with fewer tokens.

All is read from `tokenizer.json` and written as one. Which tokens stay is decided without running a
tokenizer's code.
"""

from expertprune.tokenizing.companions import Renumbering, write_tokenizer
from expertprune.tokenizing.essentials import essential_ids
from expertprune.tokenizing.trimming import Trimmed, trimmed
from expertprune.tokenizing.vocabulary import TokenizerKind, Vocabulary, read_vocabulary, with_added

__all__ = [
    "Renumbering",
    "TokenizerKind",
    "Trimmed",
    "Vocabulary",
    "essential_ids",
    "read_vocabulary",
    "trimmed",
    "with_added",
    "write_tokenizer",
]
