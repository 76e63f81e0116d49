"""Is it worth scoring units on the task's text too? Three tasks, on a model of 1.5 billion parameters.

    python -m bench.claims --data DATA --base BASE [--sparsity 0.25 ...]

BASE is Qwen2.5-Coder-1.5B-Instruct: a folder, a GGUF file or a hub id. DATA is a folder of JSON
lines: `task/boolq_*`, `task/rte_*` and `task/sst2_*`, each with `_calibration.jsonl` and
`_report.jsonl`, and `general/wikitext2_*`.

A part of each layer's FFN neurons goes, unrepaired, chosen by one of three criteria on the task's
text, on WikiText-2, or on both. Each task is asked for in one prompt without examples; the answer
is the likelier of two tokens. This is the question of task-aware pruning (arXiv:2510.22489).
Report rows are measured and choose nothing. What was measured is kept in `bench/results/`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np
import torch

import expertprune
from expertprune.artifacts.plan import Plan
from expertprune.evaluation.retention import RESAMPLES, tail
from expertprune.progress import silent
from expertprune.pruning.slicing import pruned_layer
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of

from .cells import Bench as Cells
from .measure import Sums, blocks, excess, likeliest, losses
from .quality import SHARED_EXCLUSIVE, UNREPAIRED
from .records import RESULTS, Table, described, made, read, write

TEXT, TEXT_BLOCKS = "general/wikitext2_report.jsonl", 2
SPARSITIES = (0.25, 0.4)
TOKENS = 4000  # of calibration text, of each corpus


@dataclass(frozen=True)
class Task:
    """A task of two answers: its prompt, by the keys of a row, and how many report rows are asked.

    `answers` are the words behind the prompt, by the row's `label_text`. Rows with more than
    `characters` in all are left out.
    """

    prompt: str
    answers: Mapping[str, str]
    rows: int
    characters: int = 10_000


TASKS = {
    "boolq": Task("Passage: {passage}\nQuestion: {question}?\nAnswer:", {"yes": " yes", "no": " no"}, 80, 800),
    "rte": Task(
        "{premise}\nQuestion: does it follow that {hypothesis}\nAnswer (yes or no):",
        {"entailment": " yes", "not_entailment": " no"},
        100,
    ),
    "sst2": Task("Review: {sentence}\nSentiment:", {"positive": " positive", "negative": " negative"}, 200),
}
GENERAL = "encyclopedia"
# By name: the dimension's corpora and the general ones; `None` stands for the task.
WAYS: dict[str, tuple[str | None, tuple[str, ...], dict[str, Any]]] = {
    "general only": (GENERAL, (), {}),
    "task only": (None, (), {}),
    "both, weighted": (None, (GENERAL,), {}),
    "both, shared/exclusive": (None, (GENERAL,), SHARED_EXCLUSIVE),
}
FUSED = tuple(WAYS)[2:]
CRITERIA = ("activation", "taylor")  # those that see text; taylor is the loss' perturbation


@dataclass(frozen=True)
class Cell:
    """One way to choose the neurons of a task, or of all where `task` is `None`; `base` is uncut."""

    criterion: str
    way: str = "general only"
    task: str | None = None
    sparsity: float = 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that are asked."""
        return tuple(TASKS) if self.task is None else (self.task,)

    @property
    def path(self) -> Path:
        parts = [self.criterion, self.way, self.task or "all", f"{self.sparsity:g}"]
        return RESULTS / f"claims-{'-'.join(parts).replace(', ', '-').replace(' ', '-').replace('/', '-')}.json"


BASE = Cell("base")


def cells(sparsities: Sequence[float] = SPARSITIES) -> Iterator[Cell]:
    """All cells, the base first."""
    yield BASE
    for sparsity in sparsities:
        yield Cell("magnitude", sparsity=sparsity)
        for criterion, way in itertools.product(CRITERIA, WAYS):
            for task in [None] if WAYS[way][0] else TASKS:
                yield Cell(criterion, way, task, sparsity)


