"""Measure base and expert on the same held-out examples of corpora."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expertprune.artifacts.evaluation import (
    CorpusGroup,
    CorpusResult,
    DocumentBits,
    Evaluation,
    Measured,
    QuestionAnswers,
    Settings,
)
from expertprune.corpora.batches import Batch, warn_of_length
from expertprune.corpora.chat import Rendered
from expertprune.corpora.documents import GENERAL, OTHER, Corpus, CorpusName, Question
from expertprune.engine.team import team
from expertprune.errors import CheckpointError, SpecError, under
from expertprune.evaluation.alignment import Aligning
from expertprune.evaluation.arrays import Floats
from expertprune.evaluation.documents import (
    check_documents,
    document_rows,
    document_rows_apart,
    end_of,
    texts_of,
    tokens_of,
)
from expertprune.evaluation.questions import Answers, answers, check_questions, choices_of, paired_answers
from expertprune.evaluation.reading import Compared, Read, Reading, bits, compare, read, read_together
from expertprune.evaluation.retention import RESAMPLES, bits_of_corpora, document_metrics, summarize
from expertprune.models.passes import Stream, TextRun
from expertprune.progress import Progress
from expertprune.spec.schema import PER_TOKEN, Evaluate


@dataclass(frozen=True)
class _Range:
    """A corpus' documents or questions: their place among all sequences."""

    corpus: CorpusName
    questions: bool
    here: slice


@dataclass(frozen=True)
class _Examples:
    """Everything that is measured, in the tokens of one tokenizer."""

    reading: Reading
    ranges: list[_Range]

    def of(self, corpus: CorpusName, questions: bool) -> slice:
        return next(each.here for each in self.ranges if (each.corpus, each.questions) == (corpus, questions))

    def corpus_of(self, batch: Batch) -> str | None:
        """The corpus of a batch of documents; `None` for questions."""
        first = batch.documents[0]
        found = next(each for each in self.ranges if each.here.start <= first < each.here.stop)
        return None if found.questions else str(found.corpus)

    def reading_of(self, here: slice) -> Reading:
        """Some of the sequences."""
        return Reading(self.reading.sequences[here], ())


log = logging.getLogger(__name__)


