"""What pydantic finds wrong, in words for the user."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from expertprune.registry import nearest


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The problems of data that was read as `model`, one for each key."""
    found: dict[str, str] = {}
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"] if not _is_branch(part)]
        key = ".".join(parts) or model.__name__.lower()
        if problem["type"] == "extra_forbidden":
            parents, name = [str(part) for part in problem["loc"][:-1] if not _is_branch(part)], str(problem["loc"][-1])
            key = ".".join([*parents, name])  # a user's own key may look like a branch
            message = f"unknown key {key!r}{nearest(name, _keys_at(parents, model))}"
        elif problem["type"] == "missing":
            message = f"missing key {key!r}"
        else:
            told = _told(problem["type"], problem.get("ctx") or {}, problem["input"]) or problem["msg"]
            message = f"{key}: {told.removeprefix('Value error, ')} (found {_short(problem['input'])})"
        found.setdefault(key, message)
    return list(found.values())


def _told(kind: str, limits: dict[str, Any], found: Any) -> str | None:
    """What pydantic's kinds of problems allow, in words; `None` for a kind without words of its own."""
    if kind == "literal_error":
        near = nearest(str(found), re.findall("'([^']*)'", limits["expected"]))
        return f"must be {limits['expected']}" + (near if "did you mean" in near else "")
    if kind == "string_type" and isinstance(found, bool | int | float):
        return "must be text; put it in quotes"
    if limits.get("min_length") == 1:
        return "must not be empty"
    words = _WORDS.get(kind)
    whole = {key: int(limit) for key, limit in limits.items() if isinstance(limit, float) and limit.is_integer()}
    return None if words is None else words.format(**limits | whole)


_WHOLE, _NUMBER, _TRUTH, _MAPPING = (
    f"must be {what}" for what in ("a whole number", "a number", "true or false", "a mapping of keys and values")
)
# By pydantic's kind of problem; braces name its limits.
_WORDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), _TRUTH),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), _MAPPING),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    "string_type": "must be text",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def _is_branch(part: str | int) -> bool:
    """Whether pydantic names the branch of a union, which the user does not know."""
    return isinstance(part, str) and ("[" in part or part in ("float",))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(parents: list[str], model: type[BaseModel]) -> list[str]:
    for parent in parents:
        field = model.model_fields.get(parent)
        candidates = [field.annotation, *get_args(field.annotation)] if field is not None else []
        inner = [a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:  # an entry of a dictionary has no field of its own; its model was found one level up
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]
