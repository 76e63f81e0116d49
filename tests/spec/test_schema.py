"""The spec: what is required, what is refused and with which words, how paths and overrides are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from expertprune.errors import SpecError
from expertprune.files import shipped
from expertprune.spec.reading import load_spec, parse_spec
from expertprune.spec.schema import Spec

MINIMAL: dict[str, Any] = {
    "name": "small",
    "base": "owner/model",
    "dimensions": {"language": "de"},
    "budget": {"ffn": 0.25},
}
FULL: dict[str, Any] = {
    "name": "full-1.0_x",
    "base": {"model": "owner/model", "revision": "main", "dtype": "bfloat16", "trust_remote_code": False},
    "dimensions": {"language": ["de", "fr"], "domain": ["medical"], "task": ["qa"]},
    "general": ["general", "legal"],
    "corpora": {
        "sources": {
            "de": {"dataset": "owner/data", "config": "de", "split": "train", "evaluation_split": "test"},
            "language/fr": {"dataset": "owner/other", "template": "Q: {question}\nA: {answers.text.0}"},
        }
    },
    "calibration": {"documents": 12, "max_tokens": 64, "tokens_per_batch": 100, "seed": 3},
    "relevance": {"criterion": "activation", "loss": "kl", "seed": 4},
    "compose": {
        "rule": "mean",
        "aggregate": 0.9,
        "scale": "percentile",
        "fusion": {"tau": 0.2, "lambda": 0.75, "beta": 0.25},
        "allocation": "uniform",
    },
    "budget": {"ffn": 384, "kv_groups": 1, "multiple_of": 8, "floor": 0.2},
    "compensation": {"method": "none", "ridge": 500.0},
    "evaluate": {"corpora": ["medical"], "documents": 3, "max_tokens": 77, "metrics": ["kl"], "enabled": False},
}


def spec_of(**changes: Any) -> Spec:
    return parse_spec({**copy.deepcopy(MINIMAL), **changes}, "my.yaml", Path("/nowhere"))


def problems_of(**changes: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        spec_of(**changes)
    return caught.value.problems


def holds(found: Any, expected: Any) -> bool:
    """Whether plain data has the expected values, whatever other keys it has."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and holds(found[key], value) for key, value in expected.items())
    return bool(found == expected)


def test_the_minimal_spec_is_valid_and_has_the_documented_defaults() -> None:
    spec = spec_of()
    expected = {
        "base": {"model": "owner/model", "dtype": "auto", "trust_remote_code": False},
        "general": ["general"],
        "calibration": {"documents": 256, "max_tokens": 512, "windows": 1, "prompt_weight": 1.0, "seed": 0},
        "relevance": {"criterion": "auto", "experts": None},
        "compose": {"rule": "intersection", "allocation": "auto"},
        "budget": {"ffn": 0.25, "query_heads": 0, "kv_groups": 0, "multiple_of": 64},
        "compensation": {"method": "least_squares"},
    }
    assert holds(spec.model_dump(), expected)
    assert spec.dimensions.chosen == {"language": ["de"]}
    assert spec.evaluate.metrics is None
    every = ["bits_per_byte", "perplexity", "kl", "agreement", "questions"]
    assert spec.evaluate.chosen_metrics(other_tokens=False) == every


def test_an_empty_spec_names_every_required_key_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({}, "my.yaml", Path("/nowhere"))
    required = ("base", "budget", "dimensions", "name")
    assert sorted(caught.value.problems) == [f"my.yaml: missing key '{key}'" for key in required]


UNKNOWN = [
    ({"evalute": {}}, "evalute", "evaluate"),
    ({"base": {"model": "a/b", "dtyp": "float32"}}, "base.dtyp", "dtype"),
    ({"dimensions": {"language": "de", "taks": "qa"}}, "dimensions.taks", "task"),
    ({"corpora": {"sources": {"de": {"path": "a", "feild": "b"}}}}, "corpora.sources.de.feild", "field"),
    ({"corpora": {"sources": {"a/b": {"path": "a", "fild": "b"}}}}, "corpora.sources.a/b.fild", "field"),
    ({"corpora": {"sources": {"path": {"path": "a", "queston": "b"}}}}, "corpora.sources.path.queston", "questions"),
    ({"compose": {"fusion": {"lamda": 0.5}}}, "compose.fusion.lamda", "lambda"),
    ({"budget": {"ffn": 0.2, "fnn": 0.2}}, "budget.fnn", "ffn"),
    ({"evaluate": {"metric": ["kl"]}}, "evaluate.metric", "metrics"),
    ({"compose": {"fusion": {"zzz": 1}}}, "compose.fusion.zzz", None),
]


