"""Find and check everything that a spec names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import ancestor_of, places_of_bases
from expertprune.composition.coverage import check_enough
from expertprune.composition.defaults import AUTO, resolved
from expertprune.composition.plan import foreseen_widths
from expertprune.composition.rows import foreseen_rows
from expertprune.composition.scoring import rules
from expertprune.composition.shares import corpus_shares
from expertprune.composition.widths import LayerWidths, own_widths
from expertprune.corpora.batches import Batch, CalibrationText, check_ids, corpus_text, each_once, warn_of_length
from expertprune.corpora.catalogue import source_key
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.leaks import LeakGuard
from expertprune.corpora.loading import HELD_OUT, load_corpora, load_others
from expertprune.corpora.shares import shared_out
from expertprune.errors import CheckpointError, SpecError, gathered, under
from expertprune.evaluation.documents import check_documents, end_of, texts_of, tokens_of
from expertprune.evaluation.questions import check_questions, choices_of
from expertprune.files import digest_of, store_folder
from expertprune.models.base import ResolvedBase, is_hub_id, resolve_base
from expertprune.models.gguf.writing import check_gguf
from expertprune.models.inventory import vocabulary_rows
from expertprune.models.running import RunningBase
from expertprune.pruning.repair import repairs
from expertprune.pruning.selfcheck import check_family
from expertprune.registry import Registry
from expertprune.relevance import criteria
from expertprune.spec.reading import load_spec, parse_spec, with_corpus_paths
from expertprune.spec.schema import Budget, Evaluate, Spec
from expertprune.spec.values import Coverage
from expertprune.stages.generate import generator

log = logging.getLogger(__name__)


HELD_BACK = 8  # documents of a corpus that a retention floor is measured on, where a quarter of it is no fewer


SpecLike = Spec | str | Path
Share = Callable[[Sequence[Batch]], Sequence[Batch]]


@dataclass(frozen=True)
class Found:
    """What a spec names, found and checked; no model is loaded.

    Attributes:
        spec: as the user gave it.
        corpora: all of them, by name.
        calibration: what of each corpus is profiled; documents held back for `budget.retention` are not.
        evaluated: corpora to evaluate on, without documents that leak.
        running: the base's model and tokenizer. Everything that is prepared from one `Found` shares them.
    """

    spec: Spec
    base: ResolvedBase
    corpora: Mapping[CorpusName, Corpus]
    calibration: Mapping[CorpusName, CalibrationText]
    evaluated: Sequence[Corpus]
    store: Path
    running: RunningBase

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read: the base, the bases that it was cut from, and the corpora."""
        paths: list[Path] = []
        with_corpus_paths(self.spec, lambda _, path: paths.append(Path(path)) or path)  # type: ignore[func-returns-value]
        return [*places_of_bases(self.base, self.store), *paths]

    def repaired(self, share: Share = list) -> dict[CorpusName, list[Batch | None]]:
        """What a repair runs of the batches of each corpus: every window once (see `each_once`)."""
        return dict(zip(self.calibration, each_once(list(self.calibration.values()), share), strict=True))

    def repair_batches(self, share: Share = list) -> list[Batch]:
        """The same of all corpora together, weighed as the spec says (see `corpus_shares`)."""
        shares, texts = corpus_shares(self.spec), self.calibration
        return shared_out(list(texts.values()), list(self.repaired(share).values()), [shares[name] for name in texts])


@dataclass(frozen=True)
class Prepared(Found):
    """A spec whose base, corpora and budget are checked.

    Attributes:
        spec: with what it left open decided for the base.
        widths: what the budget comes to, as far as that is known without profiles (see `foreseen_widths`).
        rows: vocabulary rows that stay, as far as that is known (see `foreseen_rows`).
        allocation_left_open: whether the spec left `compose.allocation` to the base.
    """

    widths: Sequence[LayerWidths] | None
    rows: int | None
    allocation_left_open: bool = False


def as_spec(spec: SpecLike, overrides: Mapping[str, Any] | None = None) -> Spec:
    if isinstance(spec, Spec):
        return parse_spec(spec.document(), spec.name, Path.cwd(), overrides) if overrides else spec
    return load_spec(spec, overrides)


def about(spec: SpecLike) -> AbstractContextManager[None]:
    """Errors of the block name the spec's file, if it is in one."""
    return nullcontext() if isinstance(spec, Spec) else under(str(spec))


