"""Numbers as text for people: the same in the terminal, on the page and in the model card."""

from __future__ import annotations

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


def megabytes(value: float) -> str:
    """Bytes as `"232.9 MB"`."""
    return f"{value / 1e6:,.1f} MB"


def quantity(value: float) -> str:
    """A measurement of any size with four significant digits: `"1,234"`, `"12.35"`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


STYLES = {
    "count": count, "percent": percent, "ratio": ratio, "short": short, "megabytes": megabytes, "quantity": quantity
}  # fmt: skip
