"""Documents, questions, corpora and their names."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from expertprune.corpora.messages import Conversation
from expertprune.files import digest_of
from expertprune.spec.schema import Spec


@dataclass(frozen=True)
class Document:
    """One text, or a conversation, whose `text` is what is said in it.

    A conversation is read by a model as the base's chat template renders it.
    """

    text: str
    conversation: Conversation | None = None

    @classmethod
    def of(cls, conversation: Conversation) -> Document:
        """A conversation as a document."""
        return cls(conversation.text, conversation)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, white space aside; it tells documents apart."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """What a model is asked; it prefers the choice that it finds likeliest behind it."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def digest(self) -> str:
        """It tells questions apart."""
        return digest_of([self.question, self.choices, self.answer])

    @property
    def texts(self) -> tuple[Document, ...]:
        """Texts by which the leak guard knows the question: alone, with its answer, and with its
        choices.
        """
        choices = "\n".join(self.choices)
        answered = f"{self.prompt} {self.choices[self.answer]}"
        return Document(self.question), Document(answered), Document(f"{self.question}\n{choices}")


GENERAL = "general"


OTHER = "other"  # of corpora that a spec only evaluates on: `evaluate.others`


@dataclass(frozen=True, order=True)
class CorpusName:
    """A corpus' name, `language/de`; `dimension` is one of the three, `general` or `other`."""

    dimension: str
    value: str

    @classmethod
    def parse(cls, text: str) -> CorpusName:
        """The inverse of `str`; raises `ValueError` for text of another form."""
        dimension, _, value = text.partition("/")
        if not dimension or not value:
            raise ValueError(f"{text!r} is no name of a corpus, such as language/de")
        return cls(dimension, value)

    def __str__(self) -> str:
        return f"{self.dimension}/{self.value}"

    @property
    def is_general(self) -> bool:
        """Whether it measures what the expert keeps in general, and not what the expert is for."""
        return self.dimension == GENERAL

    def answers_to(self, text: str) -> bool:
        """Whether a user who writes `text` means this corpus: `language/de`, or `de` alone."""
        return text in (str(self), self.value)


@dataclass(frozen=True)
class Corpus:
    """Documents of one dimension value, or of `general`.

    `set_aside` says that the evaluation documents are a tenth of the corpus rather than a split of
    their own. `generated` says how the base made the calibration documents, if it did.
    """

    name: CorpusName
    calibration: tuple[Document, ...]
    evaluation: tuple[Document, ...]
    questions: tuple[Question, ...] = ()
    set_aside: bool = False
    generated: str | None = None

    @property
    def digest(self) -> str:
        return digest_of([document.digest for document in self.calibration])

    @property
    def measured(self) -> list[Any]:
        """Its name and everything of it that is measured, as plain data."""
        return [
            str(self.name),
            [[each.text, each.conversation and asdict(each.conversation)] for each in self.evaluation],
            [asdict(question) for question in self.questions],
        ]


def corpus_names(spec: Spec) -> list[CorpusName]:
    """Every corpus of a spec: the dimensions' in their order, then those of `general`."""
    names = [CorpusName(dimension, value) for dimension, values in spec.dimensions.chosen.items() for value in values]
    return names + [CorpusName(GENERAL, value) for value in spec.general]
