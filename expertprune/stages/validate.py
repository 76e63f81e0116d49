"""Find and check everything that a spec names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import ancestor_of
from expertprune.composition.defaults import AUTO, resolved
from expertprune.composition.plan import foreseen_widths
from expertprune.composition.rows import foreseen_rows
from expertprune.composition.scoring import rules
from expertprune.corpora.batches import Batch, calibration_batches, make_batches, tokenize
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.leaks import LeakGuard
from expertprune.corpora.loading import HELD_OUT, load_corpora
from expertprune.errors import SpecError, gathered
from expertprune.files import digest_of, store_folder
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.pruning.repair import repairs
from expertprune.pruning.selfcheck import check_family
from expertprune.registry import Registry
from expertprune.relevance import criteria
from expertprune.spec.reading import load_spec, parse_spec
from expertprune.spec.schema import Spec

log = logging.getLogger(__name__)


HELD_BACK = 8  # documents of a corpus that a retention floor is measured on, where a quarter of it is no fewer


SpecLike = Spec | str | Path


@dataclass
class Prepared:
    """A spec with everything it names found and checked, and nothing loaded yet."""

    spec: Spec
    base: ResolvedBase
    corpora: dict[CorpusName, Corpus]
    evaluated: list[Corpus]
    store: Path

    def __post_init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._calibration: dict[CorpusName, tuple[list[Document], list[Batch]]] = {}

    @property
    def loaded(self) -> bool:
        """Whether the base is running."""
        return self._model is not None

    @property
    def model(self) -> Any:
        """The running base, loaded at its first use."""
        if self._model is None:
            self._model = load_model(self.base.folder, self.base.dtype, trust_remote_code=self.base.trust_remote_code)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base.folder, self.base.trust_remote_code)
        return self._tokenizer

    def calibration(self, name: CorpusName) -> tuple[list[Document], list[Batch]]:
        """The profiled documents of a corpus and their batches."""
        if name not in self._calibration:
            corpus = self.corpora[name]
            if self.spec.budget.retention is not None:
                held_back = validation_documents(corpus)
                rest = tuple(document for document in corpus.calibration if document not in held_back)
                if not rest:
                    raise SpecError(f"corpus {name}: budget.retention holds documents back, and there is only one")
                corpus = replace(corpus, calibration=rest)
            self._calibration[name] = calibration_batches(corpus, self.tokenizer, self.spec)
        return self._calibration[name]

    def repair_batches(self) -> list[Batch]:
        """The calibration text of all corpora together, each document once."""
        documents = {d.digest: d for name in self.corpora for d in self.calibration(name)[0]}
        settings = self.spec.calibration
        tokens = tokenize(list(documents.values()), self.tokenizer, settings.max_tokens)
        return make_batches(tokens, settings.tokens_per_batch)


def as_spec(spec: SpecLike, overrides: Mapping[str, Any] | None = None) -> Spec:
    if isinstance(spec, Spec):
        return parse_spec(spec.document(), spec.name, Path.cwd(), overrides) if overrides else spec
    return load_spec(spec, overrides)


def validate(spec: SpecLike, overrides: Mapping[str, Any] | None = None, store: str | Path | None = None) -> Prepared:
    """Find and check everything that a spec names: base, corpora, criterion, budget. No model is loaded.

    Raises:
        SpecError: with every problem of the spec and its corpora at once.
        CheckpointError: the base is incomplete, damaged or of a kind that is not supported.
        PlanError: the budget is not reachable.
    """
    spec = as_spec(spec, overrides)
    folder = store_folder(store)
    problems: list[str] = []
    corpora: dict[CorpusName, Corpus] = {}
    evaluated: list[Corpus] = []
    with gathered(problems):
        check_names(spec)
    base = None
    with gathered(problems):
        base = resolve_base(spec.base, folder)
    with gathered(problems):
        corpora = load_corpora(spec)
        if spec.evaluate.enabled:
            ancestor = ancestor_of(base) if base is not None else None
            digests = ancestor.calibration_digests if ancestor is not None else ()
            evaluated = evaluation_corpora(spec, corpora, leak_guard(corpora, digests))
    if problems or base is None:
        raise SpecError(problems)
    spec = resolved(spec, base)
    foreseen_widths(spec, base)
    if not base.family.tested:
        done = check_family(base, layer_widths=spec.compose.allocation != "uniform")
        log.warning("%s: the oracle holds on a tiny random copy (%s)", base.name, ", ".join(done))
    foreseen_rows(spec, base)
    prepared = Prepared(spec, base, corpora, evaluated, folder)
    for name in corpora:
        with gathered(problems):
            prepared.calibration(name)
    if problems:
        raise SpecError(problems)
    return prepared


def check_names(spec: Spec) -> None:
    """Raises `SpecError` with every criterion, rule and repair of the spec that nobody has registered."""
    problems: list[str] = []
    registered: list[tuple[str, Registry[Any], str | None]] = [
        ("relevance.criterion", criteria, spec.relevance.criterion),
        ("relevance.experts", criteria, spec.relevance.experts),
        ("compose.rule", rules, spec.compose.rule),
        ("compensation.method", repairs, spec.compensation.method),
    ]
    for key, registry, name in registered:
        if name is not None and name != AUTO:
            with gathered(problems):
                registry.named(name, key)
    if problems:
        raise SpecError(problems)


def leak_guard(corpora: Mapping[CorpusName, Corpus], digests: Iterable[str]) -> LeakGuard:
    """The guard of an expert that these corpora calibrate; `digests` are those of its ancestors' documents."""
    return LeakGuard((document for corpus in corpora.values() for document in corpus.calibration), digests)


def evaluation_corpora(spec: Spec, corpora: Mapping[CorpusName, Corpus], guard: LeakGuard) -> list[Corpus]:
    """The corpora to evaluate on, without documents that leak."""
    if spec.evaluate.corpora is None:
        return guard.clean(list(corpora.values()))
    chosen = []
    for wanted in spec.evaluate.corpora:
        matches = [corpus for name, corpus in corpora.items() if name.answers_to(wanted)]
        if not matches:
            raise SpecError(
                f"evaluate.corpora: {wanted!r} is none of the spec's corpora: {', '.join(map(str, corpora))}"
            )
        chosen += matches
    return guard.clean(chosen)


def validation_documents(corpus: Corpus) -> list[Document]:
    """Calibration documents held back for measuring what a budget keeps, by digest.

    A tenth, or eight if those are more, but no more than a quarter, and one at least: the least of several corpora decides,
    and on two or three documents that is chance.
    """
    order = sorted(corpus.calibration, key=lambda document: digest_of(["validation", document.digest]))
    number = min(max(len(order) // HELD_OUT, HELD_BACK), len(order) // 4)
    return order[: max(1, number)]