@dataclass(frozen=True)
class Result:
    """A cell's figures: 1 for each right answer by task, losses of general text, and how it was made."""

    right: dict[str, list[int]]
    text: Sums
    made: dict[str, Any]


def stored(cell: Cell) -> Result:
    """The result of a cell that was measured before; raises `NotMeasuredError`."""
    found = read(cell.path)
    return Result(found["right"], Sums(*(np.array(found["text"][name]) for name in ("nats", "tokens"))), found["made"])


class Bench:
    """Measures cells on one base over one folder of data. The model is loaded once."""

    def __init__(self, data: Path, base: str, work: Path) -> None:
        self.data, self.base, self.work = data, base, work
        every = self.spec("taylor", list(TASKS), (GENERAL,))
        self.prepared = expertprune.validate(every)
        plan_of(self.prepared, silent)  # profiles every corpus
        self.running = self.prepared.running
        self.text = blocks(data / TEXT, self.prepared.base.tokenizer, TEXT_BLOCKS)

    def rows(self, task: str, part: str) -> list[dict[str, Any]]:
        with jsonlines.open(self.data / f"task/{task}_{part}.jsonl") as found:
            rows = list(found)
        return [row for row in rows if sum(len(str(value)) for value in row.values()) <= TASKS[task].characters]

    def corpus(self, name: str) -> str:
        """The path of a corpus of about `TOKENS` tokens, four characters each."""
        path = self.work / f"{name}.jsonl"
        if not path.is_file():
            if name == GENERAL:
                with jsonlines.open(Cells(self.data).pieces(GENERAL)) as found:
                    texts = [row["text"] for row in found]
            else:
                task = TASKS[name]
                texts = [
                    task.prompt.format(**row) + task.answers[row["label_text"]]
                    for row in self.rows(name, "calibration")
                ]
            enough = next(number for number, total in enumerate(_sums(texts), 1) if total >= 4 * TOKENS)
            with jsonlines.open(path, "w") as file:
                file.write_all({"text": text} for text in texts[:enough])
        return str(path)

    def spec(self, criterion: str, task: Any, general: tuple[str, ...], overrides: Mapping[str, Any] = {}) -> Spec:
        names = [*(task if isinstance(task, list) else [task]), *general]
        data = {
            "name": "bench-claims",
            "base": {"model": self.base, "dtype": "bfloat16"},
            "dimensions": {"task": task},
            "general": list(general),
            "corpora": {"sources": {name: {"path": self.corpus(name)} for name in names}},
            "calibration": {"documents": 10_000, "max_tokens": 512},
            "relevance": criterion,
            "budget": {"ffn": 0.25},
            "evaluate": {"enabled": False},
        }
        return parse_spec(data, "bench", self.data, {"compose.allocation": "uniform", **UNREPAIRED, **overrides})

    def plan(self, cell: Cell) -> Plan:
        chosen, general, overrides = WAYS[cell.way]
        spec = self.spec(cell.criterion, chosen or cell.task, general, {**overrides, "budget.ffn": cell.sparsity})
        return plan_of(expertprune.validate(spec), silent)

    def run(self, cell: Cell) -> None:
        """Cut the running model, ask it, and put its layers back."""
        model = self.running.model
        decoder = model.get_decoder()
        whole = list(decoder.layers)
        if cell != BASE:
            plan = self.plan(cell)
            for index, layer in enumerate(whole):
                family, shape = self.prepared.base.family, plan.shapes[index]
                decoder.layers[index] = pruned_layer(layer, family, index, shape, plan.kept[index], model.config)
        try:
            right = {task: self.ask(task) for task in cell.tasks}
            text = losses(model, self.text)
        finally:
            decoder.layers = torch.nn.ModuleList(whole)
        kept = {"nats": text.nats.tolist(), "tokens": text.tokens.tolist()}
        write(cell.path, {"right": right, "text": kept, "made": made()})

    def ask(self, task: str) -> list[int]:
        """1 for each question whose right answer is the likelier one, 0 else."""
        about, tokenizer = TASKS[task], self.prepared.base.tokenizer
        rows = self.rows(task, "report")[: about.rows]
        prompts = [tokenizer(about.prompt.format(**row))["input_ids"] for row in rows]
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in about.answers.values()]
        labels = list(about.answers)
        picks = likeliest(self.running.model, prompts, tokens)
        return [int(labels[pick] == row["label_text"]) for pick, row in zip(picks, rows, strict=True)]


