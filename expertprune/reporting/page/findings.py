"""An expert's artifacts to the numbers of its report: the one place where they are formed."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.expert import Expert
from expertprune.composition.scoring import check_criterion, criterion_name, part_name
from expertprune.corpora.documents import CorpusName
from expertprune.evaluation.retention import pooled
from expertprune.files import digest_of
from expertprune.reporting.card import fusion_of, purpose
from expertprune.reporting.page.evidence import Artifacts, damaged
from expertprune.reporting.page.reasons import kept_units, relevance_findings
from expertprune.reporting.tables import METRIC_LABELS
from expertprune.units import Structure

SPEED = "output_tokens_per_second"


@dataclass(frozen=True)
class ReportData:
    """The numbers of one expert's report; `report --json` prints them, and the page shows nothing else.

    `missing` maps a section that is not there to its `reason` and the `command` that fills it in, if there is one.
    """

    name: str
    folder: str
    purpose: str
    base: dict[str, Any]
    size: dict[str, Any]
    retention: dict[str, Any] | None
    speed: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    outcome: dict[str, int]
    structures: list[dict[str, Any]]
    relevance: list[dict[str, Any]] | None
    alignment: list[dict[str, Any]] | None
    throughput: dict[str, Any] | None
    provenance: dict[str, Any]
    commands: list[dict[str, str]]
    missing: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return asdict(self)


def findings(artifacts: Artifacts) -> ReportData:
    """The numbers of one expert's report.

    Raises:
        CheckpointError: `expertprune.json` or `throughput.json` lacks something or holds something else.
    """
    expert, plan, folder = artifacts.expert, artifacts.expert.plan, artifacts.expert.folder
    missing: dict[str, dict[str, str | None]] = {}
    try:
        evaluation = expert.evaluation.document() if expert.evaluation is not None else None
        metrics = metric_rows(evaluation) if evaluation else []
        relevance = _relevance(artifacts, missing)
        if not metrics:
            missing["metrics"] = _missing("Nothing has been measured of this expert yet.", "evaluate", folder)
        alignment = _alignment(evaluation)
        if alignment is None:
            reason = "The hidden states of base and expert have not been compared."
            missing["alignment"] = _missing(reason, "evaluate", folder, " --suite general")
        throughput = None if artifacts.throughput is None else _speeds(artifacts.throughput)
        if throughput is None:
            missing["throughput"] = _missing("Base and expert have not been timed.", "bench", folder)
        return ReportData(
            name=expert.name,
            folder=str(folder),
            purpose=purpose(plan.spec),
            base=expert.base.model_dump(include={"model", "digest", "tokenizer_digest", "revision"}),
            size=_size(artifacts),
            retention=_retention(evaluation),
            speed=_headline_speed(throughput),
            metrics=metrics,
            outcome=_outcome(metrics),
            structures=kept_units(plan),
            relevance=relevance,
            alignment=alignment,
            throughput=throughput,
            provenance=_provenance(artifacts),
            commands=_commands(artifacts),
            missing=missing,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise damaged(folder, error) from None


def _missing(reason: str, command: str, folder: Path, options: str = "") -> dict[str, str | None]:
    return {"reason": reason, "command": f"expertprune {command} {shlex.quote(str(folder))}{options}"}


def _size(artifacts: Artifacts) -> dict[str, Any]:
    plan = artifacts.expert.plan
    before, after = (int(plan.parameters[key]) for key in ("before", "after"))
    base, expert = artifacts.expert.base.weight_bytes, artifacts.bytes
    rows = plan.vocabulary.rows if plan.vocabulary is not None else None
    return {
        "vocabulary": rows and {"base": rows.of, "expert": rows.rows},
        "parameters": {"base": before, "expert": after, "fraction": after / before},
        "weights": {"base": base, "expert": expert, "fraction": expert / base},
    }


# --- retention ------------------------------------------------------------------------------------------------------


def _retention(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Expert and general retention: the evaluation's summary, else bits per byte pooled over documents."""
    if not evaluation:
        return None
    if evaluation.get("summary"):
        found = {}
        for group in ("expert", "general"):
            numbers = evaluation["summary"].get(group)
            count = numbers and numbers.get("metrics")
            found[group] = numbers and {
                **{key: finite(numbers[key]) for key in ("retention", "low", "high")},
                "metrics": len(count) if isinstance(count, list | dict) else count,
                "documents": None,
            }
        return {**found, "measure": "mean of metrics"}
    corpora = Evaluation(evaluation["corpora"], evaluation.get("settings", {}))
    pools = {"expert": pooled(corpora, general=False), "general": pooled(corpora, general=True)}
    if not any(pools.values()):
        return None
    keys = ("retention", "low", "high")
    return {
        **{
            group: pool
            and {**{key: finite(pool[key]) for key in keys}, "metrics": None, "documents": pool["documents"]}
            for group, pool in pools.items()
        },
        "measure": "bits per byte",
    }


