"""An expert's folder as an object: how it was made, where its base and corpora lie here, and what it keeps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from expertprune.arch import bundled_models
from expertprune.artifacts.evaluation import Evaluation
from expertprune.artifacts.places import KnownPlaces, unclear
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.record import Record
from expertprune.errors import CheckpointError, ExpertpruneError, SpecError
from expertprune.files import EXPERT_FILE, as_model, digest_of, problems_of, read_json, read_kept, write_json
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.origin import Origin
from expertprune.spec.reading import parse_spec, trusting, with_base, with_corpus_paths
from expertprune.spec.schema import Base, Spec

EXPERT_SCHEMA = 2
# Keys of the spec that say what the expert is; others say how it is measured.
_SETTLED = ("name", "dimensions", "general", "calibration", "relevance", "compose", "budget", "serve_with",
            "compensation")  # fmt: skip
_MEMORY = "calibration.tokens_per_batch"  # says how text is read, not which
_OF_PLAN = ("name", "parameters", "spec")  # keys of the plan that stand beside it in the file, for people who read it


class BaseRecord(Record):
    """The base as an expert remembers it.

    `model` is a hub id, the name of a bundled model, or the name of a local folder or file. `digest` covers config and
    weights, `tokenizer_digest` the tokenizer's files; `weight_bytes` is the size of the weights' files. `revision` is
    what the spec says, and `hub` what is known of the base on the hub, its commit among it.
    """

    model: str
    digest: str
    tokenizer_digest: str
    revision: str | None
    trust_remote_code: bool
    weight_bytes: int
    hub: Origin = Origin()


class CorpusRecord(Record):
    """The calibration text of one corpus: its digest, that of each document, and how the base
    generated it, if it did.
    """

    digest: str
    documents: list[str]
    generated: str | None = None


class _File(Record):
    """`expertprune.json` but for `kind` and `schema`; the four plain mappings have readers of their own."""

    name: str
    base: BaseRecord
    parameters: dict[str, int]
    corpora: dict[str, CorpusRecord]
    versions: dict[str, str]
    criterion_paper: str | None
    spec: dict[str, Any]
    plan: dict[str, Any]
    ancestor: dict[str, Any] | None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Description:
    """How an expert was made. It names no place of the machine that made it.

    Attributes:
        plan: which units were kept; made `portable`.
        corpora: the calibration text, by corpus.
        versions: of the packages that made the expert.
        criterion_paper: where the criterion comes from.
        ancestor: how the base was made, if it is an expert itself.
    """

    plan: Plan
    base: BaseRecord
    corpora: Mapping[str, CorpusRecord]
    versions: Mapping[str, str]
    criterion_paper: str | None
    ancestor: Description | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @cached_property
    def spec(self) -> Spec:
        """The plan's spec. Local files are named by the end of their path: see `Expert.local_spec`.

        It is read when asked for, so that an expert can be served where a package that its spec names is missing.

        Raises:
            CheckpointError: a key is unknown to this version, or has no legal value.
        """
        try:
            return Spec.model_validate(self.plan.spec)
        except ValidationError as error:
            problems = "; ".join(problems_of(error, Spec))
            raise CheckpointError(f"expert {self.name}: the spec in {EXPERT_FILE} cannot be used: {problems}") from None

    @property
    def lineage(self) -> list[Description]:
        """This expert, the expert that it was cut from, and so on."""
        return [self, *(self.ancestor.lineage if self.ancestor is not None else [])]

    @property
    def calibration_digests(self) -> frozenset[str]:
        """Digests of all documents that calibrated this expert or one of its ancestors."""
        records = (record for each in self.lineage for record in each.corpora.values())
        return frozenset(digest for record in records for digest in record.documents)

    def document(self) -> dict[str, Any]:
        """The contents of `expertprune.json`."""
        plan = self.plan.document()
        return {
            "kind": "expert",
            "schema": EXPERT_SCHEMA,
            "name": plan["name"],
            "base": self.base.model_dump(),
            "parameters": plan["parameters"],
            "corpora": {name: record.model_dump() for name, record in self.corpora.items()},
            "versions": dict(self.versions),
            "criterion_paper": self.criterion_paper,
            "spec": plan["spec"],
            "plan": {key: value for key, value in plan.items() if key not in _OF_PLAN},
            "ancestor": self.ancestor.document() if self.ancestor is not None else None,
        }


@dataclass(frozen=True)
class Expert(Description):
    """An expert's folder: an ordinary Hugging Face folder with `expertprune.json` beside the weights.

    Attributes:
        evaluation: what has been measured of it.
    """

    folder: Path = Path()
    evaluation: Evaluation | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check the `expertprune.json` of a folder.

        Raises:
            CheckpointError: the folder is no expert, another version wrote it, or the file is damaged.
        """
        folder = Path(folder)
        path = folder / EXPERT_FILE
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder}: is no expert (it has no {EXPERT_FILE})")
        description, measured = _read(read_json(path), str(path))
        try:
            evaluation = Evaluation.from_document(measured) if measured is not None else None
        except ValidationError as error:
            problems = "; ".join(problems_of(error, Evaluation))
            raise CheckpointError(f"{path}: damaged: evaluation: {problems}; evaluate the expert again") from None
        return cls(**_fields(description), folder=folder, evaluation=evaluation)

    def save(self) -> None:
        """Write `expertprune.json` into the folder."""
        write_json(self.folder / EXPERT_FILE, self.document())

    @property
    def description(self) -> Description:
        """How the expert was made, without its folder and evaluation."""
        return Description(**_fields(self))

    def document(self) -> dict[str, Any]:
        measured = self.evaluation.document() if self.evaluation is not None else None
        return {**super().document(), "evaluation": measured}

    # --- on this machine ----------------------------------------------------------------------------------------------

    def remember_places(self, spec: Spec, store: Path) -> None:
        """Note in the store where base and corpora lie on this machine, which the expert's folder does not say.

        Args:
            spec: the spec that the expert was built from, with absolute paths.
        """
        corpora = {name: path for path, name in _portable_names(spec).items()}
        places = _noted(self, store).then(spec.base.model, corpora)
        with contextlib.suppress(CheckpointError):  # a store that cannot be written costs a question later
            write_json(_places_file(self, store), places.model_dump())

    def local_spec(self, store: Path, overrides: Mapping[str, Any] | None = None) -> Spec:
        """The spec with base and corpora where they lie on this machine.

        A local file is looked for where the build had it, if the store knows; then in the current folder; then in the
        expert's folder and in the folder around it. Where builds of one plan had different files, the one that shares most
        of its path with the expert's folder is taken.

        Args:
            overrides: dotted keys and values, such as `{"base.model": "/models/base"}`; they need not be looked for.

        Raises:
            SpecError: a corpus' file is in none of these places, or in several; or an override is not legal, or changes what
                the expert has become.
        """
        settled = (key for key in overrides or () if key.partition(".")[0] in _SETTLED and key != _MEMORY)
        if wrong := sorted(settled):
            raise SpecError([f"{key}: the expert is built already; build it again with this key" for key in wrong])
        noted = _noted(self, store)
        problems: list[str] = []

        def corpus_file(key: str, name: str) -> str:
            places = noted.chosen(name, self.folder)
            found = _find(name, next(iter(places), None), self.folder)
            if any(key == given or key.startswith(f"{given}.") for given in overrides or ()):
                return found or name
            if len(places) > 1:
                problems.append(unclear(key, name, places))
            elif found is None:
                problems.append(
                    f"{key}: {name} lies neither in the current folder nor beside {self.folder}: change into its "
                    f"folder, or say where it is with --set {key}=PATH"
                )
            return found or name

        spec = with_corpus_paths(self.spec, corpus_file)
        if problems:
            raise SpecError(problems)
        spec = spec.model_copy(update={"base": self.local_base(store)})
        base = str((overrides or {}).get("base.model", spec.base.model))
        spec = parse_spec(spec.document(), str(self.folder / EXPERT_FILE), Path.cwd(), overrides)
        if base in bundled_models():  # though the current folder may hold one of this name, such as the expert itself
            spec = with_base(spec, model=base)
        return trusting(spec, overrides)

    def local_base(self, store: Path, model: str | Path | None = None) -> Base:
        """The spec's base where it lies on this machine; it is looked for as the corpora are (see `local_spec`).

        Args:
            model: its folder, or the name of a bundled model, where you know it.
        """
        base = self.spec.base
        found = str(model or base_place(self, self.folder, store))
        return base.model_copy(update={"model": found, "trust_remote_code": False})

    def find_base(self, store: Path, base: Base | None = None) -> ResolvedBase:
        """The base that the expert was cut from.

        Args:
            base: where it is; default: `local_base`.

        Raises:
            CheckpointError: it is not there, or another model is.
        """
        try:
            resolved = resolve_base(base or self.local_base(store), store)
        except ExpertpruneError as error:
            raise CheckpointError(
                f"the base of this expert cannot be found ({error}); say where it is with --base"
            ) from None
        if resolved.digest != self.base.digest:
            raise CheckpointError(
                f"{resolved.folder}: is not the base of this expert (digest {resolved.digest[:12]}, "
                f"recorded {self.base.digest[:12]}); say where the base is with --base"
            )
        return resolved


