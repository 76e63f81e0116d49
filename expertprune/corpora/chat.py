"""Render conversations by a chat template, and find their answers in the text."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from expertprune.corpora.documents import Document
from expertprune.corpora.messages import ANSWER, Conversation, with_text_arguments
from expertprune.corpora.templates import Span, TemplateFailedError, TemplateStoppedError, run_template
from expertprune.errors import SpecError, first_line

_MARK = "\ue000"  # a character of no language
_ANCHOR = 8  # characters in front of an answer by which it is found again
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The text that a model reads.

    `answers` are the spans of characters, `[start, end)`, that the loss counts on. `None`: a plain
    document, of which every token counts and to which the tokenizer adds its special tokens.
    """

    text: str
    answers: tuple[Span, ...] | None = None

    def cut(self, end: int) -> Rendered:
        """The text up to a character."""
        if self.answers is None:
            return Rendered(self.text[:end])
        kept = tuple((start, min(stop, end)) for start, stop in self.answers if start < end)
        return Rendered(self.text[:end], kept)


def render(document: Document, tokenizer: Any) -> Rendered:
    """The text of a document: a conversation through the tokenizer's chat template.

    Raises:
        SpecError: there is no template, it refuses the conversation, fails or does not end, or it
            changes answers so that they cannot be found.
    """
    if document.conversation is None:
        return Rendered(document.text)
    return ChatTemplate(tokenizer).render(document.conversation)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        if not has_template(tokenizer):
            raise SpecError(
                "the base has no chat template, so conversations cannot be rendered; take an instruct model as "
                "base.model, or set 'documents: raw' in their source"
            )
        self._tokenizer = tokenizer
        added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
        self._special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation and the spans of its answers; see `render`."""
        if conversation.verbatim:
            return self._verbatim(conversation)
        text, marked = self._text(conversation.tools, conversation.messages)
        spans = marked or list(self._by_prefixes(conversation, text))
        _check_calls(conversation, text if marked else "\n".join(text[start:end] for start, end in spans))
        return Rendered(text, tuple((start, start + len(text[start:end].rstrip())) for start, end in spans))

    def _verbatim(self, conversation: Conversation) -> Rendered:
        """What a model read and wrote. Many templates leave the thoughts of an answer out, which it also wrote."""
        *asked, answer = conversation.messages
        before, _ = self._text(conversation.tools, asked, opened=True)
        other, _ = self._text(conversation.tools, [*asked, {"role": ANSWER, "content": _MARK}])
        _, found, end = other.rpartition(_MARK)
        text = before + answer["content"] + (end if found else self._tokenizer.eos_token or "")
        return Rendered(text, ((len(before), len(text.rstrip())),))

    def prompt(self, conversation: Conversation) -> str:
        """The text up to where the first answer begins."""
        return self._text(conversation.tools, conversation.prompt, opened=True)[0]

    def question(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a question that a task asks.

        Args:
            add_generation_prompt: whether what opens an answer follows; else the last message is an answer that goes on.
        """
        ends = {"opened": add_generation_prompt, "continued": not add_generation_prompt}
        return self._text(None, messages, **ends, fix="leave 'chat' out")[0]

    def _text(
        self,
        tools: Sequence[Any] | None,
        messages: Sequence[dict[str, Any]],
        opened: bool = False,
        continued: bool = False,
        fix: str = "leave such conversations out, or set 'documents: raw'",
    ) -> tuple[str, list[Span]]:
        """The text of messages, and the spans that the template itself marks as generated."""
        tokenizer = self._tokenizer
        try:
            template = tokenizer.get_chat_template(None, tools)
            run = functools.partial(
                run_template,
                template,
                tools=tools,
                special=tokenizer.special_tokens_map,
                opened=opened,
                continued=continued,
                marked=_GENERATION.search(template) is not None,
            )
            try:
                return run(messages)
            except TemplateFailedError:
                if (others := with_text_arguments(messages)) == list(messages):
                    raise
                return run(others)  # few templates join the arguments of tool calls as text
        except TemplateStoppedError as error:
            raise TemplateStoppedError(f"{error}; {fix}") from None
        except Exception as error:  # of the tokenizer, which may have no template for tools, or of the template
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
            raise SpecError(
                f"the base's chat template refuses a conversation of the roles {roles}: {first_line(error)}; {fix}"
            ) from None

    def _by_prefixes(self, conversation: Conversation, text: str) -> Iterator[Span]:
        """Find each answer as what it adds to the conversation before it.

        Templates may render an earlier answer otherwise than the last one (without its reasoning),
        so that a shorter conversation is no prefix, or open no answer. The answer is then what changes
        if a mark takes its place.
        """
        messages, behind = conversation.messages, 0
        for number, message in enumerate(messages):
            if message["role"] != ANSWER:
                continue
            before = self._prefix(conversation, text, messages[:number], opened=True)
            end = self._prefix(conversation, text, messages[: number + 1])
            start, span = max(behind, before or 0), None
            unopened = before is None or before == self._prefix(conversation, text, messages[:number])
            if unopened or end is None:
                span = self._by_mark(conversation, text, number) or self._by_part(conversation, text, number, behind)
            if unopened:
                start = max(start, text.find(message["content"].strip(), start) if span is None else span[0])
            if end is None or before is None:
                if span is None or span[1] <= max(start, span[0]):
                    if message["content"].strip() or message.get("tool_calls"):
                        raise SpecError(
                            f"the base's chat template changes message {number + 1}, so its answer cannot be found; "
                            "set 'documents: raw'"
                        )
                    span = span or (start, start)  # an earlier answer that says nothing
                end = span[1]
                end += next((len(token) for token in self._special if text.startswith(token, end)), 0)
            yield min(start, end), end  # an answer may come to nothing
            behind = end

    def _by_mark(self, conversation: Conversation, text: str, number: int) -> Span | None:
        """What differs between the text and that of the same conversation with a mark as one of its answers."""
        messages = list(conversation.messages)
        messages[number] = {"role": ANSWER, "content": _MARK}
        try:
            other, _ = self._text(conversation.tools, messages)
        except TemplateStoppedError:
            raise
        except SpecError:
            return None
        before, found, behind = other.partition(_MARK)
        if not found:
            return None
        start = _alike(before, text)
        return start, len(text) - _alike(behind[::-1], text[start:][::-1])

    def _by_part(self, conversation: Conversation, text: str, number: int, behind: int) -> Span | None:
        """The same where a template takes no mark in the whole: by the messages up to the answer alone.

        Some refuse words in place of a call of tools between others, and have the tools before the last question.
        """
        part = Conversation.of(conversation.messages[: number + 1], conversation.tools)
        try:
            shorter, _ = self._text(part.tools, part.messages)
        except TemplateStoppedError:
            raise
        except SpecError:
            return None
        if (span := self._by_mark(part, shorter, number)) is None:
            return None
        start, end = span
        if text.startswith(shorter[:start]):
            return span if text.startswith(shorter[:end]) else None
        anchor = min(start, _ANCHOR)
        found = text.find(shorter[start - anchor : end], max(0, behind - anchor))
        return None if found < 0 else (found + anchor, found + anchor + end - start)

    def _prefix(
        self, conversation: Conversation, text: str, messages: Sequence[dict[str, Any]], opened: bool = False
    ) -> int | None:
        """How long the text of the first messages is, if the whole text begins with it."""
        try:
            shorter, _ = self._text(conversation.tools, messages, opened)
        except TemplateStoppedError:
            raise
        except SpecError:  # the whole was rendered, so this is about the part alone
            return None
        return len(shorter) if messages and text.startswith(shorter) else None


def _check_calls(conversation: Conversation, answers: str) -> None:
    """Raises `SpecError` where a template leaves calls of tools out, as those do that know of none."""
    for number, message in enumerate(conversation.messages, 1):
        functions = [call.get("function") for call in message.get("tool_calls") or () if message["role"] == ANSWER]
        names = [str(each.get("name") or "") for each in functions if isinstance(each, dict)]
        if left_out := next((name for name in names if name not in answers), None):
            raise SpecError(
                f"the base's chat template leaves out the call of {left_out!r} in message {number}, so nothing of it would "
                "be learnt or measured; leave such conversations out, or set 'documents: raw'"
            )


def _alike(one: str, other: str) -> int:
    """With how many characters both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
