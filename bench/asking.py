"""A task asked as people ask: MBPP through the chat template, in vLLM, with greedy answers.

The model is asked for a Python function. Its answer passes if the code in it passes the task's own
tests (pass@1).

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
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonlines

from expertprune.corpora.chat import ChatTemplate
from expertprune.serving.generation import Job, generate

SECONDS = 5  # of a program's processor time
MEMORY = 1 << 30  # bytes of its address space
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


FILE = "task/mbpp_report"
TOKENS = 256  # of an answer


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


def ask(folder: Path, tokenizer: Any, data: Path, log: Path, number: int) -> list[int]:
    """1 for each of the first programs of the model in a folder that passes, 0 for others."""
    with jsonlines.open(data / f"{FILE}.jsonl") as file:
        rows = [row for row, _ in zip(file, range(number), strict=False)]
    template = ChatTemplate(tokenizer)
    texts = [template.question([{"role": "user", "content": programming(row)}]) for row in rows]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = generate(Job(str(folder), prompts, 1, False, max(map(len, prompts)) + TOKENS, 0.0, 0), log)
    return [int(passes(answer.text, row)) for answer, row in zip(answers, rows, strict=True)]
