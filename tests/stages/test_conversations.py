"""From a user's own conversations to an expert: what counts on the way, and what a user can get wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Corpus, Document
from expertprune.errors import SpecError
from expertprune.models.loading import load_tokenizer
from expertprune.serving import generation
from expertprune.spec.reading import load_spec
from expertprune.stages.evaluate import measuring
from expertprune.stages.validate import validate
from tests.commands.test_bad_input import Workplace
from tests.conftest import refuse_to_load
from tests.corpora.test_chat import ALTERNATING, CHATML
from tests.patching import everywhere
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
    def medical(**changes: Any) -> Any:
        found = validate(load_spec(chat.spec, changes)).calibration
        return next(text for name, text in found.items() if name.value == "medical")

    expertprune.build(chat.spec, chat.out)
    found = Expert.load(chat.out)
    assert found.evaluation is not None
    rows = found.evaluation.corpora["domain/medical"].per_document
    assert len(rows) == 4
    assert [name for name, each in found.evaluation.corpora.items() if each.answers_only] == ["domain/medical"]
    # Two answers of five words and an end.
    assert {(row.tokens, row.bytes > 40) for row in rows} == {(2 * (5 + 1), True)}
    assert load_tokenizer(chat.out).chat_template == load_tokenizer(Path(chat.data["base"])).chat_template
    (chat.folder / "suite.yaml").write_text("{name: mine, perplexity: {corpora: [medical]}}")
    for changes in ({}, {"corpora.sources.medical.documents": "raw"}):  # both in one store
        of_suite = expertprune.evaluate_suites(chat.out, [str(chat.folder / "suite.yaml")], overrides=changes)
        own = expertprune.evaluate(chat.out, ["medical"], overrides=changes)
        tokens, expected = (
            [row.tokens for row in each.corpora["domain/medical"].per_document] for each in (of_suite, own)
        )
        assert tokens == expected
    text = medical()
    assert {(each.predicted, len(each)) for each in text.tokens} == {(2 * (5 + 1), 4 * (5 + 3))}
    source = "corpora.sources.medical.documents"
    for changes in ({"calibration.prompt_weight": 0.5}, {"calibration.max_tokens": 15}, {source: "raw"}):
        assert medical(**changes).digest != text.digest
    with pytest.raises(SpecError, match="domain/medical: no answer begins within the first 7 tokens of its evaluation"):
        expertprune.evaluate(chat.out, overrides={"evaluate.max_tokens": 7})
    wrong = "corpora.sources.medical: evaluation: no answer begins within the first 7 tokens"
    with pytest.raises(SpecError, match=wrong):  # before anything is profiled
        validate(load_spec(chat.spec, {"evaluate.max_tokens": 7}))


def test_what_another_template_rendered_is_measured_again(chat: Workplace) -> None:
    """Where text without a template calibrates, and conversations are only measured."""
    sources = chat.data["corpora"]["sources"]
    sources["talks"], sources["medical"] = sources["medical"], dict(sources["en"])
    chat.data["evaluate"] = {"others": ["talks"]}
    chat.write()
    suite, template = chat.folder / "suite.yaml", Path(chat.data["base"]) / "chat_template.jinja"
    suite.write_text("{name: mine, perplexity: {corpora: [talks]}}")
    expertprune.build(chat.spec, chat.out)

    def bits() -> list[float]:
        (point,) = expertprune.sweep(chat.spec, [0.25]).points
        of_suite = expertprune.evaluate_suites(chat.out, [str(suite)])
        found = point.corpora["other/talks"], of_suite.corpora["general/talks"]
        return [float(each.metrics["bits_per_byte"].base or 0) for each in found]

    before = bits()
    template.write_text(template.read_text().replace(" w45 ", " w45 the law "))
    assert not {round(each, 6) for each in bits()} & {round(each, 6) for each in before}


def test_what_a_retention_floor_is_measured_on_has_answers(chat: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = talks(4)
    rows[0]["talk"][0]["content"] = " ".join(["w7"] * 40)
    (chat.folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def longest(corpus: Corpus) -> list[Document]:
        return [max(corpus.calibration, key=lambda document: len(document.text))]

    everywhere(monkeypatch, "expertprune.stages.validate.validation_documents", longest)
    spec = load_spec(chat.spec, {"calibration.max_tokens": 30, "budget": {"retention": {"expert": 0.9}}})
    words = (
        r"sources\.medical: no answer begins within .* that budget\.retention holds back: raise calibration\.max_tokens"
    )
    with pytest.raises(SpecError, match=words):
        validate(spec)


def test_conversations_that_are_cut_off_before_their_answer_are_told(
    chat: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    for name, rows, longer in (("talks", talks(12), 3), ("held", talks(4, first=20), 1)):
        for number, row in enumerate(rows[:longer]):
            row["talk"][0]["content"] = " ".join([f"w{number}", *["w7"] * 40])
        (chat.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = load_spec(chat.spec, {"calibration.max_tokens": 30, "evaluate.max_tokens": 30})
    found = validate(spec)
    assert "medical: 3 of 12 conversations calibrate nothing" in caplog.text
    measuring(found.running, found.evaluated, spec.evaluate, other_tokens=False)
    assert "medical: 1 of 4 conversations measure nothing" in caplog.text


def test_what_the_base_cannot_read_is_one_line(chat: Workplace, no_model: None) -> None:
    system = {"role": "system", "content": "law"}
    for number, (template, message, problem) in enumerate((
        (None, None, "the base has no chat template, so conversations cannot be rendered; take an instruct model"),
        (ALTERNATING, system, "roles system, user, assistant: System role not supported"),
        (CHATML, {"role": "user"}, "talks.jsonl, line 13, message 1: has no content"),
    )):  # fmt: skip
        chat.data["base"] = str(chatty(chat.folder / f"other-{number}", template))
        rows = [*talks(12), *[{"talk": [message, *talks(1, first=30)[0]["talk"]]}] * (message is not None)]
        (chat.folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        refused = chat.build_refused()
        assert problem in refused
        assert refused.lower().count("error: ") == 1


def test_the_base_writes_nothing_for_a_spec_with_other_problems(
    chat: Workplace, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", refuse_to_load)
    chat.source("medical")["generate"] = {"tokens": "1k"}
    chat.data["relevance"] = {"criterion": "impcat"}
    assert "did you mean 'impact'?" in chat.build_refused()
    chat.data["dimensions"] = {"language": "nl"}
    assert "generate: {from: continuation, tokens: 200k}" in " ".join(chat.build_refused().split())
