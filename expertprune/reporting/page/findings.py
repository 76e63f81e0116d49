"""The numbers of a report, in one place."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import yaml

from expertprune.artifacts.changes import Changes
from expertprune.artifacts.evaluation import Alignment, CorpusGroup, Evaluation, Group, Measured
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.timing import METRICS, Timing
from expertprune.composition.scoring import check_criterion, criterion_name, needed_part
from expertprune.corpora.catalogue import unnamed
from expertprune.evaluation.retention import pooled
from expertprune.files import digest_of, read_object
from expertprune.reporting.card import CriterionWords, FusionWords, experts_criterion, fusion_of, purpose
from expertprune.reporting.page.evidence import Artifacts
from expertprune.reporting.page.reasons import CutStructure, StructureRelevance, kept_units, relevance_findings
from expertprune.reporting.tables import kinds_sentences, metric_label
from expertprune.serving.engine import why_not_served
from expertprune.spec.schema import Spec
from expertprune.units import Structure

SPEED = "output_tokens_per_second"


@dataclass(frozen=True)
class Missing:
    """Why a section is not there, and the command that fills it in, if there is one."""

    reason: str
    command: str | None = None


@dataclass(frozen=True)
class BaseFacts:
    model: str
    digest: str
    tokenizer_digest: str
    revision: str | None


@dataclass(frozen=True)
class Remains:
    """How much of the base is left."""

    base: int
    expert: int
    fraction: float


@dataclass(frozen=True)
class ExpertSize:
    """Parameters, bytes of the weights' files, and vocabulary rows where they were cut."""

    parameters: Remains
    weights: Remains
    vocabulary: Remains | None


@dataclass(frozen=True)
class MetricRow:
    """One metric of one corpus or task; the fields of `Measured`, and where they come from.

    `verdict` is `loss` or `gain` where the interval of the retention leaves 1 out, `open` where it
    does not. `same` is equal for rows of two experts that were measured on the same examples in the
    same way.
    """

    group: CorpusGroup
    suite: str
    name: str
    metric: str
    label: str
    unit: str
    backend: str | None
    same: str
    verdict: str | None
    examples: int
    base: float | None
    expert: float | None
    retention: float | None
    low: float | None
    high: float | None
    chance: float | None
    gained: int | None
    lost: int | None
    note: str | None
    agreement: float | None = None
    common: float | None = None


@dataclass(frozen=True)
class Speed:
    """One measure of speed: medians of base, expert and their ratio, and the ratio's extremes."""

    metric: str
    base: float | None
    expert: float | None
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Throughput:
    """What `expertprune bench` measured; `limit` is what reading fewer weights can give at most."""

    rows: list[Speed]
    limit: float
    of_limit: float | None
    beyond_limit: bool
    settings: dict[str, int]
    arguments: list[str]
    runs: int
    machine: str
    versions: dict[str, str]

    @property
    def headline(self) -> Speed | None:
        """Output tokens per second, where they have a ratio."""
        return next((row for row in self.rows if row.metric == SPEED and row.ratio is not None), None)


@dataclass(frozen=True)
class CorpusFacts:
    """A corpus that calibrated the expert; `stored` says whether the store has its profile."""

    name: str
    digest: str
    documents: int
    profile: str | None
    stored: bool
    generated: str | None


@dataclass(frozen=True)
class Provenance:
    """How the expert was made; `experts` is the criterion of whole routed experts, where another chose among them."""

    criterion: str
    paper: str | None
    experts: CriterionWords | None
    rule: str
    allocation: str
    repair: str
    fusion: FusionWords | None
    plan: str
    corpora: list[CorpusFacts]
    versions: dict[str, str]
    spec: str


@dataclass(frozen=True)
class ReportData:
    """The numbers of one expert's report: what `report --json` prints and the page shows.

    `kinds` says what the kinds of units are. `retention` is the headline: bits per byte over the
    documents of all corpora of a group, each document once. `outcome` counts the metrics of both
    groups that have a retention. `changes` are empty where the evaluation kept none. `missing` has a
    line for each section that is not there.
    """

    name: str
    folder: str
    purpose: str
    base: BaseFacts
    size: ExpertSize
    retention: dict[Group, Measured | None]
    speed: Speed | None
    metrics: list[MetricRow]
    outcome: dict[str, int]
    changes: Changes
    structures: list[CutStructure]
    kinds: str
    relevance: list[StructureRelevance] | None
    alignment: dict[str, Alignment]
    throughput: Throughput | None
    provenance: Provenance
    missing: dict[str, Missing] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "changes": self.changes.document(),
            "retention": {group: found and found.model_dump() for group, found in self.retention.items()},
            "alignment": [{"name": name, **found.model_dump()} for name, found in self.alignment.items()],
        }


