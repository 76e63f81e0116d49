"""Write the questions of the local suites that follow from the corpora: python -m bench.suite_data

A question of `NAME.continuation.jsonl` is the beginning of an evaluation document and four
sentences, one of which goes on: the other three are from other documents of the same corpus, of
about the same length. What goes on is at most the fifth sentence after the first, so that no
document dominates. Documents of `UNSUITED` kinds are left out. `medical.questions.jsonl` are the
corpora's questions on medicine.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "profiles" / "suites" / "data"
CORPORA = {
    "domain": ["finance", "legal", "medical", "software"],
    "general": ["general"],
    "language": ["de", "en", "es", "fr", "zh"],
    "task": ["math", "qa", "sentiment", "summarization"],
}
CHOICES, SENTENCES = 4, 5
UNSUITED = ("code", "table", "language")  # no sentences, or a language that gives the answer away


def sentences(text: str) -> list[str]:
    """A text's sentences with the white space before them."""
    parts = re.findall(r"\s*(?:.+?(?:[.!?…]+[\"'”»)]*(?=\s|$)|[。！？]+[”」』]?|\n|$))", text)
    return [part for part in parts if part.strip()]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def continuations(texts: list[str], seed: int = 0) -> list[dict[str, object]]:
    """Questions over documents, in their order; wrong sentences and places are random."""
    generator = random.Random(seed)
    split = [sentences(text) for text in texts]
    questions = []
    for number, parts in enumerate(split):
        others = [part for other, those in enumerate(split) if other != number for part in those[1:]]
        positions = [i for i in range(1, len(parts)) if len(parts[i].strip()) >= 12]
        for position in sorted(generator.sample(positions, min(SENTENCES, len(positions)))):
            right = parts[position]
            near = sorted(others, key=lambda part: abs(len(part) - len(right)))[: 3 * CHOICES]
            choices = generator.sample([part.strip() for part in near], CHOICES - 1)
            answer = generator.randrange(CHOICES)
            choices.insert(answer, right.strip())
            gap = right[: len(right) - len(right.lstrip())]
            context = "".join(parts[:position]).lstrip() + gap
            questions.append({"context": context, "choices": choices, "answer": answer})
    return questions


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    for dimension, values in CORPORA.items():
        for value in values:
            rows = rows_of(ROOT / "corpora" / dimension / f"{value}.evaluation.jsonl")
            texts = [row["text"] for row in rows if row.get("kind") not in UNSUITED]
            write(DATA / f"{value}.continuation.jsonl", continuations(texts))
    questions = rows_of(ROOT / "corpora" / "task" / "qa.questions.jsonl")
    medical = [
        {key: row[key] for key in ("question", "choices", "answer")} for row in questions if row["domain"] == "medical"
    ]
    write(DATA / "medical.questions.jsonl", medical)


if __name__ == "__main__":
    main()
