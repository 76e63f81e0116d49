"""Mutations of plain data and of bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

# What stands in places where nobody expects it.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**23, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "a", "nan",
    "\x1b[2J", "\0", "~nosuchuser", "../../..", "/dev/zero", "n" * 300, "ä" * 200, "\ud800", "0-999999999999", "{a:>9}",
    "{", "<script>", [], {}, [[]], [None], {"": {}}, {"a": 1}, ["a", 1, None], "de", "2024-13-45", "=", "!!int abc",
    "{{ 9 ** (9 ** 9) }}", "{{ 'x' * 10 ** 11 }}", "{% for i in range(99999) %}{% for j in range(99999) %}", "{% endfor %}",
]  # fmt: skip


def mutated(data: Any, chance: random.Random) -> Any:
    """Plain data with one to three places changed: another value, a key gone or new, a piece of another place."""
    data = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return chance.choice(VALUES)
        inside, key = chance.choice(places)
        way = chance.random()
        if way < 0.6:
            inside[key] = copy.deepcopy(chance.choice(VALUES))
        elif way < 0.75:
            del inside[key]
        elif way < 0.85:
            other, name = chance.choice(places)
            inside[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name : name + 1])
        elif isinstance(inside, dict):
            inside[chance.choice(["x", "", "0", "text", "<<", "\ud800"])] = copy.deepcopy(chance.choice(VALUES))
        else:
            inside += copy.deepcopy(inside)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    todo = [data]
    while todo:
        here = todo.pop()
        if isinstance(here, dict | list):
            for key, value in list(here.items() if isinstance(here, dict) else enumerate(here)):
                yield here, key
                todo.append(value)


def garbled(content: bytes, chance: random.Random) -> bytes:
    """Bytes with pieces changed, gone, doubled or cut off. The head, where formats say what follows, is hit most."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        end = max(1, len(changed))
        at = chance.randrange(min(end, 2048)) if chance.random() < 0.7 else chance.randrange(end)
        length = chance.choice((1, 1, 4, 8, 64))
        way = chance.randrange(6)
        if way == 0:
            changed[at : at + length] = chance.randbytes(length)
        elif way == 1:
            changed[at : at + length] = b"\xff" * length
        elif way == 2:
            del changed[at : at + length]
        elif way == 3:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 100))
        elif way == 4:
            del changed[at:]
        else:
            changed[at:at] = chance.choice(
                (b"[" * 3000, b"{", b'"', b"\0", b"&a [*a]", b"!!python/name:os.system ", b"9" * 5000)
            )
    return bytes(changed)
