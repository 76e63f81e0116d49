"""Experts of three dimensions, cut from an instruct model of 1.5 billion parameters: what they keep.

    python -m bench.experts --data DATA --out DIR [--expert medical ...] [--removed 0.25 ...] [--ask]

Cuts Qwen2.5-Coder-1.5B-Instruct for a language, a domain and a task, by a part of *all* parameters:
vocabulary rows, FFN neurons and KV groups together. It is the question of Cus-Prun
(arXiv:2506.02561). DATA is a folder of JSON lines, split into calibration and report rows; `CORPORA`
and `QUESTIONS` name the files, and `EXPERTS` says how much text calibrates. The experts are built
into DIR, unless they are there.

Base and experts are asked the same multiple-choice questions, once and without examples; the answer
is the likeliest of four letters. With `--ask`, the experts for software write programs instead
(MBPP, see `bench.asking`); "programs" has MBPP's tasks as conversations among its calibration text.
Report rows are measured and choose nothing. What was measured is kept in `bench/results/`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np
import torch

import expertprune
from expertprune.artifacts.evaluation import Average, CorpusGroup, Measured
from expertprune.artifacts.expert import Expert
from expertprune.evaluation.retention import Counted, Paired, summarize
from expertprune.files import store_folder
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.models.sources import trim
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec

from . import instruct
from .asking import ask, programming
from .cells import SHIPPED
from .cells import Bench as Cells
from .measure import likeliest
from .records import RESULTS, Table, described, made, paragraph, read, write

BASE = instruct.QWEN
TOKENS, MORE = 2000, 4000  # of calibration text, of each corpus; a token has about four characters
DOCUMENTS, MAX_TOKENS = 4, 512  # of each corpus that is measured in bits
ROWS = {0.25: 65_536, 0.4: 49_152}  # rows of the vocabulary that stay, by the part of all parameters that goes
PROGRAMS = 40
LETTERS = "ABCD"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A multiple-choice question of four choices, and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    word: str = "Answer"

    def __str__(self) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question}\n{choices}\n{self.word}:"

    @property
    def answered(self) -> str:
        return f"{self} {LETTERS[self.answer]}"


def four(row: Row) -> Asked | None:
    """A row of the English sets; `None` where it has not four choices."""
    question = row.get("question") or f"What comes next?\n{row['context']}"
    return Asked(question, tuple(row["choices"]), row["answer"]) if len(row["choices"]) == len(LETTERS) else None


def spanish(row: Row) -> Asked | None:
    """A paragraph of XQuAD and its first question; wrong choices are answers to the paragraph's other questions."""
    first, *others = row["questions"]
    wrong = list(dict.fromkeys(each["answer"] for each in others if each["answer"] != first["answer"]))[:3]
    if len(wrong) < 3:
        return None
    choices = random.Random(first["question"]).sample([first["answer"], *wrong], 4)
    text = f"{row['text']}\nPregunta: {first['question']}"
    return Asked(text, tuple(choices), choices.index(first["answer"]), "Respuesta")


Content = str | list[dict[str, str]]  # a text or a conversation
TextOf = Callable[[Row], Content | None]


def _text(template: str) -> TextOf:
    return lambda row: template.format(**row)


def _program(row: Row) -> list[dict[str, str]]:
    """A task of MBPP and its program, as a model is asked for it."""
    answer = f"```python\n{row['code'].strip()}\n```"
    return [{"role": "user", "content": programming(row)}, {"role": "assistant", "content": answer}]


_WHOLE = _text("{text}")


def _question(form: Callable[[Row], Asked | None]) -> TextOf:
    def text(row: Row) -> str | None:
        asked = form(row)
        return asked.answered if asked else None

    return text


@dataclass(frozen=True)
class Text:
    """A corpus: its files for calibration and measuring, and what a row says; `None` leaves it out."""

    calibration: str
    report: str
    text: TextOf = _WHOLE


def _both(name: str, text: TextOf = _WHOLE) -> Text:
    return Text(f"{name}_calibration.jsonl", f"{name}_report.jsonl", text)


