"""The tokenizers of real models cut: SmolLM2's byte-level BPE and Gemma's, which is SentencePiece's with bytes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from expertprune.arch import bundled_models
from expertprune.artifacts.plan import VocabularyPlan
from expertprune.composition.coverage import missing_interval, rows_for
from expertprune.composition.rows import Essentials, RowRanking, essentials
from expertprune.corpora.documents import CorpusName
from expertprune.errors import PlanError
from expertprune.files import shipped, store_folder
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
_store: list[Path] = []


@pytest.fixture(autouse=True)
def store(real_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(real_store))
    _store[:] = [real_store]
    return real_store


def texts_of(name: str, split: str = "calibration") -> list[str]:
    path = next((shipped("corpora")).glob(f"*/{name}.{split}.jsonl"))
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@functools.cache
def words_of(name: str) -> list[str]:
    return sorted({word for text in texts_of(name) for word in text.split()})


@functools.cache
def base_of(model: str) -> ResolvedBase:
    entry = bundled_models()[model]
    if any(importlib.util.find_spec(packaged.module) is None for packaged in entry.packaged):
        pytest.skip(f"needs {entry.install}")
    return resolve_base(Base(model=model), _store[0] if _store else store_folder())


class Cut:
    """A model's own tokenizer, and a smaller one: tokens of some corpora, and a random twentieth of the others."""

    def __init__(self, model: str) -> None:
        self.must: Essentials = essentials(base_of(model))
        vocabulary = self.must.vocabulary
        self.base = Tokenizer.from_str(json.dumps(vocabulary.data))
        ids = sorted(vocabulary.by_id)
        kept = set(random.Random(0).sample(ids, len(ids) // 20)) | self.must.ids
        for name in KEPT[model]:
            kept |= {index for text in texts_of(name) for index in self.base.encode(text).ids}
        found = trimmed(vocabulary, kept)
        self.ids, self.kept = found.ids, kept
        self.smaller = Tokenizer.from_str(json.dumps(found.data))


cut_of = functools.cache(Cut)


MODEL = pytest.mark.parametrize("model", list(KEPT))


def check(cut: Cut, text: str) -> bool:
    """Same text back; and where all base tokens are kept, which is returned, the same tokens."""
    base, found = cut.base.encode(text), cut.smaller.encode(text)
    for special in (True, False):
        expected = cut.base.decode(base.ids, skip_special_tokens=special)
        assert cut.smaller.decode(found.ids, skip_special_tokens=special) == expected
    if not set(base.ids) <= cut.ids.keys():
        return False
    assert found.ids == [cut.ids[index] for index in base.ids]
    assert found.offsets == base.offsets
    return True


@MODEL
def test_text_of_kept_tokens_gives_the_same_tokens_and_any_text_comes_back(model: str) -> None:
    """Text of the kept corpora, all of it and mixed anew; and of every language, with and without spaces."""
    cut = cut_of(model)
    for name in KEPT[model]:
        assert all(check(cut, text) for text in texts_of(name))
    draw, words = random.Random(1), words_of(KEPT[model][0])
    assert sum(check(cut, " " + " ".join(draw.choices(words, k=4))) for _ in range(300)) > 100
    for language, space in itertools.product(LANGUAGES, (" ", "", "\n", "  ", "\t")):
        for _ in range(2):
            check(cut, space.join(draw.choices(words_of(language), k=8)))


@MODEL
def test_every_kept_token_stays_reachable(model: str) -> None:
    """By the word of the library's model: what made itself of its own text before does so still."""
    cut, reached = cut_of(model), 0
    for index in cut.kept:
        token = cut.must.vocabulary.by_id[index]
        if token in cut.must.vocabulary.tokens and [each.value for each in cut.base.model.tokenize(token)] == [token]:
            assert [each.value for each in cut.smaller.model.tokenize(token)] == [token]
            reached += 1
    assert reached > len(cut.kept) * 0.6


@pytest.mark.parametrize(("model", "language"), [("smollm2-135m-instruct", "en"), ("gemma-3-270m", "de")])
def test_coverage_that_is_promised_of_unseen_text_holds_on_the_evaluation_split(
    model: str, language: str, tmp_path: Path
) -> None:
    """From the 24 documents that ship; the model's probabilities are left out, so that none has to run."""
    base, name = base_of(model), CorpusName("language", language)
    own, of = (
        Tokenizer.from_str(json.dumps(essentials(base).vocabulary.data)),
        vocabulary_rows(base.checkpoint, base.family),
    )
    documents = [own.encode(text).ids for text in texts_of(language)]
    counts = csr_array(np.array([np.bincount(ids, minlength=of) for ids in documents]))
    profile = counted_profile(tmp_path, language, of, documents, folds_of_similar(counts).tolist())
    data = {"name": "n", "base": model, "dimensions": {"language": language}, "general": [],
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


@MODEL
def test_the_cut_model_has_the_bases_logits_and_its_greedy_text_up_to_a_dropped_row(model: str, tmp_path: Path) -> None:
    """In float32 and plain transformers; the first token that differs is one that was dropped."""
    base = base_of(model)
    name = KEPT[model][0]
    own = AutoTokenizer.from_pretrained(base.folder)
    prompts = [own(text[:120])["input_ids"] for text in texts_of(name)[:3]]
    ids = [*prompts, *(own(text)["input_ids"] for text in texts_of(name))]  # a prompt may end within a word
    must = essentials(base)
    rows = tuple(sorted(must.vocabulary.closed(must.ids.union(*ids))))
    vocabulary = VocabularyPlan(KeptRows(vocabulary_rows(base.checkpoint, base.family), rows), base.tokenizer_digest)
    plan = replace(plan_of(base, [shape.all_kept for shape in base.layers]), vocabulary=vocabulary)
    (tmp_path / "expert").mkdir()
    prune(plan, base, tmp_path / "expert")
    dense, expert = load(base.folder), load(tmp_path / "expert")
    new = {index: place for place, index in enumerate(rows)}
    found = AutoTokenizer.from_pretrained(tmp_path / "expert")(texts_of(name)[0])["input_ids"]
    assert found == [new[index] for index in own(texts_of(name)[0])["input_ids"]]
    agreed = 0
    for prompt in prompts:
        mapped = torch.tensor([[new[index] for index in prompt]])
        expected = logits_of(dense, torch.tensor([prompt]))[..., list(new)]
        torch.testing.assert_close(logits_of(expert, mapped), expected, rtol=1e-5, atol=1e-5)
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
        text = dense.generate(torch.tensor([prompt]), **options)[0].tolist()
        found = expert.generate(mapped, **options)[0].tolist()
        same = next((place for place, index in enumerate(text) if index not in new), len(text))
        agreed += same - len(prompt)
        assert found[:same] == [new[index] for index in text[:same]]
    assert agreed > 5
