"""From plan and base to the expert's folder: nothing lost, nothing written that should not be."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import LayerPlan, Plan, VocabularyPlan
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.rows import essentials
from expertprune.composition.widths import LayerWidths
from expertprune.errors import CheckpointError, PlanError
from expertprune.files import staged_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import INDEX, Checkpoint
from expertprune.models.inventory import vocabulary_rows
from expertprune.pruning.repair import Repair
from expertprune.pruning.write import RepairInput, bytes_needed, check_plan, prune
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Compensation
from expertprune.units import KeptRows
from tests import oracle
from tests.oracle import contents, plan_of, pruned, random_plan, read_json, resolved
from tests.patching import everywhere
from tests.pruning.cutting import tiny_base
from tests.tiny import save_tiny, tiny_tokenizer
from tests.vocabularies import KINDS, save_worded, worded_spec


@pytest.fixture
def base(tiny_llama: Path, store: Path) -> ResolvedBase:
    return resolved(tiny_llama, store)


@pytest.mark.parametrize(
    ("family", "shards", "with_repair"),
    [("qwen2", "20KB", True), ("mixtral", "20KB", False), ("qwen3_moe", "1GB", True)],
)
def test_nothing_cut_gives_the_base_byte_for_byte(family: str, shards: str, with_repair: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", family, shards)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = folder / "config.json"
    config.write_text(json.dumps(read_json(config), indent=1, sort_keys=False))  # not as we would write it
    oracle.pad_headers(folder)
    base = resolved(folder, tmp_path / "store")
    plan = plan_of(base, [shape.all_kept for shape in base.layers])
    # A model that cannot run: nothing needs repair, so it must not be touched.
    repair_input = RepairInput(None, [], Compensation(ridge=20)) if with_repair else None
    assert contents(pruned(plan, base, tmp_path / "expert", repair_input)) == contents(folder)


def test_budget_zero_gives_the_base_byte_for_byte(
    spec_data: dict[str, Any], tmp_path: Path, base: ResolvedBase
) -> None:
    spec_data["budget"] = {"ffn": 0, "query_heads": 0, "kv_groups": 0}
    plan = expertprune.compose(parse_spec(spec_data, "spec", tmp_path))
    assert not plan.cuts_layers
    assert plan.vocabulary is None
    assert contents(pruned(plan, base, tmp_path / "expert")) == contents(base.folder)


def test_a_plan_fits_its_base_and_copies_of_it_alone(base: ResolvedBase, tmp_path: Path) -> None:
    moved, changed = (Path(shutil.copytree(base.folder, tmp_path / name)) for name in ("moved", "changed"))
    plan = random_plan(base, ffn=20)
    check_plan(plan, resolved(moved, tmp_path / "store"))
    oracle.change_config(changed, rms_norm_eps=1e-3)
    other = save_tiny(tmp_path / "other", seed=1)
    edited = replace(plan, shapes=[replace(shape, ffn=33) for shape in plan.shapes])
    for wrong, problem in (
        (random_plan(resolved(other, tmp_path / "store"), ffn=20), "was made for .*for this base"),
        (random_plan(resolved(changed, tmp_path / "store"), ffn=20), "was made for .*for this base"),
        (edited, "was edited: .*compose it again"),
    ):
        with pytest.raises(PlanError, match=problem):
            check_plan(wrong, base)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path, num_key_value_heads=6)
    plan = random_plan(base)
    one = replace(plan.layers[1].kept, query_heads=(0, 1, 2, 4, 5), kv_groups=(0, 1, 2, 4, 5))
    with pytest.raises(PlanError, match="5 query heads do not divide"):
        pruned(replace(plan, layers=[plan.layers[0], LayerPlan(one), plan.layers[2]]), base, tmp_path / "uneven")
    free = bytes_needed(plan, base) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(CheckpointError, match=r"expert: needs .* MiB of disk, .* MiB are free"):
        pruned(plan, base, tmp_path / "expert")
    assert [*(tmp_path / "uneven").iterdir(), *(tmp_path / "expert").iterdir()] == []


def test_failure_midway_leaves_no_folder_and_keeps_the_expert_that_was_there(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files makes the real writer fail, as a full disk would, at the third shard."""
    (pruned(random_plan(base, ffn=20), base, tmp_path / "expert") / "expertprune.json").write_text("{}")
    before, paths = contents(tmp_path / "expert"), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def written(path: Path, *arguments: Any) -> Any:
        paths.append(path)
        if len(paths) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        return write(path, *arguments)

    write = everywhere(monkeypatch, "expertprune.models.shards.written_file", written)
    for out in (tmp_path / "new" / "expert", tmp_path / "expert"):
        paths.clear()
        try:
            with (
                pytest.raises(CheckpointError, match="no room left on the disk"),
                staged_folder(out, overwrite=True) as at,
            ):
                prune(random_plan(base, ffn=12), base, at)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(paths) == 3
    assert contents(tmp_path / "expert") == before
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name not in ("expert", "new")]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_repair_must_be_finite(base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, bad = "model.layers.0.mlp.down_proj.weight", torch.full((24, 20), 1.0)
    bad[3, 4] = float("nan")
    method = Repair("bad", lambda *arguments: iter([(name, bad)]), runs_model=True)
    everywhere(monkeypatch, "expertprune.pruning.repair.check_repair", lambda _: method)
    with pytest.raises(CheckpointError, match=rf"{name}: the repair is not finite; raise compensation\.ridge"):
        pruned(random_plan(base, ffn=20), base, tmp_path / "expert", RepairInput(None, [], Compensation(ridge=20)))


def test_other_files_are_carried_unchanged(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", max_shard_size="20KB")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {  # transformers stores all but the default one in a folder of their own
        "default": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "tool_use": "tools: {{ messages }}",
    }
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (folder / "LICENSE").write_text("Apache")
    (folder / "licence.html").write_text("<p>Apache</p>")
    (folder / "Mine.HTM").write_text('<meta name="generator" content="expertprune report">')
    (folder / "README.md").write_text("the base's card")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    base = resolved(folder, tmp_path / "store")
    expert = pruned(random_plan(base, ffn=20), base, tmp_path / "expert")
    carried = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "licence.html",
               "chat_template.jinja",
               "additional_chat_templates/tool_use.jinja"}  # fmt: skip
    before, after = contents(folder), contents(expert)
    assert {name: after[name] for name in carried} == {name: before[name] for name in carried}
    assert set(after) == carried | {"config.json", "model.safetensors.index.json", *base.checkpoint.shards}
    assert AutoTokenizer.from_pretrained(expert).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("family", "heads"), [("llama", (1, 2)), ("qwen2", (2, 3)), ("qwen2", (1, 2))])