@pytest.mark.parametrize(("changes", "key", "nearest"), UNKNOWN, ids=[key for _, key, _ in UNKNOWN])
def test_an_unknown_key_names_file_key_and_the_nearest_key_or_all(
    changes: dict[str, Any], key: str, nearest: str | None
) -> None:
    hint = f"did you mean '{nearest}'?" if nearest else "valid: beta, lambda, method, rows, tau"
    assert problems_of(**changes) == [f"my.yaml: unknown key '{key}'; {hint}"]


def test_several_errors_of_different_kinds_are_reported_at_once() -> None:
    data = {"name": "a b", "dimensions": {"language": "de", "domian": "x"}, "calibration": {"documents": 0}}
    with pytest.raises(SpecError) as caught:
        parse_spec({**data, "budget": {"ffn": 1.0}, "surprise": 1}, "my.yaml", Path("/nowhere"))
    problems = caught.value.problems
    assert len(problems) == 6
    assert all(problem.startswith("my.yaml: ") for problem in problems)
    keys = ("name:", "missing key 'base'", "'dimensions.domian'", "calibration.documents", "budget.ffn", "'surprise'")
    for key in keys:
        assert sum(key in problem for problem in problems) == 1, key
    assert str(caught.value) == "\n".join(problems)


WRONG = [
    ({"name": "a/b"}, "name:", "found 'a/b'"),
    ({"base": ""}, "base.model:", "found ''"),
    ({"base": {"model": "a/b", "dtype": "int8"}}, "base.dtype:", "'float32'"),
    ({"dimensions": {"language": ["de", ""]}}, "dimensions.language.1:", "found ''"),
    ({"dimensions": {"language": []}}, "dimensions:", "at least one of language, domain, task"),
    ({"general": {"general": 1}}, "general:", "list"),
    ({"corpora": {"sources": {"de": "de.jsonl"}}}, "corpora.sources.de:", "found 'de.jsonl'"),
    ({"budget": 0.25}, "budget:", "found 0.25"),
    ({"budget": {"multiple_of": 8}}, "budget:", "ffn, query_heads, kv_groups, experts, vocabulary, parameters"),
    ({"budget": {"ffn": True}}, "budget.ffn:", "found True"),
    ({"budget": {"ffn": -0.1}}, "budget.ffn:", "found -0.1"),
    ({"budget": {"ffn": 1.0}}, "budget.ffn:", "below 1"),
    ({"budget": {"kv_groups": 1.5}}, "budget.kv_groups:", "below 1"),
    ({"budget": {"parameters": 1}}, "budget.parameters:", "a fraction below 1"),
    ({"budget": {"parameters": 0.2, "ffn": 0.2}}, "budget:", "not both"),
    ({"budget": {"max_parameters": "100M", "ffn": 0.2}}, "budget:", "'ffn' or 'max_parameters', not both"),
    ({"budget": {"retention": {"expert": 0.9}, "ffn": 64}}, "budget:", "'ffn' or 'retention', not both"),
    ({"budget": {"retention": {"expert": 0.9}, "parameters": 0.2}}, "budget:", "give one of parameters, retention"),
    ({"budget": {"max_parameters": 9, "parameters": 0.2}}, "budget:", "give one of parameters, max_parameters"),
    ({"budget": {"retention": {}}}, "budget.retention:", "at least one of expert, general"),
    ({"budget": {"retention": {"expert": 0}}}, "budget.retention.expert:", "greater than 0"),
    ({"budget": {"max_parameters": "abcM"}}, "budget.max_parameters:", "found 'abcM'"),
    ({"budget": {"max_parameters": 0}}, "budget.max_parameters:", "such as 100M, 1.5B or 100000000"),
    ({"budget": {"max_parameters": -5}}, "budget.max_parameters:", "found -5"),
    ({"budget": {"max_parameters": "infB"}}, "budget.max_parameters:", "found 'infB'"),
    ({"compose": {"allocation": "globl"}}, "compose.allocation:", "'uniform' or 'global'"),
    ({"evaluate": {"metrics": []}}, "evaluate.metrics:", "must not be empty"),
    (
        {"compose": {"scale": "standard", "fusion": {"beta": 0.5}}},
        "compose:",
        "fusion.beta 0.5 weighs scores above zero",
    ),
    (
        {"compose": {"scale": "standard", "fusion": {"beta": 0}}},
        "compose:",
        "take scale: share or percentile, or beta: 1",
    ),
    ({"compose": {"fusion": {"lambda": 3}}}, "compose.fusion.lambda:", "must be at most 1"),
    ({"evaluate": {"metrics": ["kl", "bleu"]}}, "evaluate.metrics.1:", "found 'bleu'"),
]