def _sums(texts: Sequence[str]) -> Iterator[int]:
    return itertools.accumulate(map(len, texts))


def text() -> str:
    """Both tables, of the sparsities that were measured: every cell, and what the task's text is worth."""
    base = stored(BASE)
    sparsities = [each for each in SPARSITIES if all(cell.path.is_file() for cell in cells((each,)))]
    every = Table(["removed", "criterion", "scored on", *TASKS, "mean", "WikiText-2: excess ln (95%)"])
    every.add("", "base", "", *_accuracies(base.right), "")
    used = [base.made]
    for sparsity in sparsities:
        for criterion, way in [("magnitude", "general only"), *itertools.product(CRITERIA, WAYS)]:
            found = [stored(cell) for cell in cells((sparsity,)) if (cell.criterion, cell.way) == (criterion, way)]
            used += [each.made for each in found]
            nats = np.mean([each.text.nats for each in found], axis=0)
            lost = excess(base.text, Sums(nats, base.text.tokens))
            scored = "no text" if criterion == "magnitude" else way
            right = {task: each.right[task] for each in found for task in each.right}
            interval = f"{lost.value:.3f} ({lost.low:.3f} to {lost.high:.3f})"
            every.add(f"{sparsity:.0%}", criterion, scored, *_accuracies(right), interval)
    each_and_all = [(each,) for each in sparsities] + ([tuple(sparsities)] if len(sparsities) > 1 else [])
    columns = [" and ".join(f"{sparsity:.0%}" for sparsity in those) for those in each_and_all]
    means = Table(["scored on", "against", *columns])
    for way in WAYS:
        for other in ("general only", "task only"):
            if way in FUSED or (way, other) == ("task only", "general only"):
                means.add(way, other, *(gain(way, other, those) for those in each_and_all))
    return f"{every}\n\n{described(used)}\n\nPoints of accuracy more, mean over tasks and criteria:\n\n{means}"


def gain(way: str, other: str, sparsities: Sequence[float]) -> str:
    """By how many points the accuracy of one way lies above another's, with its 95% interval.

    The mean over tasks, criteria and sparsities; the interval resamples the questions of each task.
    """
    differences = []
    for task in TASKS:
        over = []
        for sparsity, criterion in itertools.product(sparsities, CRITERIA):
            one, two = (
                stored(Cell(criterion, each, None if WAYS[each][0] else task, sparsity)).right[task]
                for each in (way, other)
            )
            over.append(np.subtract(one, two))
        differences.append(np.mean(over, axis=0))
    random = np.random.default_rng(0)
    draws = [each[random.integers(0, len(each), (RESAMPLES, len(each)))].mean(1) for each in differences]
    outside = tail([len(each) for each in differences], [each.var() for each in draws])
    low, high = np.quantile(np.mean(draws, axis=0), (outside, 1 - outside))
    value = np.mean([each.mean() for each in differences])
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _accuracies(right: Mapping[str, Sequence[int]]) -> list[str]:
    found = [float(np.mean(right[task])) for task in TASKS]
    return [f"{each:.3f}" for each in [*found, float(np.mean(found))]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument("--base", required=True, help="Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--sparsity", type=float, nargs="*", default=list(SPARSITIES), help="default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data.resolve(), arguments.base, Path(folder))
        for cell in cells(arguments.sparsity):
            if not cell.path.is_file():
                bench.run(cell)
                right = {task: f"{np.mean(answers):.3f}" for task, answers in stored(cell).right.items()}
                print(cell.path.stem, right, flush=True)
    print(f"\n{text()}")


if __name__ == "__main__":
    main()
