"""Conversations: messages in the forms that data sets use, in one form."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from expertprune.errors import SpecError
from expertprune.files import parse_json

ANSWER = "assistant"  # the role whose messages count
_INSTRUCTIONS = ("system", "developer")  # roles of messages that many conversations share
# What templates read besides role and content.
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# Roles of the ShareGPT form, https://github.com/lm-sys/FastChat, and of its variants for tools.
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": ANSWER,
    "chatgpt": ANSWER,
    "bing": ANSWER,
    "bard": ANSWER,
    "model": ANSWER,
    "assistant": ANSWER,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": ANSWER,
}


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that they may call, in the form that chat templates take.

    `data` is both as JSON with sorted keys, so that conversations can be compared and hashed. `verbatim` says that a
    model wrote the last message, an answer, which is read word for word behind what opens it.
    """

    data: str
    verbatim: bool = False

    @classmethod
    def of(
        cls, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None, verbatim: bool = False
    ) -> Conversation:
        """From messages with `role` and `content`."""
        whole = {"messages": list(messages), "tools": list(tools) if tools else None}
        return cls(json.dumps(whole, sort_keys=True, ensure_ascii=False), verbatim)

    @cached_property
    def _read(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.data)
        return data

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages; do not change them."""
        found: list[dict[str, Any]] = self._read["messages"]
        return found

    @property
    def tools(self) -> list[Any] | None:
        """JSON schemas of the tools; `None` without any."""
        found: list[Any] | None = self._read["tools"]
        return found

    @property
    def text(self) -> str:
        """What is said, without roles: one paragraph a message."""
        return "\n\n".join(said for message in self.messages if (said := _said(message)))

    @property
    def exchanged(self) -> str:
        """`text` without system messages, which tell no conversations apart: those of one product share them."""
        return "\n\n".join(
            said for message in self.messages if message["role"] not in _INSTRUCTIONS and (said := _said(message))
        )

    @property
    def answered(self) -> bool:
        """Whether it has an answer."""
        return any(message["role"] == ANSWER for message in self.messages)

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the first answer."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == ANSWER]
        return self.messages[: answers[0]] if answers else self.messages


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in (message["content"] or "", *calls) if part.strip())


def read_conversation(messages: Any, tools: Any, where: str, unanswered: bool = False) -> Conversation:
    """A conversation from a row: OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`).

    Lists may be written as JSON text, as CSV files have them. What follows the last answer is left
    out: it predicts nothing.

    Args:
        where: what an error names.
        unanswered: whether a conversation may have no answer; it then ends with its last message.

    Raises:
        SpecError: messages of mixed types, of an unknown form, or no answer among them.
    """
    messages = _listed(messages)
    if not isinstance(messages, list):
        raise SpecError(f"{where}: messages must be a list of role and content, not {type(messages).__name__}")
    read = [_message(each, f"{where}, message {number}") for number, each in enumerate(messages, 1)]
    answers = [i for i, each in enumerate(read) if each["role"] == ANSWER and _said(each)]
    if not answers and unanswered and read:
        return Conversation.of(read, _tools(tools, where))
    if not answers:
        roles = ", ".join(list(dict.fromkeys(repr(each["role"]) for each in read))[:10]) or "none"
        raise SpecError(
            f"{where}: a conversation without an answer: no message of role {ANSWER!r} says anything; its roles: {roles}"
        )
    return Conversation.of(read[: answers[-1] + 1], _tools(tools, where))


def _tools(tools: Any, where: str) -> list[Any] | None:
    found = _listed(tools) if tools else None
    if found is not None and not isinstance(found, list):
        raise SpecError(f"{where}: tools must be a list, not {type(found).__name__}")
    return found


def read_exchange(prompt: Any, completion: Any, where: str, unanswered: bool = False) -> Conversation:
    """A conversation from a prompt and its completion; each is text, or a list of messages.

    See `read_conversation`.
    """
    both: list[Any] = []
    for value, role in ((prompt, "user"), (completion, ANSWER)):
        both += value if isinstance(value, list) else [{"role": role, "content": value}]
    return read_conversation(both, None, where, unanswered)


def _listed(value: Any) -> Any:
    """A list that is written as JSON text, read."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(SpecError):
            return parse_json(value, "", SpecError, any_integer=True)
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise SpecError(f"{where}: must be a mapping of role and content, not {type(message).__name__}")
    if "role" in message:
        role, content = message["role"], message.get("content")
    elif "from" in message:
        role, content = _SHAREGPT.get(str(message["from"]), message["from"]), message.get("value")
    else:
        raise SpecError(f"{where}: has neither 'role' nor 'from'; its keys are {', '.join(map(str, message))}")
    if not isinstance(role, str) or not role:
        raise SpecError(f"{where}: its role is {role!r}, not a name")
    if message.get("function_call"):
        raise SpecError(f"{where}: holds function_call, which chat templates do not read; write it as tool_calls")
    kept = {key: message[key] for key in _KEPT if message.get(key)}
    if message.get("reasoning"):  # as vLLM answers, and what it gives to templates
        kept.setdefault("reasoning_content", message["reasoning"])
    if "tool_calls" in kept:
        calls = _listed(kept["tool_calls"])
        if not isinstance(calls, list) or not all(isinstance(each, dict) for each in calls):
            raise SpecError(f"{where}: its tool_calls must be a list of mappings")
        kept["tool_calls"] = [_call(each) for each in calls]
    if content is None and "tool_calls" not in kept:
        raise SpecError(f"{where}: has no content")
    return {"role": role, "content": _content(content, where), **kept}


def _call(call: Any) -> Any:
    """A tool call with its arguments as a mapping, which templates expect; OpenAI's form has them as JSON text.

    What is no mapping becomes an empty one, as in vLLM, so that the expert is calibrated on what it will be served.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "", SpecError, any_integer=True)
        except SpecError:
            arguments = None
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}


def with_text_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose tool calls have their arguments as JSON text, as OpenAI's form has them."""

    def written(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _content(content: Any, where: str) -> str:
    """Text, or a list of parts of which each is text: a line each, as vLLM joins them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = sorted({str(part.get("type")) for part in content if part.get("type") != "text"})
        if others:
            raise SpecError(f"{where}: holds {', '.join(others)}; only text can be read")
        texts = [part.get("text") or "" for part in content]
        if wrong := next((text for text in texts if not isinstance(text, str)), None):
            raise SpecError(f"{where}: the text of a part is {type(wrong).__name__}, not text")
        return "\n".join(texts)
    raise SpecError(f"{where}: its content is {type(content).__name__}, not text")
