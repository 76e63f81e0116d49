"""Numbers as text for people: the same in the terminal, on the page and in the model card."""

from __future__ import annotations

import re

UNDEFINED = "undefined"


def count(value: float) -> str:
    """`"1,234,567"`."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A fraction as `"85.2%"`, or below one percent as `"0.41%"`."""
    return f"{value:.2%}" if 0 < abs(value) < 0.01 else f"{value:.1%}"


def ratio(value: float) -> str:
    """`"0.9472"`, for retention and the two numbers behind it."""
    return f"{value:.4f}"


def short(value: float) -> str:
    """`"0.947"`, for headlines."""
    return f"{value:.3f}"


def interval(low: float | None, high: float | None) -> str:
    """The two ends of an interval as `"0.9411 to 0.9533"`, or that there is none."""
    return "no interval" if low is None or high is None else f"{ratio(low)} to {ratio(high)}"


def megabytes(value: float) -> str:
    """Bytes as `"232.9 MB"`."""
    return f"{value / 1e6:,.1f} MB"


def quantity(value: float) -> str:
    """A measurement of any size with four significant digits: `"1,234"`, `"12.35"`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


STYLES = {
    "count": count, "percent": percent, "ratio": ratio, "short": short, "megabytes": megabytes, "quantity": quantity
}  # fmt: skip


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text with control characters written out as JSON does (`\\u001b`): they could change what a terminal shows.

    Line breaks and tabs stay.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def file_name(text: str) -> str:
    """Text as part of a file's name: letters and digits of any language, dots and dashes, 60 at most."""
    return re.sub(r"[^\w.-]+", "-", text)[:60]


def one_line(text: str) -> str:
    """Text as Markdown shows it as it is: one line, without control characters or HTML."""
    return printable(" ".join(text.splitlines())).replace("<", "&lt;")