def finite(value: Any) -> float | None:
    """A number, or `None` for what is undefined."""
    return None if value is None or not math.isfinite(value) else float(value)


def metric_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per metric: the dimensions' first, then the general ones, each in the evaluation's order."""
    rows = []
    settings = evaluation.get("settings") or {}
    for corpus, result in evaluation["corpora"].items():
        documents = [document["digest"] for document in result.get("per_document", [])]
        for metric, numbers in result["metrics"].items():
            asked = metric == "questions"
            same = ["questions", result.get("questions")] if asked else [documents, settings.get("max_tokens")]
            about = {
                "group": "general" if CorpusName.parse(corpus).is_general else "expert",
                "suite": "corpora",
                "name": corpus,
                "metric": metric,
                "label": METRIC_LABELS.get(metric, metric.replace("_", " ")),
                "examples": result.get("questions") if asked else result.get("documents"),
                "unit": "questions" if asked else "documents",
                "backend": None,
                "note": None,
                "same": digest_of([corpus, *same]),
            }
            rows.append({**about, **_numbers(numbers)})
    for kind, unit in (("tasks", "examples"), ("generation", "prompts")):
        for name, result in (evaluation.get(kind) or {}).items():
            about = {
                "group": result["group"],
                "suite": result.get("suite", kind),
                "name": name,
                "metric": result["metric"],
                "label": str(result["metric"]).replace("_", " "),
                "examples": result["examples"],
                "unit": unit,
                "backend": result.get("backend"),
                "note": result.get("note"),
                "same": digest_of([kind, result.get("suite"), name, result["metric"], result["examples"]]),
            }
            rows.append({**about, **_numbers(result)})
    return sorted(rows, key=lambda row: row["group"] == "general")


def _numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("base", "expert", "retention", "low", "high", "chance", "gained", "lost", "agreement")
    row = {key: finite(numbers.get(key)) for key in keys}
    row |= {key: None if row[key] is None else int(row[key] or 0) for key in ("gained", "lost")}
    return {**row, "verdict": _verdict(row) if "retention" in numbers else None}


def _verdict(row: Mapping[str, Any]) -> str | None:
    """`loss` or `gain` where the interval of the retention leaves 1 out, `open` where it does not."""
    low, high = row["low"], row["high"]
    if row["retention"] is None or low is None or high is None:
        return None
    return "loss" if high < 1 else "gain" if low > 1 else "open"


def _outcome(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many metrics that have a retention lost, gained, or leave it open."""
    counts = {verdict: sum(row["verdict"] == verdict for row in metrics) for verdict in ("loss", "open", "gain")}
    return {"metrics": sum(counts.values()), **counts}


# --- the other sections ---------------------------------------------------------------------------------------------


def _relevance(artifacts: Artifacts, missing: dict[str, dict[str, str | None]]) -> list[dict[str, Any]] | None:
    spec = artifacts.expert.spec
    relevance = spec.relevance
    criterion = check_criterion(relevance.criterion)
    experts = check_criterion(criterion_name(relevance, Structure.EXPERTS))
    if not criterion.sees_data:
        reason = f"Criterion {criterion.name} does not look at the corpora, so all of them are the same to it."
        missing["relevance"] = {"reason": reason, "command": None}
        return None
    if artifacts.absent or not artifacts.profiles:
        names = ", ".join(artifacts.absent)
        reason = f"The store {artifacts.store} has no profile of {names} that this plan was made from."
        command = f"expertprune profile {plain_name(artifacts)}.yaml --store {shlex.quote(str(artifacts.store))}"
        missing["relevance"] = {"reason": reason, "command": command}
        return None
    part, plan = part_name(relevance), artifacts.expert.plan
    return relevance_findings(plan, artifacts.profiles, criterion, spec.compose.aggregate, part, experts)


