"""The arms of the table of instruct models."""

from __future__ import annotations

from pathlib import Path

import jsonlines
import pytest

from bench.asking import passes, runs
from bench.instruct import ARMS, Bench, Enough
from expertprune.corpora.loading import load_corpora

PROMPTS = {"medquad": Enough(3, 60), "oasst1": Enough(2, 50)}


def test_arms_differ_in_one_thing_and_read_no_held_out_row(tmp_path: Path) -> None:
    """Of six conversations of each corpus, told apart by their numbers."""
    for name in ("domain/medquad", "chat/oasst1"):
        path = tmp_path / f"{name}_calibration.jsonl"
        path.parent.mkdir()
        said = [("user", "question"), ("assistant", "answer")]
        rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in said]} for i in range(6)]
        with jsonlines.open(path, "w") as file:
            file.write_all(rows)
    bench = Bench(tmp_path, tokens=100, documents=2, work=tmp_path)
    plain = bench.spec(ARMS["conversations, prompts 1"], PROMPTS)
    for name, arm in ARMS.items():
        spec = bench.spec(arm, PROMPTS)
        for source in spec.corpora.sources.values():
            assert source.documents == ("raw" if name == "text" else "chat")
            assert (source.generate is not None) == name.startswith("generated")
        others = spec.document() | {"corpora": None, "calibration": None}
        assert others == plain.document() | {"corpora": None, "calibration": None}
    weights = [bench.spec(arm, PROMPTS).calibration.prompt_weight for name, arm in ARMS.items() if "prompts" in name]
    assert weights == [0, 0.1, 0.3, 1]
    medquad, oasst = load_corpora(plain).values()
    assert {document.text.split()[1] for document in medquad.calibration} == {"0", "1", "2"}
    assert {document.text.split()[1] for document in oasst.calibration} == {"0", "1"}
    assert {document.text.split()[1] for document in medquad.evaluation} == {"4", "5"}
    # The base answers more prompts, for as many tokens of answers.
    spec = bench.spec(ARMS["generated, temperature 0"], PROMPTS)
    wanted = {name: source.generate.tokens for name, source in spec.corpora.sources.items() if source.generate}
    assert wanted == {"medquad": 60, "oasst1": 50}
    assert all(len(corpus.calibration) == 4 for corpus in load_corpora(spec).values())  # 6 less 2 held out


PROGRAM = {"test_list": ["assert twice(2) == 4", "assert twice(0) == 0"], "test_setup_code": ""}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Sure:\n```python\ndef twice(x):\n    return 2 * x\n```\nIt doubles.", True),
        ("def twice(x): return x + x", True),
        ("```\ndef twice(x):\n    return 2 * x", True),  # the block never ends
        ("```py\ndef twice(x):\n    return 2 * x\n```\n```py\ndef twice(x):\n    return x\n```", True),  # the first
        ("```python\ndef twice(x):\n    return 2 + x\n```", False),
        ("```python\nimport os\nos._exit(1)\n```", False),
    ],
)
def test_an_answer_passes_if_its_code_passes_every_test(answer: str, right: bool) -> None:
    assert passes(answer, PROGRAM) is right


@pytest.mark.slow
def test_programs_have_limits() -> None:
    assert runs("pass", 1)
    for program in ("while True: pass", "import time\ntime.sleep(60)", "found = bytearray(2 << 30)", "input()",
                    "open('large', 'wb').write(bytes(2 << 20))", "import os\nassert os.environ.get('HOME')"):  # fmt: skip
        assert not runs(program, 1), program
