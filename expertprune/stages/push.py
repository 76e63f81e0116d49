"""Upload an expert to the hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import Expert
from expertprune.errors import CheckpointError, UsageError, refused
from expertprune.files import PAGE_SUFFIXES, file_digest, is_report, store_folder, write_file
from expertprune.models.checkpoint import Checkpoint, check_link
from expertprune.models.hub import hub_errors
from expertprune.models.origin import CARD_FILE
from expertprune.reporting.card import card_text
from expertprune.reporting.metadata import card_metadata

_TEXT = (".json", ".jinja", ".md", ".txt", ".py", ".yaml")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # any text may be a token
_SETTINGS = ".gitattributes"  # of the repository; the hub writes it


@dataclass(frozen=True)
class Pushed:
    """An upload that is complete: the page of the model, its commit, and the files that it has now."""

    url: str
    commit: str
    files: list[str]


def push(
    folder: str | Path,
    repository: str,
    private: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    store: str | Path | None = None,
) -> Pushed:
    """Upload an expert's folder to the hub, as `owner/name`. An upload that broke off goes on.

    The model card's metadata are written into the folder first; what you wrote below them stays. Reports
    are not uploaded, since they show texts that evaluated the expert.

    Args:
        private: make the repository private. One that is there must be.
        overwrite: replace what else is in the repository.
        base_model: the base's id on the hub, where the expert was cut from a local folder.

    Raises:
        CheckpointError: the folder is no expert, or a file of it names a place of this machine.
        UsageError: no token, no right, no network, or the repository holds something else.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    expert = Expert.load(folder)
    Checkpoint(folder)  # its weights are all here
    for given in (repository, base_model):
        if given is not None:
            with hub_errors("the repository", given):
                validate_repo_id(given)
            if given.count("/") != 1:
                raise UsageError(f"{given!r} is no repository of the hub; write owner/name")
    _write_metadata(expert, base_model)
    files = list(_files(folder, store_folder(store)))
    if get_token() is None:
        raise UsageError("the hub wants a token to upload: set HF_TOKEN to one that may write, or run: hf auth login")
    api = HfApi(library_name="expertprune")
    with hub_errors(repository, repository):
        url = str(api.create_repo(repository, private=private or None, exist_ok=True))
        there = api.model_info(repository, files_metadata=True)
    if private and not there.private:
        raise UsageError(f"{repository}: is public; make it private in its settings, or push without --private")
    if not overwrite:
        _check_content(repository, there.siblings or [], folder, files, store_folder(store))
    return Pushed(url, _upload(api, expert, repository, files, overwrite), files)


def _write_metadata(expert: Expert, base_model: str | None) -> None:
    """Bring the metadata of the card up to date; its text stays, if there is one."""
    from huggingface_hub import ModelCard

    path = expert.folder / CARD_FILE
    with refused(path):
        text = path.read_text(encoding="utf-8") if path.is_file() else card_text(expert)
        body = ModelCard(text).text
    write_file(path, f"---\n{card_metadata(expert, base_model)}\n---\n{body}".encode())


def _files(folder: Path, store: Path) -> Iterator[str]:
    """The files to upload, relative to the folder: all but hidden and half-written ones, and reports.

    Raises `CheckpointError` for a file that names a place of this machine, and for a link to a file elsewhere.
    """
    places = {place for place in (Path.home(), Path.cwd(), folder.resolve().parent, store.absolute()) if place.name}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Reports show texts that evaluated the expert, and name folders of this machine.
        hidden = path.suffix == ".partial" or any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix.lower() in PAGE_SUFFIXES or is_report(path.name):
            continue
        check_link(path, folder)
        if path.suffix in _TEXT and path.name not in _VOCABULARIES:
            content = path.read_bytes()
            found = next((place for place in sorted(places) if f"{place}/".encode() in content), None)
            if found is not None:
                raise CheckpointError(f"{path}: names a place of this machine, {found}; take it out, then push again")
        yield name.as_posix()


def _check_content(repository: str, there: list[Any], folder: Path, files: list[str], store: Path) -> None:
    """Raises `UsageError` if a repository holds files that are not the expert's, or not as they are here."""
    from huggingface_hub.utils.sha import git_hash

    def same(remote: Any) -> bool:
        path = folder / remote.rfilename
        if remote.rfilename not in files or remote.size != path.stat().st_size:
            return False
        if remote.lfs is not None:
            return file_digest(path, store) == remote.lfs.sha256
        return git_hash(path.read_bytes()) == remote.blob_id

    others = [each.rfilename for each in there if each.rfilename != _SETTINGS and not same(each)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{repository}: exists with other content ({', '.join(others[:3])}{more}); choose another name, or give "
            "--overwrite to replace it"
        )


def _upload(api: Any, expert: Expert, repository: str, files: list[str], overwrite: bool) -> str:
    """Upload the files, and with `overwrite` delete all others; returns the commit."""
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors(repository, repository):
        try:
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=expert.folder,
                allow_patterns=[glob.escape(file) for file in files],
                delete_patterns="*" if overwrite else None,
                commit_message=f"{expert.name}, by expertprune {expert.versions.get('expertprune', '')}".rstrip(),
            )
        except HfHubHTTPError:
            raise
        except (RuntimeError, ValueError, OSError) as error:  # of what moves the bytes, and of the card's check
            why = " ".join(str(error.__cause__ or error).split())
            raise UsageError(f"{repository}: the upload broke off ({why}); run it again, and it goes on") from None
    return str(commit.oid)
