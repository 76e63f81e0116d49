"""Calibrate on what the base itself writes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertprune.corpora.catalogue import source_key
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.generated import Opening, Sieve, openings
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.loading import Generator
from expertprune.errors import SpecError, under
from expertprune.files import digest_of
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_tokenizer
from expertprune.progress import shown
from expertprune.serving import generation
from expertprune.spec.schema import Spec
from expertprune.spec.sources import Generate, Source

log = logging.getLogger(__name__)

_LEAST = 16  # tokens that an answer must have room for
# Of what the store keeps. 1 had answers without special tokens, rendered without thoughts; 2 had no answer twice, and no
# numbers.
_FORM = 3
_SPARE = 1.1  # tokens to write for each that is wanted: some texts are of no use


def generator(base: ResolvedBase, spec: Spec, store: Path, write: bool = True) -> Generator:
    """What makes the calibration documents of sources with `generate`.

    They are kept in the store under a digest of the base, the openings, the settings and the seed,
    so that they are written once.

    Args:
        write: whether the base may write them now. If not, a corpus whose documents are not in the
            store keeps those that it is generated from.
    """
    tokenizers: list[Any] = []
    context = base.checkpoint.config.get("max_position_embeddings")  # vLLM refuses longer texts
    length = min(spec.calibration.max_tokens, context) if isinstance(context, int) else spec.calibration.max_tokens

    def make(name: CorpusName, source: Source, corpus: Corpus, every: Sequence[Corpus]) -> Corpus:
        settings = source.generate
        assert settings is not None
        if not tokenizers:
            tokenizers.append(load_tokenizer(base.folder, base.trust_remote_code))
        asked = openings(corpus, settings, every)
        with under(f"{source_key(name, spec)}.generate"):
            documents = _documents(base, tokenizers[0], corpus, asked, settings, length, store, write)
        how = f"by {base.name} from {settings.from_}, temperature {settings.temperature:g}, seed {settings.seed}"
        return replace(corpus, calibration=tuple(documents), generated=how)

    return make


def _documents(
    base: ResolvedBase,
    tokenizer: Any,
    corpus: Corpus,
    asked: Sequence[Opening],
    settings: Generate,
    length: int,
    store: Path,
    write: bool,
) -> Sequence[Document]:
    pairs = [(opening, opening.ids(tokenizer)) for opening in asked]
    if not pairs:
        raise SpecError("no opening is left: all of them evaluate")
    pairs = [(opening, ids) for opening, ids in pairs if len(ids) + _LEAST <= length]
    if not pairs:
        raise SpecError(
            f"no opening is shorter than calibration.max_tokens, or the base's context, less {_LEAST}: {length - _LEAST}"
        )
    prompts = [ids for _, ids in pairs]
    wanted = settings.model_dump(mode="json", by_alias=True)
    key = digest_of([_FORM, base.digest, base.tokenizer_digest, prompts, wanted, length])
    path = store / "generated" / f"{key}.jsonl"
    if (kept := KeptDocuments.load(path)) is not None:
        return kept.splits["calibration"]
    if not write:
        return corpus.calibration
    job_log = store / "logs" / f"generate-{key[:12]}.log"
    log.warning(
        "corpus %s: %s writes %s tokens through vLLM; its log: %s",
        corpus.name,
        base.name,
        f"{settings.tokens:,}",
        job_log,
    )
    base.checkpoint.fetch()
    job = generation.Job(
        folder=str(base.checkpoint.folder),
        prompts=prompts,
        tokens=round(_SPARE * settings.tokens),
        whole=settings.from_ == "prompts",
        length=length,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    with shown(f"generate {corpus.name}", 1) as step:
        written = generation.generate(job, job_log)
        step()
    documents = _kept([opening for opening, _ in pairs], written, Sieve(corpus.calibration), settings, str(corpus.name))
    about = {"base": base.name, "digest": base.digest, **wanted}
    KeptDocuments(about, {"calibration": documents}).save(path)
    return documents


def _kept(
    asked: Sequence[Opening], written: Sequence[generation.Sample], sieve: Sieve, settings: Generate, corpus: str
) -> list[Document]:
    """The documents of use, as many as give the tokens that are wanted."""
    documents, tokens = [], 0
    for sample in written:
        if tokens >= settings.tokens:
            break
        document = asked[sample.prompt].completed(sample.text)
        if settings.from_ == "prompts" and not sample.ended:
            sieve.refused["without an end within calibration.max_tokens"] += 1
        elif sieve.keeps(sample.text, document):
            documents.append(document)
            tokens += sample.tokens
    why = ", ".join(f"{number} {reason}" for reason, number in sieve.refused.most_common())
    if not documents:
        raise SpecError(f"none of {len(written)} texts is of use: {why}; change temperature, seed or the corpus")
    if tokens < settings.tokens:
        log.warning(
            "corpus %s: %s tokens are generated, and %s were wanted: more documents give more (left out: %s)",
            corpus, f"{tokens:,}", f"{settings.tokens:,}", why or "none",
        )  # fmt: skip
    return documents
