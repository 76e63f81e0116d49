"""What a spec names is found once, checked once, and not changed afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.arch import family_of
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.evaluation.measure import group_of
from expertprune.models.checkpoint import Checkpoint
from expertprune.spec.reading import parse_spec
from expertprune.stages.evaluate import measuring
from expertprune.stages.outlook import notes
from expertprune.stages.validate import find
from tests.oracle import stored_tensors
from tests.patching import everywhere
from tests.tiny import save_tiny, write_corpus

Data = dict[str, Any]

EN = "corpora.sources.en"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{EN}.path": "no.jsonl"}, rf"{EN}\.path: .*/no\.jsonl: no such file"),
        ({f"{EN}.evaluation": "no.jsonl"}, rf"{EN}\.evaluation: .*/no\.jsonl: no such file"),
        ({f"{EN}.questions": "no.jsonl"}, rf"{EN}\.questions: .*/no\.jsonl: no such file"),
        ({"relevance.criterion": "fihser"}, r"relevance\.criterion: unknown criterion 'fihser'; did you mean 'fisher'"),
        ({"budget.ffn": 0.9999}, r"budget\.ffn: 0\.9999 is too much .*; the largest legal one is"),
        ({"budget.vocabulary": {"keep": 64}}, r"budget\.vocabulary: .*tokenizer\.json: a WordLevel tokenizer cannot"),
        ({"budget.floor": 1}, r"budget\.ffn: nothing can be removed from 32 neurons .*; lower budget\.floor"),
        ({"evaluate.metrics": ["questions"]}, r"evaluate\.metrics: no corpus has questions, so nothing is measured"),
        ({"base.model": "./nowhere"}, r"base\.model: .*/nowhere: no such folder"),
        ({"budget": {"retention": {"expert": 0.9}}, "relevance.criterion": "reap"}, ".*reap does not score ffn"),
        ({"base.revision": "main"}, r"base\.revision: goes with a hub id only"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_file_and_key(spec_file: Path, changes: Data, told: str) -> None:
    with pytest.raises((SpecError, PlanError, CheckpointError)) as caught:
        expertprune.validate(spec_file, changes)
    assert re.fullmatch(rf"{spec_file}: {told}.*", str(caught.value))  # one line


def test_a_plan_is_named_where_its_corpus_or_base_is_gone(spec_data: Data, tmp_path: Path) -> None:
    path, plan = write_corpus(tmp_path / "moved.jsonl", seed=20), tmp_path / "plan.json"
    spec_data["corpora"]["sources"]["en"] = {"path": str(path)}
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(plan)
    data = json.loads(plan.read_text())
    data["base"]["digest"] = "f" * 64
    data["spec"]["budget"]["ffn"] = 0.9999
    (tmp_path / "another.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="digest ffffffffffff"):
        expertprune.prune(tmp_path / "another.json", tmp_path / "expert")
    path.unlink()
    with pytest.raises(SpecError, match=rf"^{plan}: {EN}\.path: .*/moved\.jsonl: no such file"):
        expertprune.prune(plan, tmp_path / "expert")


def test_sizes_are_of_the_units_that_an_edited_plan_keeps(spec_data: Data, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(path)
    data = json.loads(path.read_text())
    data["layers"][0]["kept"]["ffn"] = "0-15"
    path.write_text(json.dumps(data))
    folder = expertprune.prune(path, tmp_path / "expert")
    told = expertprune.inspect(str(folder))
    assert told["parameters"]["after"] == sum(tensor.numel() for tensor in stored_tensors(folder).values())
    assert told["plan"]["budget"]["ffn"]["kept"] == [16, 24, 24]
    assert "Its layers have widths of their own" in (folder / "README.md").read_text()


def test_a_plan_whose_edited_layers_an_engine_does_not_read_is_refused(spec_data: Data, tmp_path: Path) -> None:
    spec_data["base"] = str(save_tiny(tmp_path / "base", "olmo2"))
    path = tmp_path / "plan.json"
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(path)
    data = json.loads(path.read_text())
    data["layers"][0]["kept"]["ffn"] = "0-15"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"^{path}: vLLM serves no layers of different widths of family 'olmo2'"):
        expertprune.prune(path, tmp_path / "expert")


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_whole_layers_alone_go_from_an_expert_whose_layers_differ(spec_data: Data, tmp_path: Path, family: str) -> None:
    """`allocation: uniform` is about what is cut inside layers; what cannot load such layers is refused all the same."""
    spec_data |= {"base": str(save_tiny(tmp_path / "base", family)), "serve_with": ["transformers"]}
    path, layers = tmp_path / "plan.json", {"budget": {"layers": 1}, "compose.allocation": "uniform"}
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(path)
    data = json.loads(path.read_text())
    for layer, kept in enumerate(("0-15", "0-7")):
        data["layers"][layer]["kept"]["ffn"] = kept
    path.write_text(json.dumps(data))
    base = {"base": str(expertprune.prune(path, tmp_path / "expert"))}
    spec = parse_spec(spec_data | base, "spec", tmp_path, layers)
    (gone,) = expertprune.compose(spec).gone
    left = Checkpoint(expertprune.build(spec, tmp_path / "smaller")).config
    widths = [shape.ffn for shape in family_of(family).layer_shapes(left)]
    assert widths == [ffn for n, ffn in enumerate((16, 8, 24)) if n != gone]
    with pytest.raises(PlanError, match=r"have different widths, so the same cut cannot be made in all of them"):
        expertprune.validate(spec, {"budget": {"ffn": 0.5, "layers": 1}})
    with_vllm = {"serve_with": ["vllm"], "compose.allocation": "auto"}
    if family == "olmo2":
        with pytest.raises(
            PlanError, match=r"and this base has such layers itself: leave this engine out of serve_with"
        ):
            expertprune.validate(spec, with_vllm)
    else:
        assert expertprune.validate(spec, with_vllm)


def test_layers_that_an_edited_plan_takes_are_checked_as_chosen_ones_are(
    spec_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*about: Any) -> None:
        raise PlanError(f"layers {about[3]}")

    path = tmp_path / "plan.json"
    expertprune.compose(parse_spec(spec_data, "spec", tmp_path)).save(path)
    data = json.loads(path.read_text())
    data["layers"][1]["kept"] = None
    path.write_text(json.dumps(data))
    everywhere(monkeypatch, "expertprune.models.depth.check_kinds", refuse)
    with pytest.raises(PlanError, match=rf"^{path}: layers .1"):
        expertprune.prune(path, tmp_path / "expert")


def test_a_source_that_nothing_names_is_told(spec_data: Data, tmp_path: Path) -> None:
    spec_data["corpora"]["sources"]["clinic-notes"] = {"path": "/nowhere.jsonl"}
    prepared = expertprune.validate(parse_spec(spec_data, "spec", tmp_path))
    assert [
        note for note in notes(prepared) if "clinic-notes: no dimension, general or evaluate.others names it" in note
    ]


def test_a_budget_that_removes_nothing_is_told(spec_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    expertprune.validate(spec_file)
    assert "removes nothing" not in caplog.text
    expertprune.validate(spec_file, {"budget.ffn": 0})
    assert "budget: removes nothing" in caplog.text


def test_texts_longer_than_the_base_was_made_for_are_told(
    spec_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec_data["base"] = str(save_tiny(tmp_path / "short", max_position_embeddings=12))
    spec = parse_spec(spec_data, "spec", tmp_path, {"calibration.max_tokens": 12})
    found = find(spec, tmp_path / "store")
    assert "max_position_embeddings" not in caplog.text
    measuring(found.running, found.evaluated, spec.evaluate, other_tokens=False)
    for corpus in found.evaluated:
        longer = sum(len(document.text.split()) > 12 for document in corpus.evaluation)
        assert 0 < longer < 4
        assert f"corpus {corpus.name}: {longer} of 4 texts have more tokens than the base was made for" in caplog.text
    caplog.clear()
    find(parse_spec(spec_data, "spec", tmp_path), tmp_path / "store")
    assert "lower calibration.max_tokens" in caplog.text


def test_other_corpora_are_measured_apart(spec_data: Data, store: Path, tmp_path: Path) -> None:
    sources = spec_data["corpora"]["sources"]
    sources["spare"] = {"path": str(write_corpus(tmp_path / "spare.jsonl", seed=20))}
    spec = parse_spec(spec_data, "spec", tmp_path, {"evaluate.others": ["spare"], "evaluate.corpora": ["en"]})
    found = find(spec, store)
    assert [group_of(corpus) for corpus in found.evaluated] == ["expert", "other"]
    assert found.evaluated[1].evaluation
    assert "spare" not in {name.value for name in found.calibration}
    sources["spare"]["evaluation"] = sources["en"]["path"]  # what calibrates measures nothing
    with pytest.raises(SpecError, match=r"corpus other/spare: .* also calibrate the expert"):
        find(parse_spec(spec_data, "spec", tmp_path, {"evaluate.others": ["spare"]}), store)


def test_mixtures_get_what_their_configs_can_say_and_passes_can_reach(tmp_path: Path, spec_data: Any) -> None:
    """For transformers alone, a config has one number of routed experts for all layers."""
    spec_data |= {"base": str(save_tiny(tmp_path / "olmoe", "olmoe")), "budget": {"experts": 2}, "relevance": "fisher"}
    alone = {"serve_with": ["transformers"], "compose": {"allocation": "auto"}, "compensation": "none"}
    prepared = expertprune.validate(parse_spec({**spec_data, **alone}, "here", tmp_path))
    assert prepared.spec.compose.allocation == "uniform"
    spec_data["relevance"] = {"criterion": "regional", "experts": "fisher"}
    with pytest.raises(SpecError, match="regional needs the regional pass, which is not made through routed experts"):
        expertprune.validate(parse_spec(spec_data, "here", tmp_path))