class Measuring:
    """Measures experts of one base on the same examples. The base reads them once.

    Args:
        base: how the base runs; its own batches do not matter.
        corpora: already guarded against leaks.
        other_tokens: whether the experts have tokenizers of their own.
        limit: the key that says where documents are cut, for warnings.

    Raises:
        SpecError: a metric per token is asked for, and base and experts have different tokens; or a
            corpus has no answer before it is cut.
    """

    def __init__(
        self,
        base: TextRun,
        tokenizer: Any,
        corpora: Sequence[Corpus],
        settings: Evaluate,
        other_tokens: bool = False,
        limit: str = "evaluate.max_tokens",
    ) -> None:
        self.base, self.corpora, self.settings, self.other_tokens = base, corpora, settings, other_tokens
        self.metrics = settings.chosen_metrics(other_tokens)
        if other_tokens and (wrong := [metric for metric in self.metrics if metric in PER_TOKEN]):
            raise SpecError(
                f"evaluate.metrics: {', '.join(wrong)} cannot be compared across vocabularies: base and expert have "
                "different tokens; use bits_per_byte"
            )
        self._texts: dict[CorpusName, Sequence[Rendered]] = {}
        for corpus in corpora if settings.reads_documents else ():
            with under(f"corpus {corpus.name}"):
                self._texts[corpus.name] = texts_of(corpus.evaluation, tokenizer, end_of(settings, other_tokens))
        self._examples = self._in_tokens(tokenizer)
        self._warn(limit)
        self._known: Stream | None = None
        self._bits: Floats | None = None

    def _warn(self, limit: str) -> None:
        positions = getattr(self.base.model.config, "max_position_embeddings", None)
        for each in self._examples.ranges:
            texts = self._examples.reading.sequences[each.here]
            if not each.questions and not any(text.predicted for text in texts):
                log.warning(
                    "corpus %s: every evaluation document is shorter than two tokens: only its questions are measured",
                    each.corpus,
                )
            if not each.questions:
                warn_of_length(each.corpus, texts, positions, limit)
            if unread := sum(text.answers is not None and not text.predicted for text in texts):
                log.warning(
                    "corpus %s: %d of %d conversations measure nothing, as no answer begins in the tokens that are read: "
                    "raise %s (%d)",
                    each.corpus, unread, len(texts), limit, self.settings.max_tokens,
                )  # fmt: skip

    def _in_tokens(self, tokenizer: Any) -> _Examples:
        """All documents and questions in a tokenizer's tokens."""
        ranges, readings, first = [], [], 0
        positions = getattr(self.base.model.config, "max_position_embeddings", None)
        for corpus in self.corpora:
            asks = "questions" in self.metrics
            with under(f"corpus {corpus.name}"):
                texts = self._texts.get(corpus.name, ())
                asked = {False: tokens_of(texts, tokenizer, self.settings, self.other_tokens)}
                check_documents(corpus, asked[False], asks)
                asked[True] = choices_of(corpus.questions, tokenizer) if asks else []
                check_questions(asked[True], corpus.questions, positions)
            for questions, sequences in asked.items():
                if sequences:
                    readings.append(Reading.of(sequences))
                    ranges.append(_Range(corpus.name, questions, slice(first, first + len(sequences))))
                    first += len(sequences)
        reading = Reading.joined(readings)
        return _Examples(replace(reading, batches=tuple(team().share(reading.batches))), ranges)

    @property
    def batches(self) -> Sequence[Batch]:
        """What the base reads, and experts with its tokens too."""
        return self._examples.reading.batches

    @property
    def known(self) -> Stream | None:
        """The base's stream behind its last layer, if it has read the batches."""
        return self._known

    def steps(self, layers: int) -> int:
        """How many steps `against` reports."""
        known = self._known is not None or self._bits is not None
        return layers * (1 if known else 2) + len(self.batches)

    # --- against an expert ------------------------------------------------------------------------------------------

    def against(
        self,
        expert: TextRun,
        progress: Progress | None = None,
        tokenizer: Any = None,
        align: bool = False,
        gone: Collection[int] = (),
    ) -> Evaluation:
        """Measure an expert.

        Args:
            expert: how it runs; its own batches do not matter.
            progress: called after each layer and each batch.
            tokenizer: the expert's, where it has other tokens than the base.
            align: compare hidden states layer by layer too; only where both have the same tokens.
            gone: the base's layers that the expert has not; they matter to `align` alone.
        """
        reading = self._examples.reading
        if self.other_tokens:
            if self._bits is None:
                self._bits = bits(reading, read(reading, self.base, progress))
            return self._apart(self._in_tokens(tokenizer), expert, progress)
        if align:
            aligning = Aligning([self._examples.corpus_of(batch) for batch in reading.batches])
            base, theirs = read_together(reading, self.base, expert, aligning.watch, progress, gone)
            found = self.of_streams(base.stream, theirs, progress)
            return found.model_copy(update={"alignment": aligning.results(base, theirs)})
        known = self._known if self._known is not None else read(reading, self.base, progress).stream
        return self.of_streams(known, read(reading, expert, progress), progress)

    def of_streams(self, base: Stream, expert: Read, progress: Progress | None = None) -> Evaluation:
        """Measure an expert that has read `batches`, as the base has, whose stream is kept."""
        self._known = base
        reading = self._examples.reading
        found = compare(reading, Read(self.base, base), expert, progress)
        rows = {}
        for corpus in self.corpora:
            if corpus.name in self._texts and corpus.evaluation:
                here = self._examples.of(corpus.name, questions=False)
                compared = Compared(found.base[here], found.expert[here], found.kl[here], found.agreed[here])
                rows[corpus.name] = document_rows(corpus.evaluation, self._examples.reading_of(here), compared)
        return self._evaluation(rows, (found.base, self._examples), (found.expert, self._examples))

    def _apart(self, others: _Examples, expert: TextRun, progress: Progress | None) -> Evaluation:
        assert self._bits is not None
        theirs = bits(others.reading, read(others.reading, expert, progress), progress)
        rows: dict[CorpusName, list[DocumentBits]] = {}
        for corpus in self.corpora:
            if corpus.name in self._texts and corpus.evaluation:
                mine, own = (each.of(corpus.name, questions=False) for each in (self._examples, others))
                rows[corpus.name] = document_rows_apart(
                    corpus.evaluation,
                    self._examples.reading_of(mine),
                    self._bits[mine],
                    others.reading_of(own),
                    theirs[own],
                )
        return self._evaluation(rows, (self._bits, self._examples), (theirs, others))

    def _evaluation(
        self,
        rows: Mapping[CorpusName, list[DocumentBits]],
        base: tuple[Floats, _Examples],
        expert: tuple[Floats, _Examples],
    ) -> Evaluation:
        for who, (needed, _) in (("base", base), ("expert", expert)):
            if not np.isfinite(needed).all():
                raise CheckpointError(f"the {who} gives values that are not finite on the evaluation's text: its weights "
                                      "are damaged, or try base.dtype: float32")  # fmt: skip
        results = {}
        for corpus in self.corpora:
            found: dict[str, Measured] = {}
            if corpus.name in rows:
                found |= document_metrics(rows[corpus.name], self.metrics)
            asked = corpus.questions if "questions" in self.metrics else ()
            answered: list[QuestionAnswers] = []
            if asked:
                mine, theirs = (self._answers(corpus, needed, examples) for needed, examples in (base, expert))
                found["questions"] = paired_answers(asked, mine.right, theirs.right).measured()
                answered = _question_rows(asked, mine, theirs)
            results[str(corpus.name)] = CorpusResult(
                group=group_of(corpus),
                documents=len(corpus.evaluation),
                questions=len(asked),
                answers_only=any(each.conversation is not None for each in corpus.evaluation),
                metrics=found,
                per_document=rows.get(corpus.name, []),
                per_question=answered,
            )
        about = Settings(
            documents=self.settings.documents,
            max_tokens=self.settings.max_tokens,
            metrics=list(self.metrics),
            resamples=RESAMPLES,
        )
        return Evaluation(settings=about, corpora=results, summary=summarize(bits_of_corpora(results)))

    def _answers(self, corpus: Corpus, needed: Floats, examples: _Examples) -> Answers:
        """What a model answers that needs so many bits for each sequence."""
        here = examples.of(corpus.name, questions=True)
        return answers(corpus.questions, needed[here], examples.reading.sizes[here])


def _question_rows(questions: Sequence[Question], base: Answers, expert: Answers) -> list[QuestionAnswers]:
    return [
        QuestionAnswers(
            digest=question.digest,
            base=int(base.picks[i]),
            expert=int(expert.picks[i]),
            base_margin=float(base.margins[i]),
            expert_margin=float(expert.margins[i]),
        )
        for i, question in enumerate(questions)
    ]


def group_of(corpus: Corpus) -> CorpusGroup:
    """Whether a corpus says what is kept of the expert's purpose, in general, or of what the spec does not name."""
    groups: dict[str, CorpusGroup] = {GENERAL: "general", OTHER: "other"}
    return groups.get(corpus.name.dimension, "expert")
