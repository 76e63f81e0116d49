"""Files between stages: written whole, read back equal, and refused with a reason where they are damaged."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expertprune.artifacts import plan as plans
from expertprune.artifacts.plan import LayerPlan, Parameters, Plan, UnitReasons, load_plan
from expertprune.artifacts.profile import Profile, ProfileKey, save_profile
from expertprune.errors import CheckpointError, PlanError
from expertprune.spec.values import Coverage
from expertprune.units import KeptRows, KeptUnits, LayerShape, format_indices, parse_indices
from tests.profiles import KEY, made_up_about

SHAPE = LayerShape(hidden=8, ffn=6, query_heads=6, kv_heads=3, head_dim=2)


def a_plan() -> Plan:
    kept = [KeptUnits((0, 1, 2, 5), (0, 5), (0, 2)), KeptUnits((1, 3, 4, 5), (3, 4), (1, 2))]
    rows = plans.RowReasons(
        requested=Coverage(0.9), threshold=None, protected={"language": 3}, coverage={"language/en": 0.97},
        unseen={"language/en": plans.UnseenCoverage(estimate=0.95, low=0.91, high=0.99, documents=9, tokens=700)},
        tokens={"language/en": 800}, last_kept=["a"], first_dropped=["ß"],
    )  # fmt: skip
    why = UnitReasons(threshold=0.1, protected={"language": 3, "general": 1}, shared=plans.KindCount(units=6, kept=4))
    return Plan(
        name="made-up",
        base=plans.BaseReference(model="nowhere/ünï", digest="d"),
        parameters=Parameters(before=1000, after=700),
        shapes=[SHAPE, SHAPE],
        layers=[LayerPlan(kept[0], {"ffn": why}), LayerPlan(kept[1])],
        budget={"ffn": plans.StructureBudget(requested=2, of=6, kept=4, removed=2)},
        profiles={"language/en": "p"},
        spec={"name": "made-up", "dimensions": {"language": ["en"]}},
        vocabulary=plans.VocabularyPlan(KeptRows(128, (0, 5, 9), (3,)), "t", rows),
    )


def test_indices_are_written_as_ascending_runs_and_other_text_is_refused() -> None:
    written = {(): "", (7,): "7", (0, 1, 2, 5): "0-2 5", (3, 4): "3-4", (1, 3, 5): "1 3 5", tuple(range(100)): "0-99"}
    for indices, text in written.items():
        assert format_indices(indices) == text
        assert parse_indices(text, 10**6) == indices
    for text in ("2 1", "1 1", "0-3 3", "0-3 2-5", "a", "-1", "1-2-3", "1.5", "1,2", "0 - 3", "5-3", "0-2 9-5", "0-"):
        with pytest.raises(ValueError, match=r"not ascending|invalid literal"):
            parse_indices(text, 10**6)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = a_plan()
    plan.save(tmp_path / "deep" / "plan.json")
    again = load_plan(tmp_path / "deep" / "plan.json")
    assert again == plan
    assert again.digest == plan.digest
    text = (tmp_path / "deep" / "plan.json").read_text(encoding="utf-8")
    assert json.loads(text)["layers"][0]["kept"] == {"ffn": "0-2 5", "query_heads": "0 5", "kv_groups": "0 2"}
    assert "nowhere/ünï" in text
    assert text.count("\n") > 20


def test_a_plan_digest_covers_every_part() -> None:
    plan, why = a_plan(), UnitReasons(threshold=None, protected={})
    changes: dict[str, Any] = {
        "name": "other", "base": plans.BaseReference(model="elsewhere", digest="d"), "spec": {}, "profiles": {},
        "shapes": [SHAPE, dataclasses.replace(SHAPE, hidden=9)], "layers": plan.layers[::-1], "budget": {},
        "parameters": Parameters(before=1000, after=701), "vocabulary": None,
        "depth": plans.DepthReasons(relevance=[0.5, 0.25], source=["domain"] * 2, why=why),
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(Plan)}
    changed = {dataclasses.replace(plan, **{name: value}).digest for name, value in changes.items()}
    assert len(changed - {plan.digest}) == len(changes)
    assert a_plan().digest == plan.digest


# A path into a plan's document, what is put there (`GONE`: nothing), and what is said of it.
GONE = object()
FFN, HEADS, GROUPS = (("layers", 0, "kept", structure) for structure in ("ffn", "query_heads", "kv_groups"))
DAMAGE: list[tuple[tuple[Any, ...], Any, str]] = [
    (HEADS, "0-1", "layer 0: the query heads are not the same number in each kept"),
    (HEADS, "0 3", "layer 0: the query heads are not the same"),  # of a group that is gone
    (("layers", 1, "kept", "query_heads"), "3 6", "layer 1: query_heads must keep some of 0-5"),
    (FFN, "0-6", "layer 0: ffn must keep some of 0-5"),
    (FFN, "", "layer 0: ffn must keep some of 0-5"),
    (GROUPS, "0 3", "layer 0: kv_groups must keep some of 0-2"),
    (FFN, "5 0-2", "indices are not ascending"),
    (("layers", 0, "kept", "neurons"), "0", "unknown key 'layers.0.kept.neurons'"),
    (("layers", 0, "kept", "experts"), "0", "layer 0: experts must keep nothing"),  # a layer that has none
    (FFN, GONE, "missing key 'layers.0.kept.ffn'"),
    (("budget", "ffn", "requested"), "half", "budget.ffn.requested"),
    (("vocabulary", "padding"), [128], "rows must be some of 0-127"),
    *[((key,), GONE, key) for key in ("base", "spec", "profiles", "parameters", "layers")],
]


@pytest.mark.parametrize(("place", "value", "reason"), DAMAGE)
def test_a_damaged_plan_is_refused_with_a_reason(tmp_path: Path, place: Any, value: Any, reason: str) -> None:
    data = json.loads(json.dumps(a_plan().document()))
    Plan.from_document(data, "before")
    inner = functools.reduce(lambda inner, key: inner[key], place[:-1], data)
    inner[place[-1]] = value
    if value is GONE:
        del inner[place[-1]]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        load_plan(path)
    assert str(error.value).startswith(f"{path}: damaged plan: ")
    assert reason in str(error.value)


def test_what_is_not_a_plan_of_this_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no such file"):
        load_plan(path)
    reasons = {
        b"{": "not valid JSON: ",
        b"\xff\xfe{}": "not UTF-8 text: ",
        b"[]": "not a plan",
        b'{"kind": "evaluation", "schema": 1}': "not a plan",
        b'{"kind": "plan", "schema": 1}': "a plan of schema 1, this version reads 2; compose it again",
    }
    for content, reason in reasons.items():
        path.write_bytes(content)
        with pytest.raises(PlanError, match=f"^{path}: {reason}"):
            load_plan(path)


ABOUT = made_up_about("abc", "language/zh-日本", ["x", "y"], tokens=9, layers=[SHAPE])


def statistics() -> dict[str, torch.Tensor]:
    half = torch.arange(12).reshape(6, 2).half()
    return {"ffn.0.rms": half.T, "ffn.0.rms.scale": torch.tensor(0.5), "ffn.0.sum": torch.arange(6.0)}


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    saved = save_profile(tmp_path / "deep" / "p.safetensors", ABOUT, statistics())
    for profile in (saved, Profile(saved.path)):
        assert (profile.digest, profile.corpus, profile.tokens) == ("abc", "language/zh-日本", 9)
        assert (profile.documents, profile.layers) == (["x", "y"], [SHAPE])
        assert profile.about == ABOUT
        for name, tensor in statistics().items():
            assert torch.equal(profile.read(name), tensor)
            assert profile.read(name).dtype == tensor.dtype


def test_a_truncated_profile_is_refused(tmp_path: Path) -> None:
    path = save_profile(tmp_path / "p.safetensors", ABOUT, statistics()).path
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, -1, -40):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=r"p\.safetensors: not a readable profile .*delete it and profile again"
        ):
            Profile(path)
    with pytest.raises(CheckpointError, match="no such profile"):
        Profile(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a readable profile"):
        Profile(tmp_path)


def test_tensors_of_another_kind_or_version_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    reasons = {
        json.dumps({"schema": 1}): "a profile of schema 1, not 5",
        "{": "not a readable profile",
        "[]": "is no profile",
    }
    for metadata, reason in reasons.items():
        save_file({"weight": torch.zeros(2)}, path, metadata={"expertprune": metadata})
        with pytest.raises(CheckpointError, match=reason):
            Profile(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is no profile"):
        Profile(path)


def test_a_profile_key_covers_every_field() -> None:
    for field in dataclasses.fields(ProfileKey):
        value: Any = {"max_tokens": 33, "versions": {"torch": "3", "transformers": "5"}}.get(field.name, "other")
        other = dataclasses.replace(KEY, **{field.name: value})
        assert other.digest != KEY.digest, field.name
        measured = field.name in ("model", "tokenizer", "corpus", "max_tokens")  # or else measured with
        assert (KEY.same_text(other.digest), KEY.same_means(other.digest)) == (not measured, measured), field.name
    assert KEY.same_text(dataclasses.replace(KEY).digest)
    assert not KEY.same_text(None)
