"""An expert uploaded by a real client to a stand-in of the hub, and loaded from there."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download

import expertprune
from expertprune.errors import CheckpointError, UsageError
from expertprune.models.loading import load_model
from tests.calling import call, call_json
from tests.experts import about
from tests.hub import TOKEN, Hub, serving, take_for_the_real_one

Patch = pytest.MonkeyPatch

NAME = "owner/tiny-expert"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Iterator[Hub]:
    with serving(Hub()) as found:
        take_for_the_real_one(monkeypatch, found, tmp_path / "cache")
        yield found


@pytest.fixture
def expert(tiny_build: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the tiny expert, which has its weights in several files."""
    return Path(shutil.copytree(tiny_build[0], tmp_path / "expert"))


def card_of(hub: Hub) -> str:
    return hub.repositories[NAME].files["README.md"].decode()


def test_an_expert_is_pushed_and_loads_from_the_hub(hub: Hub, expert: Path) -> None:
    (expert / ".cache").mkdir()
    stay = {"report.html", "comparison.html", "page.htm", "PAGE.HTML", "changes.json", "throughput-other.json"}
    for name in (".cache/state", *stay - {"changes.json"}):
        (expert / name).write_text(f'{{"name": "{expert}"}}')
    pushed = call_json("push", expert, NAME, "--private", "--base-model", "owner/base")
    repository = hub.repositories[NAME]
    assert repository.private
    assert (pushed["url"], pushed["commit"]) == (f"{hub.url}/{NAME}", repository.commit)
    uploaded = {name: content for name, content in repository.files.items() if name != ".gitattributes"}
    assert sorted(pushed["files"]) == sorted(uploaded)
    files = [path for path in expert.iterdir() if path.is_file()]
    assert stay < {path.name for path in files}
    assert uploaded == {path.name: path.read_bytes() for path in files if path.name not in stay}
    assert not [name for name, content in uploaded.items() if str(expert.parent).encode() in content]
    downloaded, local = (load_model(Path(folder), torch.float32) for folder in (snapshot_download(NAME), expert))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(downloaded(ids).logits, local(ids).logits)


