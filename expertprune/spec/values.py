"""The scalar values that a spec may hold beyond YAML's own: names, amounts, aggregations, sizes."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from expertprune.files import user_path


def listed(value: Any) -> Any:
    """A single name as a list of one. Raises `ValueError` for what YAML made a truth value of a name, such as `no`."""
    if any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value])):
        raise ValueError("YAML reads no, off, yes and on as false and true; put the name in quotes, such as 'no'")
    if value is None or isinstance(value, dict | int | float):
        raise ValueError("must be text, or a list of texts")
    return [value] if isinstance(value, str) else value


def formed(pattern: str, words: str) -> AfterValidator:
    """A check of a whole text; `words` say what `pattern` allows."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(words)
        return text

    return AfterValidator(check)


FILE_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"


FileName = Annotated[
    str,
    Field(max_length=100, json_schema_extra={"pattern": f"^{FILE_NAME}$"}),
    formed(FILE_NAME, "must be of letters, digits, '.', '_' and '-', the first a letter or a digit"),
]


DEVICE = r"auto|cpu|cuda(:\d+)?"


Device = Annotated[
    str,
    Field(json_schema_extra={"pattern": f"^({DEVICE})$"}),
    formed(DEVICE, "must be auto, cpu, cuda, or one GPU of several such as cuda:1"),
]


Name = Annotated[str, Field(min_length=1)]


def _each_once(names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"each name once; {name!r} is there twice")
    return names


Names = Annotated[
    list[Name],
    BeforeValidator(listed, json_schema_input_type=Name | list[Name]),
    AfterValidator(_each_once),
]


def _path(text: str) -> str:
    user_path(text)  # its `ValueError` says what is wrong
    return text


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_path)]


LocalPaths = Annotated[
    list[LocalPath],
    Field(min_length=1),
    BeforeValidator(listed, json_schema_input_type=LocalPath | list[LocalPath]),
]


@dataclass(frozen=True)
class Keep:
    """How many units stay."""

    keep: int


@dataclass(frozen=True)
class Remove:
    """How many units go."""

    remove: int


@dataclass(frozen=True)
class Coverage:
    """How much of the tokens of unseen text the kept vocabulary rows cover."""

    coverage: float


_PERCENT = re.compile(r"(\d+(?:\.\d+)?) *%")


def _removed(value: Any) -> int | float | Keep:
    """What goes, as a count or a fraction of the units, or how many units stay."""
    if isinstance(value, Keep):
        return value
    key, number = "remove", value
    if isinstance(value, dict) and list(value) in (["keep"], ["remove"]):
        ((key, number),) = value.items()
    if isinstance(number, str) and (percent := _PERCENT.fullmatch(number.strip())):
        number = round(float(percent[1]) / 100, 12)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError("must be what goes (0.25, 25%, remove: 384) or what stays (keep: 75%, keep: 1152)")
    if key == "keep" and isinstance(number, int) and number >= 1:
        return Keep(keep=number)
    if key == "keep" and isinstance(number, float):
        number = round(1 - number, 12)
    if (key == "keep" and isinstance(number, int)) or number < 0 or (isinstance(number, float) and number >= 1):
        raise ValueError("what goes is a fraction from 0 to below 1 or a count of at least 0; what stays is above 0")
    return number


def _fraction(value: Any) -> float:
    removed = _removed(value)
    if isinstance(removed, Keep) or removed >= 1:
        raise ValueError("must be a fraction below 1, such as 0.25, 25% or keep: 75%; give a count as max_parameters")
    return float(removed)


def _rows(value: Any) -> float | Keep | Remove | Coverage:
    if isinstance(value, Keep | Remove | Coverage):
        return value
    if isinstance(value, dict) and list(value) == ["coverage"]:
        covered = value["coverage"]
        if isinstance(covered, float) and 0 < covered < 1:
            return Coverage(coverage=covered)
        raise ValueError("coverage is a part of the tokens of unseen text, above 0 and below 1, such as 0.999")
    removed = _removed(value)
    if isinstance(value, int):
        raise ValueError(f"write keep: {value} if so many rows stay, or remove: {value} if so many go")
    if not isinstance(removed, Keep) and not removed:
        raise ValueError("must remove something; leave the key out to keep every row")
    return Remove(remove=removed) if isinstance(removed, int) else removed


def _written(value: Any) -> Any:
    return asdict(value) if isinstance(value, Keep | Remove | Coverage) else value


def _schema(*more: dict[str, Any], counts: bool = True, whole: bool = False) -> WithJsonSchema:
    """The JSON schema of an amount: a fraction or percentage; mappings that say keep or remove;
    more forms.

    Args:
        counts: whether `keep` and `remove` may be counts.
        whole: whether a whole number may stand alone.
    """
    count: dict[str, Any] = {"type": "integer", "minimum": 0}
    fraction = [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "string", "pattern": r"^[\d.]+ *%$"}]
    value = {"anyOf": [*fraction, *([count] if counts else [])]}
    said = [_mapping(key, value) for key in ("keep", "remove")]
    return WithJsonSchema({"anyOf": [*([count] if whole else []), *fraction, *said, *more]})


def _mapping(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


# One rule for every amount: a fraction (0.25), a percentage (25%) and a whole number say what is
# *removed*, of each layer where layers have the units; `keep:` says what stays. A whole number of
# vocabulary rows must say which of the two it is.
Amount = Annotated[int | float | Keep, PlainValidator(_removed), PlainSerializer(_written), _schema(whole=True)]


# A fraction that is removed.
Fraction = Annotated[float, PlainValidator(_fraction), _schema(counts=False)]


# Vocabulary rows: an amount, or what part of unseen text is covered.
Rows = Annotated[
    float | Keep | Remove | Coverage,
    PlainValidator(_rows),
    PlainSerializer(_written),
    _schema(_mapping("coverage", {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})),
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


def _scaled(value: Any) -> int:
    """A whole number of at least 1, written out or with k, M or B; 0 for anything else."""
    number, scale = value, 1
    if isinstance(value, str) and value[-1:].lower() in _SCALES:
        number, scale = value[:-1], _SCALES[value[-1].lower()]
    try:
        return 0 if isinstance(value, bool) else max(0, int(round(float(number) * scale, 6)))  # 1.005B is no less
    except (TypeError, ValueError, OverflowError):
        return 0


def _size(value: Any) -> int:
    if size := _scaled(value):
        return size
    raise ValueError("must be a number of parameters, such as 100M, 1.5B or 100000000")


def _count(value: Any) -> int:
    if count := _scaled(value):
        return count
    raise ValueError("must be a number of at least 1, such as 200k or 200000")


_WRITTEN = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})


# A number of parameters: 100000000, "100M", "1.5B".
Size = Annotated[int, PlainValidator(_size), _WRITTEN]


# A number of other things: 200000, "200k".
Count = Annotated[int, PlainValidator(_count), _WRITTEN]
