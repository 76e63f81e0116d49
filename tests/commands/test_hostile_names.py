"""Names in files that others wrote are text: on the terminal, in the card, in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from expertprune.artifacts.expert import Expert
from expertprune.commands import terminal
from expertprune.formats import printable
from expertprune.reporting.card import card_text
from tests.calling import call
from tests.experts import about, copied

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m<script>alert(1)</script>\u202e"


def test_control_characters_are_written_out_as_json_does() -> None:
    assert printable("a\x1b[2J\x9b\x7f\tä\n") == "a\\u001b[2J\\u009b\\u007f\tä\n"
    assert json.loads(printable(json.dumps("\x9b\u202e", ensure_ascii=False))) == "\x9b\u202e"


def test_what_a_console_prints_has_no_control_characters_but_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(HOSTILE)
    table.add_row(Text(HOSTILE))
    console = terminal._console()
    console.print(table)
    console.print(HOSTILE, markup=False)
    shown = capsys.readouterr().out
    assert "\\u001b]0;owned" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_names_of_an_expert_reach_neither_the_terminal_nor_the_card(
    tiny_build: tuple[Path, Path], tmp_path: Path
) -> None:
    base = about(tiny_build[0])["base"] | {"model": HOSTILE}
    folder = copied(tiny_build, tmp_path / "expert", base=base, name=HOSTILE, versions={HOSTILE: "1"})
    spec = about(folder)["spec"]
    spec["dimensions"]["domain"] = [HOSTILE]
    folder.joinpath("expertprune.json").write_text(json.dumps(about(folder) | {"spec": spec}))
    for command in (("inspect", folder), ("report", folder)):
        result = call(*command)
        assert not set(result.output) & set("\x1b\x07\x9b\u202e")
    card = card_text(Expert.load(folder))
    assert "<script" not in card
    assert not set(card) & set("\x1b\x07\x9b\u202e")
