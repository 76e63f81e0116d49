"""What pydantic finds wrong, in words for the user."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from expertprune.registry import nearest


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The problems of data that was read as `model`, one for each key."""
    found: dict[str, str] = {}
    for problem in error.errors():
        # pydantic names the branches of unions; the user does not know these names.
        parts = [str(p) for p in problem["loc"] if not (isinstance(p, str) and ("[" in p or p in ("float",)))]
        key = ".".join(parts) or model.__name__.lower()
        if problem["type"] == "extra_forbidden":
            parts, name = (
                parts[: len(problem["loc"]) - 1],
                str(problem["loc"][-1]),
            )  # a user's key may look like a branch
            parts = parts[:-1] if parts and parts[-1] == name else parts
            key = ".".join([*parts, name])
            message = f"unknown key {key!r}{nearest(name, _keys_at(parts, model))}"
        elif problem["type"] == "missing":
            message = f"missing key {key!r}"
        else:
            message = f"{key}: {problem['msg'].removeprefix('Value error, ')} (found {_short(problem['input'])})"
        found.setdefault(key, message)
    return list(found.values())


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
