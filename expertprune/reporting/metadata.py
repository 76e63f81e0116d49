"""The metadata of a model card: what the hub sorts, links and charts a model by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from expertprune.arch import bundled_models
from expertprune.artifacts.evaluation import Measured
from expertprune.artifacts.expert import Description, Expert
from expertprune.corpora.catalogue import find_sources
from expertprune.corpora.reading import on_hub
from expertprune.errors import ExpertpruneError
from expertprune.formats import one_line
from expertprune.models.origin import Origin
from expertprune.reporting.tables import metric_label
from expertprune.spec.schema import Spec

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# The hub knows adapter, merge, quantized and finetune. An expert is none of the first three: it needs no other
# weights, comes from one model, and has fewer parameters, not smaller ones. Unsaid, the hub guesses from the files.
_RELATION = "finetune"
_TASK = "text-generation"
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card_metadata(expert: Expert, base_model: str | None = None) -> ModelCardData:
    """What a card says of an expert to the hub.

    Language is what the spec names, since the others are lost first, and else the base's. A licence is that of the base, or
    of its base where it is an expert itself.

    Args:
        base_model: the base's id on the hub, where it is not known (see `Origin`).
    """
    from huggingface_hub import ModelCardData

    origins = [_origin(each) for each in expert.lineage]
    base = base_model or next((origin.name for origin in origins if _MODEL_ID.fullmatch(origin.name or "")), None)
    licensed = next((origin for origin in origins if origin.license), Origin())
    chosen = expert.spec.dimensions.chosen
    named = [value for value in chosen.get("language", ()) if re.fullmatch("[a-z]{2,3}", value)]
    carried = next((origin.language for origin in origins if origin.language), [])
    values = [value for dimension, values in chosen.items() if dimension != "language" for value in values]
    topics = [value for value in values if re.fullmatch(r"[\w.-]+", value)]
    results = list(_results(expert))
    return ModelCardData(
        base_model=base,
        base_model_relation=_RELATION if base else None,
        license=_line(licensed.license),
        license_name=_line(licensed.license_name),
        license_link=_line(licensed.license_link),
        language=[one_line(each) for each in named or carried] or None,
        datasets=_datasets(expert.spec) or None,
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["expertprune", "pruned", *topics],
        model_name=one_line(expert.name) if results else None,
        eval_results=results or None,
    )


def _origin(description: Description) -> Origin:
    """What is known of a base. Experts of earlier versions say its name only."""
    base = description.base
    if base.hub.name is not None:
        return base.hub
    if base.model in bundled_models():
        model = bundled_models()[base.model]
        return Origin(name=model.hub, license=model.licence)
    return base.hub.model_copy(update={"name": base.model}) if _MODEL_ID.fullmatch(base.model) else base.hub


def _datasets(spec: Spec) -> list[str]:
    """The data sets of the hub that calibrated an expert."""
    try:
        sources = [*find_sources(spec).values()]
    except ExpertpruneError:  # a catalogue of the machine that built it
        sources = [*spec.corpora.sources.values()]
    return sorted({str(source.dataset) for source in sources if on_hub(source) and "/" in str(source.dataset)})


def _results(expert: Expert) -> Iterator[EvalResult]:
    """Every metric of the evaluation: the expert's number, and its retention with the 95% interval."""
    if expert.evaluation is None:
        return
    for corpus, result in expert.evaluation.corpora.items():
        for metric, numbers in result.metrics.items():
            kind = "accuracy" if metric == "questions" else metric
            yield from _of_metric(corpus, f"{corpus}, held-out documents", kind, metric_label(metric), numbers)
    for task, numbers in expert.evaluation.all_tasks.items():
        yield from _of_metric(task, f"{task}, {numbers.examples} examples", numbers.metric, numbers.metric, numbers)


def _of_metric(dataset: str, title: str, kind: str, label: str, numbers: Measured) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    common: dict[str, Any] = {"task_type": _TASK, "dataset_type": one_line(dataset), "dataset_name": one_line(title)}
    if numbers.expert is not None:
        base = None if numbers.base is None else {"base": _rounded(numbers.base)}
        value = _rounded(numbers.expert)
        yield EvalResult(**common, metric_type=kind, metric_name=label, metric_value=value, metric_args=base)
    if numbers.retention is not None:
        interval = {"low": _rounded(numbers.low), "high": _rounded(numbers.high)}
        yield EvalResult(
            **common,
            metric_type="retention",
            metric_name=f"retention of {label}",
            metric_value=_rounded(numbers.retention),
            metric_args={key: end for key, end in interval.items() if end is not None} or None,
        )


def _rounded(value: float | None) -> float | None:
    """As many digits as the card's table has."""
    return None if value is None else round(value, 4)


def _line(text: str | None) -> str | None:
    return None if text is None else one_line(text)
