"""Evaluations: base and expert measured on the same examples."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from expertprune.artifacts.record import Record

Group = Literal["expert", "general"]  # what the expert is for, and what it should keep besides


CorpusGroup = Literal["expert", "general", "other"]  # other: what the spec does not name, and no average counts


Measure = Literal["bits", "accuracy"]  # averages never mix the two


def _defined(value: Any) -> Any:
    """`None` for a number that is undefined, such as 0/0."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_defined)]


class Measured(Record):
    """One metric of base and expert on the same examples; `None` is undefined.

    `retention` and its 95% interval, `low` to `high`, are defined in `evaluation.retention`. KL and
    agreement compare with the base: they have neither `base` nor `retention`, and the interval is
    their own.
    `chance` is what guessing gets, where that is known. `gained` counts examples on which the
    expert does better than the base, `lost` those on which it does worse; both are `None` for
    costs. `note` says why a retention or an interval is undefined.
    """

    examples: int
    base: Number = None
    expert: Number
    retention: Number = None
    low: Number = None
    high: Number = None
    chance: Number = None
    gained: int | None = None
    lost: int | None = None
    note: str | None = None


class DocumentBits(Record):
    """Bits of one document's predicted tokens under base and expert, and KL in bits.

    `tokens` and `bytes` count what the base predicts; `expert_tokens` and `expert_bytes` differ
    only where the expert has a tokenizer of its own. KL is undefined there, and so is `agreed`: the
    number of tokens for which both models think the same token likeliest.
    """

    digest: str
    tokens: int
    bytes: int
    base_bits: float
    expert_bits: float
    kl_bits: Number
    agreed: int | None = None
    expert_tokens: int
    expert_bytes: int


class QuestionAnswers(Record):
    """The choices that base and expert take for one question, by number, and their margins.

    A margin is by how many bits per byte the right choice's log-probability lies above that of the
    best wrong one.
    """

    digest: str
    base: int
    expert: int
    base_margin: float
    expert_margin: float


class CorpusResult(Record):
    """What was measured on one corpus: its metrics by name, and what they are made of.

    `answers_only` says whether the answers of conversations alone count; earlier versions did not say.
    """

    group: CorpusGroup
    documents: int
    questions: int
    answers_only: bool | None = None
    metrics: dict[str, Measured]
    per_document: list[DocumentBits] = Field(default_factory=list)
    per_question: list[QuestionAnswers] = Field(default_factory=list)


class TaskResult(Measured):
    """What was measured on one task of a suite.

    `metric` is lm-evaluation-harness' word. Where answers are generated, `agreement` is the share of
    prompts that expert and base answer alike, and `common` how long what they write stays the same:
    the mean part of the base's text, from its beginning, that the expert writes too. `digest` is of
    the examples, their prompts, the metric and the answer extraction; earlier versions did not say.
    """

    suite: str
    group: Group
    backend: str
    metric: str
    agreement: float | None = None
    common: Number = None
    digest: str | None = None


class Average(Record):
    """The plain mean of the retentions of several metrics of one measure, if they have one."""

    retention: Number
    low: Number
    high: Number
    metrics: list[str]
    undefined: list[str]


class Alignment(Record):
    """How alike the hidden states of base and expert are on the documents of a corpus.

    `layers` is the linear CKA after each decoder layer of the base, `cosine` the mean cosine between
    the final states over tokens. Where the expert has lost a layer, its states pass unchanged.
    """

    layers: list[Number]
    cosine: Number
    documents: int
    tokens: int


class Settings(Record):
    """How an evaluation was measured; `suites` maps the name of each suite to its digest."""

    documents: int | None = None
    max_tokens: int | None = None
    metrics: list[str] = Field(default_factory=list)
    resamples: int
    interval: float = 0.95
    suites: dict[str, str] = Field(default_factory=dict)
    backend: str | None = None
    limit: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Evaluation(Record):
    """Base and expert on the same examples: by corpus, by task, averaged, and aligned."""

    kind: Literal["evaluation"] = "evaluation"
    settings: Settings
    corpora: dict[str, CorpusResult] = Field(default_factory=dict)
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    generation: dict[str, TaskResult] = Field(default_factory=dict)
    summary: dict[Group, dict[Measure, Average]] = Field(default_factory=dict)
    alignment: dict[str, Alignment] = Field(default_factory=dict)

    @property
    def all_tasks(self) -> dict[str, TaskResult]:
        """Tasks with choices, then those whose answers are generated."""
        return {**self.tasks, **self.generation}

    def document(self) -> dict[str, Any]:
        """Plain data that gives the same evaluation back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_document(cls, data: dict[str, Any]) -> Self:
        """What `document` wrote. Raises `ValueError` (pydantic's) if it is none."""
        return cls.model_validate(data)