def findings(artifacts: Artifacts) -> ReportData:
    """The numbers of one expert's report."""
    expert, folder = artifacts.expert, shlex.quote(str(artifacts.expert.folder))
    measured, missing = expert.evaluation, {}
    metrics = metric_rows(measured) if measured is not None else []
    if not metrics:
        missing["metrics"] = Missing("Nothing has been measured of this expert yet.", f"expertprune evaluate {folder}")
    elif measured is not None and not measured.settings.suites and all(row.group != "other" for row in metrics):
        missing["others"] = _no_others(expert.spec, folder)
    relevance = _relevance(artifacts)
    if isinstance(relevance, Missing):
        missing["relevance"] = relevance
    alignment = measured.alignment if measured is not None else {}
    if not alignment:
        command = f"expertprune evaluate {folder} --suite general"
        missing["alignment"] = Missing("The hidden states of base and expert have not been compared.", command)
    throughput = _speeds(artifacts.timing) if artifacts.timing is not None else None
    if throughput is None:
        missing["throughput"] = _untimed(expert, folder)
    verdicts = [row.verdict or "no_interval" for row in metrics if row.group != "other" and row.retention is not None]
    counts = {verdict: verdicts.count(verdict) for verdict in ("loss", "open", "gain", "no_interval")}
    return ReportData(
        name=expert.name,
        folder=str(expert.folder),
        purpose=purpose(expert.spec),
        base=BaseFacts(
            expert.base.model,
            expert.base.digest,
            expert.base.tokenizer_digest,
            expert.base.hub.commit or expert.base.revision,
        ),
        size=_size(artifacts),
        retention={group: pooled(measured, group) if measured is not None else None for group in get_args(Group)},
        speed=throughput.headline if throughput is not None else None,
        metrics=metrics,
        outcome={"metrics": len(verdicts), **counts},
        changes=artifacts.changes or Changes(),
        structures=kept_units(expert.plan),
        kinds=kinds_sentences(expert.spec),
        relevance=None if isinstance(relevance, Missing) else relevance,
        alignment=alignment,
        throughput=throughput,
        provenance=_provenance(artifacts),
        missing=missing,
    )


def _untimed(expert: Expert, folder: str) -> Missing:
    if why := why_not_served(read_object(expert.folder / "config.json"), expert):
        return Missing(f"Base and expert cannot be timed: {why}.")
    return Missing("Base and expert have not been timed.", f"expertprune bench {folder}")


def _no_others(spec: Spec, folder: str) -> Missing:
    names = " ".join(f"--other {name}" for name in unnamed(spec) or ["NAME"])
    return Missing("No corpus was measured that the spec does not name.", f"expertprune evaluate {folder} {names}")


def _size(artifacts: Artifacts) -> ExpertSize:
    expert, plan = artifacts.expert, artifacts.expert.plan
    rows = plan.vocabulary.rows if plan.vocabulary is not None else None

    def remains(base: int, left: int) -> Remains:
        return Remains(base, left, left / base)

    return ExpertSize(
        parameters=remains(plan.parameters.before, plan.parameters.after),
        weights=remains(expert.base.weight_bytes, artifacts.bytes),
        vocabulary=None if rows is None else remains(rows.of, rows.rows),
    )


# --- what was measured ----------------------------------------------------------------------------------------------


