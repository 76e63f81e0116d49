"""The command line end to end on a tiny model: what each command prints, writes, reuses and exits with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import expertprune
from expertprune.artifacts.plan import load_plan
from expertprune.cli import main
from expertprune.corpora.documents import Question
from expertprune.errors import SpecError
from expertprune.evaluation.questions import answer_questions
from expertprune.spec.reading import load_spec
from tests.calling import call, call_json, strict
from tests.conftest import refuse_to_load
from tests.oracle import contents
from tests.patching import everywhere
from tests.tiny import as_run, tiny_model, tiny_tokenizer

COMMANDS = [
    "adapter", "bench", "build", "chat", "compare", "compose", "evaluate", "export", "families", "forecast", "init",
    "inspect", "list", "profile", "prune", "push", "report", "schema", "serve", "store", "sweep", "validate", "vocabulary",
]  # fmt: skip
CORPORA = ["language/en", "domain/medical", "task/qa", "general/general"]
# The tiny model by hand: embeddings and output 64 × 24 each, a last norm, and three layers of four attention
# projections (6 query and 3 KV heads of 4 channels), three FFN projections of 32 neurons and two norms.
LAYER = 24 * 24 + 2 * 12 * 24 + 24 * 24 + 3 * 32 * 24 + 2 * 24
BEFORE = 2 * 64 * 24 + 24 + 3 * LAYER
AFTER = BEFORE - 3 * 8 * 3 * 24  # a quarter of 32 neurons in each of three layers, three vectors each


# --- help and usage -------------------------------------------------------------------------------------------------


def test_the_help_shows_examples_that_parse() -> None:
    assert sorted(main.commands) == COMMANDS
    text = call("--help").stdout
    assert "expertprune build profiles/" in text
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        text = call(command, "--help").stdout
        assert call(command, "-h").stdout == text
        lines = [line for line in text.splitlines() if f"  expertprune {command} " in line]
        assert lines
        for line in lines if command != "schema" else []:
            with main.commands[command].make_context(command, line.split()[2:]) as context:
                assert context.params


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["biuld"], "No such command 'biuld'"),
        (["build"], "Missing argument 'SPEC'"),
        (["build", "a.yaml"], "Missing option '--out'"),
        (["validate", "a.yaml", "--set", "budget.ffn"], "is not KEY=VALUE"),
        (["validate", "a.yaml", "--set", "=3"], "is not KEY=VALUE"),
        (["validate", "a.yaml", "--set", "budget.ffn=[1"], "is not a YAML value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_exits_with_2_and_says_what_is_wrong(args: list[str], words: str) -> None:
    result = call(*args, code=2)
    assert words in result.stderr
    assert result.stdout == ""


# --- the stages -----------------------------------------------------------------------------------------------------


def test_validate_counts_what_is_there_and_loads_no_model(spec_file: Path, store: Path, no_model: None) -> None:
    data = call_json("validate", spec_file)
    assert data["kind"] == "validation"
    assert data["decided"] == {"criterion": "impact", "allocation": "uniform"}
    assert data["base"]["parameters"] == BEFORE
    assert data["expert"]["parameters"] == AFTER
    assert data["expert"]["budget"]["ffn"] == {"requested": 0.25, "of": 32, "kept": 24, "removed": 8}
    assert data["corpora"] == {name: {"calibration": 12, "evaluation": 4, "questions": 0} for name in CORPORA}
    text = call("validate", spec_file).stdout
    assert f"{spec_file}: valid" in text
    assert f"{BEFORE:,} parameters" in text
    assert f"{AFTER:,} parameters" in text
    assert not (store / "profiles").exists()


def test_set_may_be_given_several_times_and_takes_yaml(spec_file: Path) -> None:
    data = call_json(
        "validate", spec_file, "--set", "dimensions={task: qa}", "--set", "general=[]", "--set", "budget.ffn=0.5"
    )
    assert list(data["corpora"]) == ["task/qa"]
    assert data["expert"]["budget"]["ffn"]["kept"] == 16


def test_the_stages_one_by_one_give_what_build_gives(tmp_path: Path, spec_file: Path, store: Path) -> None:
    profiles = call_json("profile", spec_file)["profiles"]
    assert list(profiles) == CORPORA
    stored = {path.stem for path in (store / "profiles").iterdir()}
    assert stored == {entry["digest"] for entry in profiles.values()}
    assert all(Path(entry["path"]).stem == entry["digest"] for entry in profiles.values())

    plan = call_json("compose", spec_file, "--out", tmp_path / "plan.json")
    assert plan == strict((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == {"before": BEFORE, "after": AFTER}
    assert plan["profiles"] == {name: entry["digest"] for name, entry in profiles.items()}
    assert all(len(kept.ffn) == 24 for kept in load_plan(tmp_path / "plan.json").kept)

    pruned = call_json("prune", tmp_path / "plan.json", "--out", tmp_path / "steps")
    assert pruned["plan"]["layers"] == plan["layers"]
    assert pruned["plan"]["profiles"] == plan["profiles"]
    assert pruned["evaluation"] is None
    assert "Not evaluated yet" in (tmp_path / "steps" / "README.md").read_text()

    evaluation = call_json("evaluate", tmp_path / "steps")
    assert list(evaluation["corpora"]) == CORPORA
    for result in evaluation["corpora"].values():
        assert result["documents"] == 4
        assert set(result["metrics"]) == {"bits_per_byte", "perplexity", "kl", "agreement"}
        bits = result["metrics"]["bits_per_byte"]
        assert bits["retention"] == pytest.approx(bits["base"] / bits["expert"])
    assert strict((tmp_path / "steps" / "expertprune.json").read_text())["evaluation"] == evaluation
    assert "Not evaluated yet" not in (tmp_path / "steps" / "README.md").read_text()

    built = call_json("build", spec_file, "--out", tmp_path / "built")
    assert built["evaluation"] == evaluation
    assert contents(tmp_path / "built") == contents(tmp_path / "steps")
    assert {path.stem for path in (store / "profiles").iterdir()} == stored


def test_what_build_prints_for_people(tmp_path: Path, spec_file: Path) -> None:
    result = call("build", spec_file, "--out", tmp_path / "expert", "--set", "evaluate.metrics=[kl]")
    assert f"{AFTER:,} of {BEFORE:,} ({AFTER / BEFORE:.1%})" in result.stdout
    assert str(tmp_path / "expert") in result.stdout.replace("\n", "")
    assert "What the expert kept" in result.stdout
    assert "KL to base" in result.stdout
    assert "perplexity" not in result.stdout


@pytest.fixture
def expert(tmp_path: Path, spec_file: Path) -> Path:
    """An expert that was not evaluated."""
    call("build", spec_file, "--out", tmp_path / "expert", "--set", "evaluate.enabled=false")
    return tmp_path / "expert"


def test_evaluate_measures_the_corpora_and_documents_that_it_is_asked_for(expert: Path) -> None:
    data = call_json("evaluate", expert, "--corpus", "medical", "--corpus", "task/qa", "--documents", "2")
    assert {name: each["documents"] for name, each in data["corpora"].items()} == {"domain/medical": 2, "task/qa": 2}
    assert "What the expert kept" in call("evaluate", expert, "--corpus", "medical").stdout


def test_evaluate_finds_a_base_that_has_moved(
    tmp_path: Path, spec_data: dict[str, Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = tmp_path / "base"
    shutil.copytree(tiny_llama, moving)
    spec = tmp_path / "tiny.yaml"
    spec.write_text(yaml.safe_dump({**spec_data, "base": "./base"}))
    call("build", spec, "--out", tmp_path / "expert", "--set", "evaluate.enabled=false")
    moving.rename(tmp_path / "moved")
    assert "--base" in call("evaluate", tmp_path / "expert", code=2).stderr
    monkeypatch.chdir(tmp_path)
    assert list(call_json("evaluate", "expert", "--base", "moved")["corpora"]) == CORPORA


def write_questions(path: Path, base_is_right: bool) -> Path:
    """Questions whose recorded answer is the one that the tiny base prefers, or never is."""
    rows = []
    for first, second in (("heart", "law"), ("judge", "blood"), ("sum", "we")):
        asked = Question(f"the {first} {second}", (first, second), 0)
        prefers_first = bool(answer_questions(as_run(tiny_model("llama")), tiny_tokenizer(), [asked])[0])
        answer = 0 if prefers_first == base_is_right else 1
        rows.append({"question": asked.question, "choices": asked.choices, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("base_is_right", [True, False])
def test_the_json_of_an_expert_is_valid_even_where_the_base_knew_nothing(
    tmp_path: Path, spec_data: dict[str, Any], base_is_right: bool
) -> None:
    questions = write_questions(tmp_path / "questions.jsonl", base_is_right)
    spec_data["corpora"]["sources"]["qa"]["questions"] = str(questions)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec_data))
    data = call_json("build", tmp_path / "tiny.yaml", "--out", tmp_path / "expert")
    entry = data["evaluation"]["corpora"]["task/qa"]["metrics"]["questions"]
    assert entry["base"] == float(base_is_right)
    strict((tmp_path / "expert" / "expertprune.json").read_text())


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_explains_every_artifact(tmp_path: Path, spec_file: Path) -> None:
    data = call_json("inspect", spec_file)
    assert data == {"kind": "spec", "spec": load_spec(spec_file).document(), "corpora": CORPORA}
    assert "domain medical" in call("inspect", spec_file).stdout

    entry = call_json("profile", spec_file)["profiles"]["domain/medical"]
    data = call_json("inspect", entry["path"])
    assert (data["kind"], data["corpus"], data["digest"]) == ("profile", "domain/medical", entry["digest"])
    assert len(data["documents"]) == 12
    assert "32 FFN neurons" in call("inspect", entry["path"]).stdout

    plan = call_json("compose", spec_file, "--out", tmp_path / "plan.json")
    assert call_json("inspect", tmp_path / "plan.json") == plan
    text = call("inspect", tmp_path / "plan.json").stdout
    assert "plan tiny" in text
    assert "24 of 32" in text

    built = call_json("build", spec_file, "--out", tmp_path / "expert")
    size = sum(len(content) for content in contents(tmp_path / "expert").values())
    assert (built["kind"], built["folder"], built["bytes"]) == ("expert", str(tmp_path / "expert"), size)
    assert call_json("inspect", tmp_path / "expert") == built
    assert call_json("inspect", tmp_path / "expert" / "expertprune.json") == built
    text = call("inspect", tmp_path / "expert").stdout
    assert "expert tiny" in text
    assert "What the expert kept" in text


def test_inspect_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    save_file(tiny_model("llama").state_dict(), tmp_path / "weights.safetensors")
    for name, words in {
        "absent.json": "no such file or folder",
        "notes.txt": "is no spec (.yaml), profile (.safetensors), plan (.json) or expert (a folder)",
        "folder": "is no expert",
        "data.json": "not a plan",
        "broken.json": "not valid JSON",
        "noise.safetensors": "not a readable profile",
        "weights.safetensors": "a profile of schema None",
    }.items():
        assert f"error: {tmp_path / name}: {words}" in call("inspect", tmp_path / name, code=2).stderr


# --- what is reused -------------------------------------------------------------------------------------------------


def digests(*args: Any) -> dict[str, str]:
    return {name: entry["digest"] for name, entry in call_json("profile", *args)["profiles"].items()}


def test_composing_from_stored_profiles_alone(tmp_path: Path, spec_file: Path, no_model: None) -> None:
    """Nothing is measured: what is missing is named, and no plan is written."""
    out = tmp_path / "plan.json"
    result = call("compose", spec_file, "--out", out, "--stored-only", code=2)
    assert result.stderr == ("error: the profile of language/en lacks the forward pass: run the profile stage\n")
    assert not out.exists()


def test_a_pass_that_the_stored_profiles_lack_is_named(
    tmp_path: Path, tiny_build: tuple[Path, Path], no_model: None
) -> None:
    spec, setting = tiny_build[1].with_name("tiny.yaml"), {"criterion": "fisher", "loss": "kl"}
    here = ("--store", tiny_build[1], "--out", tmp_path / "plan.json", "--stored-only")
    result = call("compose", spec, *here, "--set", f"relevance={json.dumps(setting)}", code=2)
    assert result.stderr == "error: the profile of language/en lacks the gradient-kl pass: run the profile stage\n"
    with pytest.raises(SpecError, match="lacks the gradient-kl pass"):
        expertprune.compose(spec, tiny_build[1], {"relevance": setting}, run=False)


@pytest.mark.parametrize(
    "setting", ["name=other", "budget.ffn=0.5", "compose.rule=union", "calibration.tokens_per_batch=7", "general=[]"]
)
def test_what_the_statistics_do_not_depend_on_reuses_the_profiles(
    tiny_build: tuple[Path, Path], no_model: None, setting: str
) -> None:
    here = (tiny_build[1].with_name("tiny.yaml"), "--store", tiny_build[1])
    found = digests(*here, "--set", setting)
    assert found.items() <= digests(*here).items()
    assert "domain/medical" in found


def test_stored_profiles_are_enough_once_their_pass_was_made(
    tmp_path: Path, spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("profile", spec_file, "--set", "relevance=taylor")
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    stored = call_json(
        "compose", spec_file, "--out", tmp_path / "plan.json", "--stored-only", "--set", "relevance=taylor"
    )
    free = call_json("compose", spec_file, "--out", tmp_path / "other.json", "--set", "relevance=taylor")
    assert stored == free
    assert call_json("compose", spec_file, "--out", tmp_path / "third.json", "--stored-only")["kind"] == "plan"


def test_a_changed_document_gives_a_new_profile_of_its_corpus_only(spec_file: Path, spec_data: dict[str, Any]) -> None:
    first = digests(spec_file)
    path = Path(spec_data["corpora"]["sources"]["medical"]["path"])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"text": json.loads(lines[0])["text"] + " blood"}), *lines[1:]]) + "\n")
    second = digests(spec_file)
    assert {name for name in CORPORA if first[name] != second[name]} == {"domain/medical"}


def test_a_changed_weight_gives_new_profiles_of_every_corpus(tmp_path: Path, spec_file: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_llama, folder)
    first = digests(spec_file, "--set", f"base.model={folder}")
    assert digests(spec_file) == first, "the same model elsewhere has the same profiles"
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    second = digests(spec_file, "--set", f"base.model={folder}")
    assert not set(first.values()) & set(second.values())


def test_the_store_is_the_option_before_the_variable(tmp_path: Path, spec_file: Path, store: Path) -> None:
    call("profile", spec_file, "--store", tmp_path / "mine")
    assert len(list((tmp_path / "mine" / "profiles").iterdir())) == len(CORPORA)
    assert not (store / "profiles").exists()


# --- exit codes -----------------------------------------------------------------------------------------------------


def test_a_defect_is_not_disguised_as_a_users_mistake(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    everywhere(monkeypatch, "expertprune.corpora.loading.load_corpora", broken)
    result = CliRunner().invoke(main, ["validate", str(spec_file)])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_overwrite_replaces_an_expert(tmp_path: Path, spec_file: Path, expert: Path) -> None:
    (expert / "stale.txt").write_text("x")
    assert "--overwrite" in call("build", spec_file, "--out", expert, code=2).stderr
    data = call_json("build", spec_file, "--out", expert, "--overwrite", "--set", "budget.ffn=0.5")
    assert data["parameters"]["after"] == BEFORE - 3 * 16 * 3 * 24
    assert not (expert / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_functions_of_the_package_are_the_commands(tmp_path: Path, spec_file: Path) -> None:
    out = expertprune.build(spec_file, tmp_path / "expert", {"evaluate.enabled": False})
    assert out == tmp_path / "expert"
    assert expertprune.inspect(out)["parameters"] == {"before": BEFORE, "after": AFTER}
    assert list(map(str, expertprune.validate(spec_file).corpora)) == CORPORA
    with pytest.raises(AttributeError, match="biuld"):
        expertprune.biuld  # noqa: B018


def test_as_a_process_it_exits_with_a_code_and_prints_one_json_object(spec_file: Path) -> None:
    for arguments, code in ((["validate", str(spec_file), "--json"], 0), (["build"], 2)):
        command = [sys.executable, "-m", "expertprune.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        if code:
            assert done.stdout == ""
            assert "Missing argument 'SPEC'" in done.stderr
        else:
            assert strict(done.stdout)["expert"]["parameters"] == AFTER
