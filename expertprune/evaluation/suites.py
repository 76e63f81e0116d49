"""Suites: YAML files that say what an evaluation measures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from expertprune.artifacts.evaluation import Group
from expertprune.corpora.documents import CorpusName
from expertprune.errors import SpecError, gathered
from expertprune.files import digest_of, problems_of, read_yaml, shipped, user_path
from expertprune.registry import nearest
from expertprune.spec.schema import DIMENSIONS, Dimensions
from expertprune.spec.values import FileName, LocalPath, Names


class _SuiteKeys(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class _Measured(_SuiteKeys):
    """Whether a measurement counts as what the expert is for, or as what it should keep besides."""

    group: Group | None = Field(None, description="Counts as expert or as general, whatever the spec says.")
    measures: Names = Field(
        default_factory=list, description="Values such as domain/medical; the spec says whether the expert is for them."
    )

    @field_validator("measures")
    @classmethod
    def _values(cls, names: list[str]) -> list[str]:
        for name in names:
            dimension, _, value = name.partition("/")
            if dimension not in DIMENSIONS or not value:
                raise ValueError(
                    f"{name!r} is not one of {', '.join(DIMENSIONS)} and its value, such as domain/medical"
                )
        return names

    def group_for(self, dimensions: Dimensions) -> Group:
        """`expert` if it names a dimension of the spec, and a value of the spec in each such one."""
        if self.group is not None:
            return self.group
        chosen = dimensions.chosen
        measured: dict[str, list[str]] = {}
        for name in self.measures:
            corpus = CorpusName.parse(name)
            measured.setdefault(corpus.dimension, []).append(corpus.value)
        shared = [bool(set(values) & set(measured[name])) for name, values in chosen.items() if name in measured]
        return "expert" if shared and all(shared) else "general"


class TaskEntry(_Measured):
    """One task of lm-evaluation-harness, by name or as a YAML file."""

    name: str | None = Field(None, description="Task, group or tag of lm-evaluation-harness.")
    file: LocalPath | None = Field(
        None, description="A task YAML, relative to the suite; data files in it are relative to itself."
    )
    metric: str | None = Field(None, description="The metric; default: the first that the task computes, of "
                               "exact_match, acc_norm, acc, f1, bits_per_byte.")  # fmt: skip
    filter: str | None = Field(None, description="The answer extraction (a filter of the task); default: its first.")
    chance: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="What guessing gets; default: one over the number of choices, where there are choices.",
    )
    few_shot: int | None = Field(None, ge=0, description="Examples in the prompt; default: what the task says.")
    chat: bool | None = Field(None, description="Ask through the chat template; default: as the suite says.")
    fewshot_as_multiturn: bool = Field(True, description="With chat: each example of the prompt is a turn of its own.")

    @model_validator(mode="after")
    def _one_origin(self) -> TaskEntry:
        if (self.name is None) == (self.file is None):
            raise ValueError("give exactly one of 'name' and 'file'")
        return self

    @property
    def label(self) -> str:
        """Its name in results: `name`, or the `task` of its file."""
        return self.name if self.name is not None else str(_task_file(Path(str(self.file)))["task"])


class Perplexity(_SuiteKeys):
    """Bits per byte and KL to the base, on the evaluation documents of corpora."""

    corpora: Names | None = Field(
        None, min_length=1, description="Such as domain/medical or general; default: all corpora of the spec."
    )


class Suite(_Measured):
    """What is measured of base and expert."""

    name: FileName
    perplexity: Perplexity | None = None
    alignment: bool = Field(False, description="Compare hidden states, on the documents of perplexity.")
    chat: bool = Field(False, description="Ask every task through the base's chat template, as people do.")
    tasks: list[TaskEntry] = Field(default_factory=list, description="Questions with choices, or likelihoods of texts.")
    generation: list[TaskEntry] = Field(default_factory=list, description="Tasks whose answers are generated.")

    @model_validator(mode="after")
    def _something(self) -> Suite:
        if self.perplexity is None and not self.tasks and not self.generation:
            raise ValueError("the suite names nothing to measure: give perplexity, tasks or generation")
        if self.alignment and self.perplexity is None:
            raise ValueError("alignment is measured on the documents of perplexity: give perplexity too")
        for entry in (*self.tasks, *self.generation):  # what the suite says holds for each of its tasks
            if entry.group is None and not entry.measures:
                entry.group, entry.measures = self.group, list(self.measures)
            entry.chat = self.chat if entry.chat is None else entry.chat
        return self

    @property
    def digest(self) -> str:
        """Digest of the suite and of its task files."""
        files = [entry.file for entry in (*self.tasks, *self.generation) if entry.file is not None]
        contents = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
        data = self.model_dump(mode="json")
        for entry in (*data["tasks"], *data["generation"]):
            entry["file"] = None if entry["file"] is None else Path(entry["file"]).name
        return digest_of([data, contents])


def shipped_suites() -> dict[str, Path]:
    """The suites that ship, by name."""
    return {path.stem: path for path in sorted((shipped("profiles") / "suites").glob("*.yaml"))}


def find_suite(name: str) -> Suite:
    """A suite by the path of its file, or by the name of one that ships. Raises `SpecError`."""
    known = shipped_suites()
    if name in known and not Path(name).is_file():
        return load_suite(known[name])
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return load_suite(Path(name))
    raise SpecError(f"unknown suite {name!r}{nearest(name, known)}")


def find_suites(names: Sequence[str]) -> list[Suite]:
    """Several suites. Raises `SpecError` with every problem, such as two tasks of one name."""
    suites: list[Suite] = []
    problems: list[str] = []
    for name in dict.fromkeys(names):
        with gathered(problems):
            suites.append(find_suite(name))
    names = [suite.name for suite in suites]
    problems += [f"suite {name}: two files have this name; rename one" for name in names if names.count(name) > 1][:1]
    owners: dict[str, str] = {}
    for suite in suites:
        for entry in (*suite.tasks, *suite.generation):
            if entry.label in owners:
                problems.append(f"suite {suite.name}: task {entry.label!r} is in suite {owners[entry.label]} already")
            owners[entry.label] = suite.name
    if problems:
        raise SpecError(problems)
    return suites


def load_suite(path: Path) -> Suite:
    """Read and check a suite; files that it names become absolute.

    Raises:
        SpecError: with every problem, each with file, key and the nearest valid name.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a suite is a mapping of keys (name, perplexity, tasks, generation, ...)")
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise SpecError([f"{path}: {problem}" for problem in problems_of(error, Suite)]) from None
    problems = []
    for section in ("tasks", "generation"):
        for number, entry in enumerate(getattr(suite, section)):
            if entry.file is not None:
                entry.file = str((path.resolve().parent / user_path(entry.file)).resolve())
                try:
                    _task_file(Path(entry.file))
                except SpecError as error:
                    problems += [f"{path}: {section}.{number}.file: {problem}" for problem in error.problems]
    if problems:
        raise SpecError(problems)
    return suite


