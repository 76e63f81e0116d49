"""Where two answers part."""

from __future__ import annotations

import itertools
import re


def first_difference(mine: str, other: str, over: bool = True) -> tuple[int, int] | None:
    """The first word of `mine` in which it departs from `other`, as begin and end; `None` where it does not.

    An answer that goes on where the other ends departs with its next word.

    Args:
        over: whether the other answer has ended.
    """
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=False))
    same = sum(1 for _ in pairs)
    if same == len(other) and not over:
        return None
    return next((each.span() for each in re.finditer(r"\S+", mine) if each.end() > same), None)
