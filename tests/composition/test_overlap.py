"""What corpora have in common: the arithmetic against brute force, the stage on a tiny model, its pictures and refusals."""

from __future__ import annotations

import itertools
import shutil
import xml.etree.ElementTree as ElementTree
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
from expertprune.spec.reading import load_spec, parse_spec
from expertprune.spec.schema import Relevance
from expertprune.units import Structure
from tests.calling import call, call_json
from tests.experts import write_sources
from tests.tiny import save_tiny

Data = dict[str, Any]
CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]


@pytest.fixture(autouse=True)
def _profiles_are_stored(warm_store: Path) -> None: ...


def irrelevant_set(scores: list[list[float]], counts: list[int]) -> set[tuple[int, int]]:
    """(layer, unit) of the lowest scores of each layer; among equals the higher index goes first."""
    chosen = set()
    for layer, (values, count) in enumerate(zip(scores, counts, strict=True)):
        by_relevance = sorted(range(len(values)), key=lambda unit: (values[unit], -unit))
        chosen |= {(layer, unit) for unit in by_relevance[:count]}
    return chosen


def jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / len(first | second)


def spearman(first: list[Any], second: list[Any]) -> float:
    """The mean over layers by their units."""
    by_layer = [stats.spearmanr(*pair).statistic for pair in zip(first, second, strict=True)]
    return float(np.average(by_layer, weights=[len(scores) for scores in first]))


@pytest.mark.parametrize("ties", [False, True])
def test_overlap_is_that_of_sets_and_rank_correlation_that_of_layers(ties: bool) -> None:
    counts, generator = [2, 5, 1], np.random.default_rng(3)
    draw = (lambda size: generator.integers(0, 4, size).astype(float)) if ties else generator.random
    layers = [draw((5, width)) for width in (8, 20, 6)]
    scores = [[each[corpus] for each in layers] for corpus in range(5)]
    sets = [irrelevant_set([each.tolist() for each in own], counts) for own in scores]
    assert all(len(chosen) == sum(counts) for chosen in sets)
    for row, column in itertools.product(range(5), range(5)):
        assert overlap(layers, counts)[row, column] == pytest.approx(jaccard(sets[row], sets[column]), abs=1e-15)
        expected = spearman(scores[row], scores[column])
        assert rank_correlation(layers)[row, column] == pytest.approx(expected, abs=1e-12)


def test_chance_is_expected_intersection_over_expected_union_of_all_pairs_of_sets() -> None:
    units, counts = [3, 4], [1, 2]
    choices = [list(itertools.combinations(range(n), k)) for n, k in zip(units, counts, strict=True)]
    sets = [{(0, *a)} | {(1, unit) for unit in b} for a, b in itertools.product(*choices)]
    pairs = list(itertools.product(sets, sets))
    expected = sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs)
    assert chance_overlap(units, counts) == pytest.approx(expected)


def test_layers_that_leave_nothing_to_choose_or_to_order() -> None:
    """Of several units, neither none nor all are irrelevant; where all are equal, the correlation is 0."""
    generator = np.random.default_rng(6)
    single, wide = [generator.random((3, 1)) for _ in range(2)], [generator.random((3, 8))]
    assert compare_structure(single, 0.25) is None
    mixed, alone = compare_structure([*single, *wide], 0.25), compare_structure(wide, 0.25)
    assert mixed is not None
    assert alone is not None
    assert (mixed.units, mixed.irrelevant, mixed.chance) == (8, 2, 1 / 7)
    assert np.array_equal(mixed.rank_correlation, alone.rank_correlation)
    for units, fraction, count in ((9, 0.25, 2), (3, 0.25, 1), (10, 0.25, 3), (9, 0.01, 1), (9, 0.99, 8)):
        assert irrelevant_units(units, fraction) == count
    assert rank_correlation([np.array([[1.0, 2, 3], [7, 7, 7]])]).tolist() == [[1, 0], [0, 1]]


