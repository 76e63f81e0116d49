"""The spec: what is required, what is refused and with which words, how paths and overrides are read."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from expertprune.arch import bundled_models
from expertprune.corpora.loading import load_corpora
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
FULL: dict[str, Any] = yaml.safe_load("""
name: full-1.0_x
base: {model: owner/model, revision: main, dtype: bfloat16, trust_remote_code: false}
dimensions: {language: [de, fr], domain: [medical], task: [qa]}
general: [general, legal]
corpora:
  sources:
    de: {dataset: owner/data, config: de, split: train, evaluation_split: test}
    language/fr: {dataset: owner/other, template: "Q: {question}\\nA: {answers.text.0}"}
calibration: {documents: 12, max_tokens: 64, tokens_per_batch: 100, seed: 3}
relevance: {criterion: activation, loss: kl, seed: 4}
compose: {rule: mean, aggregate: 0.9, scale: percentile, fusion: {tau: 0.2, lambda: 0.75, beta: 0.25}, allocation: uniform}
budget: {ffn: 384, kv_groups: 1, multiple_of: 8, floor: 0.2}
compensation: {method: none, ridge: 500.0}
evaluate: {corpora: [medical], documents: 3, max_tokens: 77, metrics: [kl], enabled: false}
""")


def spec_of(**changes: Any) -> Spec:
    return parse_spec({**MINIMAL, **changes}, "my.yaml", Path("/nowhere"))


def problems_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(data, "my.yaml", Path("/nowhere"))
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def of_source(**source: Any) -> dict[str, Any]:
    return {"corpora": {"sources": {"de": source}}}


def holds(found: Any, expected: Any) -> bool:
    """Whether plain data has the expected values, whatever other keys it has."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and holds(found[key], value) for key, value in expected.items())
    return bool(found == expected)


UNKNOWN = [
    ({"evalute": {}}, "evalute", "evaluate"),
    ({"dimensions": {"language": "de", "taks": "qa"}}, "dimensions.taks", "task"),
    (of_source(path="a", feild="b"), "corpora.sources.de.feild", "field"),
    ({"corpora": {"sources": {"a/b": {"path": "a", "fild": "b"}}}}, "corpora.sources.a/b.fild", "field"),
    ({"corpora": {"sources": {"path": {"path": "a", "queston": "b"}}}}, "corpora.sources.path.queston", "questions"),
    ({"compose": {"fusion": {"lamda": 0.5}}}, "compose.fusion.lamda", "lambda"),
    ({"compose": {"fusion": {"zzz": 1}}}, "compose.fusion.zzz", None),
]


