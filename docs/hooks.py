"""Hooks of the site: the reference pages are generated, and pages from outside `docs/` join the site."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
# Pages and pictures outside docs/. Their links to each other hold in the clone and in the site.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "bench/LOG.md", "bench/pictures/*.png")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside `docs/`."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what is generated; links out of `docs/` hold in the clone, and lose their `../` in the site."""
    for mark, generate in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, generate())
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown


# --- the spec -------------------------------------------------------------------------------------------------------


def spec_reference() -> str:
    """Every key of a spec as Markdown: a section for each model, a row for each key."""
    from expertprune.spec.schema import Spec

    schema = Spec.model_json_schema(by_alias=True)
    smallest = {"name": "x", "base": "x", "dimensions": {"domain": "x"}, "budget": {"ffn": 0}}
    defaults = Spec.model_validate(smallest).document()
    defaults["dimensions"] = {key: [] for key in defaults["dimensions"]}
    return "\n".join(_section(schema, schema, defaults, ""))


def _section(schema: dict[str, Any], model: dict[str, Any], defaults: dict[str, Any], key: str) -> Iterator[str]:
    """The heading, description and table of one model, then its sections."""
    inner: list[tuple[str, dict[str, Any]]] = []
    yield f"## `{key}`\n" if key else "## Keys of a spec\n"
    yield f"{_prose(model.get('description', ''))}\n"
    yield "| key | value | default | |\n|---|---|---|---|"
    required = model.get("required", ())
    for name, entry in model["properties"].items():
        full = f"{key}.{name}" if key else name
        section = _model_of(schema, entry)
        if section is not None:
            inner.append((f"{full}.NAME" if "additionalProperties" in entry else full, section))
        default = "required" if name in required else _default(defaults.get(name, entry.get("default")))
        about = entry.get("description") or (section or {}).get("description", "")
        yield f"| `{full}` | {_cell(_type(schema, entry))} | {_cell(default)} | {_cell(_prose(about))} |"
    yield ""
    for full, section in inner:
        inside = defaults.get(full.rpartition(".")[2])
        yield from _section(schema, section, inside if isinstance(inside, dict) else {}, full)


def _branches(entry: dict[str, Any]) -> list[dict[str, Any]]:
    if "anyOf" not in entry:
        return [] if entry.get("type") == "null" else [entry]
    return [branch for each in entry["anyOf"] for branch in _branches(each)]


def _model_of(schema: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any] | None:
    """The model that an entry refers to, directly, as one of its forms, or as the values of a mapping."""
    for branch in [*_branches(entry), entry.get("additionalProperties") or {}]:
        if isinstance(branch, dict) and "$ref" in branch:
            model = schema["$defs"][branch["$ref"].rpartition("/")[2]]
            return model if "properties" in model else None
    return None


def _type(schema: dict[str, Any], entry: dict[str, Any]) -> str:
    return "; or ".join(dict.fromkeys(_one_type(schema, branch) for branch in _branches(entry)))


def _one_type(schema: dict[str, Any], entry: dict[str, Any]) -> str:
    """One form of a value in words, such as `number, at least 0, below 1`."""
    if "$ref" in entry:
        return "section"
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    kind = entry.get("type", "value")
    if kind == "array":
        return f"list of {_type(schema, entry['items'])}"
    if kind == "object" and "properties" in entry:
        return f"`{{{', '.join(f'{name}: …' for name in entry['properties'])}}}`"
    if "%" in entry.get("pattern", ""):
        return "percentage"
    words = {"object": "mapping", "boolean": "`true` or `false`", "string": "text", "integer": "whole number"}
    limits = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    bounds = [f"{word} {entry[limit]:g}" for limit, word in limits.items() if limit in entry]
    return ", ".join([words.get(kind, kind), *bounds])


def _default(value: Any) -> str:
    """A default as YAML; sections and what is not given have none."""
    if value is None or isinstance(value, dict):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return "`" + text.removesuffix("...\n").strip() + "`"


def _prose(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the commands ---------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """The help of every command."""
    import click

    from expertprune.cli import main

    parts = []
    parent = click.Context(main, info_name="expertprune", **{**main.context_settings, "terminal_width": 100})
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, parent=parent, info_name=name)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


# --- the criteria ---------------------------------------------------------------------------------------------------


def criteria_reference() -> str:
    """Every criterion as Markdown: what it scores, the pass that it needs, its paper, and its formula in its own words."""
    import inspect

    from expertprune.relevance import criteria

    parts = []
    for name, criterion in sorted(criteria.items()):
        needs = criterion.needs.value if criterion.needs else "forward" if criterion.sees_data else "none"
        structures = ", ".join(f"`{structure.value}`" for structure in criterion.structures)
        number = re.sub(r"^https://arxiv\.org/abs/", "arXiv:", criterion.paper)
        parts += [f"## {name}\n", inspect.getdoc(criterion.score) or "", ""]
        parts.append(f"Pass: {needs}. Scores {structures}. Paper: [{number}]({criterion.paper}).\n")
    return "\n".join(parts)


GENERATED = {
    "<!-- generated: spec -->": spec_reference,
    "<!-- generated: commands -->": command_reference,
    "<!-- generated: criteria -->": criteria_reference,
}
