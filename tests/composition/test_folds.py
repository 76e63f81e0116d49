"""What documents lose that chose no units, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import expertprune
from expertprune.artifacts.profile import Profile, ProfilePart, halved, save_profile
from expertprune.composition.folds import Fold, PartOfProfile, folds_of, optimism
from expertprune.corpora.documents import CorpusName
from expertprune.relevance import Pass
from expertprune.spec.reading import parse_spec
from expertprune.units import KeptUnits, LayerShape
from tests.profiles import made_up_about
from tests.tiny import save_tiny

PART = ProfilePart(Pass.GRADIENT, "language_model")
SHAPE = LayerShape(hidden=8, ffn=3, query_heads=2, kv_heads=1, head_dim=4)
LAW = CorpusName.parse("domain/law")


def without(neuron: int) -> list[KeptUnits]:
    ffn = tuple(each for each in range(3) if each != neuron)
    return [KeptUnits(ffn=ffn, query_heads=(0, 1), kv_groups=(0,), experts=())]


def least(fold: Fold) -> Sequence[KeptUnits]:
    """All neurons but that of the smallest squares over the documents of no fold."""
    part = fold.others[LAW].part(PART)
    assert part is not None
    return without(int(part.read_half("ffn.0.norm").square().sum(0).argmin()))


def foreseen(
    profile: Profile, gone: int, choose: Callable[[Fold], Sequence[KeptUnits] | None] = least
) -> Mapping[str, float]:
    profiles = {LAW: profile}
    return optimism(profiles, PART, without(gone), folds_of(profiles), choose)


def profile_of(folder: Path, documents: str, rows: list[list[float]]) -> Profile:
    about = made_up_about(documents=list(documents), tokens=len(rows), layers=[SHAPE])
    path = folder / "p.safetensors"
    tokens = torch.ones(len(rows))
    save_profile(path, about, {"tokens": tokens, "weights": tokens.clone()})
    save_profile(PART.path(path), about, {"loss": tokens, **halved("ffn.0.norm", torch.tensor(rows))})
    return Profile(path)


def test_each_fold_is_measured_on_the_units_that_the_others_choose(tmp_path: Path) -> None:
    rows = [[1.0, 2.0, 9.0] for _ in range(5)]
    profile = profile_of(tmp_path, "abcde", rows)
    assert foreseen(profile, 0) == {"domain/law": 1.0}
    rows[0][0] = (
        6.0  # squares of 40 and 20: the second neuron goes, but without the first document the first, of 4 and 16
    )
    profile = profile_of(tmp_path, "abcde", rows)
    assert foreseen(profile, 1) == {"domain/law": pytest.approx((36 + 4 * 4) / 20)}


def test_windows_of_a_document_are_held_out_together_and_one_document_never(tmp_path: Path) -> None:
    rows = [[4.0, 3.0, 9.0], [4.0, 3.0, 9.0], [3.0, 4.0, 9.0]]
    asked: list[list[str]] = []

    def choose(fold: Fold) -> Sequence[KeptUnits]:
        asked.append(fold.others[LAW].documents)
        return least(fold)

    # without both windows of a, b alone has the first neuron go; without b, a has the second
    found = foreseen(profile_of(tmp_path, "aab", rows), 1, choose)
    assert asked == [["b"], ["a", "a"]]
    assert found == {"domain/law": pytest.approx((16 + 16 + 16) / (9 + 9 + 16))}
    asked.clear()
    assert foreseen(profile_of(tmp_path, "aaa", rows), 1, choose) == {"domain/law": 1.0}
    assert asked == []


def test_a_fold_by_whose_others_nothing_can_be_chosen_does_not_count(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, "ab", [[4.0, 3.0, 9.0], [3.0, 4.0, 9.0]])

    def choose(fold: Fold) -> Sequence[KeptUnits] | None:
        return None if fold.held[LAW] == [0] else least(fold)

    assert foreseen(profile, 0, choose) == {"domain/law": pytest.approx(16 / 9)}  # of b, where a chose the second
    assert foreseen(profile, 0, lambda fold: None) == {"domain/law": 1.0}


def test_a_document_of_two_corpora_is_held_out_of_both(tmp_path: Path) -> None:
    other = CorpusName.parse("general/news")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one = profile_of(folders[0], "abc", [[1.0, 2.0, 9.0]] * 3)
    two = profile_of(folders[1], "xcb", [[1.0, 2.0, 9.0]] * 3)
    folds = folds_of({LAW: one, other: two})
    gone = [{one.documents[place] for place in fold.held[LAW]} for fold in folds]
    too = [{two.documents[place] for place in fold.held[other]} for fold in folds]
    assert (gone, too) == ([{"a"}, {"b"}, {"c"}], [{"x"}, {"b"}, {"c"}])


def test_a_document_that_is_all_of_another_corpus_is_held_out_of_none(tmp_path: Path) -> None:
    """It would still vote there, so what is measured on it would come out too low."""
    other, folders = CorpusName.parse("general/news"), [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one = profile_of(folders[0], "aab", [[4.0, 3.0, 9.0], [4.0, 3.0, 9.0], [3.0, 4.0, 9.0]])
    two = profile_of(folders[1], "aa", [[4.0, 3.0, 9.0]] * 2)
    profiles = {LAW: one, other: two}
    # b alone is held out; a then chooses that the second neuron goes
    assert [fold.held for fold in folds_of(profiles)] == [{LAW: [2], other: []}]
    assert optimism(profiles, PART, without(0), folds_of(profiles), least) == {
        "domain/law": pytest.approx(16 / 9),
        "general/news": 1.0,
    }


def test_documents_that_no_other_corpus_has_are_shared_out_around_those_that_one_has(tmp_path: Path) -> None:
    """Of two documents, one of another corpus' first fold, the second is in a fold of its own."""
    other, folders = CorpusName.parse("general/news"), [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one = profile_of(folders[0], "abc", [[1.0, 2.0, 9.0]] * 3)
    two = profile_of(folders[1], "ax", [[1.0, 2.0, 9.0]] * 2)
    held = [fold.held for fold in folds_of({LAW: one, other: two})]
    assert held == [{LAW: [0], other: [0]}, {LAW: [1], other: [1]}, {LAW: [2], other: []}]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_every_statistic_with_a_row_for_each_document_is_cut(
    family: str, spec_data: dict[str, Any], tmp_path: Path
) -> None:
    """Seven documents: no other axis of the tiny model is as long."""
    base = save_tiny(tmp_path / "base", family)
    overrides = {"base.model": str(base), "calibration.documents": 7, "budget": {"ffn": 0.5, "multiple_of": 8}}
    spec = parse_spec(spec_data, "spec", tmp_path, overrides)
    for whole in expertprune.profile(spec).values():
        assert len(whole.documents) == 7
        some = PartOfProfile(whole, [1, 4])
        assert some.documents == [whole.documents[1], whole.documents[4]]
        weights = whole.read("weights").double()
        for part in sorted(whole.path.parent.glob(f"{whole.path.stem}*.safetensors")):
            mine = PartOfProfile(Profile(part), [1, 4])
            with safe_open(part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    check(name, file.get_tensor(name), mine.read(name), weights)


def check(name: str, tensor: Tensor, found: Tensor, weights: Tensor) -> None:
    if name.endswith("sum") and "norm" not in name:
        expected = tensor * float(weights[[1, 4]].sum() / weights.sum())
        assert torch.allclose(found.double(), expected.double())
    else:
        by_document = tensor.ndim > 0 and tensor.shape[0] == 7
        assert torch.equal(found, tensor[[1, 4]] if by_document else tensor), name
