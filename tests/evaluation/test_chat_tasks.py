"""Tasks asked through the base's chat template."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors

from expertprune.corpora import templates
from expertprune.errors import SpecError
from expertprune.evaluation.suites import TaskEntry
from tests.corpora.test_chat import CHATML, chat_tokenizer
from tests.corpora.test_loading import write_rows
from tests.serving.fake_endpoint import fake_endpoint
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")

from expertprune.evaluation.harness.models import _with_one_bos, running_model, served_model
from expertprune.evaluation.harness.scores import common_beginning
from expertprune.evaluation.harness.tasks import load_task, run_task

TASK = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
fewshot_split: test
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    parts = [(i % 2, *WORDS[i : i + 4]) for i in range(6)]
    rows = [{"question": f"{a} {b}", "choices": [c, d], "answer": answer} for answer, a, b, c, d in parts]
    write_rows(tmp_path / "questions.jsonl", rows)
    path = tmp_path / "choose.yaml"
    path.write_text(TASK)
    return str(path)


def asked(task: Any) -> list[tuple[str, str]]:
    return [each.args for leaf in task.leaves.values() for each in leaf.instances]


def test_prompts_are_what_the_template_makes_of_them(task: str) -> None:
    tokenizer = chat_tokenizer(CHATML)
    plain = load_task(TaskEntry(file=task), generates=False)
    chat = load_task(TaskEntry(file=task, chat=True), False, tokenizer=tokenizer)
    assert asked(plain)[0] == ("the heart", " pumps")
    prompt = "<|im_start|>user\nthe heart<|im_end|>\n<|im_start|>assistant\n"
    assert [each[0] for each in asked(chat)[:2]] == [prompt, prompt]
    assert chat.digest != plain.digest
    for apart, turns in ((True, 2), (False, 1)):
        entry = TaskEntry(file=task, chat=True, few_shot=1, fewshot_as_multiturn=apart)
        assert asked(load_task(entry, False, tokenizer=tokenizer))[2][0].count("<|im_start|>user") == turns
    with pytest.raises(SpecError, match="task choose: chat: the base has no chat template; leave 'chat' out"):
        load_task(TaskEntry(file=task, chat=True), False, tokenizer=chat_tokenizer(None))
    for arguments in ("'^the', 'a', 1", "pattern='^the', repl='a', count=1"):
        Path(task).write_text(TASK.replace("{{question}}", f"{{{{question | regex_replace({arguments})}}}}"))
        assert asked(load_task(TaskEntry(file=task), False))[0][0] == "a heart"


def test_an_endpoint_with_a_key_is_asked_with_it(tiny_llama: Path) -> None:
    pytest.importorskip("tenacity")
    with fake_endpoint([], key="secret") as fake:
        model = served_model(tiny_llama, fake.url, "model", tiny_tokenizer(), "secret")
        assert model.model_call([[1, 2]], gen_kwargs={})["choices"] == [{"text": " said model"}]


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_task_cannot_hang_reach_python_or_read_a_fifo(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TIME_LIMIT", 0.3)
    for template, said in (
        (ENDLESS, "its template .* did not end within 0.3 s"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ):
        Path(task).write_text(TASK.replace("{{question}}", template))
        with pytest.raises(SpecError, match=said):
            load_task(TaskEntry(file=task), False)
    Path(task).write_text(TASK)
    data = Path(task).with_name("questions.jsonl")
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(SpecError, match=r"questions.jsonl: it is a FIFO, not a file"):
        load_task(TaskEntry(file=task), False)


def test_a_model_is_scored_on_what_follows_the_template(task: str) -> None:
    tokenizer = chat_tokenizer(CHATML)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    chat = load_task(TaskEntry(file=task, chat=True), False, tokenizer=tokenizer)
    scores = run_task(chat, running_model(model, tokenizer))
    expected = []
    for i in range(6):
        prompt = f"<|im_start|>user\n{WORDS[i]} {WORDS[i + 1]}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(input_ids=ids).logits[0, -1]
        first, second = (last[tokenizer.get_vocab()[WORDS[i + place]]] for place in (2, 3))
        expected.append(float(int(second > first) == i % 2))
    assert scores.values.tolist() == expected
    # How long generations stay the same is the part of the base's text.
    base, theirs = ["the heart", "abcd", "", ""], ["the heart pumps", "abxd", "", "a"]
    assert common_beginning(base, theirs) == (1 + 0.5 + 1 + 0) / 4


def test_no_end_is_put_behind_what_is_asked() -> None:
    plain, ending = (chat_tokenizer(CHATML) for _ in range(2))
    for tokenizer, ends in ((plain, ""), (ending, " </s>")):
        template = processors.TemplateProcessing(single=f"<s> $A{ends}", special_tokens=[("<s>", 0), ("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    expected, model = (running_model(tiny_model("llama", vocab_size=len(plain)), each) for each in (plain, ending))
    assert model.tok_encode("the heart") == expected.tok_encode("the heart") == plain("the heart")["input_ids"]
    asked = ["the heart", "blood"]
    for mine, theirs in zip(model.tok_batch_encode(asked), expected.tok_batch_encode(asked), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert ending("blood")["input_ids"][-1] == 1, "the tokenizer itself stays as it is"


def test_a_bos_that_the_template_wrote_is_not_written_again() -> None:
    def encode(text: Any) -> Any:
        if not isinstance(text, str):
            return [encode(each) for each in text]
        return [0, 0, 5] if text.startswith("<s>") else [0, 5]

    model: Any = SimpleNamespace(tok_encode=encode)
    _with_one_bos(model, 0)
    assert model.tok_encode("<s>a") == model.tok_encode("a") == [0, 5]
    assert model.tok_encode(["<s>a", "a"]) == [[0, 5], [0, 5]]