def validate(spec: SpecLike, overrides: Mapping[str, Any] | None = None, store: str | Path | None = None) -> Prepared:
    """Find and check everything that a spec names: base, corpora, criterion, budget. No model is loaded.

    Raises:
        SpecError: with every problem of the spec and its corpora at once.
        CheckpointError: the base is incomplete, damaged or of a kind that is not supported.
        PlanError: the budget is not reachable.
    """
    parsed = as_spec(spec, overrides)
    with about(spec):
        prepared = prepare(find(parsed, store_folder(store)))
        check_unlisted(prepared)
    return prepared


def find(spec: Spec, store: Path, evaluate: bool = True) -> Found:
    """Find and check what a spec names, but not what its budget comes to.

    Args:
        evaluate: whether corpora to evaluate on are wanted, if the spec says so too.

    Raises:
        SpecError: with every problem of the spec and its corpora at once.
        CheckpointError: the base is incomplete, damaged or of a kind that is not supported.
    """
    problems: list[str] = []
    corpora: dict[CorpusName, Corpus] = {}
    evaluated: list[Corpus] = []
    with gathered(problems):
        check_names(spec)
    base = None
    with gathered(problems):
        base = resolve_base(spec.base, store)
    with gathered(problems):
        # The base writes no text for a spec that has other problems: that takes minutes.
        writes = generator(base, spec, store) if base is not None and not problems else None
        corpora = load_corpora(spec, store, writes)
        if evaluate and spec.evaluate.enabled:
            ancestor = ancestor_of(base) if base is not None else None
            digests = ancestor.calibration_digests if ancestor is not None else ()
            evaluated = evaluation_corpora(spec, corpora, leak_guard(corpora, digests), store)
    with gathered(problems):
        check_measures(spec, evaluated)
    if base is not None:
        with gathered(problems):
            _check_base(base, spec)
    if problems or base is None:
        raise SpecError(problems)
    running = RunningBase(base)
    calibration: dict[CorpusName, CalibrationText] = {}
    held_back = _held_back(corpora.values()) if spec.budget.retention is not None else set()
    for name, corpus in corpora.items():
        with gathered(problems), under(source_key(name, spec)):
            calibration[name] = corpus_text(_without(corpus, held_back), base.tokenizer, spec)
    for corpus in evaluated:
        if corpus.name in corpora and corpus.name not in calibration:
            continue  # said above
        with gathered(problems), under(source_key(corpus.name, spec)):
            _check_measured(corpus, base, spec)
    for name in calibration if held_back else ():
        with gathered(problems), under(source_key(name, spec)):
            _check_held_back(corpora[name], base.tokenizer, spec)
    if problems:
        raise SpecError(problems)
    for name, text in calibration.items():
        check_ids(text.batches, vocabulary_rows(base.checkpoint, base.family))
        warn_of_length(
            name, text.tokens, base.checkpoint.config.get("max_position_embeddings"), "calibration.max_tokens"
        )
    return Found(spec, base, corpora, calibration, evaluated, store, running)


def check_measures(spec: Spec, evaluated: Sequence[Corpus]) -> None:
    """Raises `SpecError` where nothing of the corpora would be measured."""
    if evaluated and not spec.evaluate.reads_documents and not any(corpus.questions for corpus in evaluated):
        raise SpecError("evaluate.metrics: no corpus has questions, so nothing is measured; add bits_per_byte")


def _check_base(base: ResolvedBase, spec: Spec) -> None:
    """Raises `SpecError` for a key that does not go with the base, or a base that no expert can be exported from."""
    if spec.base.revision is not None and not is_hub_id(spec.base.model):
        raise SpecError("base.revision: goes with a hub id only, and the base is a file, a folder or a bundled model")
    if "gguf" in spec.serve_with and base.family.gguf is not None:
        try:
            check_gguf(base.checkpoint)
        except CheckpointError as error:
            raise SpecError(f"serve_with: {error}; leave gguf out") from None


def _check_measured(corpus: Corpus, base: ResolvedBase, spec: Spec) -> None:
    """Raises `SpecError` where what shall measure experts cannot, before anything is profiled."""
    other_tokens = spec.budget.vocabulary is not None
    asks = "questions" in spec.evaluate.chosen_metrics(other_tokens)
    if spec.evaluate.reads_documents:
        with under("evaluation"):
            texts = texts_of(corpus.evaluation, base.tokenizer, end_of(spec.evaluate, other_tokens))
            check_documents(corpus, tokens_of(texts, base.tokenizer, spec.evaluate, other_tokens), asks)
    if asks:
        context = base.checkpoint.config.get("max_position_embeddings")
        with under("questions"):
            check_questions(choices_of(corpus.questions, base.tokenizer), corpus.questions, context)


