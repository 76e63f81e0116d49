"""Teams of real processes: the same plan, weights and numbers as one process, and a clear end when one member dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import expertprune
from expertprune.artifacts.evaluation import CorpusResult
from expertprune.artifacts.expert import Expert
from expertprune.cli import main
from expertprune.corpora.batches import Batch, make_batches
from expertprune.engine.team import Team
from expertprune.errors import UsageError
from expertprune.stages.elsewhere import facts
from tests.calling import call
from tests.oracle import resolved, stored_tensors
from tests.processes import Finished, server
from tests.tiny import save_tiny
from tests.vocabularies import save_worded, worded_spec


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    """All passes: gradients, repair of heads and neurons, documents to measure."""
    budget = {"ffn": 0.25, "kv_groups": 1, "multiple_of": 4}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**spec_data, "relevance": {"criterion": "fisher"}, "budget": budget}))
    return path


def measured(folder: Path) -> dict[str, CorpusResult]:
    evaluation = Expert.load(folder).evaluation
    assert evaluation is not None
    return evaluation.corpora


def check_same(one: Path, other: Path) -> None:
    """Units and numbers of examples exactly, the rest to float32 rounding."""
    first, second = Expert.load(one).plan, Expert.load(other).plan
    assert first.kept == second.kept
    assert first.profiles == second.profiles
    assert first.vocabulary == second.vocabulary
    mine, theirs = stored_tensors(one), stored_tensors(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5)
    for name, result in measured(one).items():
        beside = measured(other)[name]
        assert [each.digest for each in result.per_document] == [each.digest for each in beside.per_document]
        for mine_, theirs_ in zip(result.per_document, beside.per_document, strict=True):
            assert (mine_.tokens, mine_.bytes) == (theirs_.tokens, theirs_.bytes)
            assert mine_.base_bits == pytest.approx(theirs_.base_bits, rel=1e-5)
            assert mine_.expert_bits == pytest.approx(theirs_.expert_bits, rel=1e-4)


def well(finished: list[Finished]) -> None:
    assert [each.code for each in finished] == [0] * len(finished), [each.stderr for each in finished]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "budget"),
    [
        ("llama", {"layers": 1, "ffn": 0.25, "vocabulary": {"keep": 384}}),
        ("gemma3_text", {"retention": {"expert": 0.9}, "multiple_of": 8}),
        ("qwen3_moe", {"layers": 1, "experts": 2, "ffn": 0.5, "multiple_of": 8}),
    ],
)
def test_two_members_build_what_one_process_builds(
    tmp_path: Path, spec_data: dict[str, Any], family: str, budget: dict[str, Any]
) -> None:
    if "vocabulary" in budget:
        data = worded_spec(save_worded(tmp_path / "base"), tmp_path / "spec", budget)
    else:
        data = {**spec_data, "base": str(save_tiny(tmp_path / "base", family)), "budget": budget}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**data, "relevance": {"criterion": "auto"}}))
    expertprune.build(path, tmp_path / "one")
    command = ["build", path, "--out", tmp_path / "team", "--store", tmp_path / "store", "--json"]
    finished = server().team(command, command)
    well(finished)
    check_same(tmp_path / "one", tmp_path / "team")
    assert json.loads(finished[0].stdout)["folder"] == str(tmp_path / "team")
    assert (finished[1].stdout, finished[1].stderr) == ("", ""), "the first member alone prints"
    assert not list((tmp_path / "store").glob("repairs/*")), "tries leave nothing behind"


@pytest.mark.slow
def test_two_members_sweep_what_one_process_sweeps(tmp_path: Path, spec_file: Path) -> None:
    """The expert of the first budget vanishes, that of the second one is kept."""
    command = ["sweep", spec_file, "--json"]
    kept = ["--budgets", "0.5", "--keep-experts", "--out", tmp_path / "kept", "--picture", tmp_path / "curve.png"]
    for more in (["--budgets", "0.25"], kept):
        finished = server().team(*[[*command, *more, "--store", tmp_path / "store"]] * 2)
        well(finished)
        found = json.loads(finished[0].stdout)
        alone = expertprune.sweep(spec_file, [float(more[1])], store=tmp_path / "alone").document()
        (mine,), (theirs,) = found["points"], alone["points"]
        assert mine["parameters"] == theirs["parameters"]
        assert mine["expert"]["retention"] == pytest.approx(theirs["expert"]["retention"], rel=1e-4)
    assert not list((tmp_path / "store").glob("repairs/*"))
    assert (tmp_path / "curve.png").is_file()
    command = ["evaluate", next((tmp_path / "kept").glob("*/")), "--fail-under", "expert=5", "--json"]
    finished = server().team(*[[*command, "--store", tmp_path / "store"]] * 2)
    assert [each.code for each in finished] == [1, 1]
    assert json.loads(finished[0].stdout)["summary"]
    assert finished[0].stderr.count("below the floor: expert") == 1
    assert (finished[1].stdout, finished[1].stderr) == ("", "")


@pytest.mark.slow
def test_members_beyond_the_number_of_documents_add_nothing(tmp_path: Path, spec_file: Path) -> None:
    """One document of each corpus, and three processes."""
    command = ["build", spec_file, "--set", "calibration.documents=1", "--set", "evaluate.documents=1"]
    expertprune.build(spec_file, tmp_path / "one", dict.fromkeys(("calibration.documents", "evaluate.documents"), 1))
    well(server().team(*[[*command, "--out", tmp_path / "team", "--store", tmp_path / "store"]] * 3))
    check_same(tmp_path / "one", tmp_path / "team")


@pytest.mark.slow
def test_a_killed_member_ends_the_others_at_once_and_the_next_run_goes_on(tmp_path: Path, spec_file: Path) -> None:
    """The first member is killed in a profile, the second one in the repair of the next run."""
    out, store = tmp_path / "experts" / "team", tmp_path / "store"
    command = ["build", spec_file, "--out", out, "--store", store]
    for rank, hold in enumerate(("profile", "repair")):
        finished = server().team(command, command, held=rank, hold=hold, send=signal.SIGKILL)
        assert finished[rank].code == -signal.SIGKILL
        other = finished[1 - rank]
        assert other.code == 1
        assert f"error: rank {rank} of the team" in other.stderr
        assert "has died or is not reachable" in other.stderr
        assert "Traceback" not in other.stderr
        assert other.seconds < 30
        assert not out.exists()
    well(server().team(command, command))
    expertprune.build(spec_file, tmp_path / "one")
    check_same(tmp_path / "one", out)
    assert [path.name for path in out.parent.iterdir()] == ["team"]
    assert not [path for path in (store / "profiles").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_members_that_disagree_are_named_and_an_error_of_one_is_told_by_all(tmp_path: Path, spec_file: Path) -> None:
    other = tmp_path / "other.yaml"
    base = save_tiny(tmp_path / "another", "llama", seed=1)
    other.write_text(yaml.safe_dump({**yaml.safe_load(spec_file.read_text()), "base": str(base)}))
    for each in server().team(["profile", spec_file], ["profile", other], ["profile", spec_file]):
        assert each.code == 2
        assert "rank 1 on " in each.stderr
        assert "another checkpoint" in each.stderr
        assert "another spec" in each.stderr
        assert "rank 2 on " not in each.stderr
    right = ["build", spec_file, "--out", tmp_path / "out"]
    finished = server().team(right, [*right, "--set", "base.dtype=float61"])
    assert [each.code for each in finished] == [2, 2], finished
    assert "rank 1 of the team" in finished[0].stderr
    assert "base.dtype" in finished[0].stderr
    assert not (tmp_path / "out").exists()


def test_a_command_that_one_process_does_is_refused_in_a_team(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("compose", "forecast", "compare", "validate", "report"):
        message = call(command, spec_file, code=2).stderr
        assert f"{command} is done by one process: run it without torchrun" in message
    teams = {name for name, command in main.commands.items() if getattr(command.callback, "as_team", False)}
    assert teams == {"build", "evaluate", "profile", "prune", "sweep"}


def test_another_transformers_is_named(tiny_llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(told: list[Any], own: tuple[str, dict[str, str]]) -> None:
        told[:] = [own, ("elsewhere", {**own[1], "version of transformers": "4.0.0"})]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UsageError, match=r"rank 1 on elsewhere: another version of transformers \(4\.0\.0, not "):
        Team(0, 2).agree(lambda: facts(resolved(tiny_llama, store)))


def rows(batches: list[Batch]) -> list[tuple[int, list[int]]]:
    found = [(doc, ids[:length].tolist()) for each in batches
             for doc, ids, length in zip(each.documents, each.ids, each.lengths, strict=True)]  # fmt: skip
    return sorted(found)


def test_shares_hold_each_document_once_and_are_balanced() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 90, (30,), generator=generator).tolist()
    tokens = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]
    batches = make_batches(tokens, tokens_per_batch=400)
    for size in (1, 2, 3, 8, 40):
        shares = [Team(rank, size).share(batches) for rank in range(size)]
        assert rows([batch for share in shares for batch in share]) == sorted(enumerate(tokens))
        loads = [sum(batch.ids.numel() for batch in share) for share in shares]
        if size <= 8:
            assert max(loads) - min(loads) <= max(batch.ids.numel() for share in shares for batch in share)
            assert max(loads) <= 1.25 * sum(loads) / size
