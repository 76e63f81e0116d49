"""An expert uploaded by a real client to a stand-in of the hub, and loaded from there."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

import expertprune
from expertprune.errors import CheckpointError, UsageError
from expertprune.models.loading import load_model
from tests.calling import call, call_json
from tests.experts import about
from tests.hub import TOKEN, Hub, serving, take_for_the_real_one

NAME = "owner/tiny-expert"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as found:
        take_for_the_real_one(monkeypatch, found, tmp_path / "cache")
        yield found


@pytest.fixture
def expert(tiny_build: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the tiny expert, which has its weights in several files."""
    return Path(shutil.copytree(tiny_build[0], tmp_path / "expert"))


def test_an_expert_is_pushed_and_loads_from_the_hub(hub: Hub, expert: Path) -> None:
    (expert / ".cache").mkdir()
    (expert / ".cache" / "state").write_text("of some tool")
    (expert / "report.html").write_text("an answer that changed")
    (expert / "comparison.html").write_text(f"expertprune evaluate {expert}")
    (expert / "throughput-other.json").write_text(f'{{"name": "{expert}"}}')
    stays = {"report.html", "comparison.html", "changes.json", "throughput-other.json"}
    assert stays <= {path.name for path in expert.iterdir()}
    pushed = call_json("push", expert, NAME, "--private", "--base-model", "owner/base")
    repository = hub.repositories[NAME]
    assert repository.private
    assert (pushed["url"], pushed["commit"]) == (f"{hub.url}/{NAME}", repository.commit)
    uploaded = {name: content for name, content in repository.files.items() if name != ".gitattributes"}
    assert sorted(pushed["files"]) == sorted(uploaded)
    assert uploaded == {path.name: path.read_bytes() for path in expert.iterdir()
                        if path.is_file() and path.name not in stays}  # fmt: skip
    for content in uploaded.values():
        assert str(expert.parent).encode() not in content
    downloaded, local = load_model(Path(snapshot()), torch.float32), load_model(expert, torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(downloaded(ids).logits, local(ids).logits)


def snapshot() -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(NAME)


def test_the_card_says_to_the_hub_where_the_expert_comes_from_and_what_it_keeps(hub: Hub, expert: Path) -> None:
    document = about(expert)
    document["base"] |= {
        "model": "owner/base",
        "hub": {"name": "owner/base", "commit": "c" * 40, "license": "llama3.2", "language": ["en", "de"]},
    }
    document["spec"]["dimensions"] = {"domain": ["medical"], "task": ["qa"]}
    source = {"dataset": "owner/questions", "field": "text"}
    document["spec"]["corpora"]["sources"]["qa"] = source
    (expert / "expertprune.json").write_text(json.dumps(document))
    (expert / "README.md").write_text("---\ntags: [old]\n---\nWritten by hand.\n")
    expertprune.push_to_hub(expert, NAME)
    text = hub.repositories[NAME].files["README.md"].decode()
    assert text.endswith("Written by hand.\n")
    card = ModelCard(text).data
    results = {(each.dataset_type, each.metric_name): each for each in card.eval_results}
    assert card.model_name == "tiny"
    card.eval_results = None
    assert card.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "license": "llama3.2",
        "language": ["en", "de"],
        "datasets": ["owner/questions"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["expertprune", "pruned", "medical", "qa"],
        "model_name": "tiny",
    }
    measured = document["evaluation"]["corpora"]["domain/medical"]["metrics"]["bits_per_byte"]
    kept = results["domain/medical", "retention of bits per byte"]
    assert kept.metric_value == pytest.approx(measured["retention"], abs=5e-5)
    assert kept.metric_args == {end: pytest.approx(measured[end], abs=5e-5) for end in ("low", "high")}
    value = results["domain/medical", "bits per byte"]
    assert (value.metric_type, value.metric_value) == ("bits_per_byte", pytest.approx(measured["expert"], abs=5e-5))
    (expert / "README.md").unlink()
    expertprune.push_to_hub(expert, NAME, overwrite=True)
    assert f"On the hub it is commit `{'c' * 40}`." in hub.repositories[NAME].files["README.md"].decode()


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
    expertprune.push_to_hub(expert, NAME)
    shards = [name for name in hub.repositories[NAME].files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert len(set(hub.sent)) == len(hub.sent)
    assert set(first) < set(hub.sent)
    again = hub.repositories[NAME].commit
    assert expertprune.push_to_hub(expert, NAME).commit == again  # what is there already is no other content


def test_a_repository_with_other_content_stays_unless_it_may_be_replaced(hub: Hub, expert: Path) -> None:
    other = hub.add(NAME, expert)
    other.files |= {"model-00001-of-00005.safetensors": b"other weights", "notes.txt": b"mine"}
    before = dict(other.files)
    error = call("push", expert, NAME, code=2).output
    assert "notes.txt" in error
    assert "exists with other content" in error
    assert other.files == before
    call("push", expert, NAME, "--overwrite")
    assert "notes.txt" not in other.files
    first = sorted(expert.glob("*.safetensors"))[0]
    assert other.files[first.name] == first.read_bytes()


def test_a_link_to_a_file_elsewhere_is_not_uploaded(hub: Hub, expert: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (expert / "sub").mkdir()
    (expert / "sub" / "x").symlink_to(tmp_path / "id_rsa")
    assert "sub/x: is a link to a file outside the folder" in call("push", expert, NAME, code=2).stderr
    assert NAME not in hub.repositories


@pytest.mark.parametrize(
    ("repository", "arguments", "token", "words"),
    [
        ("tiny", [], TOKEN, "'tiny' is no repository of the hub; write owner/name"),
        ("owner/bad name", [], TOKEN, "the repository: Repo id must use alphanumeric chars"),
        (NAME, ["--base-model", "/models/base"], TOKEN, "'/models/base'"),
        (NAME, [], None, "set HF_TOKEN to one that may write"),
        (NAME, [], "hf_wrong", "the hub does not accept the token; set HF_TOKEN to a valid one"),
        (
            "others/tiny",
            [],
            TOKEN,
            "the token may not do this; set HF_TOKEN to one that may (403 Forbidden: You don't have",
        ),
        ("owner/public", ["--private"], TOKEN, "is public; make it private in its settings"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub,
    expert: Path,
    monkeypatch: pytest.MonkeyPatch,
    repository: str,
    arguments: list[str],
    token: str | None,
    words: str,
) -> None:
    hub.add("owner/public", expert)
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    error = call("push", expert, repository, *arguments, code=2).output
    assert words in error
    assert len(error.splitlines()) == 1
    assert not hub.sent


def test_a_network_that_fails_is_one_line(hub: Hub, expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port at which nobody listens
    with pytest.raises(UsageError, match="owner/tiny-expert: the hub cannot be reached"):
        expertprune.push_to_hub(expert, NAME)


def test_a_file_that_names_a_place_of_this_machine_stays_here(
    hub: Hub, expert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((expert / "config.json").read_text()) | {"_name_or_path": str(expert.parent / "base")}
    (expert / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: names a place of this machine"):
        expertprune.push_to_hub(expert, NAME)
    assert not hub.asked
    sorted(expert.glob("*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match="no such file, though the folder's index names it"):
        expertprune.push_to_hub(expert, NAME)


def test_an_expert_of_an_expert_names_the_base_that_the_hub_knows(hub: Hub, expert: Path) -> None:
    document = about(expert)
    inner = {key: value for key, value in document.items() if key != "evaluation"}
    inner["base"] = document["base"] | {"hub": {"name": "owner/first", "license": "mit"}}
    (expert / "expertprune.json").write_text(json.dumps(document | {"ancestor": inner}))
    expertprune.push_to_hub(expert, NAME)
    metadata = yaml.safe_load(hub.repositories[NAME].files["README.md"].decode().split("---\n")[1])
    assert (metadata["base_model"], metadata["license"]) == ("owner/first", "mit")