@pytest.mark.parametrize(("changes", "key", "words"), WRONG, ids=[f"{key}{words}" for _, key, words in WRONG])
def test_a_wrong_value_names_file_key_and_what_was_found(changes: dict[str, Any], key: str, words: str) -> None:
    (problem,) = problems_of(**changes)
    assert problem.startswith(f"my.yaml: {key}")
    assert words in problem


TOLD = [
    ({"calibration": {"documents": "many"}}, "calibration.documents: must be a whole number (found 'many')"),
    ({"calibration": {"documents": 1.5}}, "calibration.documents: must be a whole number (found 1.5)"),
    ({"calibration": {"documents": 0}}, "calibration.documents: must be at least 1 (found 0)"),
    ({"calibration": 3}, "calibration: must be a mapping of keys and values (found 3)"),
    ({"compose": {"fusion": {"tau": "x"}}}, "compose.fusion.tau: must be a number (found 'x')"),
    ({"compensation": {"ridge": 0}}, "compensation.ridge: must be greater than 0 (found 0)"),
    ({"evaluate": {"enabled": "maybe"}}, "evaluate.enabled: must be true or false (found 'maybe')"),
    ({"evaluate": {"metrics": "kl"}}, "evaluate.metrics: must be a list (found 'kl')"),
    ({"general": {"a": 1}}, "general: must be text, or a list of texts (found {'a': 1})"),
    ({"general": [1]}, "general.0: must be text; put it in quotes (found 1)"),
    ({"name": ["x"]}, "name: must be text (found ['x'])"),
    ({"name": "a" * 101}, f"name: must have at most 100 characters (found '{'a' * 56}...)"),
    (
        {"name": "a b"},
        "name: must be of letters, digits, '.', '_' and '-', the first a letter or a digit (found 'a b')",
    ),
    (
        {"base": {"model": "a/b", "device": "gpu"}},
        "base.device: must be auto, cpu, cuda, or one GPU of several such as cuda:1 (found 'gpu')",
    ),
    (
        {"compose": {"scale": "shaer"}},
        "compose.scale: must be 'share', 'percentile' or 'standard'; did you mean 'share'? (found 'shaer')",
    ),
    ({"serve_with": "tgi"}, "serve_with.0: must be 'transformers', 'vllm' or 'gguf' (found 'tgi')"),
    ({"corpora": {"sources": {"de": {"path": ""}}}}, "corpora.sources.de.path.0: must not be empty (found '')"),
]


@pytest.mark.parametrize(("changes", "told"), TOLD, ids=[told.partition(":")[0] for _, told in TOLD])
def test_a_wrong_value_is_told_in_the_projects_own_words(changes: dict[str, Any], told: str) -> None:
    assert problems_of(**changes) == [f"my.yaml: {told}"]