def test_parameters_that_a_budget_promises_are_written(family: str, heads: tuple[int, int], tmp_path: Path) -> None:
    base = tiny_base(tmp_path, family)
    plan = random_plan(base, ffn=20, heads_per_group=heads[0], kv_groups=heads[1])
    expert = resolved(pruned(plan, base, tmp_path / "expert"), tmp_path / "store")
    gone = removed_parameters(base, [LayerWidths(20, *heads)] * len(base.layers))
    assert expert.checkpoint.parameters == base.checkpoint.parameters - gone


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def plan_with_rows(base: ResolvedBase, kept: set[int], padding: tuple[int, ...] = (), **widths: int) -> Plan:
    """A plan that keeps these tokens with what they need, and so many random units of each layer."""
    must = essentials(base)
    rows = tuple(sorted(must.vocabulary.closed(kept | must.ids)))
    of = vocabulary_rows(base.checkpoint, base.family)
    vocabulary = VocabularyPlan(KeptRows(of, rows, padding), base.tokenizer_digest)
    return replace(random_plan(base, **widths), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("kind", "family", "tied"),
    [
        *((kind, "llama", bool(number % 2)) for number, kind in enumerate(KINDS)),
        *(("sentencepiece", family, True) for family in ("gemma3", "starcoder2", "mixtral")),
    ],
)
def test_logits_of_kept_rows_are_the_bases(kind: str, family: str, tied: bool, tmp_path: Path) -> None:
    """In plain transformers, from text: tokens mapped, and logits to 1e-5; with neurons cut as well."""
    base = resolved(save_worded(tmp_path / "base", kind, family, tie_word_embeddings=tied), tmp_path / "store")
    text = "Der Arzt hört das Herz 345"
    own = AutoTokenizer.from_pretrained(base.folder)(text)["input_ids"]
    dense = oracle.exact(base.folder)
    plan = plan_with_rows(base, set(own), padding=(3, 3, 5), ffn=16)
    assert plan.vocabulary is not None
    kept = list(plan.vocabulary.rows.kept)
    folder = pruned(plan, base, tmp_path / "expert")
    found = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert [kept[index] for index in found] == own
    expert = oracle.exact(folder)
    logits = oracle.logits_of(expert, torch.tensor([found]))
    assert logits.shape[-1] == len(kept) + 3 == expert.config.vocab_size
    oracle.assert_same(logits[..., : len(kept)], oracle.masked_logits(dense, plan, torch.tensor([own]))[..., kept])
    for name in ("eos_token_id", "pad_token_id"):
        assert kept[getattr(expert.config, name)] == getattr(dense.config, name)


