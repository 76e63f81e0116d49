"""What corpora have in common: the arithmetic against brute force, the stage on a tiny model, its pictures and refusals."""

from __future__ import annotations

import itertools
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

import expertprune
from expertprune.artifacts.profile import Profile
from expertprune.composition.overlap import (
    chance_overlap,
    cluster,
    compare_structure,
    irrelevant_units,
    overlap,
    rank_correlation,
    relevance,
)
from expertprune.composition.scoring import needed_part
from expertprune.errors import SpecError
from expertprune.relevance import criteria
from expertprune.spec.reading import load_spec
from expertprune.spec.schema import Relevance
from expertprune.units import Structure
from tests.calling import call, call_json
from tests.conftest import refuse_to_load
from tests.patching import everywhere
from tests.tiny import save_tiny

Data = dict[str, Any]
Layers = list[np.ndarray[Any, np.dtype[np.float64]]]
CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]


# --- references -----------------------------------------------------------------------------------------------------


def irrelevant_set(scores: list[list[float]], counts: list[int]) -> set[tuple[int, int]]:
    """(layer, unit) of the lowest scores of each layer; among equals the higher index goes first."""
    chosen = set()
    for layer, (values, count) in enumerate(zip(scores, counts, strict=True)):
        by_relevance = sorted(range(len(values)), key=lambda unit: (values[unit], -unit))
        chosen |= {(layer, unit) for unit in by_relevance[:count]}
    return chosen


def jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / len(first | second)


def random_layers(widths: list[int], corpora: int, seed: int, ties: bool) -> Layers:
    generator = np.random.default_rng(seed)
    if ties:
        return [generator.integers(0, 4, (corpora, width)).astype(float) for width in widths]
    return [generator.exponential(size=(corpora, width)) for width in widths]


# --- overlap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_overlap_is_that_of_sets(ties: bool) -> None:
    counts = [2, 5, 1]
    layers = random_layers([8, 20, 5], corpora=5, seed=3, ties=ties)
    found = overlap(layers, counts)
    sets = [irrelevant_set([scores[corpus].tolist() for scores in layers], counts) for corpus in range(5)]
    assert all(len(chosen) == sum(counts) for chosen in sets)
    for row, column in itertools.product(range(5), range(5)):
        assert found[row, column] == pytest.approx(jaccard(sets[row], sets[column]), abs=1e-15)


@pytest.mark.parametrize(
    ("units", "fraction", "count"), [(9, 0.25, 2), (3, 0.25, 1), (10, 0.25, 3), (9, 0.01, 1), (9, 0.99, 8)]
)
def test_the_set_is_neither_empty_nor_everything(units: int, fraction: float, count: int) -> None:
    assert irrelevant_units(units, fraction) == count


def test_chance_is_expected_intersection_over_expected_union_of_all_pairs_of_sets() -> None:
    units, counts = [3, 4], [1, 2]
    choices = [list(itertools.combinations(range(n), k)) for n, k in zip(units, counts, strict=True)]
    sets = [{(0, *a)} | {(1, unit) for unit in b} for a, b in itertools.product(*choices)]
    intersections = sum(len(a & b) for a, b in itertools.product(sets, sets))
    unions = sum(len(a | b) for a, b in itertools.product(sets, sets))
    assert chance_overlap(units, counts) == pytest.approx(intersections / unions)


# --- rank correlation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([5, 5, 7], [1, 2, 3], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3: product 1.5 over √(1.5 · 2)
        ([1, 2, 3], [7, 7, 7], 0),  # no order to share
    ],
)
def test_rank_correlation_by_hand(first: list[float], second: list[float], expected: float) -> None:
    found = rank_correlation([np.array([first, second], dtype=float)])
    assert found == pytest.approx(np.array([[1, expected], [expected, 1]]))


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_the_mean_over_layers_by_their_units(ties: bool) -> None:
    widths = [10, 40, 25]
    layers = random_layers(widths, corpora=4, seed=3, ties=ties)
    found = rank_correlation(layers)
    for row, column in itertools.product(range(4), range(4)):
        by_layer = [stats.spearmanr(scores[row], scores[column]).statistic for scores in layers]
        expected = sum(width * rho for width, rho in zip(widths, by_layer, strict=True)) / 75
        assert found[row, column] == pytest.approx(expected, abs=1e-12)


