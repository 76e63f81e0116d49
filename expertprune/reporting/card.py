"""The model card of an expert."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan
from expertprune.composition.scoring import check_criterion, criterion_name
from expertprune.files import read_object, write_file
from expertprune.formats import one_line
from expertprune.models.origin import CARD_FILE
from expertprune.reporting.metadata import card_metadata
from expertprune.reporting.tables import (
    UNNAMED,
    kind_cells,
    kinds_sentences,
    other_rows,
    retention_notes,
    retention_rows,
    widths,
    within,
)
from expertprune.serving.engine import why_not_served
from expertprune.spec.schema import Spec
from expertprune.units import Structure

_CARD = """
# {{ expert.name }}

An expert cut from `{{ expert.base.model }}` for {{ purpose }}, without post-training:
{{ "{:,}".format(plan.parameters.after) }} of {{ "{:,}".format(plan.parameters.before) }} parameters
({{ "%.1f" % (100 * plan.parameters.after / plan.parameters.before) }}%). {% if per_layer -%}
Its layers have widths of their own. `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` builds it with
`modeling_expert.py` in this folder
{%- if refused %}. {{ refused }}.{% else %}, and so does `vllm serve folder --trust-remote-code`. Where the package
expertprune is installed, vLLM needs no code of the folder.{% endif %}
{%- else -%}
It loads like any other checkpoint of its architecture, in
transformers{% if refused %}. {{ refused }}.{% else %} and in vLLM.{% endif %}
{%- endif %}

