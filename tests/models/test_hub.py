"""Models of the hub: checked before their weights are downloaded, and only files of the index are."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

from expertprune.errors import CheckpointError, SpecError
from expertprune.files import file_digest
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.hub import known_weights_digest
from expertprune.spec.schema import Base

COMMIT = "c" * 40


@dataclass
class Hub:
    """A hub with one repository, and a cache."""

    repository: Path
    cache: Path
    asked: list[tuple[str | None, list[str]]] = field(default_factory=list)

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "owner/model"
        folder = self.cache / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        fetched = [path for path in sorted(self.repository.iterdir())
                   if any(fnmatch(path.name, pattern) for pattern in allow_patterns)]  # fmt: skip
        for path in fetched:
            shutil.copyfile(path, folder / path.name)
        self.asked.append((revision, [path.name for path in fetched if path.suffix in (".safetensors", ".bin")]))
        return str(folder)

    def get_safetensors_metadata(self, name: str, revision: str) -> Any:
        assert (name, revision) == ("owner/model", COMMIT)
        tensors = Checkpoint(self.repository).tensors
        headers = {
            file: SafetensorsFileMetadata({"format": "pt"}, {
                tensor: TensorInfo(info.dtype, list(info.shape), (0, 0))  # type: ignore[arg-type]
                for tensor, info in tensors.items() if info.file == file
            })
            for file in {info.file for info in tensors.values()}
        }  # fmt: skip
        return SafetensorsRepoMetadata(None, True, {tensor: info.file for tensor, info in tensors.items()}, headers)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    repository = Path(shutil.copytree(tiny_llama, tmp_path / "repository"))
    (repository / "consolidated.safetensors").write_bytes(b"the same weights again, in another layout")
    (repository / "pytorch_model.bin").write_bytes(b"and again")
    found = Hub(repository, tmp_path / "cache")
    for name in ("snapshot_download", "get_safetensors_metadata"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(found, name))
    return found


def test_weights_are_downloaded_when_they_are_needed_and_only_those_of_the_index(
    hub: Hub, tiny_llama: Path, store: Path
) -> None:
    base = resolve_base(Base(model="owner/model", revision="v1"), store)
    local = resolve_base(Base(model=str(tiny_llama)), store)
    assert hub.asked == [("v1", [])]
    assert (base.layers, base.dtype, base.checkpoint.dtype) == (local.layers, local.dtype, local.checkpoint.dtype)
    assert base.checkpoint.tensors == local.checkpoint.tensors
    assert base.digest == local.digest
    assert hub.asked[1:] == [(COMMIT, local.checkpoint.shards)]
    resolve_base(Base(model="owner/model", revision="v1"), store)  # from the cache: nothing is asked of the headers
    assert hub.asked[2:] == [("v1", [])]


def test_headers_are_enough_to_refuse_a_model(hub: Hub, store: Path) -> None:
    from tests.oracle import change_config

    change_config(hub.repository, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is \[32, 24\], the config makes axis 0 64"):
        resolve_base(Base(model="owner/model"), store)
    assert hub.asked == [(None, [])]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            NotASafetensorsRepoError("'owner/model' is not a safetensors repo."),
            CheckpointError,
            "not a safetensors repo",
        ),
        (LocalEntryNotFoundError("offline"), SpecError, "is not in the local cache and the hub cannot be reached"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", refuse)
    with pytest.raises(kind, match=words):
        resolve_base(Base(model="owner/model"), store)


def test_weights_that_the_cache_names_by_their_digest_are_not_read(tmp_path: Path, store: Path) -> None:
    (tmp_path / "blobs").mkdir()
    by_content, by_commit = tmp_path / "blobs" / ("a" * 64), tmp_path / "blobs" / ("b" * 40)
    for blob in (by_content, by_commit):
        blob.write_bytes(b"weights")
        (tmp_path / f"{blob.name[0]}.safetensors").symlink_to(blob)
    assert known_weights_digest(tmp_path / "a.safetensors", store) == "a" * 64
    assert known_weights_digest(tmp_path / "b.safetensors", store) is None
    assert known_weights_digest(by_content, store) is None  # no link: a file of the user's
    read = file_digest(by_content, store)
    assert known_weights_digest(by_content, store) == read != "a" * 64
