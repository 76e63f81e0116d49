"""What calibrates an instruct model: conversations as plain text, as conversations, or its own answers.

    python -m bench.instruct --data DATA [--arm text ...] [--tokens 8000] [--documents 12]

Cuts 25% of SmolLM2's FFN neurons once for each arm, calibrated on MedQuAD and on OpenAssistant's
conversations, about `--tokens` of each. DATA is a folder of JSON lines: `domain/medquad_*`,
`chat/oasst1_*` and `task/mbpp_*`, each with `_calibration.jsonl` and `_report.jsonl`. The arms
differ in one thing each: how the conversations are read, how much their prompts weigh
(`calibration.prompt_weight`), or at which temperature the base answers them (`generate`).

Every arm is measured on answers: the bits per byte that it keeps, and how often its likeliest token
is the base's. Defaults are chosen on held-out rows, the last of the calibration files. Report rows,
and MBPP, which calibrates nothing, choose nothing. What was measured is kept in `bench/results/`.
"""

from __future__ import annotations

import argparse
import itertools
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
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_tokenizer
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.evaluate import measure_folder, measuring
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared

from .cells import SMOLLM
from .records import RESULTS, Table, described, made, read, write

CHAT = {"medquad": "domain/medquad", "oasst1": "chat/oasst1"}  # what calibrates
HELD_OUT = ("medquad, held out", "oasst1, held out")
SETS = (*HELD_OUT, "medquad", "oasst1", "mbpp")
MESSAGES, PAIRS = {"messages": "messages"}, {"prompt": "text", "completion": "code"}
MAX_TOKENS = 384


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


class Bench:
    """Measures arms over one folder of data.

    Args:
        tokens: of calibration text, of each of the two corpora.
        documents: of each set that is measured.
        work: a folder for files of rows.
    """

    def __init__(self, data: Path, tokens: int, documents: int, work: Path) -> None:
        self.data, self.tokens, self.documents, self.work = data, tokens, documents, work
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

    def spec(self, arm: Arm, prompts: Mapping[str, int]) -> Spec:
        """The spec of an arm; `prompts` are the numbers of rows that calibrate."""
        sources = {}
        for name, path in CHAT.items():
            source: dict[str, Any] = {**MESSAGES, **arm.source}
            if "generate" in source:
                source["generate"] = {"tokens": self.tokens, **source["generate"]}
            rows = self.rows(f"{path}_calibration")
            source["path"] = self.kept(name, rows[: prompts[name]])
            source["evaluation"] = self.kept(f"{name}-held-out", rows[-self.documents :])
            sources[name] = source
        data = {
            "name": "bench-instruct",
            "base": SMOLLM,
            "dimensions": {"domain": "medquad"},
            "general": ["oasst1"],
            "corpora": {"sources": sources},
            "calibration": {"documents": 10_000, "max_tokens": MAX_TOKENS},
            "budget": {"ffn": 0.25},
            "evaluate": {"enabled": False},
        }
        return parse_spec(data, "bench", self.work, dict(arm.overrides))

    def prompts(self) -> dict[str, int]:
        """How many conversations of each corpus have the tokens that are wanted, by the base's own template."""
        spec = self.spec(Arm(), {name: len(self.rows(f"{path}_calibration")) for name, path in CHAT.items()})
        base = resolve_base(spec.base, store_folder())
        base.checkpoint.fetch()
        tokenizer = load_tokenizer(base.folder)
        return {
            name.value: _enough(corpus.calibration, tokenizer, self.tokens)
            for name, corpus in load_corpora(spec).items()
        }

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

    def run(self, name: str, prompts: Mapping[str, int]) -> None:
        """Cut, repair and measure one arm, and keep its figures."""
        prepared = expertprune.validate(self.spec(ARMS[name], prompts))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "expert"
            folder.mkdir()
            write_folder(prepared, plan_of(prepared, silent), folder)
            measured = measure_folder(self.judge(prepared), folder, prepared.running, silent)
        sets = {
            str(corpus).partition("/")[2]: {
                key: numbers.model_dump(mode="json") for key, numbers in found.metrics.items()
            }
            for corpus, found in measured.corpora.items()
        }
        tokens = sum(batch.tokens for batch in prepared.repair_batches())
        about = {"arm": name, "tokens": tokens, "documents": self.documents, "made": made()}
        write(path_of(name), {**about, "sets": sets})


def _enough(documents: Sequence[Document], tokenizer: Any, tokens: int) -> int:
    """The first documents that hold so many tokens, each as far as it is read."""
    sizes = (min(MAX_TOKENS, len(tokenizer(rendered(each, tokenizer).text)["input_ids"])) for each in documents)
    return next(number for number, total in enumerate(itertools.accumulate(sizes), 1) if total >= tokens)


def path_of(arm: str) -> Path:
    return RESULTS / f"instruct-{arm.replace(', ', '-').replace(' ', '-')}.json"


def text() -> str:
    """The table of all arms that were measured, from what is stored.

    A cell is the retention of bits per byte of answers, and the agreement with the base.
    """
    found = [read(path_of(arm)) for arm in ARMS if path_of(arm).is_file()]
    table = Table(["calibrated on", "tokens", *SETS])
    for each in found:
        cells = []
        for name in SETS:
            bits, same = (Measured.model_validate(each["sets"][name][key]) for key in ("bits_per_byte", "agreement"))
            cells.append(f"{bits.retention:.4f}, {same.expert:.4f}")
        table.add(each["arm"], f"{each['tokens']:,}", *cells)
    return f"{table}\n\n{described(each['made'] for each in found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument("--arm", nargs="*", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--tokens", type=int, default=8000, help="calibration tokens of each corpus; default: 8000")
    parser.add_argument("--documents", type=int, default=12, help="documents of each set; default: 12")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data.resolve(), arguments.tokens, arguments.documents, Path(folder))
        prompts = bench.prompts()
        for arm in arguments.arm:
            bench.run(arm, prompts)
            print(f"\n{text()}", flush=True)


if __name__ == "__main__":
    main()