def _shipped(name: str) -> Text:
    return Text(f"{SHIPPED}/{name}.calibration.jsonl", f"{SHIPPED}/{name}.evaluation.jsonl")


CORPORA = {
    "en": _both("language/xquad_en"),
    "es": _both("language/ntrex", _text("{es}")),
    "medical": _both("domain/pubmedqa", _text("{text}\nQuestion: {question}\nAnswer: {long_answer}")),
    "software": _shipped("domain/software"),
    "encyclopedia-es": _both("language/xquad_es"),
    "choice": Text("general/mmlu_fewshot.jsonl", "general/mmlu_report.jsonl", _question(four)),
    "completion": _both("task/mbpp", _text("{text}\n{code}")),
    "programs": _both("task/mbpp", _program),
    "reading-es": _both("language/xquad_es", _question(spanish)),
    "encyclopedia": _both("general/wikitext2"),
    "general": _shipped("general/general"),
}
GENERAL = ("encyclopedia", "general")


@dataclass(frozen=True)
class Wanted:
    """An expert: its dimensions, the tokens of each corpus, and what the base runs in while it is built."""

    dimensions: Mapping[str, str]
    tokens: int = TOKENS
    dtype: str = "float32"


EXPERTS = {
    "medical": Wanted({"language": "en", "domain": "medical", "task": "choice"}),
    "software": Wanted({"language": "en", "domain": "software", "task": "completion"}),
    "programs": Wanted({"language": "en", "domain": "software", "task": "programs"}, MORE, "bfloat16"),
    "spanish": Wanted({"language": "es", "domain": "encyclopedia-es", "task": "reading-es"}, MORE, "bfloat16"),
}
PROGRAMMERS = ("software", "programs")


@dataclass(frozen=True)
class Questions:
    """A set of questions: its file, how many are asked, and what experts it is of; none: it is general."""

    file: str
    number: int
    experts: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    form: Callable[[Row], Asked | None] = four

    def has(self, row: Row) -> bool:
        return not self.subjects or row["subject"] in self.subjects


_MEDICAL = ("anatomy", "clinical_knowledge", "college_medicine", "professional_medicine")
_COMPUTING = ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning")
QUESTIONS = {
    "MedQA": Questions("domain/medqa_report", 40, ("medical",)),
    "MedMCQA": Questions("domain/medmcqa_report", 80, ("medical",)),
    "MMLU, medicine": Questions("general/mmlu_report", 60, ("medical",), _MEDICAL),
    "MMLU, computing": Questions("general/mmlu_report", 60, PROGRAMMERS, _COMPUTING),
    "XQuAD in Spanish": Questions("language/xquad_es_report", 30, ("spanish",), form=spanish),
    "MMLU, other": Questions("general/mmlu_report", 60, subjects=("marketing", "world_religions")),
    "ARC, easy": Questions("general/arc_easy_report", 60),
    "OpenBookQA": Questions("general/openbookqa_report", 60),
    "HellaSwag": Questions("general/hellaswag_report", 24),
}


def asked_of(expert: str) -> dict[str, Questions]:
    """The sets that an expert is asked: its own, and the general ones. The base is asked all."""
    return {
        name: each for name, each in QUESTIONS.items() if expert == "base" or not each.experts or expert in each.experts
    }