def test_layers_of_one_unit_do_not_count() -> None:
    single = random_layers([1, 1], corpora=3, seed=6, ties=False)
    wide = random_layers([8], corpora=3, seed=7, ties=False)
    assert compare_structure(single, 0.25) is None
    mixed, alone = compare_structure([*single, *wide], 0.25), compare_structure(wide, 0.25)
    assert mixed is not None
    assert alone is not None
    assert (mixed.units, mixed.irrelevant, mixed.chance) == (8, 2, 1 / 7)
    assert np.array_equal(mixed.rank_correlation, alone.rank_correlation)


# --- clustering -----------------------------------------------------------------------------------------------------


def test_average_linkage_by_hand() -> None:
    distance = np.array([[0, 0.5, 0.1], [0.5, 0, 0.7], [0.1, 0.7, 0]])
    result = cluster(distance)
    # 0 and 2 meet at 0.1; their distances to 1 average (0.5 + 0.7) / 2 = 0.6, above the cut at 0.42.
    assert result.dendrogram[:, 2:] == pytest.approx(np.array([[0.1, 2], [0.6, 3]]))
    assert {frozenset(row[:2]) for row in result.dendrogram.tolist()} == {frozenset({0, 2}), frozenset({1, 3})}
    assert {frozenset(members) for members in result.clusters} == {frozenset({0, 2}), frozenset({1})}


@pytest.mark.parametrize(
    ("near", "far", "clusters"),
    [(0.69, 1, [1, 2]), (0.71, 1, [1, 1, 1]), (0.3, 0.3, [1, 1, 1]), (0, 0, [3])],
    ids=["near", "too far", "equally far", "the same"],
)
def test_the_dendrogram_is_cut_at_7_tenths_of_its_height(near: float, far: float, clusters: list[int]) -> None:
    distance = np.array([[0, near, far], [near, 0, far], [far, far, 0]])
    assert sorted(map(len, cluster(distance).clusters)) == clusters


def test_planted_groups_are_found_and_stand_together() -> None:
    generator = np.random.default_rng(0)
    group = generator.permutation([0, 0, 0, 1, 1, 1, 1])
    shared = generator.normal(size=(2, 6, 100))
    layers = [shared[group, layer] + generator.normal(size=(7, 100)) for layer in range(6)]
    result = compare_structure(layers, 0.25)
    assert result is not None
    planted = {frozenset(np.flatnonzero(group == g).tolist()) for g in (0, 1)}
    assert {frozenset(members) for members in result.clustering.clusters} == planted
    order = result.clustering.order
    assert sorted(order) == list(range(7))
    assert order == [corpus for members in result.clustering.clusters for corpus in members]
    in_order = group[order]
    assert np.count_nonzero(in_order[1:] != in_order[:-1]) == 1


# --- the stage ------------------------------------------------------------------------------------------------------


def names(data: Data) -> list[str]:
    return [corpus["name"] for corpus in data["corpora"]]


def own_relevance(profile: Profile, layer: int) -> list[float]:
    """`impact` of FFN neurons from what is stored: the largest `(rms · ‖column‖)²` of any document."""
    rms = profile.read(f"ffn.{layer}.rms").float() * profile.read(f"ffn.{layer}.rms.scale")
    return ((rms * profile.read(f"ffn.{layer}.output_l2")) ** 2).amax(0).tolist()


def test_the_command_compares_every_pair_of_a_specs_corpora(spec_file: Path) -> None:
    data = call_json("compare", spec_file, "--set", "compose.aggregate=max", "--fraction", "0.5")
    profiles = expertprune.profile(spec_file)
    assert names(data) == CORPORA
    assert [corpus["profile"] for corpus in data["corpora"]] == [profile.digest for profile in profiles.values()]
    said = [data[key] for key in ("kind", "criterion", "aggregate", "fraction")]
    assert said == ["comparison", "impact", "max", 0.5]
    assert list(data["structures"]) == ["ffn", "query_heads", "kv_groups"]
    scores = [[own_relevance(profile, layer) for layer in range(3)] for profile in profiles.values()]
    ffn = data["structures"]["ffn"]
    assert (ffn["units"], ffn["irrelevant"], ffn["chance"]) == (3 * 32, 3 * 16, pytest.approx(0.5 / 1.5))
    for a, b in itertools.combinations(range(4), 2):
        expected = jaccard(irrelevant_set(scores[a], [16] * 3), irrelevant_set(scores[b], [16] * 3))
        assert ffn["overlap"][a][b] == pytest.approx(expected)
        by_layer = [stats.spearmanr(scores[a][layer], scores[b][layer]).statistic for layer in range(3)]
        assert ffn["rank_correlation"][a][b] == pytest.approx(sum(by_layer) / 3, abs=1e-6)
    assert data["structures"]["query_heads"]["units"] == 3 * 6
    assert data["structures"]["kv_groups"]["units"] == 3 * 3