| structure | kept in each layer | of |
|---|---|---|
{% for structure, entry in plan.budget.items() -%}
| {{ names.get(structure, structure) }}{{ within(plan, structure) }} | {{ entry.kept | widths(plan.gone) }}
{#- #} | {{ entry.of | widths(plan.gone) }} |
{% endfor %}
{%- if plan.vocabulary -%}
| vocabulary rows, of the whole model | {{ plan.vocabulary.rows.rows }} | {{ plan.vocabulary.rows.of }} |

Its tokenizer is the base's without the other tokens and their merges. Tokens differ, so retention is in bits per byte.
{% endif %}
{% if kinds -%}
{{ kinds_sentences }}

| structure | shared | expert-exclusive | general-exclusive |
|---|---|---|---|
{% for structure, cells in kinds.items() -%}
| {{ names.get(structure, structure) }} | {{ cells | join(" | ") }} |
{% endfor %}
{% endif -%}
Method: criterion `{{ spec.relevance.criterion }}` ({{ expert.criterion_paper }}),{% if experts %} whole routed experts by
`{{ experts.criterion }}` ({{ experts.paper }}),{% endif %} rule `{{ spec.compose.rule }}`
over dimensions (Cus-Prun, https://arxiv.org/abs/2506.02561),{% if fusion %} {{ fusion.text }}{% if fusion.paper %} (after
{{ fusion.paper }}){% endif %},{% endif %} repair `{{ spec.compensation.method }}`.

{% if headline -%}
## At a glance

| | |
|---|---|
{% for cells in headline -%}
| {{ cells | map("replace", "|", "\\|") | join(" | ") }} |
{% endfor %}
{% endif -%}
## What it kept

{% if rows -%}
Base and expert on the same held-out examples. None of them calibrated the expert, or an expert that it is cut from.
Retention is 1 where nothing was lost: the base's bits over the expert's, or the expert's accuracy over the base's, both
above chance where chance is known. The 95% intervals resample documents (questions, examples). +3 −5: the expert has 3
answers right that the base has wrong, and 5 wrong that the base has right.

| corpus | metric | base | expert | retention | 95% interval |
|---|---|---|---|---|---|
{% for row in rows -%}
| {{ row | map("replace", "|", "\\|") | join(" | ") }} |
{% endfor %}
{%- if others %}
{{ unnamed | capitalize }}: nothing was calibrated for these, and no average counts them.

| corpus | metric | base | expert | retention | 95% interval |
|---|---|---|---|---|---|
{% for row in others -%}
| {{ row | map("replace", "|", "\\|") | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- for note in notes %}
{{ note }}.
{% endfor %}
{%- else -%}
Not evaluated yet: `expertprune evaluate` fills this in.
{% endif %}
## Provenance

Base digest `{{ expert.base.digest }}`.
{%- if expert.base.hub.commit %} On the hub it is commit `{{ expert.base.hub.commit }}`.
{%- endif %}
{%- if expert.ancestor %} The base is an expert itself: `{{ expert.ancestor.name }}`, cut from
`{{ expert.ancestor.base.model }}` (digest `{{ expert.ancestor.base.digest }}`).
Its spec and plan are in `expertprune.json` too.
{%- endif %}
{%- if expert.base.trust_remote_code %} The base was run with Python code of its own.
{%- endif %} Calibrated on {% for corpus, entry in expert.corpora.items() -%}
{{ corpus }} ({{ entry.documents | length }} documents
{%- if entry.generated %}, generated {{ entry.generated }}{% endif %}){{ ", " if not loop.last else "." }}
{%- endfor %} Versions: {% for package, version in expert.versions.items() -%}
{{ package }} {{ version }}{{ ", " if not loop.last else "." }}
{%- endfor %} The spec and the plan are in `expertprune.json`. The base's licence applies.
"""


def purpose(spec: Spec) -> str:
    """`"language en; domain medical; task qa"`."""
    return "; ".join(f"{name} {', '.join(values)}" for name, values in spec.dimensions.chosen.items())


def write_card(expert: Expert) -> None:
    """Write `expertprune.json` and the model card beside it."""
    card = card_text(expert)
    expert.save()
    write_file(expert.folder / CARD_FILE, card.encode())


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_plain_text
    )
    environment.filters["widths"] = widths
    return environment.from_string(_CARD)


def card_text(expert: Expert, headline: Sequence[tuple[str, str]] = ()) -> str:
    """The model card.

    Args:
        headline: what the report says at a glance, as pairs of text.
    """
    measured, spec = expert.evaluation, expert.spec
    body = _template().render(
        expert=expert,
        plan=expert.plan,
        spec=spec,
        purpose=purpose(spec),
        names={"layers": "layers, of the whole model"},
        within=within,
        experts=experts_criterion(expert.plan, spec),
        fusion=fusion_of(spec),
        kinds={each: kind_cells(expert.plan, each) for each in expert.plan.budget if expert.plan.kinds(each)},
        kinds_sentences=kinds_sentences(spec),
        per_layer=any(isinstance(entry.kept, list) for entry in expert.plan.budget.values()),
        refused=why_not_served(read_object(expert.folder / "config.json"), expert),
        rows=retention_rows(measured) if measured is not None else [],
        others=other_rows(measured) if measured is not None else [],
        unnamed=UNNAMED,
        notes=retention_notes(measured) if measured is not None else [],
        headline=headline,
    )
    return f"---\n{card_metadata(expert)}\n---\n{body}"


def _plain_text(value: Any) -> Any:
    """A value that Markdown shows as the text that it is."""
    if not isinstance(value, str):
        return value
    return one_line(value)


@dataclass(frozen=True)
class CriterionWords:
    """A criterion, and the paper that it comes from."""

    criterion: str
    paper: str


def experts_criterion(plan: Plan, spec: Spec) -> CriterionWords | None:
    """The criterion that chose among whole routed experts; `None` where the spec's own did, or none were to be chosen."""
    name = criterion_name(spec.relevance, Structure.EXPERTS)
    if name == spec.relevance.criterion or not plan.reasons(Structure.EXPERTS):
        return None
    return CriterionWords(name, check_criterion(name).paper)


@dataclass(frozen=True)
class FusionWords:
    """How general relevance counts, in words, and the paper that it comes from."""

    text: str
    paper: str | None = None


def fusion_of(spec: Spec) -> FusionWords | None:
    """How a spec's general relevance counts; `None` without general corpora."""
    if not spec.general:
        return None
    fusion = spec.compose.fusion
    if fusion.method == "weighted":
        return FusionWords(f"general relevance weighted {fusion.lambda_:g}")
    return FusionWords("shared/exclusive fusion with general relevance", "https://arxiv.org/abs/2510.22489")
