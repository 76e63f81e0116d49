"""Tasks asked as people ask: through the chat template, in vLLM, with greedy answers.

- sst2: is a review positive or negative? The answer must begin with the right word.
- mbpp: write a Python function. The answer passes if its code passes the task's own tests (pass@1).

Programs that a model wrote run one by one in a process of their own, in Python's isolated mode and an
empty folder, with limits on time, memory and files. Where the machine allows it, they have no network,
and nothing that they start outlives them.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonlines

from expertprune.corpora.chat import ChatTemplate
from expertprune.serving.generation import Job, Sample, generate

SECONDS = 5  # of a program's processor time
MEMORY = 1 << 30  # bytes of its address space
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    """A file of rows, how many are asked, the question of one, how long answers may be, and which are right."""

    file: str
    rows: int
    question: Callable[[Mapping[str, Any]], str]
    tokens: int
    right: Callable[[str, Mapping[str, Any]], bool]


def sentiment(row: Mapping[str, Any]) -> str:
    return f"Is this film review positive or negative? Answer with one word.\n\n{row['sentence'].strip()}"


def names_it(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer's first word is the label."""
    return re.findall(r"[a-z]+", answer.lower())[:1] == [row["label_text"]]


def programming(row: Mapping[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"{row['text']} It must pass these tests:\n\n{tests}\n\nAnswer with one block of Python code and nothing else."
    )


def code_of(answer: str) -> str:
    """The first block of code of an answer; the whole answer where there is none."""
    found = _CODE.search(answer)
    return found[1] if found else answer


def passes(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether the code of an answer runs, and passes all tests of its task."""
    return runs("\n".join([code_of(answer), row.get("test_setup_code") or "", *row["test_list"]]))


def runs(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program ends without an error, within its limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        command = [*_alone(), sys.executable, "-I", "-S", str(path)]
        try:
            run = subprocess.run(
                command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=2 * seconds, preexec_fn=lambda: _limit(seconds), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        return run.returncode == 0


def _limit(seconds: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))


@cache
def _alone() -> tuple[str, ...]:
    """What keeps a command from the network and from other processes, where this machine allows it."""
    words = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    allowed = shutil.which(words[0]) and subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if allowed and allowed.returncode == 0 else ()


TASKS = {
    "sst2": Task("task/sst2_report", 200, sentiment, 8, names_it),
    "mbpp": Task("task/mbpp_report", 40, programming, 256, passes),
}


def ask(task: Task, folder: Path, tokenizer: Any, data: Path, log: Path) -> list[int]:
    """1 for each right answer of the model in a folder, 0 for others."""
    with jsonlines.open(data / f"{task.file}.jsonl") as file:
        rows = [row for row, _ in zip(file, range(task.rows), strict=False)]
    answers = _answers(folder, tokenizer, [task.question(row) for row in rows], task.tokens, log)
    return [int(task.right(answer.text, row)) for answer, row in zip(answers, rows, strict=True)]


def _answers(folder: Path, tokenizer: Any, questions: Sequence[str], tokens: int, log: Path) -> list[Sample]:
    template = ChatTemplate(tokenizer)
    texts = [template.question([{"role": "user", "content": question}]) for question in questions]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, prompts)) + tokens
    return generate(Job(str(folder), prompts, 1, False, length, 0.0, 0), log)
