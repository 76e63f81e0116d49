"""Run tasks of lm-evaluation-harness on one model: one score per example."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertprune.corpora.chat import ChatTemplate, has_template
from expertprune.corpora.documents import Document
from expertprune.corpora.reading import check_builder
from expertprune.errors import CheckpointError, SpecError, first_line, refused, under
from expertprune.evaluation.harness.metrics import chosen_metric, reported, value_of
from expertprune.evaluation.harness.quiet import quiet
from expertprune.evaluation.harness.sandbox import check_code, metric_code, sandbox_templates, with_functions
from expertprune.evaluation.harness.scores import Asked, Leaf, Scores, choice_scores, example_of
from expertprune.evaluation.questions import margin
from expertprune.evaluation.suites import TaskEntry, TaskFile, read_task
from expertprune.files import digest_of, not_a_file
from expertprune.registry import nearest

_SEED = 1234  # of few-shot examples, as in lm-evaluation-harness


_FILES = ("json", "csv", "text", "parquet")  # dataset builders that read local files


_LONG = 60  # characters from which the leak guard looks at a field of an example


@dataclass
class HarnessTask:
    """A task ready to run.

    `metric` and `filter` are lm-evaluation-harness' words. `chance` is what guessing gets, where
    that is known. `digest` covers examples, prompts, metric, answer extraction, the task's own code,
    and its members' names, by which scores tell examples apart. `texts` are what the leak guard
    looks at, by example, and `asked` what people do. `trusted` says whether its metrics may run
    Python files.
    """

    label: str
    entry: TaskEntry
    leaves: dict[str, Leaf]
    metric: str
    filter: str
    generates: bool
    examples: int
    chance: float | None
    digest: str
    texts: list[list[Document]]
    asked: list[Asked]
    trusted: bool

    @property
    def reported(self) -> str:
        """The metric's name in results."""
        return reported(self.metric)


def require_harness(served: bool) -> None:
    """Raises `SpecError` if lm-evaluation-harness, or what it asks servers with, is missing."""
    for package in ("lm_eval", *(("aiohttp", "requests", "tenacity") if served else ())):
        try:
            importlib.import_module(package)
        except ImportError:
            raise SpecError(
                f"tasks need lm-evaluation-harness, and {package} is not installed: pip install 'expertprune[eval]'"
            ) from None


@functools.cache
def _manager(everything: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)  # reading its thousands of tasks takes 15 s


def check_names(entries: Sequence[TaskEntry]) -> None:
    """Raises `SpecError`, with the nearest name, for tasks that lm-evaluation-harness has not."""
    names = [entry.name for entry in entries if entry.name is not None]
    if names:
        known = _manager(True).all_tasks
        if unknown := [name for name in names if name not in known]:
            every = "`lm-eval ls tasks` lists them"
            raise SpecError([f"unknown task {name!r}{nearest(name, known)}; {every}" for name in unknown])


def generates(entry: TaskEntry) -> bool:
    """Whether a task generates its answers."""
    return output_type(entry) == "generate_until"


