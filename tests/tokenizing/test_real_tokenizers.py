"""The tokenizers of real models cut: SmolLM2's byte-level BPE and Gemma's, which is SentencePiece's with bytes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from expertprune.arch import bundled_models
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.composition.coverage import missing_interval, rows_for
from expertprune.composition.rows import RowRanking, essentials
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.files import shipped
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.inventory import vocabulary_rows
from expertprune.profiling.rows import folds_of_similar
from expertprune.pruning.write import prune
from expertprune.spec.schema import Base, Spec
from expertprune.tokenizing import trimmed
from expertprune.units import KeptRows
from tests.oracle import load, logits_of, plan_of
from tests.vocabularies import counted_profile

pytestmark = pytest.mark.slow
# Which corpora's tokens are kept, by model: what it was trained on, and what it was not.
KEPT = {"smollm2-135m-instruct": ("en", "medical"), "gemma-3-270m": ("de",)}
LANGUAGES = ("de", "en", "es", "fr", "zh")


def texts_of(name: str, split: str = "calibration") -> list[str]:
    path = next((shipped("corpora")).glob(f"*/{name}.{split}.jsonl"))
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@functools.cache
def words_of(name: str) -> list[str]:
    return sorted({word for text in texts_of(name) for word in text.split()})


@pytest.fixture(params=list(KEPT))
def base(request: pytest.FixtureRequest, real_store: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedBase:
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(real_store))
    entry = bundled_models()[request.param]
    if any(importlib.util.find_spec(packaged.module) is None for packaged in entry.packaged):
        pytest.skip(f"needs {entry.install}")
    return resolve_base(Base(model=request.param), real_store)


def test_a_smaller_tokenizer_gives_the_same_tokens_and_text_and_reaches_every_token(base: ResolvedBase) -> None:
    """It has the tokens of some corpora and a random twentieth of the others. Text is that of the kept corpora, all of it
    and mixed anew, and of every language, with and without spaces."""
    vocabulary, must = essentials(base).vocabulary, essentials(base).ids
    own, names = Tokenizer.from_str(json.dumps(vocabulary.data)), KEPT[base.name]
    kept = set(random.Random(0).sample(sorted(vocabulary.by_id), len(vocabulary.by_id) // 20)) | must
    kept |= {index for name in names for text in texts_of(name) for index in own.encode(text).ids}
    result = trimmed(vocabulary, kept)
    smaller = Tokenizer.from_str(json.dumps(result.data))

    def check(text: str) -> bool:
        """Same text back; and where all base tokens are kept, which is returned, the same tokens."""
        before, found = own.encode(text), smaller.encode(text)
        for special in (True, False):
            expected = own.decode(before.ids, skip_special_tokens=special)
            assert smaller.decode(found.ids, skip_special_tokens=special) == expected
        if not set(before.ids) <= result.ids.keys():
            return False
        assert found.ids == [result.ids[index] for index in before.ids]
        assert found.offsets == before.offsets
        return True

    assert all(check(text) for name in names for text in texts_of(name))
    draw, words = random.Random(1), words_of(names[0])
    assert sum(check(" " + " ".join(draw.choices(words, k=4))) for _ in range(300)) > 100
    for language, space in itertools.product(LANGUAGES, (" ", "", "\n", "  ", "\t")):
        for _ in range(2):
            check(space.join(draw.choices(words_of(language), k=8)))
    reached = 0  # by the word of the library's model: what made itself of its own text before does so still
    for token in (vocabulary.by_id[index] for index in kept):
        if token in vocabulary.tokens and [each.value for each in own.model.tokenize(token)] == [token]:
            assert [each.value for each in smaller.model.tokenize(token)] == [token]
            reached += 1
    assert reached > len(kept) * 0.6


def test_coverage_that_is_promised_of_unseen_text_holds_on_the_evaluation_split(
    base: ResolvedBase, tmp_path: Path
) -> None:
    """From the 24 documents that ship; the model's probabilities are left out, so that none has to run."""
    language = KEPT[base.name][0]
    name = CorpusName("language", language)
    own, of = (
        Tokenizer.from_str(json.dumps(essentials(base).vocabulary.data)),
        vocabulary_rows(base.checkpoint, base.family),
    )
    documents = [own.encode(text).ids for text in texts_of(language)]
    counts = csr_array(np.array([np.bincount(ids, minlength=of) for ids in documents]))
    profile = counted_profile(tmp_path, language, of, documents, folds_of_similar(counts).tolist())
    data = {"name": "n", "base": base.name, "dimensions": {"language": language}, "general": [],
            "budget": {"vocabulary": 0.5}}  # fmt: skip
    ranking = RowRanking(Spec.model_validate(data), base, {name: profile})
    unseen = [own.encode(text).ids for text in texts_of(language, "evaluation")]
    for asked in (0.9, 0.95, 0.98):
        rows = rows_for(asked, ranking.tested, ranking.must.smallest, of)
        kept = set(ranking.plan(rows).rows.kept)
        assert rows < of
        missing = np.array([sum(index not in kept for index in ids) for ids in unseen], dtype=float)
        least, _ = missing_interval(missing)  # eight documents: what chance explains is no broken promise
        assert least <= (1 - asked) * sum(map(len, unseen))
    with pytest.raises(PlanError, match=r"promise at most coverage: 0\.999\d*; give it about \d+,000 tokens"):
        rows_for(0.9999, ranking.tested, ranking.must.smallest, of)


def test_the_cut_model_has_the_bases_logits(base: ResolvedBase, tmp_path: Path) -> None:
    """In float32 and plain transformers."""
    own, texts = AutoTokenizer.from_pretrained(base.folder), texts_of(KEPT[base.name][0])
    prompts = [own(text[:120])["input_ids"] for text in texts[:3]]
    ids = [*prompts, *(own(text)["input_ids"] for text in texts)]  # a prompt may end within a word
    must = essentials(base)
    rows = tuple(sorted(must.vocabulary.closed(must.ids.union(*ids))))
    vocabulary = VocabularyPlan(KeptRows(vocabulary_rows(base.checkpoint, base.family), rows), base.tokenizer_digest)
    plan = replace(plan_of(base, [shape.all_kept for shape in base.layers]), vocabulary=vocabulary)
    (tmp_path / "expert").mkdir()
    prune(plan, base, tmp_path / "expert")
    dense, expert = load(base.folder), load(tmp_path / "expert")
    new = {index: place for place, index in enumerate(rows)}
    found = AutoTokenizer.from_pretrained(tmp_path / "expert")(texts[0])["input_ids"]
    assert found == [new[index] for index in own(texts[0])["input_ids"]]
    for prompt in prompts:
        mapped = torch.tensor([[new[index] for index in prompt]])
        expected = logits_of(dense, torch.tensor([prompt]))[..., list(new)]
        torch.testing.assert_close(logits_of(expert, mapped), expected, rtol=1e-5, atol=1e-5)
