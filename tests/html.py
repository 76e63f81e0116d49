"""Pages as a parser sees them."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import html5lib

Element = ElementTree.Element


def parsed(text: str) -> Element:
    """The tree of a page; raises `html5lib.html5parser.ParseError` where it is not valid HTML."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    root: Element = parser.parse(text)
    return root


def words(element: Element) -> str:
    """All text in an element, white space made one."""
    return " ".join("".join(element.itertext()).split())


def at(data: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) points to."""
    for key in pointer.removeprefix("/").split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def numbers(root: Element) -> dict[str, tuple[float, str]]:
    """Every number of a page by its pointer: its exact value, and how it is written."""
    found = {}
    for element in root.iter("data"):
        found[element.get("data-pointer", "")] = (json.loads(element.get("value", "")), words(element))
    return found
