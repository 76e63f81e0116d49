"""Sweeps: experts of one base under several budgets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError

from expertprune.artifacts.evaluation import CorpusResult, Measured
from expertprune.artifacts.record import Record
from expertprune.errors import CheckpointError
from expertprune.files import problems_of, read_json, write_json
from expertprune.spec.schema import Evaluate

SWEEP_SCHEMA: Literal[2] = 2


class Point(Record):
    """One expert of a sweep.

    Attributes:
        budget: what was asked for: a fraction to remove.
        key: the digest of everything that the numbers depend on.
        parameters: of the base (`before`) and of the expert (`after`).
        fraction: parameters of the expert over those of the base.
        bytes: size of the expert's folder.
        expert, general: bits per byte over the documents of all corpora of the group; `None` without documents.
        corpora: what was measured on each corpus, without single documents.
    """

    budget: float
    key: str
    parameters: dict[str, int]
    fraction: float
    bytes: int
    expert: Measured | None
    general: Measured | None
    corpora: dict[str, CorpusResult]


class SweptBase(Record):
    """The base of a sweep, and how many parameters it has."""

    model: str
    digest: str
    parameters: int


class Sweep(Record):
    """Experts of one base, in the order in which their budgets were given.

    `earlier` are points of other budgets, or of another spec, that the same file holds.
    """

    model_config = ConfigDict(populate_by_name=True)

    kind: Literal["sweep"] = "sweep"
    schema_: Literal[2] = Field(SWEEP_SCHEMA, alias="schema")
    name: str
    base: SweptBase
    settings: Evaluate
    points: list[Point]
    earlier: list[Point] = Field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Plain data that gives the same sweep back."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: Path) -> None:
        write_json(path, self.document())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a sweep from a file.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the file holds something else.
        """
        if not os.path.lexists(path):
            raise FileNotFoundError(path)
        try:
            return cls.model_validate(read_json(path))
        except (CheckpointError, ValidationError) as error:
            reason = "; ".join(problems_of(error, cls)) if isinstance(error, ValidationError) else str(error)
            raise CheckpointError(f"{path}: not a sweep ({reason}); remove it, or choose another folder") from None
