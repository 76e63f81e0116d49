"""What pydantic finds wrong, in words for the user."""

from __future__ import annotations

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
            message = f"{key}: {problem['msg'].removeprefix('Value error, ')} (found {_short(problem['input'])})"
        found.setdefault(key, message)
    return list(found.values())


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