def base_place(description: Description, folder: Path, store: Path) -> str:
    """Where the base of an expert lies on this machine; what the spec says if it is in no place that is looked in.

    The name of a bundled model stays, unless the expert was cut here from a folder of that name.

    Args:
        folder: where it is looked for besides: the expert's folder, or that of an expert cut from it.
    """
    model, noted = description.spec.base.model, _noted(description, store).base
    if model in bundled_models() and not Path(noted or "").is_absolute():
        return model
    return _find(model, noted, folder) or model


def _find(name: str, noted: str | None, beside: Path) -> str | None:
    """The first place where a local file or folder is, which is not the expert's own folder."""
    beside = beside.resolve()
    places = [Path(noted)] if noted is not None else []
    places += [folder / name for folder in (Path.cwd(), beside, beside.parent)]
    return next((str(path) for path in places if path.exists() and path.resolve() != beside), None)


def _noted(description: Description, store: Path) -> KnownPlaces:
    """What `Expert.remember_places` wrote on this machine."""
    return read_kept(_places_file(description, store), KnownPlaces) or KnownPlaces()


def _places_file(description: Description, store: Path) -> Path:
    return store / "places" / f"{digest_of([description.base.digest, description.plan.digest])}.json"


def ancestor_of(base: ResolvedBase) -> Description | None:
    """How a base was made, if it is an expert itself."""
    return Expert.load(base.folder).description if (base.folder / EXPERT_FILE).is_file() else None


