"""The command line end to end on a tiny model: what each command prints, writes, reuses and exits with."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import expertprune
from expertprune.cli import main
from expertprune.commands.terminal import _Once
from expertprune.errors import SpecError
from expertprune.spec.reading import load_spec
from tests.calling import call, call_json, parsed, strict
from tests.oracle import contents
from tests.patching import everywhere
from tests.tiny import save_tiny

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


def test_the_help_shows_examples_that_parse() -> None:
    assert sorted(main.commands) == COMMANDS
    assert all(command in call("--help").stdout for command in COMMANDS)
    for command in COMMANDS:
        text = call(command, "-h").stdout
        lines = [line for line in text.splitlines() if f"  expertprune {command} " in line]
        assert lines
        for line in lines if command != "schema" else []:
            assert parsed(line.split())


def test_a_wrong_call_exits_with_2_and_says_what_is_wrong() -> None:
    for line, words in (
        ("biuld", "No such command 'biuld'"),
        ("build a.yaml", "Missing option '--out'"),
        ("validate a.yaml --set budget.ffn", "is not KEY=VALUE"),
        ("validate a.yaml --set =3", "is not KEY=VALUE"),
        ("validate a.yaml --set budget.ffn=[1", "is not a YAML value"),
    ):
        result = call(*line.split(), code=2)
        assert words in result.stderr
        assert result.stdout == ""


def test_as_a_process_it_exits_with_a_code() -> None:
    command = [sys.executable, "-m", "expertprune.cli", "build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Missing argument 'SPEC'" in done.stderr


def test_a_defect_is_not_disguised_as_a_users_mistake(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    everywhere(monkeypatch, "expertprune.corpora.loading.load_corpora", broken)
    result = CliRunner().invoke(main, ["validate", str(spec_file)])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


# --- the stages -----------------------------------------------------------------------------------------------------


def test_validate_counts_what_is_there_and_loads_no_model(spec_file: Path, store: Path, no_model: None) -> None:
    data = call_json("validate", spec_file)
    assert data["kind"] == "validation"
    assert data["decided"] == {"criterion": "impact", "allocation": "uniform"}
    assert (data["base"]["parameters"], data["expert"]["parameters"]) == (BEFORE, AFTER)
    assert data["expert"]["budget"]["ffn"] == {"requested": 0.25, "of": 32, "kept": 24, "removed": 8}
    assert data["corpora"] == {name: {"calibration": 12, "evaluation": 4, "questions": 0} for name in CORPORA}
    text = call("validate", spec_file).stdout
    assert all(words in text for words in (f"{spec_file}: valid", f"{BEFORE:,} parameters", f"{AFTER:,} parameters"))
    assert not (store / "profiles").exists()
    several = ("--set", "dimensions={task: qa}", "--set", "general=[]", "--set", "budget.ffn=0.5")
    data = call_json("validate", spec_file, *several)
    assert (list(data["corpora"]), data["expert"]["budget"]["ffn"]["kept"]) == (["task/qa"], 16)


def test_the_stages_one_by_one_give_what_build_gives(tmp_path: Path, spec_file: Path, store: Path) -> None:
    profiles = call_json("profile", spec_file)["profiles"]
    assert list(profiles) == CORPORA
    stored = {path.stem for path in (store / "profiles").iterdir()}
    assert stored == {entry["digest"] for entry in profiles.values()}

    plan = call_json("compose", spec_file, "--out", tmp_path / "plan.json")
    assert plan == strict((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == {"before": BEFORE, "after": AFTER}
    assert plan["profiles"] == {name: entry["digest"] for name, entry in profiles.items()}

    pruned = call_json("prune", tmp_path / "plan.json", "--out", tmp_path / "steps")
    assert (pruned["plan"]["layers"], pruned["plan"]["profiles"]) == (plan["layers"], plan["profiles"])
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


def test_what_vllm_cannot_serve_is_not_offered_to_it(
    tmp_path: Path, spec_data: dict[str, Any], spec_file: Path
) -> None:
    off = ["--set", "evaluate.enabled=false"]
    assert "serve it:   expertprune serve" in call("build", spec_file, "--out", tmp_path / "served", *off).output
    assert "in\ntransformers and in vLLM.\n" in (tmp_path / "served" / "README.md").read_text()
    base = save_tiny(tmp_path / "olmo2", "olmo2")
    spec = spec_data | {"base": str(base), "serve_with": "transformers", "compose": {"allocation": "global"}}
    (tmp_path / "other.yaml").write_text(json.dumps(spec))
    assert "serve it" not in call("build", tmp_path / "other.yaml", "--out", tmp_path / "other", *off).output
    card = (tmp_path / "other" / "README.md").read_text()
    assert "in this folder. vLLM serves no layers of different widths of family 'olmo2'.\n" in card
    assert "vllm serve" not in card
    missing = call_json("report", tmp_path / "other")["experts"][0]["missing"]["throughput"]
    assert (missing["command"], "no layers of different widths" in missing["reason"]) == (None, True)
    assert "of family 'olmo2'; load it with transformers" in call("serve", tmp_path / "other", code=2).output


def test_evaluate_measures_the_corpora_and_documents_that_it_is_asked_for(expert: Path) -> None:
    data = call_json("evaluate", expert, "--corpus", "medical", "--corpus", "task/qa", "--documents", "2")
    assert {name: each["documents"] for name, each in data["corpora"].items()} == {"domain/medical": 2, "task/qa": 2}
    text = call("evaluate", expert, "--corpus", "medical").stdout
    assert all(words in text for words in ("What the expert kept", "KL to base"))


def test_inspect_explains_every_artifact(tmp_path: Path, spec_file: Path, warm: Path, expert: Path) -> None:
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
    assert "24 of 32" in call("inspect", tmp_path / "plan.json").stdout

    found, size = call_json("inspect", expert), sum(len(content) for content in contents(expert).values())
    assert (found["kind"], found["folder"], found["bytes"]) == ("expert", str(expert), size)
    assert call_json("inspect", expert / "expertprune.json") == found
    assert "What the expert kept" in call("inspect", expert).stdout


def test_inspect_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for name, words in (("absent.json", "no such file or folder"), ("", "is no expert"),
                        ("notes.txt", "is no spec (.yaml), profile (.safetensors), plan (.json) or expert")):  # fmt: skip
        assert f"error: {tmp_path / name}: {words}" in call("inspect", tmp_path / name, code=2).stderr


# --- what is reused -------------------------------------------------------------------------------------------------


def digests(*args: Any) -> dict[str, str]:
    return {name: entry["digest"] for name, entry in call_json("profile", *args)["profiles"].items()}


def test_composing_from_stored_profiles_alone_names_what_they_lack(
    tmp_path: Path, spec_file: Path, warm: Path, no_model: None
) -> None:
    """Nothing is measured, and no plan is written."""
    out, setting = tmp_path / "plan.json", {"criterion": "fisher", "loss": "kl"}
    lacking = (
        (("--store", tmp_path / "empty"), "forward pass"),
        (("--set", f"relevance={json.dumps(setting)}"), "gradient-kl pass"),
    )
    for options, part in lacking:
        result = call("compose", spec_file, "--out", out, "--stored-only", *options, code=2)
        said = f"the profile of language/en lacks the {part}: run `expertprune profile` with this spec"
        assert result.stderr == f"error: {said}\n"
        assert not out.exists()
    with pytest.raises(SpecError, match="lacks the gradient-kl pass"):
        expertprune.compose(spec_file, warm, {"relevance": setting}, run=False)
    assert call_json("compose", spec_file, "--out", out, "--stored-only")["kind"] == "plan"


def test_what_the_statistics_do_not_depend_on_reuses_the_profiles(spec_file: Path, warm: Path, no_model: None) -> None:
    first = digests(spec_file)
    for setting in (
        "name=other",
        "budget.ffn=0.5",
        "compose.rule=union",
        "calibration.tokens_per_batch=7",
        "general=[]",
    ):
        found = digests(spec_file, "--set", setting)
        assert found.items() <= first.items()
        assert "domain/medical" in found


def test_new_profiles_are_made_where_a_document_or_a_weight_has_changed(
    tmp_path: Path, spec_file: Path, spec_data: dict[str, Any], tiny_llama: Path, warm: Path
) -> None:
    """The same model elsewhere has the same profiles, and `--store` comes before the variable."""
    stored = {path.stem for path in (warm / "profiles").iterdir()}
    folder = tmp_path / "changed"
    shutil.copytree(tiny_llama, folder)
    here = (spec_file, "--set", f"base.model={folder}")
    first = digests(*here)
    assert {*first.values()} <= stored
    path = Path(spec_data["corpora"]["sources"]["medical"]["path"])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"text": json.loads(lines[0])["text"] + " blood"}), *lines[1:]]) + "\n")
    second = digests(*here)
    assert {name for name in CORPORA if first[name] != second[name]} == {"domain/medical"}
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    third = digests(*here, "--store", tmp_path / "mine")
    assert not {*second.values()} & {*third.values()}
    assert {path.stem for path in (tmp_path / "mine" / "profiles").iterdir()} == {*third.values()}
    assert {path.stem for path in (warm / "profiles").iterdir()} == stored | {*second.values()}


def test_a_warning_is_shown_once_but_for_what_happens_to_a_server() -> None:
    shown = _Once()

    def told(name: str, level: int, *arguments: str) -> bool:
        return shown.filter(logging.LogRecord(name, level, "", 0, "corpus %s", arguments, None))

    rows, server = "expertprune.composition.rows", "expertprune.serving.deployment"
    assert [told(rows, logging.WARNING, each) for each in ("a", "b", "a")] == [True, True, False]
    assert [told(rows, logging.INFO, "a"), told(rows, logging.INFO, "a")] == [True, True]
    assert [told(server, logging.WARNING, "c"), told(server, logging.WARNING, "c")] == [True, True]