def output_type(entry: TaskEntry) -> str:
    """What a task, or the first member of a group, asks of a model: `multiple_choice`, ..."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.file is not None:
        return str(read_task(Path(entry.file)).keys.get("output_type"))
    index = _manager(True).task_index
    names = [entry.name]
    while names:
        found = index.get(str(names.pop(0)))
        if found is None:
            continue
        config = load_yaml(found.yaml_path, resolve_func=False) if found.yaml_path is not None else {}
        if "output_type" in config:
            return str(config["output_type"])
        members = config.get("task")
        names += sorted(found.tags) if not members else members if isinstance(members, list) else []
        names = [each.get("task", each.get("group")) if isinstance(each, dict) else each for each in names]
    return ""


def load_task(
    entry: TaskEntry, generates: bool, limit: int | None = None, tokenizer: Any = None, trusted: bool = False
) -> HarnessTask:
    """Load a task's data and build its prompts.

    Args:
        generates: whether its suite says that the task generates answers.
        limit: at most so many examples (of each member, where the task is a group).
        tokenizer: the base's, where the task is asked through its chat template.
        trusted: whether Python code that the task names, functions and metrics, may run.

    Raises:
        SpecError: it is to be asked through a chat template, and there is none; it would run code that
            is not trusted; its data cannot be loaded, it has no example, or base and expert cannot be
            paired under its metric.
    """
    label = entry.label
    file = None if entry.file is None else read_task(Path(entry.file))
    code = "" if file is None else check_code(entry, file, trusted)
    if entry.chat and not has_template(tokenizer):
        raise SpecError(
            f"task {label}: chat: the base has no chat template; leave 'chat' out, or take an instruct model"
        )
    with metric_code(entry, trusted), quiet():
        try:
            sandbox_templates()
            leaves = _load(entry, file)
            for leaf in leaves.values():
                leaf.set_config(key="num_fewshot", value=_few_shot(entry, leaf))
            instances = {name: _build(leaf, limit, entry, tokenizer) for name, leaf in leaves.items()}
        except SpecError as error:
            raise SpecError([f"task {label}: {problem}" for problem in error.problems]) from None
        except Exception as error:  # the data's library and the task's own functions fail in any way
            reason = first_line(error)
            hint = "; it comes from the Hugging Face hub: is there a network?" if entry.name is not None else ""
            raise SpecError(f"task {label}: its data cannot be loaded: {reason}{hint}") from error
        with refused(f"task {label}: its examples cannot be read"):
            return _described(label, entry, leaves, instances, generates, trusted, code)


def _load(entry: TaskEntry, file: TaskFile | None) -> dict[str, Leaf]:
    if file is None:
        return dict(_manager(True).load([entry.name])["tasks"])
    with under("dataset_path"):
        check_builder(file.keys.get("dataset_path"))
    path, config = Path(str(entry.file)), with_functions(file.keys)
    data = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") in _FILES and "data_files" in data:
        config["dataset_kwargs"] = {**data, "data_files": _absolute(data["data_files"], path.parent)}
    return dict(_manager(False).load([config])["tasks"])


def _absolute(files: Any, folder: Path) -> Any:
    """Absolute paths of data files, which are relative to the task's YAML."""
    if isinstance(files, dict):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    path = folder / Path(files).expanduser()
    if "://" not in files and "*" not in files and (problem := not_a_file(path)):
        raise SpecError(f"{path}: {problem}")
    if path.is_file() and not path.stat().st_size:
        raise SpecError(f"{path}: holds no example")
    return str(files) if "://" in files else str(path.resolve())


def _few_shot(entry: TaskEntry, leaf: Leaf) -> int:
    own = leaf.get_config("num_fewshot")
    return entry.few_shot if entry.few_shot is not None else int(own or 0)


def _build(leaf: Leaf, limit: int | None, entry: TaskEntry, tokenizer: Any) -> list[Any]:
    leaf.set_fewshot_seed(seed=_SEED)
    if not len(leaf.eval_docs):
        return []
    settings = _chat_settings(entry) | ({"chat_template": ChatTemplate(tokenizer).question} if entry.chat else {})
    leaf.build_all_requests(limit=limit, rank=0, world_size=1, **settings)
    return list(leaf.instances)


def _chat_settings(entry: TaskEntry) -> dict[str, bool]:
    """What lm-evaluation-harness is told of chat templates."""
    return {
        "apply_chat_template": bool(entry.chat),
        "fewshot_as_multiturn": bool(entry.chat) and entry.fewshot_as_multiturn,
    }


def _described(
    label: str,
    entry: TaskEntry,
    leaves: dict[str, Leaf],
    instances: dict[str, list[Any]],
    generates: bool,
    trusted: bool,
    code: str,
) -> HarnessTask:
    first = next(iter(leaves.values()))
    if not any(instances.values()):
        raise SpecError(f"task {label}: it has no example")
    if (first.OUTPUT_TYPE == "generate_until") != generates:
        wrong, right = ("tasks", "generation") if not generates else ("generation", "tasks")
        raise SpecError(f"task {label}: its output is {first.OUTPUT_TYPE}: put it under {right!r}, not under {wrong!r}")
    metric = chosen_metric(label, entry.metric, leaves.values())
    filters = [each["name"] for each in first.config.filter_list or [{"name": "none"}]]
    if entry.filter is not None and entry.filter not in filters:
        raise SpecError(f"task {label}: it has no filter {entry.filter!r}{nearest(entry.filter, filters)}")
    by_example: dict[tuple[str, int], list[Any]] = {}
    for name, those in instances.items():
        for instance in those:
            by_example.setdefault((name, instance.doc_id), []).append(instance)
    twice = any(each["metric"] == "acc_mutual_info" for each in first.config.metric_list)  # it asks for each choice so
    requests, texts, guesses, asked = [], [], [], []
    for (name, _), those in by_example.items():
        document = those[0].doc
        target = leaves[name].doc_to_target(document)
        requests.append([name, [each.args for each in those], target, those[0].request_type, document])
        prompt = leaves[name].doc_to_text(document)
        prompt = prompt if isinstance(prompt, str) else str(those[0].args[0])
        texts.append(_texts(document, prompt, target))
        asked.append(example_of(leaves[name], document, prompt, target))
        guesses.append((2 if twice else 1) / len(those))
    chance = entry.chance
    if chance is None and first.OUTPUT_TYPE == "multiple_choice" and metric.startswith("acc"):
        chance = float(np.mean(guesses))
    about = [metric, entry.filter or filters[0], first.config.filter_list, first.config.metric_list, code]
    digest = digest_of(json.loads(json.dumps([about, requests], default=_named)))
    return HarnessTask(
        label, entry, leaves, metric, entry.filter or filters[0], generates, len(requests), chance, digest, texts, asked,
        trusted,
    )  # fmt: skip


