"""Where a base comes from on the hub, and what its model card says there."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from expertprune.arch import bundled_models

CARD_FILE = "README.md"
_LICENSE_KEYS = ("license", "license_name", "license_link")


class Origin(BaseModel):
    """A model on the hub. What is not known is `None` or empty.

    Attributes:
        name: its id, `owner/name`.
        commit: of the files that were read.
        license: the hub's identifier, such as `apache-2.0`; `other` goes with a name and a link.
        language: ISO 639 codes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    commit: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = Field(default_factory=list)


def origin_of(name: str, folder: Path) -> Origin:
    """The origin of a base, as far as its folder in the hub's cache, its card or our own list tells it.

    A card that is not in the hub's cache yet is downloaded. Without a network it stays unknown.

    Args:
        name: what the spec calls the base.
        folder: where its files are.
    """
    if name in bundled_models():
        model = bundled_models()[name]
        return Origin(name=model.hub, license=model.licence)
    # The hub's cache: models--owner--name/snapshots/commit.
    cached = re.fullmatch(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})", "/".join(folder.parts[-3:]))
    if cached is None:
        return Origin(**_card(folder / CARD_FILE))
    model_id, commit = f"{cached[1]}/{cached[2]}", cached[3]
    return Origin(name=model_id, commit=commit, **_card(_fetched(model_id, commit, folder)))


def _fetched(model_id: str, commit: str, folder: Path) -> Path:
    """The card of a model in the hub's cache."""
    from huggingface_hub import hf_hub_download

    path = folder / CARD_FILE
    if not path.is_file():
        with contextlib.suppress(Exception):  # no card, no network, no access: of the HTTP library, which changes
            path = Path(hf_hub_download(model_id, CARD_FILE, revision=commit))
    return path


def _card(path: Path) -> dict[str, Any]:
    """What a model card says about licence and languages; nothing if there is none, or if it is damaged."""
    from huggingface_hub import metadata_load

    data: Any = None
    if path.is_file():
        with contextlib.suppress(Exception):  # of the YAML library
            data = metadata_load(path)
    if not isinstance(data, dict):
        return {}
    said = {key: data[key] for key in _LICENSE_KEYS if isinstance(data.get(key), str)}
    language = data.get("language") or []
    languages = [language] if isinstance(language, str) else language
    return said | {"language": [each for each in languages if isinstance(each, str)]}