def test_no_message_of_pydantic_reaches_the_user() -> None:
    wrong = [None, True, 3, -1.5, 1e9, "", "?" * 999, [], [None], {}, {"?": 1}]
    document = spec_of(**FULL).document()
    for section in document:
        for value in wrong:
            changes = [{section: value}]
            if isinstance(document[section], dict):
                changes += [{section: {**document[section], key: value}} for key in document[section]]
            for each in changes:
                try:
                    spec_of(**each)
                except SpecError as error:
                    said = [problem for problem in error.problems if "Input" in problem or "should" in problem]
                    assert said == [], each


def test_sizes_may_be_written_short() -> None:
    for written, size in (("100M", 10**8), ("1.5b", 1_500_000_000), ("250k", 250_000), ("12345", 12_345), (1e8, 10**8)):
        assert spec_of(budget={"max_parameters": written}).budget.max_parameters == size


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "exactly one of 'path' and 'dataset'"),
        ({"path": "a", "dataset": "b"}, "exactly one of 'path' and 'dataset'"),
        ({"path": "a", "field": "x", "template": "{x}"}, "'field' or 'template', not both"),
        ({"path": "a", "revision": "main"}, "revision does not go with 'path'"),
        ({"path": "a", "config": "x", "evaluation_split": "test"}, "config, evaluation_split does not go with 'path'"),
        ({"dataset": "a", "evaluation": "b.jsonl"}, "evaluation does not go with 'dataset'"),
    ],
)
def test_a_source_of_two_minds_is_refused(source: dict[str, str], words: str) -> None:
    (problem,) = problems_of(corpora={"sources": {"de": source}})
    assert problem.startswith("my.yaml: corpora.sources.de: ")
    assert words in problem


@pytest.mark.parametrize("aggregate", ["median", 0, 1, [0.5]])
def test_an_aggregate_of_another_kind_is_named_by_its_key_alone(aggregate: Any) -> None:
    assert all(p.startswith("my.yaml: compose.aggregate: ") for p in problems_of(compose={"aggregate": aggregate}))


SHORTHANDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dimensions": {"task": "qa"}}, {"dimensions": {"task": ["qa"]}}),
    ({"compose": {"aggregate": "max"}}, {"compose": {"aggregate": "max"}}),
    ({"compose": {"scale": "standard"}}, {"compose": {"scale": "standard"}}),
    (
        {"compose": {"scale": "standard", "fusion": {"method": "weighted", "beta": 0.5}}},
        {"compose": {"fusion": {"beta": 0.5}}},
    ),
    ({"budget": {"retention": {"general": 0.9}, "kv_groups": 1}}, {"budget": {"retention": {"general": 0.9}}}),
    ({"general": "medical"}, {"general": ["medical"]}),
    ({"relevance": "random"}, {"relevance": {"criterion": "random"}}),
    ({"compensation": "none"}, {"compensation": {"method": "none"}}),
    ({"corpora": "/data/mine"}, {"corpora": {"catalogue": "/data/mine"}}),
    ({"evaluate": {"corpora": "de"}}, {"evaluate": {"corpora": ["de"]}}),
    (
        {"corpora": {"sources": {"de": {"path": "/data/de.jsonl"}}}},
        {"corpora": {"sources": {"de": {"path": ["/data/de.jsonl"]}}}},
    ),
]