def test_the_card_says_to_the_hub_where_the_expert_comes_from_and_what_it_keeps(hub: Hub, expert: Path) -> None:
    document = about(expert)
    origin = {"name": "owner/base", "commit": "c" * 40, "license": "llama3.2", "language": ["en", "de"]}
    document["base"] |= {"model": "owner/base", "hub": origin}
    document["spec"]["dimensions"] = {"domain": ["medical"], "task": ["qa"]}
    document["spec"]["corpora"]["sources"]["qa"] = {"dataset": "owner/questions", "field": "text"}
    (expert / "expertprune.json").write_text(json.dumps(document))
    (expert / "README.md").write_text("---\ntags: [old]\n---\nWritten by hand.\n")
    expertprune.push_to_hub(expert, NAME)
    assert card_of(hub).endswith("Written by hand.\n")
    card = ModelCard(card_of(hub)).data
    results = {(each.dataset_type, each.metric_name): each for each in card.eval_results}
    card.eval_results = None
    assert card.to_dict() == {
        "base_model": "owner/base", "base_model_relation": "finetune", "license": "llama3.2", "language": ["en", "de"],
        "datasets": ["owner/questions"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["expertprune", "pruned", "medical", "qa"], "model_name": "tiny",
    }  # fmt: skip
    measured = document["evaluation"]["corpora"]["domain/medical"]["metrics"]["bits_per_byte"]
    kept = results["domain/medical", "retention of bits per byte"]
    assert kept.metric_value == pytest.approx(measured["retention"], abs=5e-5)
    assert kept.metric_args == {end: pytest.approx(measured[end], abs=5e-5) for end in ("low", "high")}
    value = results["domain/medical", "bits per byte"]
    assert (value.metric_type, value.metric_value) == ("bits_per_byte", pytest.approx(measured["expert"], abs=5e-5))
    # An expert of an expert names the base that the hub knows.
    (expert / "README.md").unlink()
    inner = {key: value for key, value in document.items() if key != "evaluation"}
    local = document["base"] | {"model": "local", "hub": {"commit": origin["commit"]}}
    (expert / "expertprune.json").write_text(json.dumps(document | {"base": local, "ancestor": inner}))
    expertprune.push_to_hub(expert, NAME, overwrite=True)
    metadata = ModelCard(card_of(hub)).data
    assert (metadata.base_model, metadata.license) == ("owner/base", "llama3.2")
    assert f"On the hub it is commit `{origin['commit']}`." in card_of(hub)


@pytest.mark.slow
def test_an_upload_that_is_killed_goes_on(hub: Hub, expert: Path) -> None:
    """The process dies while it sends its third large file; the next one does not send the first two again."""
    process = multiprocessing.get_context("fork").Process(target=expertprune.push_to_hub, args=(expert, NAME))

    def cut(_: str) -> None:
        if len(hub.sent) == 2:
            process.kill()
            raise ConnectionResetError

    hub.on_upload = cut
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(hub.repositories[NAME].files) == [".gitattributes"]
    first, hub.on_upload = list(hub.sent), lambda _: None
    commit = expertprune.push_to_hub(expert, NAME).commit
    assert len(set(hub.sent)) == len(hub.sent) > 2
    assert set(first) < set(hub.sent)
    assert expertprune.push_to_hub(expert, NAME).commit == commit  # what is there already is no other content


def test_a_repository_with_other_content_stays_unless_it_may_be_replaced(hub: Hub, expert: Path) -> None:
    shard = "model-00001-of-00004.safetensors"
    other = hub.add(NAME, expert)
    other.files |= {shard: b"other weights", "notes.txt": b"mine"}
    before = dict(other.files)
    error = call("push", expert, NAME, code=2).output
    assert "exists with other content" in error
    assert {"notes.txt", shard} <= set(re.findall(r"[\w.-]+\w", error))
    assert other.files == before
    call("push", expert, NAME, "--overwrite")
    assert "notes.txt" not in other.files
    assert other.files[shard] == (expert / shard).read_bytes()


def test_what_the_hub_refuses_is_one_line(hub: Hub, expert: Path, monkeypatch: Patch) -> None:
    hub.add("owner/public", expert)
    hub.sent.clear()
    for repository, arguments, token, words in (
        ("tiny", [], TOKEN, "'tiny' is no repository of the hub; write owner/name"),
        ("owner/bad name", [], TOKEN, "the repository: Repo id must use alphanumeric chars"),
        (NAME, ["--base-model", "/models/base"], TOKEN, "'/models/base'"),
        (NAME, [], "", "set HF_TOKEN to one that may write"),
        (NAME, [], "hf_wrong", "the hub does not accept the token; set HF_TOKEN to a valid one"),
        ("others/tiny", [], TOKEN, "the token may not do this; set HF_TOKEN to one that may (403 Forbidden: "),
        ("owner/public", ["--private"], TOKEN, "is public; make it private in its settings"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        error = call("push", expert, repository, *arguments, code=2).output
        assert words in error
        assert len(error.splitlines()) == 1
    assert not hub.sent
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port at which nobody listens
    with pytest.raises(UsageError, match="owner/tiny-expert: the hub cannot be reached"):
        expertprune.push_to_hub(expert, NAME)


def test_what_is_not_for_others_stays_here(hub: Hub, expert: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            expertprune.push_to_hub(expert, NAME)
        assert not hub.asked

    (tmp_path / "id_rsa").write_text("secret")
    (expert / "sub").mkdir()
    (expert / "sub" / "x").symlink_to(tmp_path / "id_rsa")
    refused("sub/x: is a link to a file outside the folder")
    (expert / "sub" / "x").unlink()
    config = json.loads((expert / "config.json").read_text()) | {"_name_or_path": str(expert.parent / "base")}
    (expert / "config.json").write_text(json.dumps(config))
    refused(r"config\.json: names a place of this machine")
    sorted(expert.glob("*.safetensors"))[0].unlink()
    refused("no such file, though the folder's index names it")
