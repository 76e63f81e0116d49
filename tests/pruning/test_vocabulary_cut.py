"""Experts with a smaller vocabulary against their base: the same logits on the rows that stay, the same greedy text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan, VocabularyPlan
from expertprune.composition.rows import essentials
from expertprune.errors import PlanError
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.inventory import vocabulary_rows
from expertprune.pruning.write import check_plan, prune
from expertprune.reporting import explain as inspection
from expertprune.spec.reading import parse_spec
from expertprune.units import KeptRows
from tests import oracle
from tests.oracle import (
    assert_same,
    contents,
    exact,
    load,
    logits_of,
    masked_logits,
    read_json,
    resolved,
    stored_tensors,
)
from tests.tiny import FAMILIES
from tests.vocabularies import KINDS, save_worded, worded_spec


def plan_of(base: ResolvedBase, kept: set[int], padding: tuple[int, ...] = (), ffn: int | None = None) -> Plan:
    """A plan that keeps these tokens with what they need, and the last `ffn` neurons of each layer or expert."""
    must = essentials(base)
    rows = tuple(sorted(must.vocabulary.closed(kept | must.ids)))
    of = vocabulary_rows(base.checkpoint, base.family)
    vocabulary = VocabularyPlan(KeptRows(of, rows, padding), base.tokenizer_digest)
    units = []
    for shape in base.layers:
        last = range(shape.ffn - (ffn or shape.ffn), shape.ffn)
        neurons = tuple(expert * shape.ffn + place for expert in range(max(1, shape.experts)) for place in last)
        units.append(replace(shape.all_kept, ffn=neurons))
    return replace(oracle.plan_of(base, units), vocabulary=vocabulary)


def cut(base: ResolvedBase, plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    prune(plan, base, folder)
    return folder


def mapped(plan: Plan, ids: list[int]) -> list[int]:
    assert plan.vocabulary is not None
    new = {index: place for place, index in enumerate(plan.vocabulary.rows.kept)}
    return [new[index] for index in ids]


@pytest.mark.parametrize(
    ("kind", "family", "tied"),
    [
        *((kind, "llama", tied) for kind, tied in (("byte_level", True), ("sentencepiece", False), ("unigram", False))),
        *(("sentencepiece", family, bool(number % 2)) for number, family in enumerate(FAMILIES) if family != "llama"),
    ],
)
def test_logits_of_kept_rows_are_the_bases(kind: str, family: str, tied: bool, tmp_path: Path, store: Path) -> None:
    """In plain transformers, from text: tokens mapped, and logits to 1e-5; with neurons cut as well."""
    base = resolved(save_worded(tmp_path / "base", kind, family, tie_word_embeddings=tied), store)
    text = "Der Arzt hört das Herz 345"
    own = AutoTokenizer.from_pretrained(base.folder)(text)["input_ids"]
    dense = exact(base.folder)
    for number, ffn in enumerate((None, 16)):
        plan = plan_of(base, set(own), padding=(3, 3, 5), ffn=ffn)
        assert plan.vocabulary is not None
        folder = cut(base, plan, tmp_path / f"expert-{number}")
        found = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert found == mapped(plan, own)
        expert = exact(folder)
        kept = list(plan.vocabulary.rows.kept)
        expected = masked_logits(dense, plan, torch.tensor([own]))[..., kept]
        logits = logits_of(expert, torch.tensor([found]))
        assert logits.shape[-1] == len(kept) + 3 == expert.config.vocab_size
        assert_same(logits[..., : len(kept)], expected)
        assert expert.config.eos_token_id == mapped(plan, [dense.config.eos_token_id])[0]
        assert expert.config.pad_token_id == mapped(plan, [dense.config.pad_token_id])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_names_rows_or_ids_changes(kind: str, tmp_path: Path, store: Path) -> None:
    base = resolved(save_worded(tmp_path / "base", kind, tie_word_embeddings=False), store)
    plan = plan_of(base, set(range(0, 150, 2)))
    assert plan.vocabulary is not None
    folder = cut(base, plan, tmp_path / "expert")
    before, after = stored_tensors(base.folder), stored_tensors(folder)
    assert before.keys() == after.keys()
    kept = list(plan.vocabulary.rows.kept)
    for name, tensor in before.items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name], tensor[kept] if rows else tensor), name
    old, new = read_json(base.folder / "config.json"), read_json(folder / "config.json")
    ids = {"vocab_size", "eos_token_id", "bos_token_id", "pad_token_id"}
    assert {key for key in old if old[key] != new[key]} <= ids
    assert new["vocab_size"] == len(kept)


def test_a_bias_of_the_head_loses_its_rows(tmp_path: Path, store: Path) -> None:
    """No listed family has one, so the checkpoint gets it after it was found to fit its model."""
    folder = save_worded(tmp_path / "base", tie_word_embeddings=False)
    base = resolved(folder, store)
    index = read_json(folder / "model.safetensors.index.json")
    bias: Tensor = torch.arange(512.0)
    file = index["weight_map"]["lm_head.weight"]
    save_file(load_file(folder / file) | {"lm_head.bias": bias}, folder / file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.bias"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base = replace(base, checkpoint=Checkpoint(folder))
    plan = plan_of(base, set(range(0, 300, 5)), padding=(410,))
    assert plan.vocabulary is not None
    found = stored_tensors(cut(base, plan, tmp_path / "expert"))["lm_head.bias"]
    assert found.tolist() == [float(index) for index in plan.vocabulary.rows.index]


def test_a_plan_for_another_tokenizer_or_without_parts_is_refused(tmp_path: Path, store: Path) -> None:
    base = resolved(save_worded(tmp_path / "base"), store)
    plan = plan_of(base, set(range(300)))
    assert plan.vocabulary is not None
    plan = replace(plan, vocabulary=replace(plan.vocabulary, tokenizer="another"))
    with pytest.raises(PlanError, match="another tokenizer"):
        check_plan(plan, base)
    must = essentials(base)
    token = max(must.vocabulary.tokens.values(), key=lambda index: len(must.vocabulary.needs(index) - must.ids))
    rows = tuple(sorted(must.ids | {token}))
    plan = replace(plan, vocabulary=VocabularyPlan(KeptRows(512, rows), base.tokenizer_digest))
    with pytest.raises(PlanError, match="without the parts"):
        prune(plan, base, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "base"]


# --- all stages -----------------------------------------------------------------------------------------------------


def test_an_expert_is_built_and_evaluated_with_its_own_tokenizer(tmp_path: Path, store: Path) -> None:
    budget = {"vocabulary": {"keep": 384}, "ffn": 0.25, "query_heads": 3}
    base = save_worded(tmp_path / "base")
    questions = [{"question": "Wer liest?", "choices": ["der Arzt", "das Gesetz"], "answer": 0}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    data = worded_spec(base, tmp_path / "spec", budget)
    data["corpora"]["sources"]["de"]["questions"] = str(tmp_path / "questions.jsonl")
    folder = expertprune.build(parse_spec(data, "spec", tmp_path), tmp_path / "expert")
    about = Expert.load(folder).document()
    assert about["parameters"]["after"] == sum(tensor.numel() for tensor in stored_tensors(folder).values())
    assert len(AutoTokenizer.from_pretrained(folder)) <= 384
    assert load(folder).config.vocab_size == 384
    result = about["evaluation"]["corpora"]["language/de"]
    assert set(result["metrics"]) == {"bits_per_byte", "questions"}
    assert result["metrics"]["bits_per_byte"]["expert"] == pytest.approx(_bits_per_byte(folder, tmp_path), rel=1e-4)
    assert result["metrics"]["bits_per_byte"]["base"] == pytest.approx(_bits_per_byte(base, tmp_path), rel=1e-4)
    assert all(each["expert_tokens"] >= each["tokens"] for each in result["per_document"])
    expertprune.evaluate(folder)
    assert Expert.load(folder).document()["evaluation"]["corpora"]["language/de"]["metrics"] == result["metrics"]
    card = (folder / "README.md").read_text()
    assert "| vocabulary rows, of the whole model | 384 | 512 |" in card
    assert inspection.explain(inspection.read(folder))


@torch.no_grad()
def _bits_per_byte(folder: Path, tmp_path: Path) -> float:
    """One document after the other, through the whole model: bits of all tokens but the first, the BOS, over all bytes."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    bits, size = 0.0, 0
    for line in (tmp_path / "spec" / "de.evaluation.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        each = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
        bits -= float(each.sum()) / torch.log(torch.tensor(2.0)).item()
        size += len(text.encode())
    return bits / size


def test_a_plan_with_rows_gives_the_same_expert_as_the_build(tmp_path: Path, store: Path) -> None:
    data = worded_spec(save_worded(tmp_path / "base"), tmp_path / "spec", {"vocabulary": {"keep": 320}, "ffn": 0.25})
    spec = parse_spec({**data, "evaluate": {"enabled": False}}, "spec", tmp_path)
    built = expertprune.build(spec, tmp_path / "built")
    expertprune.compose(spec).save(tmp_path / "plan.json")
    applied = expertprune.prune(tmp_path / "plan.json", tmp_path / "applied")
    one, other = contents(built), contents(applied)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
