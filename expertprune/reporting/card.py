"""The model card of an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from expertprune.artifacts.expert import Expert
from expertprune.files import write_file
from expertprune.reporting.tables import retention_notes, retention_rows, widths

CARD_FILE = "README.md"


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
base_model: {{ base.model | tojson }}
tags: [expertprune, pruned]
---

# {{ name }}

An expert cut from `{{ base.model }}` for {{ purpose }}, without post-training:
{{ "{:,}".format(parameters.after) }} of {{ "{:,}".format(parameters.before) }} parameters
({{ "%.1f" % (100 * parameters.after / parameters.before) }}%). {% if per_layer -%}
Its layers have widths of their own, so `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` builds it with
`modeling_expert.py` in this folder, and vLLM serves it wherever the package expertprune is installed beside it.
{%- else -%}
It loads like any other checkpoint of its architecture, in
transformers and in vLLM.
{%- endif %}

| structure | kept in each layer | of |
|---|---|---|
{% for structure, entry in plan.budget.items() -%}
| {{ structure }} | {{ entry.kept | widths }} | {{ entry.of | widths }} |
{% endfor %}
{%- if plan.vocabulary is defined -%}
| vocabulary rows, of the whole model | {{ plan.vocabulary.rows }} | {{ plan.vocabulary.of }} |

Its tokenizer is the base's with the other tokens and their merges taken out, so retention is in bits per byte.
{% endif %}
Method: criterion `{{ spec.relevance.criterion }}` ({{ criterion_paper }}), rule `{{ spec.compose.rule }}` over dimensions
(Cus-Prun, https://arxiv.org/abs/2506.02561),{% if fusion %} {{ fusion.text }}{% if fusion.paper %} (after
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
Base and expert on the same held-out documents, none of which calibrated the expert. Retention is 1 where nothing was
lost; 95% intervals are bootstrapped over documents (questions).
{%- if evaluation.get('tasks') or evaluation.get('generation') %}
Retention of a task with choices is above chance; +3 −5: the expert has 3 answers right that the base has not, and 5 wrong
that the base has right.
{%- endif %}

| corpus | metric | base | expert | retention | 95% interval |
|---|---|---|---|---|---|
{% for row in rows -%}
| {{ row | map("replace", "|", "\\|") | join(" | ") }} |
{% endfor %}
{%- for note in notes %}
{{ note }}.
{% endfor %}
{%- else -%}
Not evaluated yet: `expertprune evaluate` fills this in.
{% endif %}
## Provenance

Base digest `{{ base.digest }}`.
{%- if ancestor %} The base is an expert itself: `{{ ancestor.name }}`, cut from
`{{ ancestor.base.model }}` (digest `{{ ancestor.base.digest }}`); its spec and plan are in `expertprune.json` too.
{%- endif %}
{%- if base.trust_remote_code is true %} The base was run with Python code of its own.
{%- endif %} Calibrated on {% for corpus, entry in corpora.items() -%}
{{ corpus }} ({{ entry.documents | length }} documents){{ ", " if not loop.last else "." }}
{%- endfor %} Versions: {% for package, version in versions.items() -%}
{{ package }} {{ version }}{{ ", " if not loop.last else "." }}
{%- endfor %} The spec and the plan are in `expertprune.json`. The base's licence applies.
"""


def purpose(spec: Mapping[str, Any]) -> str:
    """`"language en; domain medical; task qa"`."""
    return "; ".join(f"{name} {', '.join(values)}" for name, values in spec["dimensions"].items() if values)


def write_card(expert: Expert) -> None:
    """Write `expertprune.json` and the model card beside it."""
    card = card_text(expert)
    expert.save()
    write_file(expert.folder / CARD_FILE, card.encode())


def card_text(expert: Expert, headline: Sequence[tuple[str, str]] = ()) -> str:
    """The model card.

    Args:
        headline: what the report says at a glance, as pairs of text.
    """
    about = expert.document()
    rows = retention_rows(about["evaluation"]) if about["evaluation"] else []
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.filters["widths"] = widths
    per_layer = any(isinstance(entry["kept"], list) for entry in about["plan"]["budget"].values())
    card = environment.from_string(_CARD)
    notes = retention_notes(about["evaluation"]) if rows else []
    kind = {"purpose": purpose(about["spec"]), "per_layer": per_layer, "fusion": fusion_of(about["spec"])}
    return card.render(**about, rows=rows, notes=notes, headline=headline, **kind)


def fusion_of(spec: Mapping[str, Any]) -> dict[str, str | None] | None:
    """How a spec's general relevance counts, as `text`, and its `paper` if it has one; `None` without general corpora."""
    if not spec.get("general"):
        return None
    fusion = spec["compose"]["fusion"]
    if fusion.get("method", "shared_exclusive") == "weighted":  # the key is younger than the other way
        return {"text": f"general relevance weighted {fusion['lambda']:g}", "paper": None}
    return {"text": "shared/exclusive fusion with general relevance", "paper": "https://arxiv.org/abs/2510.22489"}
