"""What experts with a smaller vocabulary keep: parameters, bits per byte and tokens per word, by language.

    python -m bench.vocabulary --data DATA [--expert german ...] [--others 12]

DATA is a folder of JSON lines: `language/xquad_{en,de,es,zh,th,ru}_*` and `domain/pubmedqa_*`, each with
`_calibration.jsonl` and `_report.jsonl`. Rows are chosen on calibration rows and on the corpora that ship; report rows are
measured and choose nothing. The corpora of an expert's own dimensions are measured on all report rows, the others, which
show the price, on the first `--others`.

A measured model is kept in `bench/results/` by the digest of all that it depends on, so a run that was interrupted goes on.
Bits per byte count the bytes that each model predicts; words are stretches without white space, so in Chinese and Thai
tokens per word say little beside their ratio to the base's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines
import numpy as np

import expertprune
from expertprune.corpora.documents import Document
from expertprune.evaluation.documents import score_alone
from expertprune.evaluation.retention import bootstrap
from expertprune.files import digest_of, shipped, write_json
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.progress import silent
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.compose import plan_of
from expertprune.stages.prune import write_folder
from expertprune.stages.validate import Prepared

from .cells import GEMMA, QA, RESULTS, SMOLLM, threads
from .measure import text_of

LANGUAGES = ("de", "en", "es", "zh", "th", "ru")
SETS = {code: f"language/xquad_{code}_report.jsonl" for code in LANGUAGES} | {"medical": "domain/pubmedqa_report.jsonl"}
# 45% of Gemma's 268,098,176 parameters are 120,644,179: 100,326,016 that are no rows, and 31,747 rows of 640.
GEMMA_ROWS = 31_744
MOST_DOCUMENTS = 100_000  # every calibration document there is


@dataclass(frozen=True)
class Expert:
    """An expert of the table: what it is for, what is cut, and on which sets it must keep what its base does."""

    model: str
    dimensions: dict[str, Any]
    budget: dict[str, Any]
    own: tuple[str, ...]
    others: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


EXPERTS = {
    "german": Expert(
        GEMMA, {"language": "de"}, {"vocabulary": {"keep": GEMMA_ROWS}}, ("de",), ("en", "es", "zh", "th", "ru")
    ),
    "german-wide": Expert(GEMMA, {"language": "de"}, {"vocabulary": {"keep": 65_536}}, ("de",)),
    "german-ffn": Expert(
        GEMMA,
        {"language": "de"},
        {"vocabulary": {"keep": GEMMA_ROWS}, "ffn": 0.15},
        ("de",),
        ("en", "es", "zh", "th", "ru"),
    ),
    "german-english": Expert(
        GEMMA, {"language": ["de", "en"]}, {"vocabulary": {"keep": GEMMA_ROWS}}, ("de", "en"), ("es", "zh", "th", "ru")
    ),
    "english-medical": Expert(
        SMOLLM,
        {"language": "en", "domain": "medical"},
        {"vocabulary": {"keep": 16_384}},
        ("medical", "en"),
        ("de", "es"),
    ),
}


class Bench:
    """Experts over one data folder, each measured once."""

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
                "evaluation": str(self.data / SETS[code]),  # so that no calibration row is set aside
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

    def documents(self, name: str, expert: Expert) -> list[Document]:
        """The rows of a set that are measured."""
        with jsonlines.open(self.data / SETS[name]) as rows:
            found = [Document(text_of(row)) for row in rows]
        return found[:45] if name in expert.own else found[: self.others]

    def run(self, name: str) -> dict[str, Any]:
        """Base and expert on every set, from files where they were measured before."""
        expert, spec = EXPERTS[name], self.spec(name)
        prepared = expertprune.validate(spec)
        settings = prepared.spec.document()  # with what the spec leaves open decided
        settings["relevance"] = {key: value for key, value in settings["relevance"].items() if value is not None}
        sections = ("calibration", "relevance", "compose", "budget", "compensation", "dimensions")
        about = {
            "spec": {key: settings[key] for key in sections},
            "corpora": {str(corpus): found.digest for corpus, found in prepared.corpora.items()},
            "base": prepared.base.digest,
            "dtype": str(prepared.base.dtype),
        }
        sets = {each: self.documents(each, expert) for each in (*expert.own, *expert.others)}
        path = self.results / f"vocabulary-{digest_of(about)[:16]}.json"
        known = json.loads(path.read_text()) if path.is_file() else {"about": about, "sets": {}}
        if missing := {each: found for each, found in sets.items() if _key(found) not in known["sets"].get(each, {})}:
            self._expert(prepared, missing, known, path)
        base = self._base(prepared, sets)
        return {"parameters": known["parameters"], "rows": known["rows"], "sets": _compared(sets, base, known["sets"])}

    def _expert(self, prepared: Prepared, sets: dict[str, list[Document]], known: dict[str, Any], path: Path) -> None:
        plan = plan_of(prepared, silent)
        assert plan.vocabulary is not None
        assert plan.vocabulary.why is not None
        known |= {
            "parameters": plan.parameters.document(),
            "rows": plan.vocabulary.rows.rows,
            "why": plan.vocabulary.why.document(),
        }
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "expert"
            folder.mkdir()
            write_folder(prepared, plan, folder)
            model, tokenizer = load_model(folder, prepared.base.dtype), load_tokenizer(folder)
            for name, documents in sets.items():
                known["sets"].setdefault(name, {})[_key(documents)] = _measured(model, tokenizer, documents)
                write_json(path, known)

    def _base(self, prepared: Prepared, sets: dict[str, list[Document]]) -> dict[str, Any]:
        about = {"method": "base", "base": prepared.base.digest, "dtype": str(prepared.base.dtype)}
        path = self.results / f"vocabulary-{digest_of(about)[:16]}.json"
        known = json.loads(path.read_text()) if path.is_file() else {"about": about, "sets": {}}
        for name, documents in sets.items():
            if _key(documents) not in known["sets"].setdefault(name, {}):
                known["sets"][name][_key(documents)] = _measured(prepared.model, prepared.tokenizer, documents)
                write_json(path, known)
        found: dict[str, Any] = known["sets"]
        return found


def _key(documents: list[Document]) -> str:
    return digest_of([document.text for document in documents])[:16]


def _measured(model: Any, tokenizer: Any, documents: list[Document]) -> dict[str, list[float]]:
    bits, _, size = score_alone(model, tokenizer, documents)
    plain = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    return {"bits": bits.tolist(), "tokens": [len(ids) for ids in plain], "bytes": size.tolist()}


def _compared(sets: dict[str, list[Document]], base: dict[str, Any], expert: dict[str, Any]) -> dict[str, Any]:
    """Per set: bits per byte and tokens per word of both; their ratio, with its interval over documents (bootstrap)."""
    result = {}
    for name, documents in sets.items():
        words = sum(len(document.text.split()) for document in documents)
        mine, theirs = ({k: np.array(v) for k, v in found[name][_key(documents)].items()} for found in (base, expert))

        def ratio(i: Any, mine: Any = mine, theirs: Any = theirs) -> Any:
            after, before = (each["bits"][i].sum(1) / each["bytes"][i].sum(1) for each in (theirs, mine))
            return after / before

        low, high = bootstrap(ratio, len(documents))
        figures = [
            (float(x["bits"].sum() / x["bytes"].sum()), float(x["tokens"].sum() / words)) for x in (mine, theirs)
        ]
        result[name] = {"documents": len(documents), "base": figures[0], "expert": figures[1], "low": low, "high": high}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--expert", nargs="*", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--others", type=int, default=12, help="Report rows of the sets that show the price.")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.others)
    header = [
        "set",
        "documents",
        "bits per byte: base",
        "expert",
        "change (95%)",
        "tokens per word: base",
        "expert",
        "change",
    ]
    for name in arguments.expert:
        result = bench.run(name)
        before, after = result["parameters"]["before"], result["parameters"]["after"]
        print(f"\n### {name}: {after:,} of {before:,} parameters ({after / before:.2%}), {result['rows']:,} rows\n")
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        for each, found in result["sets"].items():
            (bits, tokens), (new_bits, new_tokens) = found["base"], found["expert"]
            change = f"{new_bits / bits - 1:+.2%} ({found['low'] - 1:+.2%} to {found['high'] - 1:+.2%})"
            cells = [each, str(found["documents"]), f"{bits:.4f}", f"{new_bits:.4f}", change]
            cells += [f"{tokens:.3f}", f"{new_tokens:.3f}", f"{new_tokens / tokens - 1:+.2%}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nexpertprune {expertprune.__version__}, {threads()} threads")


if __name__ == "__main__":
    main()
