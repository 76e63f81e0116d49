"""Perplexity of base and experts on real text: criteria with and without repair, in one run.

    python bench/quality.py --quick --data DATA

DATA is a folder with `domain/pubmedqa_{calibration,report}.jsonl` and `general/wikitext2_{calibration,report}.jsonl`
(JSON lines; PubMedQA: text, question, long_answer; WikiText-2: text). Calibration rows are profiled, report rows are
measured and choose nothing. Finished cells are kept in `bench/results/` and not computed again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jsonlines
import torch

import expertprune
from expertprune import api
from expertprune.files import digest_of, write_json
from expertprune.models import load_model, load_tokenizer
from expertprune.spec import Spec, parse_spec

HERE = Path(__file__).parent
BLOCK = 512
TEMPLATE = "{text}\nQuestion: {question}\nAnswer: {long_answer}"
QUICK = [("random", "none"), ("magnitude", "none"), ("activation", "none"), ("impact", "none")]
QUICK += [(criterion, "least_squares") for criterion, _ in QUICK]
SETS = {"PubMedQA": "domain/pubmedqa_report.jsonl", "WikiText-2": "general/wikitext2_report.jsonl"}


def make_spec(data: Path, criterion: str, repair: str, fraction: float, documents: int) -> Spec:
    sources = {
        "medical": {"path": str(data / "domain/pubmedqa_calibration.jsonl"), "template": TEMPLATE},
        "encyclopedia": {"path": str(data / "general/wikitext2_calibration.jsonl")},
    }
    return parse_spec(
        {
            "name": "bench-quality",
            "base": "smollm2-135m-instruct",
            "dimensions": {"domain": "medical"},
            "general": ["encyclopedia"],
            "corpora": {"sources": sources},
            "calibration": {"documents": documents, "max_tokens": BLOCK},
            "relevance": {"criterion": criterion},
            "budget": {"ffn": fraction},
            "compensation": repair,
            "evaluate": {"enabled": False},
        },
        "bench",
        HERE,
    )


def blocks(path: Path, tokenizer: Any, count: int) -> torch.Tensor:
    """`count` blocks of 512 tokens, spread evenly over the file's text in its order, `[count, 512]`."""
    ids: list[int] = []
    with jsonlines.open(path) as rows:
        for row in rows:
            text = TEMPLATE.format(**row) if "long_answer" in row else row["text"]
            ids += tokenizer(text + "\n\n")["input_ids"]
    every = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    return every[torch.linspace(0, len(every) - 1, min(count, len(every))).long()]


@torch.inference_mode()
def losses(model: Any, data: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood (nats) of each block."""
    result = []
    for block in data:
        logits = model(input_ids=block[None].to(model.device), use_cache=False).logits[0, :-1].float()
        result.append(float(torch.nn.functional.cross_entropy(logits, block[1:].to(model.device))))
    return result


def interval(base: list[float], expert: list[float]) -> tuple[float, float]:
    """95% bootstrap interval over blocks of the excess log-perplexity."""
    excess = torch.tensor(expert) - torch.tensor(base)
    generator = torch.Generator().manual_seed(0)
    means = excess[torch.randint(len(excess), (2000, len(excess)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def cell(criterion: str | None, spec: Spec, data: dict[str, torch.Tensor], key: dict[str, Any]) -> dict[str, Any]:
    """The losses of the spec's expert, or of its base where no criterion is given; kept by the digest of `key`."""
    path = HERE / "results" / f"{digest_of(key)[:16]}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    with tempfile.TemporaryDirectory() as temporary:
        if criterion is None:
            model = api.validate(spec).model
        else:
            folder = api.prune(api.compose(spec), Path(temporary) / "expert")
            model = load_model(folder, api.validate(spec).base.dtype)
        found = {name: losses(model, part) for name, part in data.items()}
    result = {"key": key, "losses": found}
    write_json(path, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", required=True, help="The table of bench/README.md.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--documents", type=int, default=48, help="Calibration documents of each corpus.")
    parser.add_argument("--blocks", type=int, default=48, help="Measured blocks of 512 tokens of each set.")
    arguments = parser.parse_args()
    first = make_spec(arguments.data.resolve(), "impact", "none", arguments.fraction, arguments.documents)
    prepared = api.validate(first)
    tokenizer = load_tokenizer(prepared.base.folder)
    data = {name: blocks(arguments.data / path, tokenizer, arguments.blocks) for name, path in SETS.items()}
    about = {
        "base": prepared.base.digest,
        "dtype": str(prepared.base.dtype),
        "blocks": {name: digest_of(part.tolist()) for name, part in data.items()},
        "corpora": {str(name): corpus.digest for name, corpus in prepared.corpora.items()},
    }
    base = cell(None, first, data, {**about, "method": "base"})
    lines = ["| chosen by | repair | " + " | ".join(f"{name} | excess ln (95%)" for name in data) + " |"]
    lines.append("|---|---|" + "---|---|" * len(data))
    row = " | ".join(f"{math.exp(sum(v) / len(v)):.2f} | " for v in base["losses"].values())
    lines.append(f"| base | | {row} |")
    for criterion, repair in QUICK:
        spec = make_spec(arguments.data.resolve(), criterion, repair, arguments.fraction, arguments.documents)
        sections = ("calibration", "relevance", "compose", "budget", "compensation")
        settings = {section: spec.document()[section] for section in sections}
        key = {**about, "method": settings, "version": expertprune.__version__}
        result = cell(criterion, spec, data, key)
        columns = []
        for name in data:
            mine, theirs = base["losses"][name], result["losses"][name]
            low, high = interval(mine, theirs)
            excess = sum(theirs) / len(theirs) - sum(mine) / len(mine)
            columns.append(f"{math.exp(sum(theirs) / len(theirs)):.2f} | {excess:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {criterion} | {repair.replace('_', ' ')} | {' | '.join(columns)} |")
        print(lines[-1], flush=True)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("expertprune", "torch", "transformers")
    )
    print("\n".join(lines))
    print(f"\n{versions}, {about['dtype']}, {datetime.date.today().isoformat()}")


if __name__ == "__main__":
    main()