def bare_task(name: str) -> tuple[TaskEntry, str]:
    """A task by its name alone, and the shipped suite that has it (`""`: none).

    A suite's entry has the metric, the answer extraction and the few-shot examples that the field
    reports.
    """
    for suite in map(load_suite, shipped_suites().values()):
        for entry in (*suite.tasks, *suite.generation):
            if entry.label == name:
                return entry, suite.name
    return TaskEntry(name=name), ""


@dataclass(frozen=True)
class TaskFunction:
    """A function that a task YAML names, such as `utils.process_docs`, and the folder of that YAML."""

    name: str
    folder: Path

    @property
    def code(self) -> str:
        """The file that is run, or the module where there is no such file."""
        module = self.name.rpartition(".")[0]
        file = self.folder / f"{module.replace('.', '/')}.py"
        return str(file) if file.exists() else f"the module {module}"


@dataclass(frozen=True)
class TaskFile:
    """A task YAML together with what it includes. Nothing is imported.

    Attributes:
        keys: those of the task; its own ones count before included ones.
        functions: all that stand anywhere in the files.
    """

    keys: dict[str, Any]
    functions: tuple[TaskFunction, ...]


def read_task(path: Path) -> TaskFile:
    """Read a task YAML and the files that it includes, as lm-evaluation-harness puts them together.

    Raises:
        SpecError: one of the files cannot be read, or is included twice.
    """
    return _read_task(path.resolve(), set())


def _read_task(path: Path, seen: set[Path]) -> TaskFile:
    if path in seen:
        raise SpecError(f"{path}: is included twice, or includes itself")
    seen.add(path)
    data, functions = _task_yaml(path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a task is a mapping of keys")
    included = data.pop("include", [])
    keys: dict[str, Any] = {}
    for each in included if isinstance(included, list) else [included]:
        try:
            place = (path.parent / str(each)).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError(f"{path}: include: {error}") from None
        inner = _read_task(place, seen)
        inner.keys.pop("task_list", None)  # it is of tasks in the included file itself
        keys |= inner.keys
        functions += inner.functions
    return TaskFile(keys | data, tuple(functions))


def _task_yaml(path: Path) -> tuple[Any, list[TaskFunction]]:
    """The content of one task YAML, and the functions that stand anywhere in it."""
    functions: list[TaskFunction] = []

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> TaskFunction:
        functions.append(TaskFunction(str(loader.construct_scalar(node)), path.parent))
        return functions[-1]

    Loader.add_constructor("!function", function)
    return read_yaml(path, Loader), functions


def _task_file(path: Path) -> dict[str, Any]:
    """The keys of a task YAML. Raises `SpecError` if it names no task."""
    data, _ = _task_yaml(path)
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise SpecError(f"{path}: is no task of lm-evaluation-harness: it has no key 'task' with a name")
    return data