def metric_rows(evaluation: Evaluation) -> list[MetricRow]:
    """One row per metric: the expert's, the general ones, and those of others, in the evaluation's order."""
    rows = []
    for corpus, result in evaluation.corpora.items():
        asked: list[Any] = [question.digest for question in result.per_question] or [result.questions]
        read = [*(document.digest for document in result.per_document), *["answers"] * bool(result.answers_only)]
        for metric, numbers in result.metrics.items():
            unit = "questions" if metric == "questions" else "documents"
            examples = [asked] if metric == "questions" else [read, evaluation.settings.max_tokens]
            same = digest_of([corpus, unit, *examples])
            about = {"suite": "corpora", "name": corpus, "metric": metric, "label": metric_label(metric)}
            rows.append(_row(numbers, group=result.group, unit=unit, backend=None, same=same, **about))
    for kind, unit, tasks in (
        ("tasks", "examples", evaluation.tasks),
        ("generation", "prompts", evaluation.generation),
    ):
        for name, task in tasks.items():
            same = digest_of([kind, task.suite, name, task.metric, task.examples, task.digest])
            rows.append(_row(task, name=name, label=metric_label(task.metric), unit=unit, same=same))
    return sorted(rows, key=lambda row: get_args(CorpusGroup).index(row.group))


def _row(numbers: Measured, **about: Any) -> MetricRow:
    verdict = None
    if numbers.retention is not None and numbers.low is not None and numbers.high is not None:
        verdict = "loss" if numbers.high < 1 else "gain" if numbers.low > 1 else "open"
    return MetricRow(**{**numbers.model_dump(exclude={"digest"}), **about, "verdict": verdict})


def _finite(value: Any) -> float | None:
    """A number, or `None` for what is undefined."""
    return None if value is None or not math.isfinite(value) else float(value)


def _speeds(timing: Timing) -> Throughput:
    """The rows of a timing. A single round has no smallest and largest ratio."""
    base, expert, rounds = timing.models["base"], timing.models["expert"], timing.load.rounds
    rows = []
    for metric in METRICS:
        ratio = timing.ratios.get(metric)
        median = ratio.median if ratio is not None else None
        low, high = (ratio.low, ratio.high) if ratio is not None and rounds > 1 else (None, None)
        rows.append(Speed(metric, getattr(base, metric), getattr(expert, metric), median, low, high))
    speed = next((row.ratio for row in rows if row.metric == SPEED), None)
    return Throughput(
        rows=rows,
        limit=timing.limit,
        of_limit=speed / timing.limit if speed else None,
        beyond_limit=bool(speed and speed > timing.limit),
        settings=timing.load.model_dump(),
        arguments=timing.arguments,
        runs=len(timing.runs),
        machine=timing.machine,
        versions=timing.versions,
    )


# --- why, and how ---------------------------------------------------------------------------------------------------


def _relevance(artifacts: Artifacts) -> list[StructureRelevance] | Missing:
    expert, spec = artifacts.expert, artifacts.expert.spec
    criterion = check_criterion(spec.relevance.criterion)
    if not criterion.sees_data:
        return Missing(f"Criterion {criterion.name} does not look at the corpora, so all of them are the same to it.")
    if artifacts.absent or not artifacts.profiles:
        names = ", ".join(artifacts.absent)
        store = shlex.quote(str(artifacts.store))
        return Missing(
            f"The store {artifacts.store} has no profile of {names} that this plan was made from.",
            f"expertprune profile SPEC --store {store}",
        )
    experts = check_criterion(criterion_name(spec.relevance, Structure.EXPERTS))
    aggregate, part = spec.compose.aggregate, needed_part(spec.relevance)
    if part is not None and not all(part.path(profile.path).is_file() for profile in artifacts.profiles.values()):
        return Missing(f"No unit inside a layer was to be cut, so criterion {criterion.name} has not scored any.")
    return relevance_findings(expert.plan, artifacts.profiles, criterion, aggregate, part, experts)


def _provenance(artifacts: Artifacts) -> Provenance:
    expert, spec = artifacts.expert, artifacts.expert.spec
    return Provenance(
        criterion=spec.relevance.criterion,
        paper=expert.criterion_paper,
        experts=experts_criterion(expert.plan, spec),
        rule=spec.compose.rule,
        allocation=spec.compose.allocation,
        repair=spec.compensation.method,
        fusion=fusion_of(spec),
        plan=expert.plan.digest,
        corpora=[
            CorpusFacts(
                name,
                record.digest,
                len(record.documents),
                expert.plan.profiles.get(name),
                name in artifacts.profiles,
                record.generated,
            )
            for name, record in expert.corpora.items()
        ],
        versions=dict(expert.versions),
        spec=yaml.safe_dump(expert.plan.spec, sort_keys=False, allow_unicode=True, width=110),
    )