def _check_held_back(corpus: Corpus, tokenizer: Any, spec: Spec) -> None:
    """Raises `SpecError` where what is held back of a corpus has nothing to predict."""
    held = replace(corpus, evaluation=tuple(validation_documents(corpus)), questions=())
    settings = Evaluate(max_tokens=spec.calibration.max_tokens)
    where = "of the documents that budget.retention holds back: raise calibration.max_tokens"
    check_documents(held, tokens_of(texts_of(held.evaluation, tokenizer), tokenizer, settings, False, where), False)


def _held_back(corpora: Iterable[Corpus]) -> set[str]:
    """Digests of what is held back of any corpus: another one may have the same documents."""
    return {document.digest for corpus in corpora for document in validation_documents(corpus)}


def _without(corpus: Corpus, held_back: set[str]) -> Corpus:
    """The corpus without calibration documents of these digests."""
    rest = tuple(document for document in corpus.calibration if document.digest not in held_back)
    if not rest:
        only = len(corpus.calibration) == 1
        why = "there is only one" if only else "corpora with the same documents hold back the rest"
        raise SpecError(f"budget.retention holds documents back, and {why}; give it more")
    return replace(corpus, calibration=rest)


def prepare(found: Found, budget: Budget | None = None) -> Prepared:
    """Decide what the spec leaves open, and check its budget.

    Args:
        budget: in place of the spec's.

    Raises:
        PlanError: the budget is not reachable.
    """
    base, spec = found.base, found.spec
    left_open = spec.compose.allocation == AUTO
    spec = resolved(spec if budget is None else spec.model_copy(update={"budget": budget}), base)
    widths, rows = foreseen_widths(spec, base), foreseen_rows(spec, base)
    if spec.budget.vocabulary is None and widths is not None and list(widths) == own_widths(base, ()):
        log.warning("budget: removes nothing, so the expert is a copy of the base")
    if isinstance(spec.budget.vocabulary, Coverage):
        tokens = {name: sum(batch.tokens for batch in found.calibration[name].batches) for name in found.corpora}
        check_enough(spec.budget.vocabulary.coverage, {name: tokens[name] for name in tokens if not name.is_general})
    about = {each.name: getattr(found, each.name) for each in fields(Found)} | {"spec": spec}
    return Prepared(**about, widths=widths, rows=rows, allocation_left_open=left_open)


def check_unlisted(prepared: Prepared) -> None:
    """Where the base's family is not one that tests cover, cut a tiny random copy of it and compare.

    Raises:
        CheckpointError: the cut copy is another model than the masked one.
    """
    base = prepared.base
    if not base.family.tested:
        own_widths, layers = prepared.spec.compose.allocation != "uniform", bool(prepared.spec.budget.layers)
        done = check_family(base, layer_widths=own_widths, layers=layers)
        log.warning("%s: the oracle holds on a tiny random copy (%s)", base.name, ", ".join(done))


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


def evaluation_corpora(spec: Spec, corpora: Mapping[CorpusName, Corpus], guard: LeakGuard, store: Path) -> list[Corpus]:
    """The corpora to evaluate on, without documents that leak: the spec's own, then `evaluate.others`."""
    others = load_others(spec, store)
    if spec.evaluate.corpora is None:
        return guard.clean([*corpora.values(), *others])
    chosen = []
    for wanted in spec.evaluate.corpora:
        matches = [corpus for name, corpus in corpora.items() if name.answers_to(wanted)]
        if not matches:
            raise SpecError(
                f"evaluate.corpora: {wanted!r} is none of the spec's corpora: {', '.join(map(str, corpora))}; name "
                "others in evaluate.others"
            )
        chosen += [corpus for corpus in matches if corpus not in chosen]
    return guard.clean([*chosen, *others])


def validation_documents(corpus: Corpus) -> list[Document]:
    """Calibration documents held back for measuring what a budget keeps, by digest.

    A tenth, or eight if those are more, but no more than a quarter, and one at least: the least of several corpora decides,
    and on two or three documents that is chance.
    """
    order = sorted(corpus.calibration, key=lambda document: digest_of(["validation", document.digest]))
    number = min(max(len(order) // HELD_OUT, HELD_BACK), len(order) // 4)
    return order[: max(1, number)]