@dataclass(frozen=True)
class Bench:
    """Builds and measures experts over one folder of data."""

    data: Path
    out: Path
    work: Path

    def rows(self, file: str) -> list[Row]:
        """The rows of a file in an order of chance, always the same."""
        with jsonlines.open(self.data / file) as found:
            rows = list(found)
        random.Random(0).shuffle(rows)
        return rows

    def corpus(self, name: str, tokens: int) -> dict[str, str]:
        """A corpus as a source of the spec: about so many tokens to calibrate, `DOCUMENTS` documents to measure."""
        about = CORPORA[name]
        calibration = self.texts(name, about.calibration)
        total = np.cumsum([min(_characters(text), 4 * MAX_TOKENS) for text in calibration])
        enough = int(np.searchsorted(total, 4 * tokens)) + 1
        return {
            **({} if isinstance(calibration[0], str) else instruct.MESSAGES),
            "path": self.kept(f"{name}-calibration", calibration[:enough]),
            "evaluation": self.kept(f"{name}-report", self.texts(name, about.report)[:DOCUMENTS]),
        }

    def texts(self, name: str, file: str) -> list[Content]:
        about = CORPORA[name]
        if file == CORPORA["encyclopedia"].calibration:  # whole articles: pieces have more of them
            rows: list[Row] = self.rows(str(Cells(self.data).pieces("encyclopedia")))
        else:
            rows = self.rows(file)
        if name in ("encyclopedia-es", "reading-es") and file == about.calibration:  # a half of the paragraphs each
            rows = rows[name == "reading-es" :: 2]
        return [text for row in rows if (text := about.text(row)) is not None]

    def kept(self, name: str, texts: Sequence[Content]) -> str:
        path = self.work / f"{name}.jsonl"
        with jsonlines.open(path, "w") as file:
            file.write_all({"text" if isinstance(text, str) else "messages": text} for text in texts)
        return str(path)

    def spec(self, expert: str, removed: float) -> Spec:
        wanted = EXPERTS[expert]
        names = (*wanted.dimensions.values(), *GENERAL)
        data = {
            "name": f"{expert}-{removed:g}",
            "base": {"model": BASE, "dtype": wanted.dtype},
            "dimensions": dict(wanted.dimensions),
            "general": list(GENERAL),
            "corpora": {"sources": {name: self.corpus(name, wanted.tokens) for name in names}},
            "calibration": {"documents": 10_000, "max_tokens": MAX_TOKENS},
            "budget": {"parameters": removed, "vocabulary": {"keep": ROWS[removed]}},
            "evaluate": {"documents": DOCUMENTS, "max_tokens": MAX_TOKENS, "metrics": ["bits_per_byte"]},
        }
        return parse_spec(data, "bench", self.data)

    def folder(self, expert: str, removed: float) -> Path:
        return self.out / f"{expert}-{removed:g}"

    def run(self, expert: str, removed: float) -> None:
        """Build an expert unless it is there, ask it, and keep its figures."""
        folder, spec = self.folder(expert, removed), self.spec(expert, removed)
        tokens = sum(batch.tokens for batch in expertprune.validate(spec).repair_batches())
        if not folder.is_dir():
            expertprune.build(spec, folder)
        built = Expert.load(folder)
        assert built.evaluation is not None
        bits = {
            str(name): {"group": found.group, **found.metrics["bits_per_byte"].model_dump(mode="json")}
            for name, found in built.evaluation.corpora.items()
        }
        parameters = built.plan.parameters
        figures = {"parameters": [parameters.before, parameters.after], "tokens": tokens, "bits": bits, "programs": []}
        write(path_of(expert, removed), {**figures, "right": self.answers(expert, folder), "made": made()})

    def base(self) -> None:
        """Ask the base every set."""
        base = resolve_base(self.spec("medical", 0.25).base, store_folder())
        base.checkpoint.fetch()
        write(path_of("base"), {"right": self.answers("base", base.folder), "made": made()})

    def answers(self, expert: str, folder: Path) -> dict[str, list[int]]:
        """1 for each right answer, by set."""
        trim()
        model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
        letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
        right = {}
        for name, about in asked_of(expert).items():
            every = [one for row in self.rows(f"{about.file}.jsonl") if about.has(row) and (one := about.form(row))]
            asked = every[: about.number]
            picks = likeliest(model, [tokenizer(str(each))["input_ids"] for each in asked], letters)
            right[name] = [int(pick == each.answer) for pick, each in zip(picks, asked, strict=True)]
            print(f"{folder.name}: {name}: {np.mean(right[name]):.3f}", flush=True)
        return right

    def programs(self, expert: str, removed: float) -> None:
        """Ask an expert that was measured for programs."""
        folder = self.folder(expert, removed)
        right = ask(folder, load_tokenizer(folder), self.data, self.work / "vllm.log", PROGRAMS)
        path = path_of(expert, removed)
        write(path, {**read(path), "programs": right})


def _characters(content: Content) -> int:
    return len(content) if isinstance(content, str) else sum(len(each["content"]) for each in content)


