"""What experts with a smaller vocabulary keep: parameters, bits per byte, tokens per word.

    python -m bench.vocabulary --data DATA [--expert german ...] [--others 12]

DATA is a folder of JSON lines: `language/xquad_{en,de,es,zh,th,ru}_*` and `domain/pubmedqa_*`, each
with `_calibration.jsonl` and `_report.jsonl`. Rows of the vocabulary are chosen on calibration rows
and on the corpora that ship. Report rows are measured and choose nothing: all of them for the sets
that an expert must keep, the first `--others` for the sets that show the price.

What was measured is kept in `bench/results/`; `python -m bench.tables` writes it into README.md.
Bits per byte count the bytes that each model predicts. Words are stretches without white space, so
in Chinese and Thai tokens per word mean little beyond their ratio to the base's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np

import expertprune
from expertprune.arch import family_of
from expertprune.corpora.documents import Document
from expertprune.evaluation.documents import score_alone
from expertprune.evaluation.retention import bootstrap
from expertprune.files import digest_of, shipped
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.models.passes import TextRun
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared

from .cells import GEMMA, QA, SMOLLM, agrees
from .measure import text_of
from .records import RESULTS, Table, described, made, read, write

SETS = {code: f"language/xquad_{code}_report.jsonl" for code in ("de", "en", "es", "zh", "th", "ru")}
SETS["medical"] = "domain/pubmedqa_report.jsonl"
REPORT_ROWS = 45
SECTIONS = ("calibration", "relevance", "compose", "budget", "compensation", "dimensions")
# 45% of Gemma's 268,098,176 parameters are 120,644,179: 100,326,016 that are no rows, and
# 31,747 rows of 640.
GEMMA_ROWS = 31_744
MOST_DOCUMENTS = 100_000  # every calibration document there is


@dataclass(frozen=True)
class Expert:
    """An expert of the tables; `own` are the sets it must keep, `others` show the price."""

    model: str
    dimensions: dict[str, Any]
    budget: dict[str, Any]
    own: tuple[str, ...]
    others: tuple[str, ...] = ()


FOREIGN = ("es", "zh", "th", "ru")
GERMAN = {"language": "de"}
EXPERTS = {
    "german": Expert(GEMMA, GERMAN, {"vocabulary": {"keep": GEMMA_ROWS}}, ("de",), ("en", *FOREIGN)),
    "german-wide": Expert(GEMMA, GERMAN, {"vocabulary": {"keep": 65_536}}, ("de",)),
    "german-english": Expert(
        GEMMA, {"language": ["de", "en"]}, {"vocabulary": {"keep": GEMMA_ROWS}}, ("de", "en"), FOREIGN
    ),
    "german-ffn": Expert(GEMMA, GERMAN, {"vocabulary": {"keep": GEMMA_ROWS}, "ffn": 0.15}, ("de",), ("en", *FOREIGN)),
    "english-medical": Expert(
        SMOLLM,
        {"language": "en", "domain": "medical"},
        {"vocabulary": {"keep": 16_384}},
        ("medical", "en"),
        ("de", "es"),
    ),
}


class Bench:
    """Measures experts over one folder of data, each once."""

    def __init__(self, data: Path, others: int, results: Path = RESULTS) -> None:
        self.data, self.others, self.results = data, others, results

    def spec(self, name: str) -> Spec:
        expert = EXPERTS[name]
        sources: dict[str, Any] = {
            code: {
                "path": [
                    str(shipped("corpora") / f"language/{code}.calibration.jsonl"),
                    str(self.data / f"language/xquad_{code}_calibration.jsonl"),
                ],
                # Named, so that no calibration row is set aside.
                "evaluation": str(self.data / SETS[code]),
            }
            for code in ("de", "en")
        }
        medical = str(self.data / "domain/pubmedqa_calibration.jsonl")
        report = str(self.data / SETS["medical"])
        sources["medical"] = {"path": medical, "template": "{text}\n" + QA, "evaluation": report}
        data = {
            "name": name,
            "base": expert.model,
            "dimensions": expert.dimensions,
            "general": [],
            "corpora": {"sources": sources},
            "calibration": {"documents": MOST_DOCUMENTS if expert.model == GEMMA else 200, "max_tokens": 512},
            "budget": expert.budget,
            "evaluate": {"enabled": False},
        }
        return parse_spec(data, "bench", self.data)

    def documents(self, name: str, count: int) -> list[Document]:
        """The first report rows of a set."""
        with jsonlines.open(self.data / SETS[name]) as rows:
            return [Document(text_of(row)) for row in rows][:count]

    def run(self, name: str) -> None:
        """Measure base and expert on every set on which they were not measured before."""
        expert, prepared = EXPERTS[name], expertprune.validate(self.spec(name))
        settings = prepared.spec.document()  # with what the spec leaves open decided
        about = {
            "base": prepared.base.digest,
            "dtype": str(prepared.base.dtype),
            "corpora": {str(corpus): found.digest for corpus, found in prepared.corpora.items()},
            "spec": json.loads(json.dumps({key: settings[key] for key in SECTIONS})),
        }
        path = _path(name, self.results)
        known = read(path) if path.is_file() else {}
        measured = known["sets"] if known and agrees(known["about"], about) else {}
        sizes = {**dict.fromkeys(expert.own, REPORT_ROWS), **dict.fromkeys(expert.others, self.others)}
        sets = {each: self.documents(each, count) for each, count in sizes.items()}
        missing = {
            each: found for each, found in sets.items() if measured.get(each, {}).get("digest") != _digest(found)
        }
        if missing:
            self._measure(prepared, missing, {"about": about, "made": made()}, measured, path)

    def _measure(
        self,
        prepared: Prepared,
        sets: dict[str, list[Document]],
        head: dict[str, Any],
        measured: dict[str, Any],
        path: Path,
    ) -> None:
        plan = plan_of(prepared, silent)
        assert plan.vocabulary is not None
        assert plan.vocabulary.why is not None
        why = plan.vocabulary.why.document()
        head |= {"parameters": plan.parameters.document(), "rows": plan.vocabulary.rows.rows, "why": why}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "expert"
            folder.mkdir()
            write_folder(prepared, plan, folder)
            models = {
                "base": (prepared.running.model, prepared.base.tokenizer),
                "expert": (load_model(folder, prepared.base.dtype), load_tokenizer(folder)),
            }
            for name, documents in sets.items():
                words = sum(len(document.text.split()) for document in documents)
                figures = {role: _figures(*pair, documents) for role, pair in models.items()}
                measured[name] = {"digest": _digest(documents), "words": words, **figures}
                write(path, {**head, "sets": measured})


def _path(name: str, results: Path = RESULTS) -> Path:
    return results / f"vocabulary-{name}.json"


def _digest(documents: list[Document]) -> str:
    return digest_of([document.text for document in documents])[:16]


def _figures(model: Any, tokenizer: Any, documents: list[Document]) -> dict[str, list[float]]:
    """Bits, tokens and predicted bytes of each document."""
    run = TextRun(model, family_of(model.config.model_type), (), ())
    bits, _, size = score_alone(run, tokenizer, documents)
    plain = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    return {"bits": bits.tolist(), "tokens": [len(ids) for ids in plain], "bytes": size.tolist()}


def text_of_expert(name: str, results: Path = RESULTS) -> str:
    """An expert's size, its table and how it was made, from what is stored.

    Change is the expert's bits per byte over the base's, with its 95% interval over documents
    (paired bootstrap).
    """
    known, expert = read(_path(name, results)), EXPERTS[name]
    before, after = known["parameters"]["before"], known["parameters"]["after"]
    table = Table(
        [
            "set",
            "documents",
            "bits per byte: base",
            "expert",
            "change (95%)",
            "tokens per word: base",
            "expert",
            "change",
        ]
    )
    for each in (*expert.own, *expert.others):
        found = known["sets"][each]
        base, own = ({key: np.array(values) for key, values in found[role].items()} for role in ("base", "expert"))

        def ratio(i: Any, base: Any = base, own: Any = own) -> Any:
            new, old = (model["bits"][i].sum(1) / model["bytes"][i].sum(1) for model in (own, base))
            return new / old

        low, high = bootstrap(ratio, len(base["bits"]))
        bits, new_bits = (float(model["bits"].sum() / model["bytes"].sum()) for model in (base, own))
        tokens, new_tokens = (float(model["tokens"].sum() / found["words"]) for model in (base, own))
        change = f"{new_bits / bits - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})"
        cells = [each, str(len(base["bits"])), f"{bits:.4f}", f"{new_bits:.4f}", change]
        table.add(*cells, f"{tokens:.3f}", f"{new_tokens:.3f}", f"{new_tokens / tokens - 1:+.2%}")
    head = f"**{name}: {after:,} of {before:,} parameters ({after / before:.2%}), {known['rows']:,} rows**"
    return f"{head}\n\n{table}\n\n{described([known['made']])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, see above")
    parser.add_argument("--expert", nargs="*", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--others", type=int, default=12, help="report rows of the sets that show the price")
    arguments = parser.parse_args()
    bench = Bench(arguments.data.resolve(), arguments.others)
    for name in arguments.expert:
        bench.run(name)
        print(f"\n{text_of_expert(name)}", flush=True)


if __name__ == "__main__":
    main()