def _alignment(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    found = (evaluation or {}).get("alignment")
    if not found:
        return None
    return [
        {
            "name": name,
            "documents": int(numbers["documents"]),
            "cosine": finite(numbers["cosine"]),
            "layers": [finite(value) for value in numbers["layers"]],
        }
        for name, numbers in found.items()
    ]


def _speeds(data: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of base and expert and their ratio, metric by metric, in the order of the measurement.

    A ratio is the median of those of the rounds; `low` and `high` are the smallest and the largest of them, and `None` of a
    single round.
    """
    base, expert = data["models"]["base"], data["models"]["expert"]
    settings, runs = data.get("settings") or {}, len(data.get("runs") or [])
    rows = []
    for metric in expert:
        values = [finite(side.get(metric)) for side in (base, expert)]
        ratio = data["ratios"].get(metric) or {}
        numbers = {
            key: finite(ratio.get(name)) for key, name in (("ratio", "median"), ("low", "low"), ("high", "high"))
        }
        if runs <= 2:
            numbers |= {"low": None, "high": None}
        rows.append({"metric": metric, "base": values[0], "expert": values[1], **numbers})
    speed = next((row["ratio"] for row in rows if row["metric"] == SPEED), None)
    limit = finite(data.get("limit"))
    return {
        "rows": rows,
        "limit": limit,
        "of_limit": speed / limit if speed and limit else None,
        "beyond_limit": bool(speed and limit and speed > limit),
        "settings": {key: value for key, value in settings.items() if key != "arguments"},
        "arguments": list(settings.get("arguments") or []),
        "runs": runs,
        "machine": data.get("machine"),
        "versions": dict(data.get("versions") or {}),
    }


def _headline_speed(throughput: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if throughput is None:
        return None
    row = next((row for row in throughput["rows"] if row["metric"] == SPEED and row["ratio"] is not None), None)
    return row and {**row, "limit": throughput["limit"], "of_limit": throughput["of_limit"]}


def _provenance(artifacts: Artifacts) -> dict[str, Any]:
    expert, plan = artifacts.expert, artifacts.expert.plan
    spec = plan.spec
    return {
        "criterion": spec["relevance"]["criterion"],
        "paper": expert.criterion_paper,
        "rule": spec["compose"]["rule"],
        "allocation": spec["compose"]["allocation"],
        "repair": spec["compensation"]["method"],
        "fusion": fusion_of(spec),
        "plan": plan.digest,
        "corpora": [
            {
                "name": name,
                "digest": record.digest,
                "documents": len(record.documents),
                "profile": plan.profiles.get(name),
                "stored": name in artifacts.profiles,
            }
            for name, record in expert.corpora.items()
        ],
        "versions": [{"package": package, "version": version} for package, version in expert.versions.items()],
        "evaluated": _settings(expert),
        "spec": spec_text(spec),
    }


def _settings(expert: Expert) -> dict[str, Any]:
    """What the expert was evaluated with."""
    return dict(expert.evaluation.settings) if expert.evaluation is not None else {}


def spec_text(spec: Mapping[str, Any]) -> str:
    """A spec as YAML that gives the same spec back."""
    return yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True, width=110)


def plain_name(artifacts: Artifacts) -> str:
    """The expert's name as that of a file."""
    return re.sub(r"[^\w.-]+", "-", artifacts.expert.name).strip("-.") or "expert"


def _commands(artifacts: Artifacts) -> list[dict[str, str]]:
    """From the spec to the same report, in a folder of the expert's name; to be run one after the other."""
    out = plain_name(artifacts)
    spec = spec_text(artifacts.expert.plan.spec)
    steps = [("Write the spec.", f"cat > {out}.yaml <<'END_OF_SPEC'\n{spec}END_OF_SPEC")]
    steps.append(("Profile, compose, prune, evaluate.", f"expertprune build {out}.yaml --out {out}"))
    evaluated = _settings(artifacts.expert)
    if evaluated.get("suites"):
        options = "".join(f" --suite {shlex.quote(name)}" for name in evaluated["suites"])
        for key in ("backend", "limit"):
            options += f" --{key} {shlex.quote(str(evaluated[key]))}" if evaluated.get(key) else ""
        steps.append(("Measure what the suites name.", f"expertprune evaluate {out}{options}"))
    timed = dict((artifacts.throughput or {}).get("settings") or {})
    arguments = [shlex.quote(str(argument)) for argument in timed.pop("arguments", None) or []]
    options = "".join(f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in timed.items())
    options += f" -- {' '.join(arguments)}" if arguments else ""
    steps.append(("Time base and expert.", f"expertprune bench {out}{options}"))
    steps.append(("Write this page.", f"expertprune report {out}"))
    return [{"step": step, "command": command} for step, command in steps]