def places_of_bases(base: ResolvedBase, store: Path) -> list[Path]:
    """The folders of a base, of the base that it was cut from, and so on, as far as this machine knows them."""
    description = ancestor_of(base)
    lineage = description.lineage if description is not None else []
    names = [base.name, *(base_place(each, base.folder, store) for each in lineage)]
    places = [Path(name) for name in names if name not in bundled_models()]
    return [base.folder, *(place for place in places if place.exists())]


def portable(plan: Plan) -> Plan:
    """A plan without places of this machine: local files are named by the end of their path.

    The end is the file's name, or as many folders more as tell it from the spec's other files.
    """
    base = plan.base.model_copy(update={"model": portable_base(plan.base.model)})
    return replace(plan, spec=portable_spec(Spec.model_validate(plan.spec)).document(), base=base)


def portable_spec(spec: Spec) -> Spec:
    """The spec of a portable plan."""
    names = _portable_names(spec)
    spec = with_corpus_paths(spec, lambda _, path: names[path])
    return with_base(spec, model=portable_base(spec.base.model))


def portable_base(model: str) -> str:
    """A local base by the name of its folder or file; hub ids and names of bundled models stay."""
    return Path(model).name if Path(model).is_absolute() else model


def _portable_names(spec: Spec) -> dict[str, str]:
    """From each path below `corpora` of a spec to the shortest end of it that no other path has.

    That of a data set's folder begins with a dot, as `./shop` does: a name on the hub does not.
    """
    paths: dict[str, str] = {}
    with_corpus_paths(spec, lambda key, path: paths.setdefault(path, key) and path)

    def ends(path: str) -> Iterator[str]:
        parts = Path(path).parts
        yield from ("/".join(parts[-count:]) for count in range(1, len(parts)))

    def taken(end: str, path: str) -> bool:
        return any(f"/{other}".endswith(f"/{end}") for other in paths if other != path)

    def name(path: str) -> str:
        end = next((end for end in ends(path) if not taken(end, path)), path.lstrip("/"))
        return f"./{end}" if paths[path].endswith(".dataset") and not end.startswith(".") else end

    return {path: name(path) for path in paths}


def _read(data: Any, where: str) -> tuple[Description, dict[str, Any] | None]:
    """A description and what was measured, from the contents of `expertprune.json`. Raises `CheckpointError`."""
    if not isinstance(data, dict) or data.get("kind") != "expert":
        raise CheckpointError(f"{where}: is not an expert's description")
    if data.get("schema") != EXPERT_SCHEMA:
        written = f"of schema {data['schema']}" if "schema" in data else "of an older version"
        raise CheckpointError(
            f"{where}: an expert {written}, and this version reads schema {EXPERT_SCHEMA}: build the expert again"
        )
    contents = {key: value for key, value in data.items() if key not in ("kind", "schema")}
    file = as_model(contents, _File, f"{where}: damaged, build the expert again")
    plan = Plan.from_document(file.plan | {key: data[key] for key in _OF_PLAN}, where)
    ancestor = None if file.ancestor is None else _read(file.ancestor, f"{where}: ancestor")[0]
    return Description(plan, file.base, file.corpora, file.versions, file.criterion_paper, ancestor), file.evaluation


def _fields(description: Description) -> dict[str, Any]:
    return {field.name: getattr(description, field.name) for field in fields(Description)}
