"""Cells of the quality tables: a method on a model, calibrated, cut and measured once.

A finished cell is kept in `bench/results/` under the digest of what it asks for (`Cell.asked`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np

import expertprune
from expertprune.files import digest_of, write_file
from expertprune.models.loading import load_model
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared

from .measure import Blocks, Sums, blocks, losses, piqa_answers
from .peers import METHODS
from .records import RESULTS, NotMeasuredError, made, read, write

PIECE = 1800  # characters of a calibration document: long articles are cut at line ends
QA = "Question: {question}\nAnswer: {long_answer}"
SHIPPED = Path(__file__).resolve().parent.parent / "corpora"
# Corpora by name: file, template. Calibration rows only.
CORPORA = {
    "general": (str(SHIPPED / "general/general.calibration.jsonl"), "{text}"),
    "medical": ("domain/pubmedqa_calibration.jsonl", "{text}\n" + QA),
    "abstracts": ("domain/pubmedqa_calibration.jsonl", "{text}"),
    "qa": ("domain/pubmedqa_calibration.jsonl", QA),
    "encyclopedia": ("general/wikitext2_calibration.jsonl", "{text}"),
    "math": ("task/gsm8k_calibration.jsonl", "Question: {question}\nAnswer: {answer}"),
    **{code: (f"language/xquad_{code}_calibration.jsonl", "{text}") for code in ("de", "en", "th")},
}
SETS = {
    "PubMedQA": "domain/pubmedqa_report.jsonl",
    "WikiText-2": "general/wikitext2_report.jsonl",
    "GSM8K": "task/gsm8k_report.jsonl",
    **{f"XQuAD-{code}": f"language/xquad_{code}_report.jsonl" for code in ("de", "en", "th")},
}
SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
SECTIONS = ("calibration", "relevance", "compose", "compensation", "dimensions", "general")


@dataclass(frozen=True)
class Cell:
    """What a cell asks for.

    `method` is `base`, the name of a peer, or `ours` with `overrides` of the spec's keys. `budget`
    says what goes. `dtype` is what the model runs in; `auto` leaves it to the machine.
    """

    method: str
    model: str = SMOLLM
    budget: Mapping[str, Any] = field(default_factory=lambda: {"ffn": 0.25})
    dimensions: Mapping[str, str] = field(default_factory=lambda: {"domain": "medical"})
    general: tuple[str, ...] = ("encyclopedia",)
    documents: int = 60
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ("PubMedQA", "WikiText-2", "GSM8K")
    blocks: int = 16
    piqa: int = 150
    dtype: str = "auto"

    @property
    def asked(self) -> dict[str, Any]:
        """The cell as plain data; of a base only model and measure, as nothing calibrates it."""
        every = json.loads(json.dumps(asdict(self)))
        names = ("method", "model", "sets", "blocks", "piqa", "dtype") if self.method == "base" else tuple(every)
        asked = {name: every[name] for name in names}
        if self.dtype == "auto":
            del asked["dtype"]  # results that were measured before cells had a dtype keep their digests
        return asked

    def path(self, results: Path = RESULTS) -> Path:
        return results / f"{digest_of(self.asked)[:16]}.json"


@dataclass(frozen=True)
class Result:
    """A cell's figures.

    `sums` holds the losses by document of each set, `piqa` 1 for each right answer, `removed` the
    parameters that went, `tokens` the calibration text, and `made` commit, date and versions.
    """

    sums: dict[str, Sums]
    piqa: list[float]
    removed: int
    tokens: int
    made: dict[str, Any]


def stored(cell: Cell, results: Path = RESULTS) -> Result:
    """The result of a cell that was computed before.

    Raises:
        NotMeasuredError: the cell has no result.
    """
    try:
        data = read(cell.path(results))
    except NotMeasuredError as error:
        raise NotMeasuredError(f"{error}: {json.dumps(cell.asked)}") from None
    sums = {name: Sums(np.array(each["nats"]), np.array(each["tokens"])) for name, each in data["sums"].items()}
    return Result(sums, data["piqa"], data["removed"], data["tokens"], data["made"])


class Bench:
    """Computes cells over one folder of data, each once."""

    def __init__(self, data: Path, results: Path = RESULTS) -> None:
        self.data, self.results = data, results
        self._sets: dict[tuple[str, str, int], Blocks] = {}
        self._results: dict[Path, Result] = {}

    def spec(self, cell: Cell) -> Spec:
        """The spec of a cell; peers are calibrated by its corpora too."""
        names = [*cell.dimensions.values(), *cell.general]
        sources = {name: {"path": str(self.pieces(name))} for name in names}
        overrides = {"calibration.seed": cell.seed, "base.dtype": cell.dtype, **cell.overrides}
        data = {
            "name": "bench-quality",
            "base": cell.model,
            "dimensions": dict(cell.dimensions),
            "general": list(cell.general),
            "corpora": {"sources": sources},
            "calibration": {"documents": cell.documents, "max_tokens": 512},
            "budget": dict(cell.budget),
            "evaluate": {"enabled": False},
        }
        return parse_spec(data, "bench", self.data, overrides)

    def pieces(self, name: str) -> Path:
        """A corpus as JSON lines of `text`, long documents cut into pieces to have more of them."""
        file, template = CORPORA[name]
        path = self.results / "corpora" / f"{name}.jsonl"
        if path.is_file():
            return path
        found: list[str] = []
        with jsonlines.open(self.data / file) as rows:
            for row in rows:
                text = ""
                for line in template.format(**row).splitlines(keepends=True):
                    if len(text) + len(line) > PIECE and len(text) > PIECE // 3:
                        found.append(text)
                        text = ""
                    text += line
                found.append(text)
        lines = [json.dumps({"text": text.strip()}, ensure_ascii=False) for text in found if len(text.strip()) > 200]
        write_file(path, ("\n".join(lines) + "\n").encode())
        return path

    def blocks(self, prepared: Prepared, name: str, count: int) -> Blocks:
        key = (prepared.base.tokenizer_digest, name, count)
        if key not in self._sets:
            self._sets[key] = blocks(self.data / SETS[name], prepared.base.tokenizer, count)
        return self._sets[key]

    def run(self, cell: Cell) -> Result:
        """The cell's result, computed unless a stored one has the same spec, base and text."""
        path = cell.path(self.results)
        if path in self._results:  # tables ask for a cell once for each set
            return self._results[path]
        prepared = expertprune.validate(self.spec(cell))
        about = self._about(cell, prepared)
        if not path.is_file() or not agrees(read(path)["about"], about):
            figures = self._compute(cell, prepared)
            write(path, {"cell": cell.asked, "about": about, "made": made(), **figures})
        self._results[path] = stored(cell, self.results)
        return self._results[path]

    def _about(self, cell: Cell, prepared: Prepared) -> dict[str, Any]:
        """What the figures depend on beyond `Cell.asked`: the spec's defaults, base and text."""
        about = {
            "base": prepared.base.digest,
            "dtype": str(prepared.base.dtype),
            "sets": {name: digest_of(self.blocks(prepared, name, cell.blocks).ids.tolist()) for name in cell.sets},
        }
        if cell.method == "base":
            return about
        about["corpora"] = {str(name): corpus.digest for name, corpus in prepared.corpora.items()}
        settings = prepared.spec.document()  # with what the spec leaves open decided
        about["spec"] = {name: settings[name] for name in (SECTIONS if cell.method == "ours" else ("calibration",))}
        return dict(json.loads(json.dumps(about)))

    def _compute(self, cell: Cell, prepared: Prepared) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        model, removed = built(cell, prepared, seconds)
        measured = time.perf_counter()
        sums = {name: losses(model, self.blocks(prepared, name, cell.blocks)) for name in cell.sets}
        piqa_file = self.data / "general/piqa_report.jsonl"
        answers = piqa_answers(model, prepared.base.tokenizer, piqa_file, cell.piqa).tolist() if cell.piqa else []
        seconds["measure"] = time.perf_counter() - measured
        seconds["all"] = time.perf_counter() - start
        return {
            "removed": removed,
            "tokens": sum(batch.tokens for batch in prepared.repair_batches()),
            "sums": {name: {"nats": s.nats.tolist(), "tokens": s.tokens.tolist()} for name, s in sums.items()},
            "piqa": answers,
            "seconds": seconds,
        }


