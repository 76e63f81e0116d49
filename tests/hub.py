"""A stand-in of the hub's HTTP API on this machine, for a real `huggingface_hub` client.

It speaks what the client speaks without `hf_xet`: repositories, listings, files with ranges, and commits whose large files
come through the LFS batch API first. `python -m tests.hub FOLDER` serves the repositories in a folder until it is ended.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_a_token_that_may_write"
LARGE = 10_000  # bytes from which a file goes through LFS, and every *.safetensors
SETTINGS = ".gitattributes"


@dataclass
class Repository:
    """Files by name; the commit is a digest of them."""

    files: dict[str, bytes] = field(default_factory=lambda: {SETTINGS: b"*.safetensors filter=lfs\n"})
    private: bool = False
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        entry = {"path": name, "rfilename": name, "type": "file", "size": len(content), "oid": blob(content)}
        entry["blobId"] = entry["oid"]
        if large(name, len(content)):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        return entry


def large(name: str, size: int) -> bool:
    return size >= LARGE or name.endswith(".safetensors")


def blob(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """The repositories, what was uploaded and not committed yet, and what was asked.

    `asked` holds method and path of each request, `sent` the digests whose bytes came. `on_upload` is called before the
    bytes of a large file are taken, one file at a time.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    on_upload: Callable[[str], None] = lambda digest: None
    lock: Any = field(default_factory=threading.Lock)
    url: str = ""

    def add(self, name: str, folder: Path, **about: bool) -> Repository:
        """A repository of the files in a folder."""
        repository = self.repositories[name] = Repository(**about)
        for path in folder.rglob("*"):
            if path.is_file():
                repository.files[path.relative_to(folder).as_posix()] = path.read_bytes()
        return repository

    def downloads(self, suffix: str) -> list[str]:
        """The files whose content was asked for, with repeats left out."""
        found = [path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return list(dict.fromkeys(name for name in found if name.endswith(suffix)))


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed, as a test wanted
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and self.command in method.split():
                try:
                    action(self, *found.groups())
                except _Refusal as refusal:
                    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                    self._send(refusal.status, {"error": refusal.message}, headers)
                return
        self._send(404, {"error": f"no such route: {self.command} {path}"})

    def _send(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        given = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
        for name, value in given.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, content: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._signed_in):
            raise _Refusal(404 if self._signed_in else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated:
            raise _Refusal(403 if self._signed_in else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return repository

    def _revision(self, name: str, revision: str, content: bool = False) -> Repository:
        repository = self._repository(name, content)
        if revision not in ("main", repository.commit):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository

    def _may_write(self) -> None:
        if not self._signed_in:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")

    # --- what can be asked ----------------------------------------------------------------------------------------

    def create(self) -> None:
        given = json.loads(self._body())
        self._may_write()
        if given["organization"] == "others":
            raise _Refusal(403, "", 'You don\'t have the rights to create a model under the namespace "others".')
        name = f"{given['organization']}/{given['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repositories[name] = Repository(
            private=given.get("visibility") == "private" or given.get("private", False)
        )
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None) -> None:
        repository = self._revision(name, revision or "main")
        files = [repository.entry(each) for each in repository.files]
        about = {"id": name, "modelId": name, "sha": repository.commit, "private": repository.private, "tags": []}
        self._send(200, {**about, "siblings": files, "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        repository = self._revision(name, revision)
        self._send(200, [repository.entry(each) for each in repository.files])

    def validate(self) -> None:
        self._body()
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        self._may_write()
        there = self._revision(name, revision).files
        answers = []
        for each in files:
            mode = "lfs" if large(each["path"], each["size"]) else "regular"
            old = there.get(each["path"])
            oid = None if old is None else blob(old) if mode == "regular" else hashlib.sha256(old).hexdigest()
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def batch(self, name: str) -> None:
        wanted = json.loads(self._body())["objects"]
        self._may_write()
        self._repository(name)
        answers = []
        for each in wanted:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            answers.append({**each, **({} if each["oid"] in self.hub.objects else {"actions": upload})})
        self._send(200, {"transfer": "basic", "objects": answers})

    def upload(self, digest: str) -> None:
        with self.hub.lock:
            self.hub.on_upload(digest)
            content = self._body()
            assert hashlib.sha256(content).hexdigest() == digest
            self.hub.objects[digest] = content
            self.hub.sent.append(digest)
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        self._may_write()
        repository = self._revision(name, revision)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.hub.url}/{name}/commit/{repository.commit}"
        self._send(200, {"commitUrl": url, "commitOid": repository.commit, "pullRequestUrl": None})

    def file(self, name: str, revision: str, path: str) -> None:
        repository = self._revision(name, revision, content=True)
        if path not in repository.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        content, entry = repository.files[path], repository.entry(path)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_NAME}(?:/revision/{_REVISION})?", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.upload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(.+)", _Handler.file),
]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at an address of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What a process needs to take the hub for the real one."""
    found = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return found | ({"HF_TOKEN": token} if token is not None else {})


def take_for_the_real_one(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """The same for this process, whose client has read its settings already."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


if __name__ == "__main__":
    with serving(Hub()) as found:
        for folder in Path(sys.argv[1]).iterdir() if len(sys.argv) > 1 else ():
            found.add(f"owner/{folder.name}", folder)
        print(found.url, flush=True)
        threading.Event().wait()