@pytest.mark.parametrize(("changes", "key", "nearest"), UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest(changes: dict[str, Any], key: str, nearest: str | None) -> None:
    hint = f"did you mean '{nearest}'?" if nearest else "valid: beta, lambda, method, rows, tau"
    assert problems_of({**MINIMAL, **changes}) == [f"my.yaml: unknown key '{key}'; {hint}"]


def test_several_errors_of_different_kinds_are_reported_at_once() -> None:
    required = ("base", "budget", "dimensions", "name")
    assert sorted(problems_of({})) == [f"my.yaml: missing key '{key}'" for key in required]
    data = {"name": "a b", "dimensions": {"language": "de", "domian": "x"}, "calibration": {"documents": 0}}
    problems = problems_of({**data, "budget": {"ffn": 1.0}, "surprise": 1})
    assert len(problems) == 6
    assert all(problem.startswith("my.yaml: ") for problem in problems)
    keys = ("name:", "missing key 'base'", "'dimensions.domian'", "calibration.documents", "budget.ffn", "'surprise'")
    for key in keys:
        assert sum(key in problem for problem in problems) == 1, key


WRONG = [
    ({"name": "a b"}, "name", "must be of letters, digits, '.', '_' and '-'"),
    ({"name": ["x"]}, "name", "must be text (found ['x'])"),
    ({"name": "a" * 101}, "name", f"must have at most 100 characters (found '{'a' * 56}...)"),
    ({"base": ""}, "base.model", "must not be empty (found '')"),
    ({"base": {"model": "a/b", "device": "gpu"}}, "base.device", "must be auto, cpu, cuda, or one GPU of several"),
    ({"dimensions": {"language": []}}, "dimensions", "at least one of language, domain, task"),
    ({"general": {"general": 1}}, "general", "must be text, or a list of texts"),
    ({"general": ["de", "fr", "de"]}, "general", "each name once; 'de' is there twice"),
    ({"general": [1]}, "general.0", "must be text; put it in quotes (found 1)"),
    ({"calibration": 3}, "calibration", "must be a mapping of keys and values (found 3)"),
    ({"calibration": {"documents": "many"}}, "calibration.documents", "must be a whole number (found 'many')"),
    ({"calibration": {"documents": 0}}, "calibration.documents", "must be at least 1 (found 0)"),
    ({"budget": {"multiple_of": 8}}, "budget", "ffn, query_heads, kv_groups, experts, vocabulary, parameters"),
    *(({"budget": {"ffn": wrong}}, "budget.ffn", f"found {wrong}") for wrong in (True, -0.1, 1.0, 1.5)),
    ({"budget": {"parameters": 1}}, "budget.parameters", "a fraction below 1"),
    ({"budget": {"retention": {"expert": 0.9}, "ffn": 64}}, "budget", "'ffn' or 'retention', not both"),
    ({"budget": {"retention": {"expert": 0.9}, "parameters": 0.2}}, "budget", "give one of parameters, retention"),
    ({"budget": {"retention": {}}}, "budget.retention", "at least one of expert, general"),
    *(({"budget": {"max_parameters": wrong}}, "budget.max_parameters", "such as 100M") for wrong in ("abcM", "infB", 0)),
    *(({"compose": {"aggregate": wrong}}, "compose.aggregate", "quantile") for wrong in ("median", 0, 1, [0.5])),
    ({"compose": {"scale": "shaer"}}, "compose.scale", "'standard'; did you mean 'share'? (found 'shaer')"),
    ({"compose": {"scale": "standard", "fusion": {"beta": 0}}}, "compose", "take scale: share or percentile"),
    ({"compose": {"fusion": {"lambda": 3}}}, "compose.fusion.lambda", "must be at most 1 (found 3)"),
    ({"compose": {"fusion": {"tau": "x"}}}, "compose.fusion.tau", "must be a number (found 'x')"),
    ({"compensation": {"ridge": 0}}, "compensation.ridge", "must be greater than 0 (found 0)"),
    ({"serve_with": "tgi"}, "serve_with.0", "must be 'transformers', 'vllm' or 'gguf' (found 'tgi')"),
    ({"evaluate": {"enabled": "maybe"}}, "evaluate.enabled", "must be true or false (found 'maybe')"),
    ({"evaluate": {"metrics": "kl"}}, "evaluate.metrics", "must be a list (found 'kl')"),
    *((of_source(**wrong), "corpora.sources.de", "exactly one of 'path' and 'dataset'")
      for wrong in ({}, {"path": "a", "dataset": "b"})),
    (of_source(path=""), "corpora.sources.de.path.0", "must not be empty (found '')"),
    (of_source(path="a", field="x", template="{x}"), "corpora.sources.de", "'field' or 'template', not both"),
    (of_source(path="a", config="x", split="y"), "corpora.sources.de", "config, split does not go with 'path'"),
    (of_source(dataset="a", evaluation="b"), "corpora.sources.de", "evaluation does not go with 'dataset'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "words"), WRONG)
def test_a_wrong_value_is_told_by_file_key_and_what_would_be_right(changes: Any, key: str, words: str) -> None:
    (problem,) = problems_of({**MINIMAL, **changes})
    assert problem.startswith(f"my.yaml: {key}: ")
    assert words in problem


def test_no_message_of_pydantic_reaches_the_user() -> None:
    document = spec_of(**FULL).document()
    for section, inside in document.items():
        for value in (None, True, 3, -1.5, 1e9, "", "?" * 999, [], [None], {}, {"?": 1}):
            keys = inside if isinstance(inside, dict) else ()
            for each in ({section: value}, *({section: {**inside, key: value}} for key in keys)):
                try:
                    spec_of(**each)
                except SpecError as error:
                    said = [problem for problem in error.problems if "Input" in problem or "should" in problem]
                    assert said == [], each


SHORTHANDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dimensions": {"task": "qa"}}, {"dimensions": {"task": ["qa"]}}),
    (
        {"compose": {"scale": "standard", "fusion": {"method": "weighted", "beta": 0.5}}},
        {"compose": {"fusion": {"beta": 0.5}}},
    ),
    ({"budget": {"retention": {"general": 0.9}, "kv_groups": 1}}, {"budget": {"retention": {"general": 0.9}}}),
    ({"general": "medical"}, {"general": ["medical"]}),
    ({"relevance": "random"}, {"relevance": {"criterion": "random"}}),
    ({"compensation": "none"}, {"compensation": {"method": "none"}}),
    ({"corpora": "/data/mine"}, {"corpora": {"catalogue": "/data/mine"}}),
    (of_source(path="/data/de.jsonl"), of_source(path=["/data/de.jsonl"])),
]


def test_shorthands_mean_the_long_form() -> None:
    for changes, expected in SHORTHANDS:
        assert holds(spec_of(**changes).document(), expected), changes
    sizes = {
        "100M": 10**8,
        "1.5b": 1_500_000_000,
        "250k": 250_000,
        "12345": 12_345,
        1e8: 10**8,
        "1.005B": 1_005_000_000,  # a binary fraction a little below it
        "32.3k": 32_300,
    }
    for written, size in sizes.items():
        assert spec_of(budget={"max_parameters": written}).budget.max_parameters == size
    dimensions = spec_of(dimensions={"task": "qa", "domain": "medical", "language": ["fr", "de"]}).dimensions
    assert list(dimensions.chosen.items()) == [("language", ["fr", "de"]), ("domain", ["medical"]), ("task", ["qa"])]


# --- files ----------------------------------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models/mine", "specs/data/shop", "specs/json", "elsewhere/owner/data"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = {"path": ["a.jsonl", "/abs/b.jsonl"], "evaluation": "../e.jsonl", "questions": "q.jsonl"}
    data_sets = {"fr": "data/shop", "it": "../shop", "es": "owner/data", "pt": "json"}
    sources = {name: {"dataset": data_set} for name, data_set in data_sets.items()}
    sources["pt"]["data_files"] = "a.jsonl"
    corpora = {"catalogue": "../catalogue", "sources": {"de": source, **sources}}
    path = tmp_path / "specs" / "my.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "base": "../models/mine", "corpora": corpora}))
    spec = load_spec(path)
    assert spec.base.model == str(tmp_path / "models" / "mine")
    assert spec.corpora.catalogue == str(tmp_path / "catalogue")
    read = spec.corpora.sources["de"]
    assert read.path == [str(tmp_path / "specs" / "a.jsonl"), "/abs/b.jsonl"]
    assert read.evaluation == [str(tmp_path / "e.jsonl")]
    assert read.questions == str(tmp_path / "specs" / "q.jsonl")
    found = {name: spec.corpora.sources[name].dataset for name in data_sets}
    assert found == {
        "fr": str(tmp_path / "specs" / "data" / "shop"), "it": str(tmp_path / "shop"), "es": "owner/data", "pt": "json"
    }  # fmt: skip


def test_a_base_is_a_path_if_it_looks_like_one_or_is_there(tmp_path: Path) -> None:
    (tmp_path / "there" / "is").mkdir(parents=True)
    for base in ("../mine", "weights.gguf", "there/is", "owner/model", "bundled-name"):
        found = parse_spec({**MINIMAL, "base": base}, "my.yaml", tmp_path).base.model
        assert found == (base if base in ("owner/model", "bundled-name") else str((tmp_path / base).resolve()))


def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    wrong = {b"name: [unclosed": "not valid YAML", b"": "a spec is a mapping", b"name: \xff\xfe": "not UTF-8 text"}
    for content, words in wrong.items():
        path.write_bytes(content)
        with pytest.raises(SpecError, match=f"{path}: .*{words}"):
            load_spec(path)
    with pytest.raises(SpecError, match=r"absent\.yaml: no such file"):
        load_spec(tmp_path / "absent.yaml")


# --- overrides ------------------------------------------------------------------------------------------------------


OVERRIDES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {"compose.fusion.lambda": 0.125, "name": "b"}, {"compose": {"fusion": {"lambda": 0.125}}, "name": "b"}),
    ({}, {"dimensions.task": ["qa"]}, {"dimensions": {"language": ["de"], "task": ["qa"]}}),
    ({}, {"base.dtype": "float32"}, {"base": {"model": "owner/model", "dtype": "float32"}}),
    ({"relevance": "taylor"}, {"relevance.seed": 9}, {"relevance": {"criterion": "taylor", "seed": 9}}),
    ({"relevance": "taylor"}, {"relevance": "random"}, {"relevance": {"criterion": "random"}}),
    ({"corpora": "/data"}, {"corpora.sources.de.path": "/de.txt"}, {"corpora": {"catalogue": "/data"}}),
    ({"corpora": "/data"}, {"corpora.sources.de.path": "/de.txt"}, of_source(path=["/de.txt"])),
    (of_source(path="/a"), {"corpora.sources.de.generate.tokens": 9, "corpora.sources.de.prompt": "p"},
     of_source(path=["/a"], generate={"tokens": 9})),
    ({"corpora": {"sources": {"node.js": {"path": "/a"}, "node": {"path": "/b"}}}},
     {"corpora.sources.node.js.path": "/c", "corpora.sources.node.field": "f"},
     {"corpora": {"sources": {"node.js": {"path": ["/c"]}, "node": {"path": ["/b"], "field": "f"}}}}),
    ({}, {"corpora.sources.node.js.data_files.train": "/c.csv", "corpora.sources.node.js.dataset": "csv",
          "corpora.sources.a.b": {"path": "/d"}, "corpora.sources.x.y.path": "/e"},
     {"corpora": {"sources": {"node.js": {"dataset": "csv", "data_files": {"train": ["/c.csv"]}},
                              "a.b": {"path": ["/d"]}, "x.y": {"path": ["/e"]}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "overrides", "expected"), OVERRIDES)
def test_overrides_change_one_key_and_keep_what_stands_beside_it(
    changes: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = {**copy.deepcopy(MINIMAL), **changes}
    before = copy.deepcopy(data)
    assert holds(parse_spec(data, "my.yaml", Path("/nowhere"), overrides).document(), expected)
    assert data == before
    with pytest.raises(SpecError, match=r"unknown key 'budget\.fnn'; did you mean 'ffn'"):
        parse_spec(data, "my.yaml", Path("/nowhere"), {**overrides, "budget.fnn": 0.5})


# --- round trip and schema ------------------------------------------------------------------------------------------


def test_the_document_of_a_spec_gives_the_same_spec_back_through_yaml() -> None:
    for data in (MINIMAL, FULL):
        spec = parse_spec(data, "my.yaml", Path("/nowhere"))
        document = yaml.safe_load(yaml.safe_dump(spec.document()))
        again = parse_spec(document, "again.yaml", Path("/somewhere/else"))
        assert again == spec
        assert again.document() == spec.document()
    assert holds(document, FULL)


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    schema = Spec.model_json_schema(by_alias=True)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_json_schema_accepts_what_a_spec_accepts_and_refuses_what_it_refuses() -> None:
    """The specs that ship are among them: each has its file's name, and all of its corpora."""
    shipped_specs = []
    for path in shipped("profiles").glob("*.yaml"):
        shipped_specs.append(yaml.safe_load(path.read_text(encoding="utf-8")))
        spec = load_spec(path)
        assert spec.name == path.stem
        assert spec.base.model in bundled_models() or spec.base.model.count("/") == 1, path
        assert not spec.base.trust_remote_code, path
        assert all(corpus.calibration and corpus.evaluation for corpus in load_corpora(spec).values()), path
    assert len(shipped_specs) >= 8
    written_out = spec_of(**FULL).document()
    for data in (FULL, written_out, *shipped_specs, *({**FULL, **changes} for changes, _ in SHORTHANDS)):
        assert validator().is_valid(data), data
    limits = ({"budget": {"ffn": 1.5}}, {"compose": {"scale": "most"}}, {"calibration": {"documents": 0}})
    for changes in (*limits, *(changes for changes, _, _ in UNKNOWN)):
        assert not validator().is_valid({**FULL, **changes}), changes
