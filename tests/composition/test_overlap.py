"""What corpora have in common: the arithmetic against brute force, the stage on a tiny model, its pictures and refusals."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

import expertprune
from expertprune.artifacts.profile import Profile
from expertprune.cli import main
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
from tests.patching import everywhere
from tests.tiny import save_tiny, write_corpus

Data = dict[str, Any]
Layers = list[np.ndarray[Any, np.dtype[np.float64]]]
CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """A command in the main thread changes how the process is terminated."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --- references in plain Python -------------------------------------------------------------------------------------


def irrelevant_set(scores: list[list[float]], counts: list[int]) -> set[tuple[int, int]]:
    """(layer, unit) of the lowest scores of each layer; among equals the higher index goes first."""
    chosen = set()
    for layer, (values, count) in enumerate(zip(scores, counts, strict=True)):
        by_relevance = sorted(range(len(values)), key=lambda unit: (values[unit], -unit))
        chosen |= {(layer, unit) for unit in by_relevance[:count]}
    return chosen


def jaccard(first: set[Any], second: set[Any]) -> float:
    return len(first & second) / len(first | second)


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; a value that stands several times gets the mean of the places that it takes."""
    return [sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2 for value in values]


def spearman(first: list[float], second: list[float]) -> float:
    a, b = ranks(first), ranks(second)
    mean = (len(a) + 1) / 2
    product = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    squares = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return product / math.sqrt(squares)


def random_layers(widths: list[int], corpora: int, seed: int, ties: bool) -> Layers:
    generator = np.random.default_rng(seed)
    if ties:
        return [generator.integers(0, 4, (corpora, width)).astype(float) for width in widths]
    return [generator.exponential(size=(corpora, width)) for width in widths]


def of_corpus(layers: Layers, corpus: int) -> list[list[float]]:
    return [scores[corpus].tolist() for scores in layers]


# --- overlap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("widths", "counts"), [([12], [3]), ([8, 20, 5], [2, 5, 1]), ([3, 3], [2, 1])])
def test_overlap_is_that_of_sets(widths: list[int], counts: list[int], ties: bool) -> None:
    layers = random_layers(widths, corpora=5, seed=len(widths), ties=ties)
    found = overlap(layers, counts)
    sets = [irrelevant_set(of_corpus(layers, corpus), counts) for corpus in range(5)]
    assert all(len(chosen) == sum(counts) for chosen in sets)
    for row, column in itertools.product(range(5), range(5)):
        assert found[row, column] == pytest.approx(jaccard(sets[row], sets[column]), abs=1e-15)


def test_overlap_by_hand() -> None:
    # Layer 0: {0, 1} and {1, 2}; layer 1: {0} and {0}. Two shared of four in all.
    layers = [np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.5]]), np.array([[0.0, 1.0], [3.0, 4.0]])]
    assert overlap(layers, [2, 1])[0, 1] == 2 / 4


def test_among_equals_the_lower_index_is_kept_as_in_composition() -> None:
    layers = [np.array([[0.0, 0.0, 0.0, 1.0], [5.0, 5.0, 0.0, 1.0]])]
    assert overlap(layers, [1])[0, 1] == 1, "unit 2 of both"
    assert overlap(layers, [2])[0, 1] == pytest.approx(1 / 3), "units 1, 2 and units 2, 3"


@pytest.mark.parametrize(
    ("units", "fraction", "count"),
    [(1536, 0.25, 384), (9, 0.25, 2), (3, 0.25, 1), (2, 0.25, 1), (10, 0.25, 3), (9, 0.01, 1), (9, 0.99, 8)],
)
def test_the_set_is_of_the_nearest_size_and_neither_empty_nor_everything(
    units: int, fraction: float, count: int
) -> None:
    assert irrelevant_units(units, fraction) == count


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_chance_is_f_over_2_minus_f(fraction: float) -> None:
    assert chance_overlap([1000, 1000], [int(1000 * fraction)] * 2) == pytest.approx(fraction / (2 - fraction))


def test_chance_is_expected_intersection_over_expected_union_of_all_pairs_of_sets() -> None:
    units, counts = [3, 4], [1, 2]
    choices = [list(itertools.combinations(range(n), k)) for n, k in zip(units, counts, strict=True)]
    sets = [{(0, *a)} | {(1, unit) for unit in b} for a, b in itertools.product(*choices)]
    intersections = sum(len(a & b) for a, b in itertools.product(sets, sets))
    unions = sum(len(a | b) for a, b in itertools.product(sets, sets))
    assert chance_overlap(units, counts) == pytest.approx(intersections / unions)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_independent_corpora_overlap_as_by_chance_and_are_uncorrelated(fraction: float) -> None:
    # 40 layers of 1,000 units: one standard deviation is at most 0.003 of overlap and 0.005 of correlation.
    result = compare_structure(random_layers([1000] * 40, corpora=4, seed=1, ties=False), fraction)
    assert result is not None
    others = ~np.eye(4, dtype=bool)
    assert np.abs(result.overlap[others] - fraction / (2 - fraction)).max() < 0.012
    assert np.abs(result.rank_correlation[others]).max() < 0.02
    assert result.chance == pytest.approx(fraction / (2 - fraction))


# --- rank correlation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [2, 1, 4, 3], 1 - 6 * 4 / (4 * 15)),  # no ties: 1 − 6 Σ d² / (n (n² − 1))
        ([1, 2, 3, 4], [10, 100, 1000, 1e6], 1),
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
        by_layer = [spearman(scores[row].tolist(), scores[column].tolist()) for scores in layers]
        expected = sum(width * rho for width, rho in zip(widths, by_layer, strict=True)) / 75
        assert found[row, column] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_matrices_are_symmetric_with_a_diagonal_of_1(ties: bool) -> None:
    result = compare_structure(random_layers([50, 7, 2], corpora=6, seed=4, ties=ties), 0.25)
    assert result is not None
    for matrix in (result.overlap, result.rank_correlation):
        assert np.array_equal(matrix, matrix.T)
        assert np.array_equal(np.diag(matrix), np.ones(6))


def test_only_ranks_within_a_layer_and_corpus_count() -> None:
    layers = random_layers([30, 12], corpora=3, seed=5, ties=False)
    stretched = [np.exp(scores) * np.array([[1.0], [100.0], [1e-6]]) for scores in layers]
    first, second = compare_structure(layers, 0.25), compare_structure(stretched, 0.25)
    assert first is not None
    assert second is not None
    assert np.array_equal(first.overlap, second.overlap)
    assert np.array_equal(first.rank_correlation, second.rank_correlation)


def test_layers_of_one_unit_do_not_count() -> None:
    single = random_layers([1, 1], corpora=3, seed=6, ties=False)
    wide = random_layers([8], corpora=3, seed=7, ties=False)
    assert compare_structure(single, 0.25) is None
    mixed, alone = compare_structure([*single, *wide], 0.25), compare_structure(wide, 0.25)
    assert mixed is not None
    assert alone is not None
    assert (
        (mixed.units, mixed.irrelevant, mixed.chance) == (alone.units, alone.irrelevant, alone.chance) == (8, 2, 1 / 7)
    )
    assert np.array_equal(mixed.rank_correlation, alone.rank_correlation)


# --- clustering -----------------------------------------------------------------------------------------------------


def test_average_linkage_by_hand() -> None:
    distance = np.array([[0, 0.5, 0.1], [0.5, 0, 0.7], [0.1, 0.7, 0]])
    result = cluster(distance)
    # 0 and 2 meet at 0.1; their distances to 1 average (0.5 + 0.7) / 2 = 0.6, above the cut at 0.42.
    assert result.dendrogram[:, 2:] == pytest.approx(np.array([[0.1, 2], [0.6, 3]]))
    assert {frozenset(row[:2]) for row in result.dendrogram.tolist()} == {frozenset({0, 2}), frozenset({1, 3})}
    assert {frozenset(members) for members in result.clusters} == {frozenset({0, 2}), frozenset({1})}


@pytest.mark.parametrize(("height", "clusters"), [(0.69, [1, 2]), (0.71, [1, 1, 1])])
def test_the_dendrogram_is_cut_at_7_tenths_of_its_height(height: float, clusters: list[int]) -> None:
    distance = np.array([[0, height, 1], [height, 0, 1], [1, 1, 0]])
    assert sorted(map(len, cluster(distance).clusters)) == clusters


def test_corpora_that_are_equally_far_from_each_other_make_no_group() -> None:
    result = cluster(np.full((4, 4), 0.3) * (1 - np.eye(4)))
    assert sorted(map(len, result.clusters)) == [1, 1, 1, 1]


def test_corpora_that_are_the_same_make_one_group() -> None:
    assert [sorted(members) for members in cluster(np.zeros((3, 3))).clusters] == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found_and_stand_together(seed: int) -> None:
    generator = np.random.default_rng(seed)
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


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: Data) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec_data))
    return path


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["compare", *map(str, args)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


def run_json(*args: Any) -> Data:
    data: Data = json.loads(run(*args, "--json").stdout)
    return data


def names(data: Data) -> list[str]:
    return [corpus["name"] for corpus in data["corpora"]]


def refuse_to_load(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


def own_relevance(profile: Profile, layer: int, how: Callable[[Any], Any]) -> list[float]:
    """`impact` of FFN neurons from what is stored: `(rms · ‖column‖)²` per document, then over documents."""
    rms = profile.read(f"ffn.{layer}.rms").float() * profile.read(f"ffn.{layer}.rms.scale")
    scores = how(((rms * profile.read(f"ffn.{layer}.output_l2")) ** 2).numpy())
    values: list[float] = scores.tolist()
    return values


def test_relevance_is_that_of_the_criterion_over_documents(spec_file: Path) -> None:
    (profile, *_) = expertprune.profile(spec_file).values()
    by_mean = relevance(profile, Structure.FFN, criteria["impact"], "mean")
    by_max = relevance(profile, Structure.FFN, criteria["impact"], "max")
    heads = relevance(profile, Structure.QUERY_HEADS, criteria["impact"], "mean")
    assert (len(by_mean), len(heads)) == (3, 3)
    for layer in range(3):
        assert by_mean[layer] == pytest.approx(np.array(own_relevance(profile, layer, lambda s: s.mean(0))), rel=1e-5)
        assert by_max[layer] == pytest.approx(np.array(own_relevance(profile, layer, lambda s: s.max(0))), rel=1e-5)
        stored = profile.read(f"heads.{layer}.impact").double().mean(0).numpy()
        assert heads[layer] == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_the_command_compares_every_pair_of_a_specs_corpora(spec_file: Path, aggregate: str) -> None:
    data = run_json(spec_file, "--set", f"compose.aggregate={aggregate}", "--fraction", "0.5")
    profiles = expertprune.profile(spec_file)
    assert names(data) == CORPORA
    assert [corpus["profile"] for corpus in data["corpora"]] == [profile.digest for profile in profiles.values()]
    assert (data["kind"], data["criterion"], data["aggregate"], data["fraction"]) == (
        "comparison",
        "impact",
        aggregate,
        0.5,
    )
    assert list(data["structures"]) == ["ffn", "query_heads", "kv_groups"]
    how = {"mean": lambda s: s.mean(0), "max": lambda s: s.max(0)}[aggregate]
    scores = [[own_relevance(profile, layer, how) for layer in range(3)] for profile in profiles.values()]
    ffn = data["structures"]["ffn"]
    assert (ffn["units"], ffn["irrelevant"], ffn["chance"]) == (3 * 32, 3 * 16, pytest.approx(0.5 / 1.5))
    for a, b in itertools.combinations(range(4), 2):
        expected = jaccard(irrelevant_set(scores[a], [16] * 3), irrelevant_set(scores[b], [16] * 3))
        assert ffn["overlap"][a][b] == pytest.approx(expected)
        by_layer = [spearman(scores[a][layer], scores[b][layer]) for layer in range(3)]
        assert ffn["rank_correlation"][a][b] == pytest.approx(sum(by_layer) / 3, abs=1e-6)
    assert data["structures"]["query_heads"]["units"] == 3 * 6
    assert data["structures"]["kv_groups"]["units"] == 3 * 3


def test_other_settings_give_other_figures(spec_file: Path) -> None:
    first = run_json(spec_file)["structures"]["ffn"]
    assert run_json(spec_file, "--fraction", "0.5")["structures"]["ffn"]["overlap"] != first["overlap"]
    other = run_json(spec_file, "--set", "relevance.criterion=activation")
    assert other["criterion"] == "activation"
    assert other["structures"]["ffn"]["rank_correlation"] != first["rank_correlation"]


def test_stored_profiles_are_compared_without_the_model(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_json(spec_file)
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    assert run_json(spec_file) == first
    assert expertprune.compare(load_spec(spec_file)).document() == first


def test_the_table_shows_what_the_json_says(spec_file: Path) -> None:
    data = run_json(spec_file)
    text = run(spec_file).stdout
    sections = dict(zip(data["structures"], text.split("\n\n")[1:], strict=True))
    for structure, result in data["structures"].items():
        lines = sections[structure].splitlines()
        assert lines[0].startswith(f"{structure}: {result['irrelevant']} of {result['units']} units")
        assert lines[0].endswith(f"by chance {result['chance']:.2f}")
        rows = [line.split() for line in lines[1:] if "─" not in line][1:]
        assert [row[:2] for row in rows] == [[str(i), name] for i, name in enumerate(result["order"], 1)]
        order = [names(data).index(name) for name in result["order"]]
        for number, corpus in enumerate(order):
            below = [f"{result['rank_correlation'][corpus][other]:.2f}" for other in order[:number]]
            above = [f"{result['overlap'][corpus][other]:.2f}" for other in order[number + 1 :]]
            assert rows[number][2:] == below + above
        # A line above the head, below it, and below each cluster.
        assert sum("─" in line for line in lines) == 2 + len(result["clusters"])


def test_one_structure_alone(spec_file: Path) -> None:
    everything = run_json(spec_file)["structures"]
    assert run_json(spec_file, "--structure", "kv_groups")["structures"] == {"kv_groups": everything["kv_groups"]}


def test_several_specs_name_their_corpora_together(tmp_path: Path, spec_data: Data) -> None:
    paths = []
    for value, dimension in (("medical", "domain"), ("qa", "task")):
        path = tmp_path / f"{value}.yaml"
        path.write_text(yaml.safe_dump({**spec_data, "name": value, "dimensions": {dimension: value}}))
        paths.append(path)
    assert names(run_json(*paths)) == ["domain/medical", "general/general", "task/qa"]


def test_all_takes_every_stored_profile_of_the_base(tmp_path: Path, spec_file: Path, spec_data: Data) -> None:
    expertprune.profile(spec_file)
    expertprune.profile(spec_file, overrides={"base.model": str(save_tiny(tmp_path / "other", seed=1))})
    (tmp_path / "en.yaml").write_text(yaml.safe_dump({**spec_data, "dimensions": {"language": "en"}, "general": []}))
    data = run_json(tmp_path / "en.yaml", "--all")
    assert sorted(names(data)) == sorted(CORPORA)
    assert names(data)[0] == "language/en", "the spec's own come first"


def test_corpora_of_one_name_are_told_apart_by_their_profiles(spec_file: Path) -> None:
    other = expertprune.profile(spec_file, overrides={"calibration.documents": 5, "dimensions": {"domain": "medical"}})
    data = run_json(spec_file, "--all")
    medical = [corpus for corpus in data["corpora"] if corpus["name"].startswith("domain/medical")]
    assert [corpus["name"] for corpus in medical] == [f"domain/medical ({c['profile'][:8]})" for c in medical]
    assert [corpus["documents"] for corpus in medical] == [12, 5]
    assert {profile.digest for profile in other.values()} <= {corpus["profile"] for corpus in data["corpora"]}
    assert "language/en" in names(data), "its name is its own"


def test_a_stored_profile_that_cannot_be_read_is_left_out(
    spec_file: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_json(spec_file)
    (store / "profiles" / "noise.safetensors").write_bytes(b"noise")
    assert run_json(spec_file, "--all") == first
    assert "noise.safetensors is left out" in caplog.text


def test_structures_with_one_unit_per_layer_are_left_out(tmp_path: Path, spec_file: Path) -> None:
    base = save_tiny(tmp_path / "narrow", num_attention_heads=2, num_key_value_heads=1)
    data = run_json(spec_file, "--set", f"base.model={base}")
    assert list(data["structures"]) == ["ffn", "query_heads"]
    error = run(spec_file, "--set", f"base.model={base}", "--structure", "kv_groups", code=2).stderr
    assert "error: kv_groups: no layer has more than one" in error


# --- pictures -------------------------------------------------------------------------------------------------------


def test_the_picture_is_a_png_that_grows_with_what_it_shows(tmp_path: Path, spec_file: Path) -> None:
    sizes = {}
    for structures in (["ffn"], ["ffn", "query_heads", "kv_groups"]):
        path = tmp_path / f"{len(structures)}.png"
        options = [part for structure in structures for part in ("--structure", structure)]
        run(spec_file, "--picture", path, *options)
        with Image.open(path) as image:
            image.verify()
            assert image.format == "PNG"
        with Image.open(path) as image:
            sizes[len(structures)] = image.size
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 50, "something is drawn"
    assert sizes[3][1] == sizes[1][1]
    assert 400 < sizes[1][0] < 1000 < 2 * sizes[1][0] < sizes[3][0] < 3000


def text_of(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_svg_names_every_corpus_and_prints_every_value(tmp_path: Path, spec_file: Path) -> None:
    data = run_json(spec_file, "--structure", "ffn", "--picture", tmp_path / "a.svg")
    run(spec_file, "--structure", "ffn", "--picture", tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    found = text_of(tmp_path / "a.svg")
    ffn = data["structures"]["ffn"]
    drawn = [text for text in found if text in CORPORA]
    assert drawn == ffn["order"] * 2, "below and beside the heat map, in clustering order"
    values = [text for text in found if len(text) == 4 and text.startswith("0.")]
    order = [CORPORA.index(name) for name in ffn["order"]]
    expected = [f"{ffn['overlap'][a][b]:.2f}" for a, b in itertools.product(order, order) if a != b]
    assert "\n".join(expected) in "\n".join(values)
    assert any("by chance 0.14" in text for text in found)


def test_names_are_drawn_as_they_are(tmp_path: Path, spec_data: Data) -> None:
    """A dollar sign starts no formula."""
    sources = spec_data["corpora"]["sources"]
    sources["a$_b$"] = sources.pop("medical")
    spec_data["dimensions"] = {"domain": "a$_b$"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec_data))
    run(tmp_path / "tiny.yaml", "--picture", tmp_path / "a.svg")
    assert "domain/a$_b$" in text_of(tmp_path / "a.svg")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail, before a model is loaded, and leave nothing behind; gives its message."""
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)

    def call(*args: Any) -> str:
        before = {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")}
        result = run(*args, code=2)
        assert {path for folder in (tmp_path, store / "profiles") for path in folder.rglob("*")} == before
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        return result.stderr

    return call


@pytest.mark.parametrize("general", [[], ["medical"]])
def test_one_corpus_is_not_enough(
    tmp_path: Path, spec_data: Data, refused: Callable[..., str], general: list[str]
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({**spec_data, "dimensions": {"domain": "medical"}, "general": general}))
    for arguments in ([path], [path, path], [path, "--all"]):
        message = refused(*arguments)
        assert "a comparison needs two different corpora, found domain/medical" in message
        assert "--all" in message


def test_specs_of_different_bases_are_refused(tmp_path: Path, spec_data: Data, refused: Callable[..., str]) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    same = shutil.copytree(spec_data["base"], tmp_path / "same")
    for name, base in (("first", spec_data["base"]), ("second", str(other)), ("third", str(same))):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**spec_data, "name": name, "base": base}))
    message = refused(tmp_path / "first.yaml", tmp_path / "third.yaml", tmp_path / "second.yaml")
    assert "base.model: specs 'first' and 'second' have different bases" in message
    assert str(other) in message
    assert "third" not in message, "the same model elsewhere is the same base"


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_criterion_that_does_not_see_the_corpus_is_refused(
    spec_file: Path, refused: Callable[..., str], criterion: str
) -> None:
    message = refused(spec_file, "--set", f"relevance.criterion={criterion}")
    assert f"relevance.criterion: {criterion} does not look at the corpus" in message
    assert "all corpora are the same" in message


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


