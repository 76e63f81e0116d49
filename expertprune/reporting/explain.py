"""Explain any artifact: a spec, a profile, a plan, an expert's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import load_plan
from expertprune.artifacts.profile import Profile
from expertprune.corpora.documents import corpus_names
from expertprune.errors import SpecError
from expertprune.files import EXPERT_FILE, folder_size
from expertprune.reporting.card import purpose
from expertprune.reporting.tables import plan_table, retention_table, vocabulary_table
from expertprune.spec.reading import load_spec


def describe(path: Path) -> dict[str, Any]:
    """Plain data about an artifact, with its `kind`.

    Raises:
        SpecError: the path is missing, or is none of the four kinds.
    """
    if path.is_dir():
        return {**Expert.load(path).document(), "folder": str(path), "bytes": folder_size(path)}
    if not path.is_file():
        raise SpecError(f"{path}: no such file or folder")
    if path.suffix in (".yaml", ".yml"):
        spec = load_spec(path)
        return {"kind": "spec", "spec": spec.document(), "corpora": [str(name) for name in corpus_names(spec)]}
    if path.suffix == ".safetensors":
        return {"kind": "profile", **Profile(path).about}
    if path.suffix == ".json":
        if path.name == EXPERT_FILE:
            return describe(path.parent)
        return load_plan(path).document()
    raise SpecError(f"{path}: is no spec (.yaml), profile (.safetensors), plan (.json) or expert (a folder)")


def explain(about: dict[str, Any]) -> RenderableType:
    """What `describe` found, for a terminal."""
    return {"spec": _spec, "profile": _profile, "plan": _plan, "expert": _expert}[about["kind"]](about)


def _pairs(title: str, pairs: dict[str, Any]) -> Table:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for key, value in pairs.items():
        table.add_row(key, Text(str(value)))
    return table


def _spec(about: dict[str, Any]) -> RenderableType:
    spec = about["spec"]
    pairs = {"for": purpose(spec), "base": spec["base"]["model"], "corpora": ", ".join(about["corpora"])}
    for section in ("calibration", "relevance", "compose", "budget", "compensation", "evaluate"):
        pairs[section] = ", ".join(f"{k} {json.dumps(v)}" for k, v in spec[section].items() if v is not None)
    return _pairs(f"spec {spec['name']}", pairs)


def _profile(about: dict[str, Any]) -> RenderableType:
    shape = about["layers"][0]
    return _pairs(
        f"profile {about['digest'][:12]}",
        {
            "base": about["base"],
            "corpus": about["corpus"],
            "documents": len(about["documents"]),
            "tokens": f"{about['tokens']:,}",
            "layers": f"{len(about['layers'])} of {_widths(shape)}, {shape['query_heads']} query heads, "
            f"{shape['kv_heads']} KV groups",
            "run in": about["key"]["dtype"],
        },
    )


def _widths(shape: dict[str, int]) -> str:
    experts = shape.get("experts", 0)
    return f"{experts} experts of {shape['ffn']} FFN neurons" if experts else f"{shape['ffn']} FFN neurons"


def _parameters(parameters: dict[str, int]) -> str:
    before, after = parameters["before"], parameters["after"]
    return f"{after:,} of {before:,} ({after / before:.1%})"


def _plan(about: dict[str, Any]) -> RenderableType:
    pairs = {
        "for": purpose(about["spec"]),
        "base": about["base"]["model"],
        "parameters": _parameters(about["parameters"]),
        "rule": about["spec"]["compose"]["rule"],
        "criterion": about["spec"]["relevance"]["criterion"],
        **({"criterion of whole experts": experts} if (experts := about["spec"]["relevance"].get("experts")) else {}),
        "allocation": about["spec"]["compose"]["allocation"],
    }
    requested = [entry["requested"] for entry in about["budget"].values()]
    if found := next((each["found"] for each in requested if isinstance(each, dict) and "found" in each), None):
        pairs["kept of held-back text"] = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    rows = [vocabulary_table(about["vocabulary"])] if about.get("vocabulary") else []
    return Group(_pairs(f"plan {about['name']}", pairs), plan_table(about), *rows)


def _expert(about: dict[str, Any]) -> RenderableType:
    pairs = {
        "for": purpose(about["spec"]),
        "base": about["base"]["model"],
        "parameters": _parameters(about["parameters"]),
        "folder": f"{about['folder']}, {about['bytes'] / 1e6:.1f} MB",
        "repair": about["spec"]["compensation"]["method"],
        "versions": ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
    }
    parts: list[RenderableType] = [_pairs(f"expert {about['name']}", pairs), plan_table(about["plan"])]
    if about["plan"].get("vocabulary"):
        parts.append(vocabulary_table(about["plan"]["vocabulary"]))
    if about["evaluation"]:
        parts.append(retention_table(about["evaluation"]))
    return Group(*parts)