def test_stored_profiles_are_compared_without_the_model(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = call_json("compare", spec_file)
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    assert call_json("compare", spec_file) == first
    assert expertprune.compare(load_spec(spec_file)).document() == first
    groups = {"kv_groups": first["structures"]["kv_groups"]}
    assert call_json("compare", spec_file, "--structure", "kv_groups")["structures"] == groups


def test_the_table_shows_what_the_json_says(spec_file: Path) -> None:
    data = call_json("compare", spec_file)
    text = call("compare", spec_file).stdout
    sections = dict(zip(data["structures"], text.split("\n\n")[1:], strict=True))
    for structure, result in data["structures"].items():
        lines = sections[structure].splitlines()
        assert lines[0].startswith(f"{structure}: {result['irrelevant']} of {result['units']} units")
        assert lines[0].endswith(f"by chance {result['chance']:.2f}")
        rows = [line.split() for line in lines[1:] if "─" not in line][1:]
        order = [CORPORA.index(name) for name in result["order"]]
        for number, corpus in enumerate(order):
            below = [f"{result['rank_correlation'][corpus][other]:.2f}" for other in order[:number]]
            above = [f"{result['overlap'][corpus][other]:.2f}" for other in order[number + 1 :]]
            assert rows[number] == [str(number + 1), CORPORA[corpus], *below, *above]
        # A line above the head, below it, and below each cluster.
        assert sum("─" in line for line in lines) == 2 + len(result["clusters"])


def test_several_specs_name_their_corpora_together(tmp_path: Path, spec_data: Data) -> None:
    paths = []
    for value, dimension in (("medical", "domain"), ("qa", "task")):
        path = tmp_path / f"{value}.yaml"
        path.write_text(yaml.safe_dump({**spec_data, "name": value, "dimensions": {dimension: value}}))
        paths.append(path)
    assert names(call_json("compare", *paths)) == ["domain/medical", "general/general", "task/qa"]


def test_all_takes_every_stored_profile_of_the_base(tmp_path: Path, spec_file: Path, spec_data: Data) -> None:
    expertprune.profile(spec_file)
    expertprune.profile(spec_file, overrides={"base.model": str(save_tiny(tmp_path / "other", seed=1))})
    (tmp_path / "en.yaml").write_text(yaml.safe_dump({**spec_data, "dimensions": {"language": "en"}, "general": []}))
    data = call_json("compare", tmp_path / "en.yaml", "--all")
    assert sorted(names(data)) == sorted(CORPORA)
    assert names(data)[0] == "language/en", "the spec's own come first"


def test_corpora_of_one_name_are_told_apart_by_their_profiles(spec_file: Path) -> None:
    other = expertprune.profile(spec_file, overrides={"calibration.documents": 5, "dimensions": {"domain": "medical"}})
    data = call_json("compare", spec_file, "--all")
    medical = [corpus for corpus in data["corpora"] if corpus["name"].startswith("domain/medical")]
    assert [corpus["name"] for corpus in medical] == [f"domain/medical ({c['profile'][:8]})" for c in medical]
    assert [corpus["documents"] for corpus in medical] == [12, 5]
    assert {profile.digest for profile in other.values()} <= {corpus["profile"] for corpus in data["corpora"]}
    assert "language/en" in names(data), "its name is its own"


def test_a_stored_profile_that_cannot_be_read_is_left_out(
    spec_file: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = call_json("compare", spec_file)
    (store / "profiles" / "noise.safetensors").write_bytes(b"noise")
    assert call_json("compare", spec_file, "--all") == first
    assert "noise.safetensors is left out" in caplog.text


def test_structures_with_one_unit_per_layer_are_left_out(tmp_path: Path, spec_file: Path) -> None:
    base = save_tiny(tmp_path / "narrow", num_attention_heads=2, num_key_value_heads=1)
    data = call_json("compare", spec_file, "--set", f"base.model={base}")
    assert list(data["structures"]) == ["ffn", "query_heads"]
    error = call("compare", spec_file, "--set", f"base.model={base}", "--structure", "kv_groups", code=2).stderr
    assert "error: kv_groups: no layer has more than one" in error


# --- pictures -------------------------------------------------------------------------------------------------------


def text_of(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_svg_names_every_corpus_and_prints_every_value(tmp_path: Path, spec_data: Data) -> None:
    """A dollar sign in a name starts no formula."""
    sources = spec_data["corpora"]["sources"]
    sources["a$_b$"] = sources.pop("medical")
    spec_data["dimensions"]["domain"] = "a$_b$"
    spec_file = tmp_path / "tiny.yaml"
    spec_file.write_text(yaml.safe_dump(spec_data))
    corpora = ["language/en", "domain/a$_b$", "task/qa", "general/general"]
    data = call_json("compare", spec_file, "--structure", "ffn", "--picture", tmp_path / "a.svg")
    call("compare", spec_file, "--structure", "ffn", "--picture", tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    found = text_of(tmp_path / "a.svg")
    ffn = data["structures"]["ffn"]
    drawn = [text for text in found if text in corpora]
    assert drawn == ffn["order"] * 2, "below and beside the heat map, in clustering order"
    values = [text for text in found if len(text) == 4 and text.startswith("0.")]
    order = [corpora.index(name) for name in ffn["order"]]
    expected = [f"{ffn['overlap'][a][b]:.2f}" for a, b in itertools.product(order, order) if a != b]
    assert "\n".join(expected) in "\n".join(values)
    assert any("by chance 0.14" in text for text in found)
    call("compare", spec_file, "--picture", tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        assert image.format == "PNG"
        assert 1000 < image.size[0] < 3000, "three heat maps beside each other"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, store: Path, no_model: None) -> Callable[..., str]:
    """Runs a command that must fail, before a model is loaded, and leave nothing behind; gives its message."""

    def run(*arguments: Any) -> str:
        before = {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")}
        result = call("compare", *arguments, code=2)
        assert {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")} == before
        assert result.stdout == ""
        return result.stderr

    return run


def test_options_that_cannot_be_are_refused(spec_file: Path, refused: Callable[..., str]) -> None:
    for fraction in ("0", "1", "25", "nan"):
        assert "is not between 0 and 1" in refused(spec_file, "--fraction", fraction)
    for criterion in ("magnitude", "random"):
        message = refused(spec_file, "--set", f"relevance.criterion={criterion}")
        assert f"relevance.criterion: {criterion} does not look at the corpus" in message
    assert "'heads' is not one of" in refused(spec_file, "--structure", "heads")
    assert "Missing argument 'SPEC...'" in refused()
    with pytest.raises(SpecError, match="structures: 'heads' is none of ffn, query_heads, kv_groups"):
        expertprune.compare(spec_file, structures=["heads"])
    with pytest.raises(SpecError, match="needs a spec"):
        expertprune.compare([])


def test_specs_that_cannot_be_compared_are_refused(
    tmp_path: Path, spec_data: Data, refused: Callable[..., str]
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    same = shutil.copytree(spec_data["base"], tmp_path / "same")

    def written(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**spec_data, "name": name, **changes}))
        return path

    first = written("first")
    message = refused(first, written("third", base=str(same)), written("second", base=str(other)))
    assert "base.model: specs 'first' and 'second' have different bases" in message
    assert str(other) in message
    assert "third" not in message, "the same model elsewhere is the same base"
    scoring = refused(first, written("fourth", relevance="activation"))
    assert "relevance.criterion: specs 'first' and 'fourth' differ" in scoring
    scoring = refused(first, written("fifth", compose={"allocation": "uniform", "aggregate": 0.9}))
    assert "compose.aggregate: specs 'first' and 'fifth' differ" in scoring
    for general in ([], ["medical"]):
        one = written("one", dimensions={"domain": "medical"}, general=general)
        for arguments in ([one], [one, one], [one, "--all"]):
            message = refused(*arguments)
            assert "a comparison needs two different corpora, found domain/medical" in message
            assert "--all" in message


def test_criteria_say_whether_they_see_the_corpus(spec_file: Path) -> None:
    """A criterion gives two corpora the same scores exactly when it says that it does not look at them."""
    for name, criterion in criteria.items():
        if Structure.FFN not in criterion.structures:  # of experts alone
            continue
        first, second, *_ = expertprune.profile(spec_file, overrides={"relevance.criterion": name}).values()
        part = needed_part(Relevance(criterion=name))
        pairs = zip(
            relevance(first, Structure.FFN, criterion, "mean", part),
            relevance(second, Structure.FFN, criterion, "mean", part),
            strict=True,
        )
        assert criterion.sees_data != all(np.array_equal(a, b) for a, b in pairs), criterion.name


def test_a_picture_that_cannot_be_written_is_refused_before_anything_else(
    tmp_path: Path, spec_file: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    refusals = {
        "a.jpg": "a picture is a .png or .svg file",
        "absent/a.png": "cannot be written: there is no folder",
        "folder.png": "cannot be written: it is a folder",
    }
    for picture, words in refusals.items():
        assert f"error: {tmp_path / picture}: {words}" in refused(spec_file, "--picture", tmp_path / picture)
