"""Models of the hub: checked before their weights are downloaded, and only files of the index are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file

from expertprune.engine.forecast import Forecaster, Work
from expertprune.engine.memory import Sizes
from expertprune.engine.rates import Rates
from expertprune.errors import CheckpointError, SpecError
from expertprune.files import file_digest
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import SINGLE
from expertprune.models.hub import known_weights_digest
from expertprune.models.origin import Origin, origin_of
from expertprune.models.spool import Limits
from expertprune.spec.schema import Base
from tests.hub import TOKEN, Hub, serving, take_for_the_real_one
from tests.models.test_encodings import FP8, fp8_of, quantized
from tests.patching import everywhere
from tests.tiny import save_tiny

CARD = """---
license: other
license_name: made-up
license_link: https://example.org/licence
language: [en, de]
---
# A model
"""


HEAD = "lm_head.weight"


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model in several shards, and the same weights beside them in other layouts."""
    with serving(Hub()) as found:
        files = found.add("owner/model", tiny_llama).files
        files["consolidated.safetensors"] = b"the same weights again, in another layout"
        files["pytorch_model.bin"] = b"and again"
        files["README.md"] = CARD.encode()
        files["modeling.py"] = b"raise AssertionError('its code ran')"
        take_for_the_real_one(monkeypatch, found, tmp_path / "cache")
        yield found


def test_weights_are_downloaded_when_they_are_needed_and_only_those_of_the_index(
    hub: Hub, tiny_llama: Path, store: Path
) -> None:
    base = resolve_base(Base(model="owner/model", revision="main"), store)
    local = resolve_base(Base(model=str(tiny_llama)), store)
    shards = local.checkpoint.shards
    assert len(shards) > 1
    assert not list(base.folder.glob("*.safetensors"))
    assert (base.layers, base.dtype, base.checkpoint.dtype) == (local.layers, local.dtype, local.checkpoint.dtype)
    assert base.checkpoint.tensors == local.checkpoint.tensors
    assert base.digest == local.digest
    assert sorted(path.name for path in base.folder.glob("*.safetensors")) == shards
    assert sorted(hub.downloads(".safetensors")) == shards  # their headers first
    assert hub.downloads(".bin") == hub.downloads(".py") == []
    hub.asked.clear()
    resolve_base(Base(model="owner/model", revision="main"), store)
    assert hub.downloads("") == []  # all from the cache
    assert resolve_base(Base(model="owner/model", trust_remote_code=True), store).trust_remote_code
    assert hub.downloads("") == ["modeling.py"]


def test_what_is_still_to_come_is_counted_as_it_is_stored_and_without_what_is_here(
    hub: Hub, tiny_llama: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base in FP8 comes in half the bytes in which it appears, and a download that broke off goes on."""
    plain = shutil.copytree(tiny_llama, tmp_path / "plain")
    hub.add("owner/fp8", quantized(plain, tmp_path / "fp8", FP8, fp8_of))
    base = resolve_base(Base(model="owner/fp8"), store)
    pending, files = base.checkpoint.pending, base.checkpoint.shards
    assert pending is not None
    work = Work({}, False, False, None, None, False, 1.0, 0)

    def fetched() -> int:
        return Forecaster(base, Sizes.of(base), work, Limits(), Rates.of_shapes(base)).forecast().fetched

    assert fetched() == sum(info.bytes for info in pending.tensors.values()) < base.checkpoint.weight_bytes
    asked: list[int] = []
    everywhere(monkeypatch, "expertprune.files.places.require_room", lambda _, size: asked.append(size))
    hf_hub_download("owner/fp8", files[0])
    left = fetched()
    assert left == sum(info.bytes for info in pending.tensors.values() if info.file != files[0])
    base.checkpoint.fetch()
    assert (asked, fetched()) == ([left], 0)


def test_one_file_beside_the_shards_is_downloaded_alone(hub: Hub, store: Path, tmp_path: Path) -> None:
    one = save_tiny(tmp_path / "one", seed=1) / SINGLE
    hub.repositories["owner/model"].files[SINGLE] = one.read_bytes()
    bases = [resolve_base(Base(model="owner/model"), store) for _ in range(2)]
    for base in (*bases, resolve_base(Base(model="owner/model"), store)):
        assert torch.equal(base.checkpoint.deferred()[HEAD][:], load_file(one)[HEAD])
    assert hub.downloads(".safetensors") == [SINGLE]


def test_a_head_that_is_not_what_it_is_tied_to_is_refused_when_it_is_here(hub: Hub, store: Path) -> None:
    files = hub.repositories["owner/model"].files
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"tie_word_embeddings": True}).encode()
    base = resolve_base(Base(model="owner/model"), store)
    for refuse in (base.checkpoint.fetch, lambda: resolve_base(Base(model="owner/model"), store)):
        with pytest.raises(CheckpointError, match=r"set tie_word_embeddings: false in config\.json"):
            refuse()


def test_the_origin_of_a_base_is_its_commit_and_what_its_card_says(hub: Hub, store: Path, tmp_path: Path) -> None:
    base = resolve_base(Base(model="owner/model"), store)
    origin = origin_of(base.name, base.folder)
    said = {"license": "other", "license_name": "made-up", "license_link": "https://example.org/licence"}
    commit = hub.repositories["owner/model"].commit
    assert origin == Origin(name="owner/model", commit=commit, language=["en", "de"], **said)
    (tmp_path / "README.md").write_text(CARD)
    assert origin_of(str(tmp_path), tmp_path) == origin.model_copy(update={"name": None, "commit": None})
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert origin_of(str(tmp_path), tmp_path) == Origin()
    bundled = origin_of("smollm2-135m-instruct", tmp_path)
    assert (bundled.name, bundled.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


PRIVATE = "the hub has no such repository, or"


@pytest.mark.parametrize(
    ("change", "token", "words"),
    [
        ("gated", TOKEN, "is gated: accept the licence at {url}/owner/model, and take the token of that account"),
        ("gated", None, "is gated: accept the licence at {url}/owner/model, and set HF_TOKEN to a token of that"),
        ("private", None, f"{PRIVATE} it is private: set HF_TOKEN"),
        ("private", "hf_another", f"{PRIVATE} HF_TOKEN may not read it"),
    ],
)
def test_a_base_that_is_kept_from_you_is_one_line_with_the_fix(
    hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch, change: str, token: str | None, words: str
) -> None:
    setattr(hub.repositories["owner/model"], change, True)
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SpecError) as refused:
        resolve_base(Base(model="owner/model"), store)
    (problem,) = refused.value.problems
    assert problem.startswith("base.model: 'owner/model': ")
    assert words.format(url=hub.url) in problem
    assert "\n" not in problem


def test_what_cannot_be_had_or_cut_is_refused_before_weights_come(
    hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.repositories["owner/model"].files
    with pytest.raises(SpecError, match="'owner/model': has no such revision"):
        resolve_base(Base(model="owner/model", revision="v1"), store)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"intermediate_size": 64}).encode()
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is \[32, 24\], the config makes axis 0 64"):
        resolve_base(Base(model="owner/model"), store)
    del files["model.safetensors.index.json"], files["consolidated.safetensors"]
    with pytest.raises(CheckpointError, match="not a safetensors repo"):
        resolve_base(Base(model="owner/model"), store)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port at which nobody listens
    with pytest.raises(SpecError, match="'owner/other' is not in the local cache and the hub cannot be reached"):
        resolve_base(Base(model="owner/other"), store)


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
