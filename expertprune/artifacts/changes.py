"""Examples on which an expert departs most from its base, with their texts: a file beside `expertprune.json`.

The texts are a user's own. They stay out of `expertprune.json`, which is published with the expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from expertprune.artifacts.evaluation import CorpusGroup, Number
from expertprune.artifacts.record import Record
from expertprune.errors import CheckpointError
from expertprune.files import CHANGES_FILE, problems_of, read_json, write_json

Outcome = Literal["lost", "gained", "neither"]


class AnswerChange(Record):
    """A question that base and expert answer differently.

    `source` is the corpus or the task. `outcome` is `lost` where the base alone is right, `gained`
    where the expert alone is, and `neither` otherwise. A margin is by how much the right choice's
    log-probability lies above that of the best wrong one: in bits, and over the choice's length
    where choices are compared so. `change` is the expert's margin less the base's. Answers that are
    written rather than chosen have no margin.
    """

    source: str
    group: CorpusGroup
    prompt: str
    base: str
    expert: str
    gold: str | None
    outcome: Outcome
    base_margin: Number = None
    expert_margin: Number = None
    change: Number = None


class DocumentChange(Record):
    """A document on which expert and base need different numbers of bits per byte.

    `change` is the expert's bits per byte less the base's.
    """

    source: str
    group: CorpusGroup
    digest: str
    text: str
    base: float
    expert: float
    change: float


class Changes(Record):
    """The largest changes of an evaluation, largest first; texts are cut to a bounded length."""

    kind: Literal["changes"] = "changes"
    answers: list[AnswerChange] = Field(default_factory=list)
    documents: list[DocumentChange] = Field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the file into an expert's folder."""
        write_json(folder / CHANGES_FILE, self.document())

    def document(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The changes in an expert's folder, or `None` where there are none.

        Raises:
            CheckpointError: the file holds something else.
        """
        path = folder / CHANGES_FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            problems = "; ".join(problems_of(error, cls))
            raise CheckpointError(f"{path}: is no list of changes ({problems}); evaluate the expert again") from None
