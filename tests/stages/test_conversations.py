"""From a user's own conversations to an expert: what counts on the way, and what a user can get wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.errors import SpecError
from expertprune.models.loading import load_tokenizer
from expertprune.serving import generation
from expertprune.spec.reading import load_spec
from expertprune.stages.validate import validate
from tests.calling import call
from tests.commands.test_bad_input import Workplace
from tests.conftest import refuse_to_load
from tests.corpora.test_chat import ALTERNATING, CHATML
from tests.tiny import WORDS, save_tiny, tiny_tokenizer

Data = dict[str, Any]


def chatty(folder: Path, template: str | None = CHATML) -> Path:
    """A tiny base with a chat template, in which roles are words and markers single tokens."""
    save_tiny(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w44", "w45"]})
    tokenizer.chat_template = template and template.replace("<|im_start|>", " w44 ").replace("<|im_end|>", " w45 ")
    tokenizer.save_pretrained(folder)
    return folder


def talks(count: int, first: int = 0) -> list[Data]:
    """Conversations of two turns over the tiny tokenizer's words, all different."""
    found = []
    for number in range(first, first + count):
        words = random.Random(number)
        messages = [
            {"role": role, "content": " ".join([*words.choices(WORDS, k=4), f"w{number}"])}
            for role in ("user", "assistant") * 2
        ]
        found.append({"talk": messages})
    return found


@pytest.fixture
def chat(tmp_path: Path, spec_data: Data, store: Path) -> Workplace:
    """A spec whose medical corpus holds conversations."""
    for name, rows in (("talks", talks(12)), ("held", talks(4, first=20))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "talks.jsonl"), "evaluation": str(tmp_path / "held.jsonl"), "messages": "talk"}
    spec_data["corpora"]["sources"]["medical"] = source
    spec_data["base"] = str(chatty(tmp_path / "base"))
    place = Workplace(tmp_path, spec_data, store)
    place.write()
    return place


def test_an_expert_is_calibrated_and_evaluated_on_answers(chat: Workplace) -> None:
    expertprune.build(chat.spec, chat.out)
    found = Expert.load(chat.out)
    assert found.evaluation is not None
    rows = found.evaluation.corpora["domain/medical"].per_document
    assert len(rows) == 4
    assert {(row.tokens, row.bytes > 40) for row in rows} == {
        (2 * (5 + 1), True)
    }  # two answers of five words and an end
    tokenizer = load_tokenizer(chat.out)
    assert tokenizer.chat_template == load_tokenizer(Path(chat.data["base"])).chat_template
    text = next(text for name, text in validate(chat.spec).calibration.items() if name.value == "medical")
    assert {each.predicted for each in text.tokens} == {12}
    assert {len(each) for each in text.tokens} == {4 * (5 + 3)}


def test_the_profile_depends_on_what_counts(chat: Workplace) -> None:
    def digest(**changes: Any) -> str:
        spec = load_spec(chat.spec, changes)
        return next(text.digest for name, text in validate(spec).calibration.items() if name.value == "medical")

    plain = digest()
    assert digest() == plain == digest(**{"calibration.tokens_per_batch": 7})
    changed = {
        "calibration.prompt_weight": 0.5,
        "calibration.max_tokens": 15,
        "corpora.sources.medical.documents": "raw",
    }
    assert len({plain, *(digest(**{key: value}) for key, value in changed.items())}) == 4


@pytest.mark.parametrize(
    ("template", "message", "problem"),
    [
        (None, None, "corpora.sources.medical: conversation '"),
        (None, None, "the base has no chat template, so conversations cannot be rendered; take an instruct model"),
        (ALTERNATING, {"role": "system", "content": "law"}, "roles system, user, assistant: System role not supported"),
        ("{% for m in messages %}{{ m.content", None, "the base's chat template refuses a conversation"),
        (CHATML, "law", "talks.jsonl, line 13, message 1: must be a mapping of role and content, not str"),
        (CHATML, {"role": "user"}, "talks.jsonl, line 13, message 1: has no content"),
    ],
)
def test_a_conversation_that_the_base_cannot_read_is_one_line(
    chat: Workplace, no_model: None, template: str | None, message: Any, problem: str
) -> None:
    chat.data["base"] = str(chatty(chat.folder / "other", template))
    if message is not None:
        with (chat.folder / "talks.jsonl").open("a") as file:
            file.write(json.dumps({"talk": [message, *talks(1, first=30)[0]["talk"]]}) + "\n")
    refused = chat.build_refused()
    assert problem in refused
    assert refused.lower().count("error: ") == 1


def test_answers_beyond_the_last_token_are_named(chat: Workplace, no_model: None) -> None:
    chat.data["calibration"] = {"max_tokens": 7}
    said = "corpora.sources.medical: no answer begins within the first 7 tokens: raise calibration"
    assert said in chat.build_refused()


def test_evaluation_without_an_answer_is_named(chat: Workplace) -> None:
    with pytest.raises(
        SpecError, match=r"domain/medical: no answer begins within the first 7 tokens of its evaluation"
    ):
        expertprune.build(chat.spec, chat.out, {"evaluate.max_tokens": 7})


def test_a_language_without_a_corpus_says_what_to_paste(chat: Workplace, no_model: None) -> None:
    chat.data["dimensions"] = {"language": "nl"}
    message = " ".join(chat.build_refused().split())
    assert "corpora: {sources: {language/nl: {path: nl.jsonl}}}" in message
    assert "generate: {from: continuation, tokens: 200k}" in message


def test_what_an_expert_was_calibrated_on_is_said_where_it_was_generated(chat: Workplace) -> None:
    expertprune.build(chat.spec, chat.out, {"evaluate.enabled": False})
    about = json.loads((chat.out / "expertprune.json").read_text())
    about["corpora"]["domain/medical"]["generated"] = "by base from prompts, temperature 1, seed 0"
    (chat.out / "expertprune.json").write_text(json.dumps(about))
    call("report", chat.out)
    assert "generated by base from prompts, temperature 1, seed 0" in (chat.out / "report.html").read_text()


def test_the_base_writes_nothing_for_a_spec_with_other_problems(
    chat: Workplace, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", refuse_to_load)
    chat.source("medical")["generate"] = {"tokens": "1k"}
    chat.data["relevance"] = {"criterion": "impcat"}
    assert "did you mean 'impact'?" in chat.build_refused()
