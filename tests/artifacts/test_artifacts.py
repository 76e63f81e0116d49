"""Files between stages: written whole, read back equal, and refused with a reason where they are damaged."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from expertprune.artifacts import profile as profiles
from expertprune.artifacts.plan import (
    BaseReference,
    KindCount,
    LayerPlan,
    Parameters,
    Plan,
    RowReasons,
    StructureBudget,
    UnitReasons,
    UnseenCoverage,
    VocabularyPlan,
    load_plan,
)
from expertprune.artifacts.profile import Profile, ProfileKey, save_profile
from expertprune.errors import CheckpointError, PlanError
from expertprune.spec.values import Coverage
from expertprune.units import KeptRows, KeptUnits, LayerShape, format_indices, parse_indices

SHAPE = LayerShape(hidden=8, ffn=6, query_heads=6, kv_heads=3, head_dim=2)


def a_plan() -> Plan:
    kept = [KeptUnits((0, 1, 2, 5), (0, 5), (0, 2)), KeptUnits((1, 3, 4, 5), (3, 4), (1, 2))]
    why = UnitReasons(threshold=0.1, protected={"language": 3, "general": 1}, shared=KindCount(units=6, kept=4))
    return Plan(
        name="made-up",
        base=BaseReference(model="nowhere/ünï", digest="d"),
        parameters=Parameters(before=1000, after=700),
        shapes=[SHAPE, SHAPE],
        layers=[LayerPlan(kept[0], {"ffn": why}), LayerPlan(kept[1])],
        budget={"ffn": StructureBudget(requested=2, of=6, kept=4, removed=2)},
        profiles={"language/en": "p"},
        spec={"name": "made-up", "dimensions": {"language": ["en"]}},
        vocabulary=VocabularyPlan(KeptRows(128, (0, 5, 9), (3,)), "t", a_reason()),
    )


def a_reason() -> RowReasons:
    return RowReasons(
        requested=Coverage(0.9),
        threshold=None,
        protected={"language": 3},
        coverage={"language/en": 0.97},
        unseen={"language/en": UnseenCoverage(estimate=0.95, low=0.91, high=0.99, documents=9, tokens=700)},
        tokens={"language/en": 800},
        last_kept=["a"],
        first_dropped=["ß"],
    )


# --- indices --------------------------------------------------------------------------------------------------------


@given(indices=st.sets(st.integers(0, 40)).map(sorted).map(tuple))
def test_indices_survive_their_text(indices: tuple[int, ...]) -> None:
    text = format_indices(indices)
    assert parse_indices(text) == indices
    gaps = sum(b != a + 1 for a, b in itertools.pairwise(indices))
    assert len(text.split()) == (gaps + 1 if indices else 0)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((), ""),
        ((7,), "7"),
        ((0, 1, 2, 5), "0-2 5"),
        ((3, 4), "3-4"),
        ((1, 3, 5), "1 3 5"),
        (tuple(range(100)), "0-99"),
    ],
)
def test_indices_are_written_as_runs(indices: tuple[int, ...], text: str) -> None:
    assert format_indices(indices) == text
    assert parse_indices(text) == indices


@pytest.mark.parametrize("text", ["2 1", "1 1", "0-3 3", "0-3 2-5", "a", "-1", "1-2-3", "1.5", "1,2", "0 - 3"])
def test_text_that_is_not_ascending_runs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not ascending|invalid literal"):
        parse_indices(text)


@pytest.mark.parametrize("text", ["5-3", "0-2 9-5", "0-"])
def test_runs_that_do_not_end_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not ascending|invalid literal"):
        parse_indices(text)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = a_plan()
    plan.save(tmp_path / "deep" / "plan.json")
    again = load_plan(tmp_path / "deep" / "plan.json")
    assert again == plan
    assert again.digest == plan.digest
    assert again.kept == [layer.kept for layer in plan.layers]


def test_a_plan_is_readable(tmp_path: Path) -> None:
    a_plan().save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert json.loads(text)["layers"][0]["kept"] == {"ffn": "0-2 5", "query_heads": "0 5", "kv_groups": "0 2"}
    assert "nowhere/ünï" in text
    assert text.count("\n") > 20


def test_a_plan_digest_covers_every_part() -> None:
    plan = a_plan()
    changed = [
        dataclasses.replace(plan, name="other"),
        dataclasses.replace(plan, base=BaseReference(model="elsewhere", digest="d")),
        dataclasses.replace(plan, spec={}),
        dataclasses.replace(plan, profiles={}),
        dataclasses.replace(plan, shapes=[SHAPE, dataclasses.replace(SHAPE, hidden=9)]),
        dataclasses.replace(plan, layers=plan.layers[::-1]),
        dataclasses.replace(plan, budget={}),
        dataclasses.replace(plan, parameters=Parameters(before=1000, after=701)),
        dataclasses.replace(plan, vocabulary=None),
    ]
    assert len(changed) == len(dataclasses.fields(Plan))
    assert len({plan.digest, *(other.digest for other in changed)}) == 1 + len(changed)
    assert a_plan().digest == plan.digest


def test_a_plan_that_keeps_everything_cuts_nothing() -> None:
    whole = dataclasses.replace(
        a_plan(), layers=[LayerPlan(SHAPE.all_kept), LayerPlan(SHAPE.all_kept)], vocabulary=None
    )
    assert whole.cuts_nothing
    assert not dataclasses.replace(whole, layers=[LayerPlan(SHAPE.all_kept), a_plan().layers[1]]).cuts_nothing


def keep(layer: int, **texts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["layers"][layer]["kept"].update(texts)


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def remove(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return remove


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "ragged groups": (keep(1, query_heads="2-4"), "layer 1: the query heads are not the same number in each kept"),
    "two heads of one group": (keep(0, query_heads="0-1"), "layer 0: the query heads are not the same number"),
    "a head of a group that is gone": (keep(0, query_heads="0 3"), "layer 0: the query heads are not the same"),
    "fewer heads than groups": (keep(0, query_heads="0"), "layer 0: the query heads are not the same"),
    "neuron out of range": (keep(0, ffn="0-6"), "layer 0: ffn must keep some of 0-5"),
    "head out of range": (keep(1, query_heads="3 6"), "layer 1: query_heads must keep some of 0-5"),
    "group out of range": (keep(0, kv_groups="0 3"), "layer 0: kv_groups must keep some of 0-2"),
    "no neuron": (keep(0, ffn=""), "layer 0: ffn must keep some of 0-5"),
    "no head": (keep(0, query_heads=""), "layer 0: query_heads must keep some"),
    "no group": (keep(0, kv_groups="", query_heads="0"), "layer 0: kv_groups must keep some"),
    "indices descend": (keep(0, ffn="5 0-2"), "indices are not ascending"),
    "an index twice": (keep(0, ffn="0-2 2"), "indices are not ascending"),
    "a negative index": (keep(0, ffn="-1"), "invalid literal"),
    "no indices at all": (keep(0, ffn="some"), "invalid literal"),
    "unknown structure": (keep(0, neurons="0"), "layers.0.kept.neurons: Extra inputs"),
    "routed experts of a layer that has none": (keep(0, experts="0"), "layer 0: experts must keep some of 0--1"),
    "structure missing": (without("layers", 0, "kept", "ffn"), "layers.0.kept.ffn: Field required"),
    "widths missing": (without("layers", 1, "of"), "of"),
    "one width missing": (without("layers", 1, "of", "hidden"), "hidden"),
    "unknown width": (lambda data: data["layers"][0]["of"].update(depth=3), "depth"),
    "a width that is text": (lambda data: data["layers"][0]["of"].update(ffn="6"), "layers.0.of.ffn: Input"),
    "no reasons": (without("layers", 0, "why"), "why"),
    "no layers": (without("layers"), "layers"),
    "layers are none": (lambda data: data.update(layers=None), "layers: Input should be a valid list"),
    "indices as a list": (keep(0, ffn=[0, 1, 2, 5]), "layers.0.kept.ffn: Input should be a valid string"),
    "kept is a list": (lambda data: data["layers"][0].update(kept=["0-2 5"]), "layers.0.kept: Input should be"),
    "a base that is text": (lambda data: data.update(base="nowhere"), "base: Input should be"),
    "parameters as text": (lambda data: data["parameters"].update(after="700"), "parameters.after: Input should be"),
    "a threshold as text": (
        lambda data: data["layers"][0]["why"]["ffn"].update(threshold="0.1"),
        "layers.0.why.ffn.threshold: Input should be a valid number",
    ),
    "a budget of no known form": (lambda data: data["budget"]["ffn"].update(requested="half"), "budget.ffn.requested"),
    "coverage as text": (
        lambda data: data["vocabulary"]["why"]["coverage"].update({"language/en": "all"}),
        "vocabulary.why.coverage.language/en: Input should be a valid number",
    ),
    "a row out of range": (lambda data: data["vocabulary"].update(padding=[128]), "rows must be some of 0-127"),
    **{f"no {key}": (without(key), key) for key in ("name", "base", "spec", "profiles", "budget", "parameters")},
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_plan_is_refused_with_a_reason(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], reason: str
) -> None:
    data = copy.deepcopy(a_plan().document())
    Plan.from_document(data, "before")
    damage(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        load_plan(path)
    assert str(error.value).startswith(f"{path}: damaged plan: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "not a plan"),
        ("plan", "not a plan"),
        (None, "not a plan"),
        ({}, "not a plan"),
        ({"kind": "evaluation", "schema": 1}, "not a plan"),
        ({"kind": "plan", "schema": 1}, "a plan of schema 1, this version reads 2; compose it again"),
        ({"kind": "plan"}, "a plan of schema None, this version reads 2"),
    ],
)
def test_what_is_not_a_plan_of_this_version_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_document(data, "some.json")
    assert str(error.value).startswith(f"some.json: {reason}")


@pytest.mark.parametrize("content", [b"", b"{", b"name: yaml", b"\xff\xfe{}"])
def test_a_file_that_is_not_json_is_no_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json: not a plan: "):
        load_plan(tmp_path / "plan.json")


def test_a_plan_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="not a plan"):
        load_plan(tmp_path)


# --- profiles -------------------------------------------------------------------------------------------------------

ABOUT = {
    "digest": "abc",
    "corpus": "language/zh-日本",
    "documents": ["x", "y"],
    "tokens": 9,
    "layers": [dataclasses.asdict(SHAPE)],
}


def statistics() -> dict[str, torch.Tensor]:
    half = torch.arange(12).reshape(6, 2).half()
    return {"ffn.0.rms": half.T, "ffn.0.rms.scale": torch.tensor(0.5), "ffn.0.sum": torch.arange(6.0)}


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    saved = save_profile(tmp_path / "deep" / "p.safetensors", ABOUT, statistics())
    for profile in (saved, Profile(saved.path)):
        assert (profile.digest, profile.corpus, profile.tokens) == ("abc", "language/zh-日本", 9)
        assert (profile.documents, profile.layers) == (["x", "y"], [SHAPE])
        for name, tensor in statistics().items():
            assert torch.equal(profile.read(name), tensor)
            assert profile.read(name).dtype == tensor.dtype


def test_a_profile_that_was_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(profiles, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_profile(tmp_path / "p.safetensors", ABOUT, statistics())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -40], ids=lambda size: f"first {size} bytes")
def test_a_truncated_profile_is_refused(tmp_path: Path, size: int) -> None:
    path = save_profile(tmp_path / "p.safetensors", ABOUT, statistics()).path
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"p\.safetensors: not a readable profile .*delete it and profile again"):
        Profile(path)


@pytest.mark.parametrize("content", [b"not a tensor in sight, only text", b"\xff" * 64, b"{}"])
def test_a_file_of_something_else_is_no_profile(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable profile"):
        Profile(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "a profile of schema None, not 3"),
        ({"format": "pt"}, "a profile of schema None, not 3"),
        ({"expertprune": json.dumps({"schema": 1})}, "a profile of schema 1, not 3"),
        ({"expertprune": "{"}, "not a readable profile"),
        pytest.param(
            {"expertprune": "[]"},
            "profile",
        ),
    ],
)
def test_tensors_of_another_kind_or_version_are_no_profile(
    tmp_path: Path, metadata: dict[str, str] | None, reason: str
) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=reason):
        Profile(tmp_path / "p.safetensors")


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such profile"):
        Profile(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="not a readable profile"):
        Profile(tmp_path)


KEY = ProfileKey("m", "t", "c", 32, "float32", "cpu", "sdpa", {"torch": "2", "transformers": "5"}, "s")


@pytest.mark.parametrize("field", dataclasses.fields(ProfileKey), ids=lambda field: field.name)
def test_a_profile_key_covers_every_field(field: dataclasses.Field[Any]) -> None:
    value: Any = {"max_tokens": 33, "versions": {"torch": "3", "transformers": "5"}}.get(field.name, "other")
    other = dataclasses.replace(KEY, **{field.name: value})
    assert other.digest != KEY.digest
    measured = field.name in ("model", "tokenizer", "corpus", "max_tokens")  # or else measured with
    assert (KEY.same_text(other.digest), KEY.same_means(other.digest)) == (not measured, measured)
    assert KEY.same_text(dataclasses.replace(KEY).digest)
    assert not KEY.same_text(None)
