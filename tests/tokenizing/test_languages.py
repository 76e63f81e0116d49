"""Languages that a tokenizer was made for."""

from __future__ import annotations

from typing import Any

from expertprune.tokenizing.languages import known_languages


def words_and_letters(text: str, **_: Any) -> dict[str, list[str]]:
    """One token for each word of Latin letters, one for each byte of every other script."""
    tokens: list[str] = []
    for word in text.split():
        tokens += [word] if all(ord(letter) < 0x250 for letter in word) else [chr(byte) for byte in word.encode()]
    return {"input_ids": tokens}


def test_a_language_that_takes_many_more_tokens_than_english_is_not_known() -> None:
    """12 words of English, at most 13 of the other Latin languages; 20 signs of Chinese are 60 bytes."""
    assert known_languages(words_and_letters) == ["en", "de", "fr", "es", "pt", "it"]
