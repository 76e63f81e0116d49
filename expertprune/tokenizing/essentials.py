"""Tokens that stay whatever the corpora say, each with its reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from expertprune.corpora.templates import TemplateFailedError, TemplateStoppedError, run_template
from expertprune.errors import CheckpointError
from expertprune.tokenizing.companions import read_settings, special_ids
from expertprune.tokenizing.vocabulary import BYTES, TokenizerKind, Vocabulary

_ROLES = ("system", "user", "assistant", "tool")


def essential_ids(vocabulary: Vocabulary, folder: Path, tokenizer: Any) -> dict[str, set[int]]:
    """Tokens that are always kept, by reason, together with the tokens that they need.

    Args:
        folder: the base's folder, whose configs name special ids and stop strings.
        tokenizer: the base's running tokenizer, which tokenizes the text of its chat template.
    """
    plain = {
        index: vocabulary.text(index) for token, index in vocabulary.tokens.items() if token not in vocabulary.added
    }
    found = {
        "special and added tokens": set(vocabulary.added.values()) - vocabulary.placeholders
        | _named(vocabulary, folder)
        | _with_roles(vocabulary, folder),
        "alphabet": _alphabet(vocabulary),
        "digits": {index for index, text in plain.items() if text.strip().isdecimal()},
        "white space": {index for index, text in plain.items() if text and not text.strip()},
        "chat template": set(_tokens(_template_texts(tokenizer), tokenizer)),
        "stop strings": set(_tokens(_stop_strings(folder), tokenizer)),
    }
    return {reason: vocabulary.closed(ids & set(vocabulary.by_id)) for reason, ids in found.items()}


def _named(vocabulary: Vocabulary, folder: Path) -> set[int]:
    """Ids in the configs and in the tokenizer's own sections; raises `CheckpointError` where the latter name no token."""
    if absent := sorted(vocabulary.named - set(vocabulary.by_id)):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: names the token {absent[0]}, which it does not have")
    configs = [read_settings(folder / name) for name in ("config.json", "generation_config.json")]
    return vocabulary.named | {index for config in configs for index in special_ids(config)}


def _with_roles(vocabulary: Vocabulary, folder: Path) -> set[int]:
    """Added tokens that the tokenizer's settings name under any key."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for each in value.values() if isinstance(value, dict) else value:
                yield from texts(each)

    found: set[int] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = {key: value for key, value in read_settings(folder / name).items() if key != "added_tokens_decoder"}
        found.update(vocabulary.added[text] for text in texts(settings) if text in vocabulary.added)
    return found


def _alphabet(vocabulary: Vocabulary) -> set[int]:
    """Tokens that spell any text: bytes, or without them all characters of the base."""
    tokens = vocabulary.tokens
    if vocabulary.kind is TokenizerKind.BYTE_LEVEL:
        kept = {index for token, index in tokens.items() if len(token) == 1}
    else:
        kept = {tokens[byte] for byte in BYTES if byte in tokens}
        if not vocabulary.reaches_bytes:
            kept |= {index for token, index in tokens.items() if len(token) == 1}
    if vocabulary.kind is TokenizerKind.UNIGRAM:
        # An unknown character scores ten below the worst piece, so the worst piece stays. Without
        # bytes, a piece stays if it alone covers some character.
        scores = [score for _, score in vocabulary.model["vocab"]]
        kept.add(scores.index(min(scores)))
        if not vocabulary.reaches_bytes:
            kept |= {index for token, index in tokens.items() if any(char not in tokens for char in token)}
    return kept


def _tokens(texts: Iterator[str], tokenizer: Any) -> Iterator[int]:
    for text in texts:
        yield from tokenizer(text, add_special_tokens=False)["input_ids"]


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, by which templates mark answers: what stands in it is as without."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an attribute of instances)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_texts(tokenizer: Any) -> Iterator[str]:
    """Text of chat templates: their literals, the roles, and rendered conversations."""
    templates = tokenizer.chat_template
    if not templates:
        return
    yield from _ROLES
    named = templates if isinstance(templates, dict) else {"default": templates}
    environment = jinja2.sandbox.SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    for template in named.values():
        with contextlib.suppress(jinja2.TemplateError, RecursionError):
            tree = environment.parse(template)
            for literal in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
                text = getattr(literal, "data", getattr(literal, "value", None))
                if isinstance(text, str):
                    yield text
        for roles in (_ROLES[:3], _ROLES[1:3], _ROLES[1:2]):
            messages = [{"role": role, "content": role} for role in roles]
            with contextlib.suppress(TemplateFailedError, TemplateStoppedError):
                yield run_template(template, messages, special=tokenizer.special_tokens_map, opened=True)[0]


def _stop_strings(folder: Path) -> Iterator[str]:
    stops = read_settings(folder / "generation_config.json").get("stop_strings") or []
    yield from [stops] if isinstance(stops, str) else stops