def built(cell: Cell, prepared: Prepared, seconds: dict[str, float]) -> tuple[Any, int]:
    """The running model of a cell, and how many parameters it lost; `seconds` gets what its stages took."""
    if cell.method == "base":
        return prepared.running.model, 0
    if cell.method == "ours":
        return _ours(prepared, seconds)
    model = load_model(prepared.base.folder, prepared.base.dtype)
    begun = time.perf_counter()
    found = METHODS[cell.method](model, prepared.repair_batches(), float(cell.budget["ffn"]), cell.seed)
    seconds["method"] = time.perf_counter() - begun
    return found


def agrees(before: Any, now: Any) -> bool:
    """Whether two descriptions say the same wherever both say something.

    A key that only one of them has is one that the spec gained or lost between them: its default is
    what was always done.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return all(agrees(before[key], now[key]) for key in before.keys() & now.keys())
    return bool(before == now)


def _ours(prepared: Prepared, seconds: dict[str, float]) -> tuple[Any, int]:
    begun = time.perf_counter()
    plan = plan_of(prepared, silent)
    seconds["plan"] = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "expert"
        folder.mkdir()
        begun = time.perf_counter()
        write_folder(prepared, plan, folder)
        seconds["prune"] = time.perf_counter() - begun
        model = load_model(folder, prepared.base.dtype)
    return model, plan.parameters.before - plan.parameters.after
