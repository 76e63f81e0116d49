"""What the base is asked, and which of its texts are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertprune.corpora.batches import encode
from expertprune.corpora.chat import render
from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.corpora.generated import Opening, Sieve, openings
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.messages import Conversation
from expertprune.spec.sources import Generate
from tests.corpora.test_chat import CHATML, TWO_TURNS, answers_of, chat_tokenizer

# As DeepSeek-R1 does: what opens an answer opens its thoughts, and they are left out of rendered answers.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PROMPTS, ONWARDS = Generate(), Generate.model_validate({"from": "continuation"})
ENGLISH = (
    "The kidney filters the blood and returns most of the water to it, and the rest of it leaves the body as urine. \
It is a part of the work of the body that we do not see, and that we only miss when it stops."
)


def test_the_base_answers_prompts_or_continues_openings() -> None:
    tokenizer, talk = chat_tokenizer(CHATML), Document.of(Conversation.of(TWO_TURNS))
    asked = Opening.of(talk, PROMPTS)
    words = tokenizer.convert_ids_to_tokens(asked.ids(tokenizer))
    assert words == ["<|im_start|>", "user", "the", "heart", "<|im_end|>", "<|im_start|>", "assistant"]
    written = asked.completed(" reads law\n")
    assert written.text == "the heart\n\n reads law\n"
    assert answers_of(render(written, tokenizer)) == [" reads law\n<|im_end|>"]
    begun = Opening.of(Document(ENGLISH), ONWARDS)
    assert begun.document.text == ENGLISH[:118]  # "It is a", and then a word that would be cut
    assert begun.completed(" part").text.endswith("as urine. It is a part")
    for heading in ("", "心脏\n\n", "# 第一章 心脏的功能\n"):  # where spaces part no words
        text = heading + "血液透过心脏流向全身各处，每一次跳动都把氧气送到细胞里。" * 9
        assert Opening.of(Document(text), ONWARDS).document.text == text[:120]
        mixed = heading + "医生用 CT 检查心音，" * 20
        assert len(Opening.of(Document(mixed), ONWARDS).document.text) >= 100


@pytest.mark.parametrize(
    ("template", "opening"), [(CHATML, ""), (REASONING, "<think>\n"), ("{{ messages[-1].role }} ", None)]
)
def test_what_the_base_wrote_is_calibrated_on_word_for_word(template: str, opening: str | None, tmp_path: Path) -> None:
    tokenizer, asked = chat_tokenizer(template), Opening.of(Document.of(Conversation.of(TWO_TURNS)), PROMPTS)
    said = "deep\n</think>\n\nreads law"
    written = asked.completed(said)
    KeptDocuments({}, {"calibration": [written]}).save(tmp_path / "kept.jsonl")
    kept = KeptDocuments.load(tmp_path / "kept.jsonl")
    assert kept is not None
    assert kept.splits["calibration"] == [written]
    before, end = f"<|im_start|>user\nthe heart<|im_end|>\n<|im_start|>assistant\n{opening}", "<|im_end|>"
    if opening is None:  # no answer is rendered at all: what ends it is the token that ends texts
        before, end = "user ", "</s>"
    text = render(kept.splits["calibration"][0], tokenizer)
    assert text.text.rstrip() == before + said + end
    assert answers_of(text) == [said + end]
    (tokens,) = encode([text], tokenizer)
    assert tokens.ids[: len(asked.ids(tokenizer))] == tuple(asked.ids(tokenizer))


def test_prompts_that_evaluate_are_never_asked() -> None:
    def talk(prompt: str, answer: str) -> Document:
        said = (("user", prompt), ("assistant", answer))
        return Document.of(Conversation.of([{"role": role, "content": content} for role, content in said]))

    calibration = (talk("the heart", "pumps"), talk("a judge", "reads"), talk("the heart", "is"), talk("law", "is"))
    corpus = Corpus(CorpusName("domain", "law"), calibration, (talk("a judge", "is"),))
    assert [each.document.text for each in openings(corpus, PROMPTS)] == ["the heart", "law"]
    plain = Corpus(CorpusName("task", "qa"), (), (Document("law"),), (Question("the heart", ("pumps", "reads"), 0),))
    chat = Corpus(CorpusName("general", "chat"), (), (talk("law", "reads"), talk("the heart", "reads")))
    for other in (chat, plain):
        assert openings(corpus, PROMPTS, [other]) == []


def test_texts_that_are_of_no_use_are_left_out_and_counted() -> None:
    sieve = Sieve([Document(ENGLISH)])
    good = "In the morning the light of the sun is low, and it reaches the wall of the house that we see from the road."
    german = (
        "Die Niere filtert das Blut und gibt den größten Teil des Wassers zurück, "
        "während der Rest als Harn den Körper verlässt, wenn er kann."
    )
    texts = (good, f" {good}\n", german, "the heart pumps the blood " * 20, " \n- -", "Yes.")
    assert [sieve.keeps(text) for text in texts] == [True, False, False, False, False, True]
    assert sieve.refused == {"generated before": 1, "in another language": 1, "repeating itself": 1, "empty": 1}
    assert Sieve([]).keeps(german)


def test_short_answers_and_numbers_are_of_use_and_the_same_one_to_another_prompt_too() -> None:
    sieve = Sieve([Document(ENGLISH)])
    talks = [Opening.of(Document.of(Conversation.of([{"role": "user", "content": ask}])), PROMPTS) for ask in "ab"]
    kept = [
        sieve.keeps(said, talk.completed(said)) for said in ("Yes.", "42", "7 " * 30) for talk in (*talks, talks[0])
    ]
    assert kept == [True, True, False, True, True, False, False, False, False]
    assert sieve.refused == {"generated before": 3, "repeating itself": 2}
