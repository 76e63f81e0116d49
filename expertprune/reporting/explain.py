"""Explain any artifact: a spec, a profile, a plan, an expert's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertprune import formats
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan, RetentionFound, load_plan
from expertprune.artifacts.profile import Profile
from expertprune.corpora.documents import corpus_names
from expertprune.errors import PlanError, SpecError
from expertprune.files import EXPERT_FILE, as_model, folder_size, not_a_file
from expertprune.reporting.card import purpose
from expertprune.reporting.tables import plan_table, retention_table, vocabulary_table
from expertprune.spec.reading import load_spec
from expertprune.spec.schema import Spec
from expertprune.units import LayerShape

Artifact = Spec | Profile | Plan | Expert


def read(path: Path) -> Artifact:
    """The artifact at a path.

    Raises:
        SpecError: the path is missing, or is none of the four kinds.
    """
    if path.is_dir():
        return Expert.load(path)
    if problem := not_a_file(path):
        raise SpecError(f"{path}: {'no such file or folder' if problem == 'no such file' else problem}")
    if path.suffix in (".yaml", ".yml") or (not path.suffix and not _is_json(path)):
        return load_spec(path)
    if path.suffix == ".safetensors":
        return Profile(path)
    if path.suffix in (".json", ""):
        return Expert.load(path.parent) if path.name == EXPERT_FILE else load_plan(path)
    raise SpecError(f"{path}: is no spec (.yaml), profile (.safetensors), plan (.json) or expert (a folder)")


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(100).lstrip()[:1] == b"{"


def describe(artifact: str | Path | Artifact) -> dict[str, Any]:
    """Plain data about an artifact or the one at a path, with its `kind`; for errors see `read`."""
    found = read(Path(artifact)) if isinstance(artifact, str | Path) else artifact
    if isinstance(found, Spec):
        return {"kind": "spec", "spec": found.document(), "corpora": [str(name) for name in corpus_names(found)]}
    if isinstance(found, Profile):
        return {"kind": "profile", **found.about.document()}
    if isinstance(found, Expert):
        return {**found.document(), "folder": str(found.folder), "bytes": folder_size(found.folder)}
    return found.document()


def explain(artifact: Artifact) -> RenderableType:
    """An artifact for a terminal."""
    if isinstance(artifact, Spec):
        return _spec(artifact)
    if isinstance(artifact, Profile):
        return _profile(artifact)
    return _expert(artifact) if isinstance(artifact, Expert) else _plan(artifact)


def _pairs(title: str, pairs: dict[str, Any]) -> Table:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for key, value in pairs.items():
        table.add_row(key, Text(str(value)))
    return table


def _spec(spec: Spec) -> RenderableType:
    pairs = {
        "for": purpose(spec),
        "base": spec.base.model,
        "corpora": ", ".join(str(name) for name in corpus_names(spec)),
    }
    data = spec.document()
    for section in ("calibration", "relevance", "compose", "budget", "compensation", "evaluate"):
        pairs[section] = ", ".join(f"{k} {json.dumps(v)}" for k, v in data[section].items() if v is not None)
    return _pairs(f"spec {spec.name}", pairs)


def _profile(profile: Profile) -> RenderableType:
    about, shape = profile.about, max(profile.layers, key=lambda layer: layer.neurons)
    heads = f", {shape.query_heads} query heads, {shape.kv_heads} KV groups" if shape.kv_heads else ""
    return _pairs(
        f"profile {about.digest[:12]}",
        {
            "base": about.base,
            "corpus": about.corpus,
            "documents": len(about.documents),
            "tokens": f"{about.tokens:,}",
            "layers": f"{len(profile.layers)} of {_widths(shape)}{heads}",
            "run in": about.key.dtype,
        },
    )


def _widths(shape: LayerShape) -> str:
    if shape.experts:
        return f"{shape.experts} routed experts of {shape.ffn} FFN neurons"
    return f"{shape.ffn} FFN neurons"


def _parameters(plan: Plan) -> str:
    before, after = plan.parameters.before, plan.parameters.after
    return f"{formats.count(after)} of {formats.count(before)} ({after / before:.1%})"


def _plan(plan: Plan) -> RenderableType:
    spec = as_model(dict(plan.spec), Spec, f"plan {plan.name!r}: spec", PlanError)
    pairs = {
        "for": purpose(spec),
        "base": plan.base.model,
        "parameters": _parameters(plan),
        "rule": spec.compose.rule,
        "criterion": spec.relevance.criterion,
        **({"criterion of routed experts": spec.relevance.experts} if spec.relevance.experts else {}),
        "allocation": spec.compose.allocation,
    }
    requested = (entry.requested for entry in plan.budget.values())
    if met := next((each for each in requested if isinstance(each, RetentionFound)), None):
        pairs["kept of held-back text"] = ", ".join(f"{name} {value:.4f}" for name, value in met.found.items())
    return Group(_pairs(f"plan {plan.name}", pairs), plan_table(plan), *_vocabulary(plan))


def _vocabulary(plan: Plan) -> list[RenderableType]:
    return [vocabulary_table(plan.vocabulary)] if plan.vocabulary is not None else []


def _expert(expert: Expert) -> RenderableType:
    pairs = {
        "for": purpose(expert.spec),
        "base": expert.base.model,
        "parameters": _parameters(expert.plan),
        "folder": f"{expert.folder}, {formats.megabytes(folder_size(expert.folder))}",
        "repair": expert.spec.compensation.method,
        "versions": ", ".join(f"{package} {version}" for package, version in expert.versions.items()),
    }
    measured = [retention_table(expert.evaluation)] if expert.evaluation is not None else []
    return Group(_pairs(f"expert {expert.name}", pairs), plan_table(expert.plan), *_vocabulary(expert.plan), *measured)
