"""A spec with everything it names found and checked, and the profiles of its corpora."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from expertprune.artifacts import Profile, part_path
from expertprune.composition import foreseen_widths
from expertprune.corpora import (
    HELD_OUT,
    Batch,
    Corpus,
    CorpusName,
    Document,
    calibration_batches,
    corpus_names,
    load_corpora,
    make_batches,
    tokenize,
)
from expertprune.defaults import AUTO, resolved
from expertprune.errors import CheckpointError, SpecError, gathered
from expertprune.evaluation import guarded
from expertprune.files import digest_of, store_folder
from expertprune.masking import masked
from expertprune.models import BaseModel, default_device, load_model, load_tokenizer, resolve_base
from expertprune.oracle import check_family
from expertprune.passes import backward_bytes
from expertprune.predictions import PART as VOCABULARY
from expertprune.profiling import profile_corpus, profile_key, profile_part, profile_path
from expertprune.relevance import Pass
from expertprune.rows import foreseen_rows
from expertprune.scoring import check_criterion, part_name
from expertprune.spec import Budget, Spec, load_spec, parse_spec
from expertprune.units import KeptUnits, Structure

log = logging.getLogger(__name__)
HELD_BACK = 8  # documents of a corpus that a retention floor is measured on, where a quarter of it is no fewer
SpecLike = Spec | str | Path
# A stage's name and its number of steps give a function that is called after each step.
Track = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def silent(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """The progress of those who do not watch."""
    yield lambda: None


@dataclass
class Prepared:
    """A spec with everything it names found and checked, and nothing loaded yet."""

    spec: Spec
    base: BaseModel
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

    def share(self, other: Prepared) -> None:
        """Take over what another one has loaded; both must name the same base and corpora."""
        self._model, self._tokenizer, self._calibration = other.model, other.tokenizer, other._calibration

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
    for criterion in (spec.relevance.criterion, spec.relevance.experts):
        if criterion is not None and criterion != AUTO:
            with gathered(problems):
                check_criterion(criterion)
    with gathered(problems):
        corpora = load_corpora(spec)
        evaluated = evaluation_corpora(spec, corpora) if spec.evaluate.enabled else []
    base = None
    with gathered(problems):
        base = resolve_base(spec.base, folder)
    if problems or base is None:
        raise SpecError(problems)
    spec = resolved(spec, base)
    foreseen_widths(spec, base)
    if not base.family.listed:
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


def evaluation_corpora(spec: Spec, corpora: Mapping[CorpusName, Corpus]) -> list[Corpus]:
    """The corpora to evaluate on, guarded against leaks from every corpus that calibrates."""
    by_name = {str(name): corpus for name, corpus in corpora.items()}
    clean = {corpus.name: corpus for corpus in guarded(list(corpora.values()))}
    if spec.evaluate.corpora is None:
        return list(clean.values())
    chosen = []
    for wanted in spec.evaluate.corpora:
        matches = [name for name in by_name if wanted in (name, name.partition("/")[2])]
        if not matches:
            raise SpecError(f"evaluate.corpora: {wanted!r} is none of the spec's corpora: {', '.join(by_name)}")
        chosen += [clean[name] for name in matches]
    return chosen


def validation_documents(corpus: Corpus) -> list[Document]:
    """Calibration documents held back for measuring what a budget keeps, by digest.

    A tenth, or eight if those are more, but no more than a quarter, and one at least: the least of several corpora decides,
    and on two or three documents that is chance.
    """
    order = sorted(corpus.calibration, key=lambda document: digest_of(["validation", document.digest]))
    number = min(max(len(order) // HELD_OUT, HELD_BACK), len(order) // 4)
    return order[: max(1, number)]


def profiles_of(
    prepared: Prepared, track: Track, kept: Sequence[KeptUnits] | None = None, run: bool = True
) -> dict[CorpusName, Profile]:
    """The profile of every corpus, with the pass that the criterion needs; what is stored is not measured again.

    Args:
        kept: profile the base with all other units masked, for cutting in rounds.
        run: whether what is missing may be measured.

    Raises:
        SpecError: something is missing and must not be measured.
        CheckpointError: the backward pass does not fit into memory.
    """
    part = part_name(prepared.spec.relevance)
    parts = [part] if part is not None and _cuts_units(prepared.spec.budget) else []
    if prepared.spec.budget.vocabulary is not None and kept is None:  # rows are decided once, on the base as it is
        parts.append(VOCABULARY)
    profiles: dict[CorpusName, Profile] = {}
    for name in corpus_names(prepared.spec):
        documents, batches = prepared.calibration(name)
        key = profile_key(prepared.base, documents, prepared.spec.calibration.max_tokens, kept)
        path = profile_path(prepared.store, key)
        missing = [] if path.is_file() else ["forward"]
        missing += [each for each in parts if not part_path(path, each).is_file()]
        if missing and not run:
            raise SpecError(f"the profile of {name} lacks the {' and the '.join(missing)} pass: run the profile stage")
        if any(each.startswith(Pass.GRADIENT) for each in missing):  # asked before the model is loaded for any pass
            check_backward_fits(prepared, batches)
        for each in missing:
            model, layers = prepared.model, len(prepared.base.layers)
            here = (model, prepared.base, str(name), documents, batches, key, prepared.store)
            mask = masked(model, prepared.base.family, prepared.base.layers, kept) if kept else contextlib.nullcontext()
            steps = len(batches) if each.startswith(Pass.GRADIENT) else layers
            with mask, track(f"profile {name}" + ("" if each == "forward" else f" ({each})"), steps) as step:
                if each == "forward":
                    profile_corpus(*here, step)
                else:
                    profile_part(*here, each, step)
        profiles[name] = Profile(path)
    return profiles


def _cuts_units(budget: Budget) -> bool:
    """Whether units of layers are to go, and not vocabulary rows alone, which no criterion scores."""
    return any(getattr(budget, each.value) for each in Structure) or budget.overall or budget.retention is not None


def check_backward_fits(prepared: Prepared, batches: Sequence[Batch]) -> None:
    """Raises `CheckpointError` where a backward pass through the whole model would not fit into memory."""
    base = prepared.base
    size = torch.empty(0, dtype=base.dtype).element_size()
    tokens = max(batch.ids.numel() for batch in batches)
    weights = base.checkpoint.parameters * size
    rows, chosen = base.checkpoint.config.get("vocab_size", 0), base.family.experts_per_token(base.checkpoint.config)
    needed = weights + backward_bytes(base.layers, rows, tokens, chosen)
    on_gpu = default_device().type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    free += weights if prepared.loaded else 0
    other = "regional, which needs one layer at a time" if base.family.has_ffn else "impact, which needs none"
    if needed > free:
        raise CheckpointError(
            f"relevance.criterion: {prepared.spec.relevance.criterion} needs a backward pass through the whole model, about "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; take criterion {other}, "
            "or lower calibration.tokens_per_batch"
        )