@pytest.mark.parametrize(
    ("key", "values"),
    [("relevance", ["impact", "activation"]), ("compose", [{"aggregate": "mean"}, {"aggregate": 0.9}])],
)
def test_specs_that_score_differently_are_refused(
    tmp_path: Path, spec_data: Data, refused: Callable[..., str], key: str, values: list[Any]
) -> None:
    paths = []
    for number, value in enumerate(values):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump({**spec_data, "name": f"spec{number}", key: value}))
    dotted = {"relevance": "relevance.criterion", "compose": "compose.aggregate"}[key]
    assert f"{dotted}: specs 'spec0' and 'spec1' differ" in refused(*paths)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("overlap.jpg", "a picture is a .png or .svg file"),
        ("overlap", "a picture is a .png or .svg file"),
        ("absent/overlap.png", "there is no folder"),
        ("folder.png", "it is a folder"),
        ("tiny.yaml/overlap.png", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_else(
    tmp_path: Path, spec_file: Path, refused: Callable[..., str], picture: str, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    message = refused(spec_file, "--picture", tmp_path / picture)
    assert f"error: {tmp_path / picture}: " in message
    assert words in message


@pytest.mark.parametrize("fraction", ["0", "1", "-0.25", "25", "nan"])
def test_a_fraction_outside_0_to_1_is_refused(spec_file: Path, refused: Callable[..., str], fraction: str) -> None:
    assert "is not between 0 and 1" in refused(spec_file, "--fraction", fraction)


def test_an_unknown_structure_is_refused(spec_file: Path) -> None:
    with pytest.raises(SpecError, match="structures: 'heads' is none of ffn, query_heads, kv_groups"):
        expertprune.compare(spec_file, structures=["heads"])
    assert "'heads' is not one of" in run(spec_file, "--structure", "heads", code=2).stderr


def test_no_spec_is_refused() -> None:
    assert "Missing argument 'SPEC...'" in run(code=2).stderr
    with pytest.raises(SpecError, match="needs a spec"):
        expertprune.compare([])


def test_corpora_that_differ_more_overlap_less(tmp_path: Path, spec_data: Data) -> None:
    """Real profiles: a corpus and nearly the same one against a corpus of other words."""
    sources = spec_data["corpora"]["sources"]
    path = Path(sources["medical"]["path"])
    rows = path.read_text().splitlines()
    (tmp_path / "near.jsonl").write_text("\n".join(rows[1:]) + "\n")
    sources["near"] = {**sources["medical"], "path": str(tmp_path / "near.jsonl")}
    sources["far"] = {**sources["medical"], "path": str(write_corpus(tmp_path / "far.jsonl", sentences=2, seed=99))}
    spec_data |= {"dimensions": {"domain": ["medical", "near", "far"]}, "general": []}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec_data))
    ffn = run_json(tmp_path / "tiny.yaml", "--structure", "ffn")["structures"]["ffn"]
    assert ffn["rank_correlation"][0][1] > ffn["rank_correlation"][0][2]
    assert ffn["clusters"][0] in (["domain/medical", "domain/near"], ["domain/near", "domain/medical"], ["domain/far"])
    assert ["domain/far"] in ffn["clusters"]
