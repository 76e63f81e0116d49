"""The scalar values that a spec may hold beyond YAML's own: names, amounts, aggregations, sizes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1)]


Names = Annotated[list[Name], BeforeValidator(_listed, json_schema_input_type=Name | list[Name])]


def _amount(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a fraction such as 0.25 or a whole number of units")
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("a fraction is at least 0 and below 1, a count at least 0; it says what is removed")
    return value


# YAML's 0.25 is a fraction of the units of each layer, its 384 a count of units; both are what is *removed*.
Amount = Annotated[
    int | float,
    PlainValidator(_amount),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}]}
    ),
]


def _rows(value: Any) -> int | float | dict[str, float]:
    if isinstance(value, dict) and list(value) == ["coverage"]:
        covered = value["coverage"]
        if isinstance(covered, int | float) and not isinstance(covered, bool) and 0 < covered <= 1:
            return {"coverage": float(covered)}
        raise ValueError("coverage is a part of all tokens, above 0 and at most 1, such as 0.9999")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError(
        "must be a whole number of rows that are kept, a fraction such as 0.8 that is removed, or coverage: 0.9999"
    )


# Vocabulary rows: a whole number is *kept*, a fraction is removed, coverage is the part of tokens that is kept.
Rows = Annotated[
    int | float | dict[str, float],
    PlainValidator(_rows),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {
                    "type": "object",
                    "properties": {"coverage": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}},
                    "required": ["coverage"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


def _aggregate(value: Any) -> str | float:
    if value in ("mean", "max") and isinstance(value, str):
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError("must be mean, max or a quantile between 0 and 1, such as 0.9")


Aggregate = Annotated[
    str | float,
    PlainValidator(_aggregate),
    WithJsonSchema(
        {"anyOf": [{"enum": ["mean", "max"]}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}
    ),
]


_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}


def _size(value: Any) -> int:
    number, scale = value, 1
    if isinstance(value, str) and value[-1:].lower() in _SCALES:
        number, scale = value[:-1], _SCALES[value[-1].lower()]
    try:
        size = 0 if isinstance(value, bool) else int(float(number) * scale)
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError("must be a number of parameters, such as 100M, 1.5B or 100000000")
    return size


# A number of parameters: 100000000, "100M", "1.5B".
Size = Annotated[
    int, PlainValidator(_size), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})
]