def test_average_linkage_by_hand() -> None:
    result = cluster(np.array([[0, 0.5, 0.1], [0.5, 0, 0.7], [0.1, 0.7, 0]]))
    # 0 and 2 meet at 0.1; their distances to 1 average (0.5 + 0.7) / 2 = 0.6, above the cut at 0.42.
    assert result.dendrogram[:, 2:] == pytest.approx(np.array([[0.1, 2], [0.6, 3]]))
    assert {frozenset(row[:2]) for row in result.dendrogram.tolist()} == {frozenset({0, 2}), frozenset({1, 3})}
    assert {frozenset(members) for members in result.clusters} == {frozenset({0, 2}), frozenset({1})}
    assert result.order == [corpus for members in result.clusters for corpus in members]
    # The dendrogram is cut at 7 tenths of its height: near it, too far, equally far, the same.
    for near, far, clusters in ((0.69, 1, [1, 2]), (0.71, 1, [1, 1, 1]), (0.3, 0.3, [1, 1, 1]), (0, 0, [3])):
        found = cluster(np.array([[0, near, far], [near, 0, far], [far, far, 0]])).clusters
        assert sorted(map(len, found)) == clusters


def names(data: Data) -> list[str]:
    return [corpus["name"] for corpus in data["corpora"]]


