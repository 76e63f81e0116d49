"""Which languages a tokenizer was made for."""

from __future__ import annotations

from typing import Any

# Article 1 of the Universal Declaration of Human Rights: one text in many languages.
_SAME = {
    "en": ("English", "All human beings are born free and equal in dignity and rights."),
    "de": ("German", "Alle Menschen sind frei und gleich an Würde und Rechten geboren."),
    "fr": ("French", "Tous les êtres humains naissent libres et égaux en dignité et en droits."),
    "es": ("Spanish", "Todos los seres humanos nacen libres e iguales en dignidad y derechos."),
    "pt": ("Portuguese", "Todos os seres humanos nascem livres e iguais em dignidade e em direitos."),
    "it": ("Italian", "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti."),
    "ru": ("Russian", "Все люди рождаются свободными и равными в своем достоинстве и правах."),
    "zh": ("Chinese", "人人生而自由，在尊严和权利上一律平等。"),
    "ja": ("Japanese", "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"),
    "hi": ("Hindi", "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।"),
}
LANGUAGES = {code: name for code, (name, _) in _SAME.items()}
_KNOWN = 1.75  # times as many tokens as the same sentence has in English


def known_languages(tokenizer: Any) -> list[str]:
    """Codes of the languages, of those in `LANGUAGES`, that a tokenizer was made for.

    It writes one sentence in each of them with at most 1.75 times the tokens that it needs in English. It
    is no proof that the model speaks a language, and no proof that it does not.
    """
    count = {code: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for code, (_, text) in _SAME.items()}
    return [code for code, tokens in count.items() if tokens <= _KNOWN * count["en"]]
