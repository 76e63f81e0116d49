"""What the base is asked, and which of its texts are kept."""

from __future__ import annotations

from expertprune.corpora.documents import Corpus, CorpusName, Document, Question
from expertprune.corpora.generated import Opening, Sieve, openings
from expertprune.corpora.messages import Conversation
from expertprune.spec.sources import Generate
from tests.corpora.test_chat import CHATML, TWO_TURNS, chat_tokenizer

PROMPTS, ONWARDS = Generate(), Generate.model_validate({"from": "continuation"})
ENGLISH = (
    "The kidney filters the blood and returns most of the water to it, and the rest of it leaves the body as urine. "
    "It is a part of the work of the body that we do not see, and that we only miss when it stops."
)


def test_the_base_answers_prompts_or_continues_openings() -> None:
    tokenizer, talk = chat_tokenizer(CHATML), Document.of(Conversation.of(TWO_TURNS))
    asked = Opening.of(talk, PROMPTS)
    words = tokenizer.convert_ids_to_tokens(asked.ids(tokenizer))
    assert words == ["<|im_start|>", "user", "the", "heart", "<|im_end|>", "<|im_start|>", "assistant"]
    answer = {"role": "assistant", "content": "reads law"}
    assert asked.completed(" reads law\n") == Document.of(Conversation.of([TWO_TURNS[0], answer]))
    begun = Opening.of(Document(ENGLISH), ONWARDS)
    assert begun.document.text == ENGLISH[:118]  # "It is a", and then a word that would be cut
    assert begun.completed(" part").text.endswith("as urine. It is a part")
    assert Opening.of(Document("血" * 200), ONWARDS).document.text == "血" * 120


def test_prompts_that_evaluate_are_never_asked() -> None:
    def talk(prompt: str, answer: str) -> Document:
        return Document.of(
            Conversation.of([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        )

    calibration = (talk("the heart", "pumps"), talk("a judge", "reads"), talk("the heart", "is"), talk("law", "is"))
    corpus = Corpus(CorpusName("domain", "law"), calibration, (talk("a judge", "is"),))
    assert [each.document.text for each in openings(corpus, PROMPTS)] == ["the heart", "law"]
    plain = Corpus(CorpusName("task", "qa"), (), (Document("law"),), (Question("the heart", ("pumps", "reads"), 0),))
    for others in (
        [Corpus(CorpusName("general", "chat"), (), (talk("law", "reads"), talk("the heart", "reads")))],
        [plain],
    ):
        assert openings(corpus, PROMPTS, others) == []


def test_texts_that_are_of_no_use_are_left_out_and_counted() -> None:
    sieve = Sieve([Document(ENGLISH)])
    good = "In the morning the light of the sun is low, and it reaches the wall of the house that we see from the road."
    german = (
        "Die Niere filtert das Blut und gibt den größten Teil des Wassers zurück, "
        "während der Rest als Harn den Körper verlässt, wenn er kann."
    )
    assert sieve.keeps(good)
    assert not sieve.keeps(f" {good}\n")
    assert not sieve.keeps(german)
    assert not sieve.keeps("the heart pumps the blood " * 20)
    assert not sieve.keeps(" \n- -")
    assert sieve.keeps("Yes.")
    assert sieve.refused == {"generated before": 1, "in another language": 1, "repeating itself": 1, "empty": 1}
    assert Sieve([]).keeps(german)