def written(folder: Path, data: Data, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def own_relevance(profile: Profile, layer: int) -> list[float]:
    """`impact` of FFN neurons from what is stored: the largest `(rms · ‖column‖)²` of any document."""
    rms = profile.read(f"ffn.{layer}.rms").float() * profile.read(f"ffn.{layer}.rms.scale")
    return ((rms * profile.read(f"ffn.{layer}.output_l2")) ** 2).amax(0).tolist()


@pytest.mark.usefixtures("no_model")
def test_the_command_compares_every_pair_of_a_specs_corpora(spec_file: Path) -> None:
    """And its table shows what its JSON says."""
    given = ["compare", spec_file, "--set", "compose.aggregate=max", "--fraction", "0.5"]
    data, text = call_json(*given), call(*given).stdout
    profiles = expertprune.profile(spec_file)
    assert names(data) == CORPORA
    assert [corpus["profile"] for corpus in data["corpora"]] == [profile.digest for profile in profiles.values()]
    said = [data[key] for key in ("kind", "criterion", "aggregate", "fraction")]
    assert said == ["comparison", "impact", "max", 0.5]
    units = {structure: result["units"] for structure, result in data["structures"].items()}
    assert units == {"ffn": 3 * 32, "query_heads": 3 * 6, "kv_groups": 3 * 3}
    scores = [[own_relevance(profile, layer) for layer in range(3)] for profile in profiles.values()]
    ffn = data["structures"]["ffn"]
    assert (ffn["irrelevant"], ffn["chance"]) == (3 * 16, pytest.approx(0.5 / 1.5))
    for a, b in itertools.combinations(range(4), 2):
        expected = jaccard(irrelevant_set(scores[a], [16] * 3), irrelevant_set(scores[b], [16] * 3))
        assert ffn["overlap"][a][b] == pytest.approx(expected)
        assert ffn["rank_correlation"][a][b] == pytest.approx(spearman(scores[a], scores[b]), abs=1e-6)
    for (structure, result), section in zip(data["structures"].items(), text.split("\n\n")[1:], strict=True):
        lines = section.splitlines()
        assert lines[0].startswith(f"{structure}: {result['irrelevant']} of {result['units']} units")
        assert lines[0].endswith(f"by chance {result['chance']:.2f}")
        rows = [line.split() for line in lines[1:] if "─" not in line][1:]
        order = [CORPORA.index(name) for name in result["order"]]
        for number, corpus in enumerate(order):
            below = [f"{result['rank_correlation'][corpus][other]:.2f}" for other in order[:number]]
            above = [f"{result['overlap'][corpus][other]:.2f}" for other in order[number + 1 :]]
            assert rows[number] == [str(number + 1), CORPORA[corpus], *below, *above]
        assert sum("─" in line for line in lines) == 2 + len(result["clusters"])  # around the head, below clusters


@pytest.mark.usefixtures("no_model")
def test_several_specs_name_their_corpora_together(tmp_path: Path, spec_data: Data) -> None:
    paths = [written(tmp_path, spec_data, name=value, dimensions={dimension: value})
             for value, dimension in (("medical", "domain"), ("qa", "task"))]  # fmt: skip
    data = call_json("compare", *paths)
    assert names(data) == ["domain/medical", "general/general", "task/qa"]
    assert expertprune.compare([load_spec(path) for path in paths]).document() == data


def test_all_takes_every_other_profile_of_the_base_that_can_be_read(
    tmp_path: Path, spec_data: Data, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Corpora of one name are told apart by their profiles."""
    spec_file = written(tmp_path, spec_data, dimensions={"language": "en"}, general=[])
    expertprune.profile(spec_file, overrides={"base.model": str(save_tiny(tmp_path / "other", seed=1))})
    medical = {"calibration.documents": 5, "dimensions": {"domain": "medical"}}
    (fewer,) = expertprune.profile(spec_file, overrides=medical).values()
    (store / "profiles" / "noise.safetensors").write_bytes(b"noise")
    data = call_json("compare", spec_file, "--all")
    assert "noise.safetensors is left out" in caplog.text
    assert names(data)[0] == "language/en", "the spec's own come first, and its name is its own"
    assert {name.partition(" ")[0] for name in names(data)} == set(CORPORA)
    found = {corpus["profile"]: corpus for corpus in data["corpora"] if corpus["name"].startswith("domain/medical")}
    assert len(data["corpora"]) == len(CORPORA) + 1
    assert {corpus["name"] for corpus in found.values()} == {f"domain/medical ({digest[:8]})" for digest in found}
    assert found[fewer.digest]["documents"] == 5


def test_structures_with_one_unit_per_layer_are_left_out(tmp_path: Path, spec_data: Data) -> None:
    base = str(save_tiny(tmp_path / "narrow", num_attention_heads=2, num_key_value_heads=1))
    narrow = written(tmp_path, spec_data, base=base, dimensions={"language": "en"})
    assert list(call_json("compare", narrow)["structures"]) == ["ffn", "query_heads"]
    error = call("compare", narrow, "--structure", "kv_groups", code=2).stderr
    assert "error: kv_groups: no layer has more than one" in error


def test_criteria_say_whether_they_see_the_corpus(spec_file: Path) -> None:
    """A criterion gives two corpora the same scores exactly when it says that it does not look at them."""
    for name, criterion in criteria.items():
        if Structure.FFN not in criterion.structures:  # of experts alone
            continue
        profiles = list(expertprune.profile(spec_file, overrides={"relevance.criterion": name}).values())[:2]
        part = needed_part(Relevance(criterion=name))
        first, second = (relevance(profile, Structure.FFN, criterion, "mean", part) for profile in profiles)
        assert criterion.sees_data != all(map(np.array_equal, first, second)), criterion.name


def test_the_svg_names_every_corpus_and_prints_every_value(tmp_path: Path, spec_data: Data) -> None:
    """A dollar sign in a name starts no formula."""
    sources = spec_data["corpora"]["sources"]
    sources["a$_b$"] = sources.pop("medical")
    spec_file = written(tmp_path, spec_data, dimensions={**spec_data["dimensions"], "domain": "a$_b$"})
    corpora = ["language/en", "domain/a$_b$", "task/qa", "general/general"]
    data = call_json("compare", spec_file, "--structure", "ffn", "--picture", tmp_path / "a.svg")
    call("compare", spec_file, "--structure", "ffn", "--picture", tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    elements = ElementTree.parse(tmp_path / "a.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    found = ["".join(element.itertext()).strip() for element in elements]
    (ffn,) = data["structures"].values()
    assert [text for text in found if text in corpora] == ffn["order"] * 2, "below and beside the heat map"
    order = [corpora.index(name) for name in ffn["order"]]
    expected = [f"{ffn['overlap'][a][b]:.2f}" for a, b in itertools.product(order, order) if a != b]
    assert "\n".join(expected) in "\n".join(text for text in found if len(text) == 4 and text.startswith("0."))
    assert any("by chance 0.14" in text for text in found)
    call("compare", spec_file, "--picture", tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        assert image.format == "PNG"
        assert 1000 < image.size[0] < 3000, "three heat maps beside each other"


@pytest.mark.parametrize(
    ("family", "others"), [("deepseek_v2", {}), ("glm4_moe", {"query_heads": 3 * 6, "kv_groups": 3 * 3})]
)
def test_a_layer_without_routed_experts_has_nothing_to_compare(family: str, others: Data, tmp_path: Path) -> None:
    """The first of three layers; the others have six routed experts of 16 neurons."""
    data = {"name": "mixed", "base": str(save_tiny(tmp_path / "base", family)), "dimensions": {"language": "en"},
            "corpora": {"sources": write_sources(tmp_path, ("en", "general"))}, "relevance": "fisher",
            "budget": {"experts": 2}}  # fmt: skip
    found = expertprune.compare(parse_spec(data, "spec", tmp_path)).structures
    units = {structure.value: each.units for structure, each in found.items()}
    assert units == {"ffn": 2 * 6 * 16, "experts": 2 * 6, **others}


def test_each_structure_is_compared_by_the_criterion_that_would_choose_its_units(tmp_path: Path) -> None:
    data = {"name": "moe", "base": str(save_tiny(tmp_path / "base", "mixtral")), "dimensions": {"language": "en"},
            "corpora": {"sources": write_sources(tmp_path, ("en", "general"))}, "budget": {"experts": 2},
            "relevance": {"criterion": "fluctuation", "experts": "reap"}}  # fmt: skip
    spec = parse_spec(data, "spec", tmp_path)
    named = expertprune.compare(spec)
    alone = expertprune.compare(parse_spec(data | {"relevance": "reap"}, "spec", tmp_path), structures=["experts"])
    assert named.criterion == "fluctuation, reap"
    wanted = alone.structures[Structure.EXPERTS].rank_correlation
    assert np.array_equal(named.structures[Structure.EXPERTS].rank_correlation, wanted)
    with pytest.raises(SpecError, match="ffn: reap does not score them, so there is nothing to compare"):
        expertprune.compare(parse_spec(data | {"relevance": "reap"}, "spec", tmp_path), structures=["ffn"])


def test_a_budget_that_scores_no_units_is_compared_all_the_same(tmp_path: Path, spec_data: Data) -> None:
    layers = written(tmp_path, spec_data, name="layers", budget={"layers": 1}, relevance="fisher")
    assert call_json("compare", layers)["structures"]


@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_compared_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, spec_data: Data, spec_file: Path, store: Path
) -> None:
    def spec(name: str, **changes: Any) -> Path:
        return written(tmp_path, spec_data, name=name, **changes)

    (tmp_path / "folder.png").mkdir()
    same = spec("same", base=str(shutil.copytree(spec_data["base"], tmp_path / "base")))  # the same base elsewhere
    other = spec("other", base=str(save_tiny(tmp_path / "another", seed=1)))
    routed = {"base": str(save_tiny(tmp_path / "mixtral", "mixtral")), "budget": {"ffn": 0.25, "multiple_of": 8}}
    mixture = spec("mixture", **routed)
    activation = spec("activation", relevance="activation")
    fisher, kl = (spec(loss, relevance={"criterion": "fisher", "loss": loss}) for loss in ("language_model", "kl"))
    aggregate = spec("aggregate", compose={"allocation": "uniform", "aggregate": 0.9})
    alone = spec("alone", dimensions={"domain": "medical"}, general=["medical"])
    rows: list[tuple[list[Any], str]] = [
        *(([spec_file, "--fraction", fraction], "is not between 0 and 1") for fraction in ("0", "1", "nan")),
        ([spec_file, "--set", "relevance.criterion=magnitude"], "magnitude does not look at the corpus"),
        ([spec_file, "--structure", "heads"], "'heads' is not one of"),
        ([], "Missing argument 'SPEC...'"),
        ([spec_file, same, other], "specs 'tiny' and 'other' have different bases"),
        ([spec_file, mixture], "specs 'tiny' and 'mixture' have different bases"),
        ([spec_file, activation], "relevance.criterion: specs 'tiny' and 'activation' differ"),
        ([fisher, kl], "relevance.loss: specs 'language_model' and 'kl' differ"),
        ([spec_file, aggregate], "compose.aggregate: specs 'tiny' and 'aggregate' differ"),
        ([alone, alone], "a comparison needs two different corpora, found domain/medical"),
        ([spec_file, "--picture", tmp_path / "a.jpg"], "a.jpg: a picture is a .png or .svg file"),
        ([spec_file, "--picture", tmp_path / "absent/a.png"], "cannot be written: there is no folder"),
        ([spec_file, "--picture", tmp_path / "folder.png"], "cannot be written: it is a folder"),
    ]
    before = {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")}
    for arguments, words in rows:
        result = call("compare", *arguments, code=2)
        assert words in result.stderr
        assert "None" not in result.stderr
        assert result.stdout == ""
    assert {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")} == before
    with pytest.raises(SpecError, match="structures: 'heads' is none of ffn, query_heads, kv_groups"):
        expertprune.compare(spec_file, structures=["heads"])
    with pytest.raises(SpecError, match="needs a spec"):
        expertprune.compare([])