def _named(value: Any) -> str:
    """The name of a function or another object in a task, without its address."""
    return str(getattr(value, "__qualname__", type(value).__name__))


def _texts(document: Any, prompt: str, target: Any) -> list[Document]:
    """An example's prompt with its target, and each longer text in its data."""
    found = [f"{prompt} {target}" if isinstance(target, str) else prompt]

    def collect(value: Any) -> None:
        if isinstance(value, str) and len(value) >= _LONG:
            found.append(value)
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    collect(document)
    return [Document(text) for text in dict.fromkeys(found)]


def run_task(task: HarnessTask, model: Any, limit: int | None = None, who: str = "model") -> Scores:
    """A model's scores on a task.

    Args:
        model: from `running_model` or `served_model`.
        limit: as in `load_task`.
        who: the model in words.

    Raises:
        CheckpointError: a likelihood is not finite, or the task fails.
        SpecError: its metric cannot be paired by example, or it would run code that is not trusted.
    """
    from lm_eval.evaluator import evaluate

    with metric_code(task.entry, task.trusted), quiet():
        for leaf in task.leaves.values():  # few-shot examples are drawn while prompts are built: the same ones again
            leaf.set_fewshot_seed(seed=_SEED)
        loaded = {"tasks": task.leaves, "groups": {}, "group_map": {}}
        settings = {"limit": limit, "bootstrap_iters": 0, "log_samples": True, **_chat_settings(task.entry)}
        with refused(f"task {task.label}: it cannot be run"):  # a task's own keys can be wrong in any way
            samples = evaluate(model, loaded, **settings)["samples"]
    chosen = [(name, each) for name in task.leaves for each in samples[name] if each["filter"] == task.filter]
    if not task.generates and not all(_finite(sample) for _, sample in chosen):
        raise CheckpointError(
            f"task {task.label}: the {who} gives likelihoods that are not finite: its weights are damaged, or try "
            "base.dtype: float32"
        )
    pairs = [value_of(task.label, task.metric, sample.get(task.metric)) for _, sample in chosen]
    answers: list[str] = []
    texts: list[str] = []
    margins: list[float | None] = []
    for (_, sample), asked in zip(chosen, task.asked, strict=True):
        if task.generates:
            answers.append(str(sample["filtered_resps"][0]).strip())
            texts.append(str(sample["resps"][0][0]))
        elif asked.choices:
            scores = choice_scores(task.metric, asked.choices, [each[0] for each in sample["filtered_resps"]])
            answers.append(asked.choices[int(scores.argmax())])
            margins.append(None if asked.answer is None else margin(scores, asked.answer))
    return Scores(
        task.reported,
        np.array([value for value, _ in pairs]),
        np.array([weight for _, weight in pairs]),
        tuple(digest_of([name, *(each[f"{part}_hash"] for part in _HASHED)]) for name, each in chosen),
        tuple(answers) if answers else None,
        tuple(texts) if task.generates else None,
        tuple(margins) if margins else None,
    )


_HASHED = ("doc", "prompt", "target")  # what tells examples apart


def _finite(sample: Any) -> bool:
    """Whether all log-likelihoods that an example asked for are numbers: alone, or with whether they are the greedy ones."""
    found = [each[0] if isinstance(each, tuple | list) else each for each in sample["filtered_resps"]]
    return all(math.isfinite(each) for each in found if isinstance(each, float))