def test_only_what_names_rows_or_ids_changes(tmp_path: Path) -> None:
    """Of a head with a bias, which no listed family has: the checkpoint gets it after it was found to fit its model."""
    folder = save_worded(tmp_path / "base", tie_word_embeddings=False)
    base, index = resolved(folder, tmp_path / "store"), read_json(folder / INDEX)
    file = index["weight_map"]["lm_head.bias"] = index["weight_map"]["lm_head.weight"]
    save_file(
        load_file(folder / file) | {"lm_head.bias": torch.arange(512.0)}, folder / file, metadata={"format": "pt"}
    )
    (folder / INDEX).write_text(json.dumps(index))
    base = replace(base, checkpoint=Checkpoint(folder))
    plan = plan_with_rows(base, set(range(0, 300, 5)), padding=(410,))
    assert plan.vocabulary is not None
    out, kept = pruned(plan, base, tmp_path / "expert"), list(plan.vocabulary.rows.index)
    before, after = oracle.stored_tensors(folder), oracle.stored_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
        assert torch.equal(after[name], tensor[kept] if rows else tensor), name
    old, new = read_json(folder / "config.json"), read_json(out / "config.json")
    ids = {"vocab_size", "eos_token_id", "bos_token_id", "pad_token_id"}
    assert {key for key in old if old[key] != new[key]} <= ids
    assert new["vocab_size"] == len(kept)


def test_a_token_that_only_the_settings_name_keeps_its_row(tmp_path: Path) -> None:
    folder = save_worded(tmp_path / "base")
    settings = read_json(folder / "tokenizer_config.json") | {"extra_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    base = resolved(folder, tmp_path / "store")
    plan = plan_with_rows(base, set(range(100)))
    assert plan.vocabulary is not None
    out = pruned(plan, base, tmp_path / "expert")
    ids = [AutoTokenizer.from_pretrained(each).convert_tokens_to_ids("<|im_end|>") for each in (folder, out)]
    assert plan.vocabulary.rows.kept[ids[1]] == ids[0]


def test_a_plan_for_another_tokenizer_or_without_parts_is_refused(tmp_path: Path) -> None:
    base = resolved(save_worded(tmp_path / "base"), tmp_path / "store")
    plan = plan_with_rows(base, set(range(300)))
    assert plan.vocabulary is not None
    plan = replace(plan, vocabulary=replace(plan.vocabulary, tokenizer="another"))
    with pytest.raises(PlanError, match="another tokenizer"):
        check_plan(plan, base)
    must = essentials(base)
    token = max(must.vocabulary.tokens.values(), key=lambda index: len(must.vocabulary.needs(index) - must.ids))
    rows = tuple(sorted(must.ids | {token}))
    plan = replace(plan, vocabulary=VocabularyPlan(KeptRows(512, rows), base.tokenizer_digest))
    with pytest.raises(PlanError, match="without the parts"):
        pruned(plan, base, tmp_path / "expert")
    assert list((tmp_path / "expert").iterdir()) == []


@torch.no_grad()
def _bits_per_byte(folder: Path, tmp_path: Path) -> float:
    """One document after the other, through the whole model: bits of all tokens but the first, the BOS, over all bytes."""
    model, tokenizer = oracle.load(folder), AutoTokenizer.from_pretrained(folder)
    bits, size = 0.0, 0
    for line in (tmp_path / "spec" / "de.evaluation.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        each = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
        bits -= float(each.sum()) / torch.log(torch.tensor(2.0)).item()
        size += len(text.encode())
    return bits / size


def test_an_expert_is_built_and_evaluated_with_its_own_tokenizer(tmp_path: Path) -> None:
    base = save_worded(tmp_path / "base")
    questions = [{"question": "Wer liest?", "choices": ["der Arzt", "das Gesetz"], "answer": 0}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    data = worded_spec(base, tmp_path / "spec", {"vocabulary": {"keep": 384}, "ffn": 0.25, "query_heads": 3})
    data["corpora"]["sources"]["de"]["questions"] = str(tmp_path / "questions.jsonl")
    spec = parse_spec(data, "spec", tmp_path)
    folder = expertprune.build(spec, tmp_path / "expert")
    about = Expert.load(folder).document()
    assert about["parameters"]["after"] == sum(tensor.numel() for tensor in oracle.stored_tensors(folder).values())
    assert len(AutoTokenizer.from_pretrained(folder)) <= 384 == oracle.load(folder).config.vocab_size
    result = about["evaluation"]["corpora"]["language/de"]
    assert set(result["metrics"]) == {"bits_per_byte", "questions"}
    assert result["metrics"]["bits_per_byte"]["expert"] == pytest.approx(_bits_per_byte(folder, tmp_path), rel=1e-4)
    assert result["metrics"]["bits_per_byte"]["base"] == pytest.approx(_bits_per_byte(base, tmp_path), rel=1e-4)
    assert all(each["expert_tokens"] >= each["tokens"] for each in result["per_document"])
    assert "| vocabulary rows, of the whole model | 384 | 512 |" in (folder / "README.md").read_text()
    expertprune.evaluate(folder)
    assert Expert.load(folder).document()["evaluation"]["corpora"]["language/de"]["metrics"] == result["metrics"]
    expertprune.compose(spec).save(tmp_path / "plan.json")
    applied = expertprune.prune(tmp_path / "plan.json", tmp_path / "applied")
    built, said = contents(folder), ("expertprune.json", "README.md")
    assert all(built[name] == content for name, content in contents(applied).items() if name not in said)