def path_of(expert: str, removed: float = 0) -> Path:
    return RESULTS / f"experts-{expert}{f'-{removed:g}' if removed else ''}.json"


def counted(expert: str, found: Mapping[str, Any]) -> Iterator[Counted]:
    """Every set of questions, and programs, under base and expert."""
    base = read(path_of("base"))["right"]
    for name, about in asked_of(expert).items():
        group: CorpusGroup = "expert" if about.experts else "general"
        yield _counted(name, group, base[name], found["right"][name], 1 / len(LETTERS))
    if found["programs"]:
        before = read(instruct.path_of(BASE, instruct.BASE))["right"][:PROGRAMS]
        yield _counted("MBPP, programs", "expert", before, found["programs"], None)


def _counted(
    name: str, group: CorpusGroup, base: Sequence[int], expert: Sequence[int], chance: float | None
) -> Counted:
    return Counted(name, group, Paired(np.array(base, float), np.array(expert, float), np.ones(len(base)), chance))


def text() -> str:
    """One table of all experts that were measured: each set and corpus, and what is kept on average."""
    table = Table(["expert", "removed", "measured on", "counts as", "base", "expert", "expert / base", "kept (95%)"])
    used, sizes = [read(path_of("base"))["made"]], []
    for expert in EXPERTS:
        for removed in ROWS:
            if not path_of(expert, removed).is_file():
                continue
            found = read(path_of(expert, removed))
            used.append(found["made"])
            before, after = (each / 1e6 for each in found["parameters"])
            sizes.append(
                f"{expert}, {removed:.0%}: {after:,.0f} of {before:,.0f} million parameters, {found['tokens']:,} tokens"
            )
            for row in _rows(expert, found):
                table.add(expert, f"{removed:.0%}", *row)
    return f"{table}\n\n{paragraph('; '.join(sizes) + '.')}\n{described(used)}"


def _rows(expert: str, found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Each set of questions, each corpus, and the means of the sets."""
    every = list(counted(expert, found))
    for each in every:
        numbers = each.paired.measured()
        yield [f"{each.name} ({numbers.examples})", each.group, *_accuracies(each.paired), _kept(numbers)]
    for name, bits in found["bits"].items():
        numbers = Measured.model_validate({key: value for key, value in bits.items() if key != "group"})
        yield [
            f"{name}, bits per byte",
            bits["group"],
            f"{numbers.base:.3f}",
            f"{numbers.expert:.3f}",
            "",
            _kept(numbers),
        ]
    for group, measures in summarize(every).items():
        mine = [each.paired for each in every if each.group == group]
        yield ["**mean accuracy**", group, *_accuracies(*mine), _kept(measures["accuracy"])]


def _accuracies(*sets: Paired) -> list[str]:
    """Of base and expert, the mean over sets, and the one over the other."""
    base, expert = (float(np.mean([getattr(each, side).mean() for each in sets])) for side in ("base", "expert"))
    return [f"{base:.3f}", f"{expert:.3f}", f"{expert / base:.3f}"]


def _kept(numbers: Average | Measured) -> str:
    if numbers.retention is None:
        return ""
    ends = "" if numbers.low is None else f" ({numbers.low:.3f} to {numbers.high:.3f})"
    return f"{numbers.retention:.3f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experts")
    parser.add_argument("--expert", nargs="*", choices=["base", *EXPERTS], default=["base", *EXPERTS])
    parser.add_argument("--removed", type=float, nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--ask", action="store_true", help="only ask the experts for software for programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(arguments.data.resolve(), arguments.out.resolve(), Path(work))
        if arguments.ask:
            for expert in (each for each in PROGRAMMERS if each in arguments.expert):
                for removed in arguments.removed:
                    bench.programs(expert, removed)
        else:
            if "base" in arguments.expert and not path_of("base").is_file():
                bench.base()
            for expert in EXPERTS:
                for removed in arguments.removed if expert in arguments.expert else ():
                    if not path_of(expert, removed).is_file():
                        bench.run(expert, removed)
    print(f"\n{text()}")


if __name__ == "__main__":
    main()