@pytest.mark.parametrize(("changes", "expected"), SHORTHANDS)
def test_shorthands_mean_the_long_form(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert holds(spec_of(**changes).document(), expected)


def test_dimensions_keep_their_fixed_order_however_they_are_written() -> None:
    spec = spec_of(dimensions={"task": "qa", "domain": "medical", "language": ["fr", "de"]})
    assert list(spec.dimensions.chosen.values()) == [["fr", "de"], ["medical"], ["qa"]]


# --- files ----------------------------------------------------------------------------------------------------------


def write_spec(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def test_relative_paths_are_relative_to_the_spec_and_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = {"path": ["a.jsonl", "/abs/b.jsonl"], "evaluation": "../e.jsonl", "questions": "q.jsonl"}
    corpora = {"catalogue": "../catalogue", "sources": {"de": source}}
    data = {**MINIMAL, "base": "../models/mine", "corpora": corpora}
    spec = load_spec(write_spec(tmp_path / "specs" / "my.yaml", data))
    assert spec.base.model == str(tmp_path / "models" / "mine")
    assert spec.corpora.catalogue == str(tmp_path / "catalogue")
    read = spec.corpora.sources["de"]
    assert read.path == [str(tmp_path / "specs" / "a.jsonl"), "/abs/b.jsonl"]
    assert read.evaluation == [str(tmp_path / "e.jsonl")]
    assert read.questions == str(tmp_path / "specs" / "q.jsonl")


@pytest.mark.parametrize(
    ("base", "absolute"),
    [("../mine", True), ("weights.gguf", True), ("there/is", True), ("owner/model", False), ("bundled-name", False)],
)
def test_a_base_is_a_path_if_it_looks_like_one_or_is_there(base: str, absolute: bool, tmp_path: Path) -> None:
    (tmp_path / "there" / "is").mkdir(parents=True)
    spec = parse_spec({**MINIMAL, "base": base}, "my.yaml", tmp_path)
    assert spec.base.model == (str((tmp_path / base).resolve()) if absolute else base)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [unclosed", "not valid YAML"),
        (b"", "a spec is a mapping"),
        (b"name: \xff\xfe", "not UTF-8 text"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({}, {"compose.fusion.lambda": 0.125, "name": "b"}, {"compose": {"fusion": {"lambda": 0.125}}, "name": "b"}),
        ({}, {"dimensions.task": ["qa"]}, {"dimensions": {"language": ["de"], "task": ["qa"]}}),
        ({}, {"base.dtype": "float32"}, {"base": {"model": "owner/model", "dtype": "float32"}}),
        ({"relevance": "taylor"}, {"relevance.seed": 9}, {"relevance": {"criterion": "taylor", "seed": 9}}),
        ({"relevance": "taylor"}, {"relevance": "random"}, {"relevance": {"criterion": "random"}}),
        (
            {"corpora": "/data/mine"},
            {"corpora.sources.de.path": "/data/de.txt"},
            {"corpora": {"catalogue": "/data/mine", "sources": {"de": {"path": ["/data/de.txt"]}}}},
        ),
    ],
)
def test_overrides_change_one_key_and_keep_what_stands_beside_it(
    changes: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = {**copy.deepcopy(MINIMAL), **changes}
    before = copy.deepcopy(data)
    assert holds(parse_spec(data, "my.yaml", Path("/nowhere"), overrides).document(), expected)
    assert data == before


def test_an_override_is_checked_like_the_file(tmp_path: Path) -> None:
    path = write_spec(tmp_path / "my.yaml", MINIMAL)
    with pytest.raises(SpecError) as caught:
        load_spec(path, {"budget.fnn": 0.5, "compose.scale": "most"})
    assert len(caught.value.problems) == 2
    assert any("'budget.fnn'; did you mean 'ffn'?" in problem for problem in caught.value.problems)


# --- round trip and schema ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [MINIMAL, FULL], ids=["minimal", "full"])
def test_the_document_of_a_spec_gives_the_same_spec_back_through_yaml(data: dict[str, Any]) -> None:
    spec = parse_spec(copy.deepcopy(data), "my.yaml", Path("/nowhere"))
    document = yaml.safe_load(yaml.safe_dump(spec.document()))
    again = parse_spec(document, "again.yaml", Path("/somewhere/else"))
    assert again == spec
    assert again.document() == spec.document()


def schema_problems(data: Any) -> list[str]:
    schema = Spec.model_json_schema(by_alias=True)
    jsonschema.Draft202012Validator.check_schema(schema)
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(data)]


def test_the_json_schema_accepts_what_a_spec_accepts_and_refuses_what_it_refuses() -> None:
    document = spec_of(**FULL).document()
    assert holds(document, FULL)
    shipped_specs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped("profiles").glob("*.yaml")]
    for data in (FULL, document, *shipped_specs, *({**FULL, **changes} for changes, _ in SHORTHANDS)):
        assert schema_problems(data) == [], data
    limits = ({"budget": {"ffn": 1.5}}, {"compose": {"scale": "most"}}, {"calibration": {"documents": 0}})
    for changes in (*limits, *(changes for changes, _, _ in UNKNOWN)):
        assert schema_problems({**FULL, **changes}), changes
