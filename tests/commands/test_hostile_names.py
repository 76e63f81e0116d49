"""Names in files that others wrote are text: on the terminal, in the card, in the report."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.commands import engines, terminal
from expertprune.formats import printable
from expertprune.progress import Standing
from expertprune.reporting.card import card_text
from expertprune.serving.chat import ChatSettings, running
from expertprune.serving.chat.terminal import talk
from tests.calling import call
from tests.experts import about, copied
from tests.serving.fake_endpoint import fake_endpoint

CONTROLS = set("\x1b\x07\x9b\u202e")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m<script>alert(1)</script>\u202e"


def test_control_characters_are_written_out_as_json_does() -> None:
    assert printable("a\x1b[2J\x9b\x7f\tä\n") == "a\\u001b[2J\\u009b\\u007f\tä\n"
    assert json.loads(printable(json.dumps("\x9b\u202e", ensure_ascii=False))) == "\x9b\u202e"


def test_bars_boards_chats_and_tables_show_no_control_characters_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal.SafeConsole(file=io.StringIO(), width=250, force_terminal=True)
    for module in (terminal, engines):
        monkeypatch.setattr(module, "messages", console)
    with terminal.progress_bar(HOSTILE, 1) as step:
        step()
    with engines.board([HOSTILE]) as tell:
        tell(HOSTILE, Standing(HOSTILE, 1, 2))
    with fake_endpoint([HOSTILE, HOSTILE], models=(HOSTILE,)) as fake:
        talk(running(fake.url, fake.url), ["Who?"], ChatSettings(), console, in_turn=True)
    table = Table(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("\\u001b]0;owned") >= 7
    assert not set(shown) & set("\x07\x9b\u202e")
    assert not re.search("\x1b(?:\\]0|\\[2J)", shown)


def test_everything_that_is_shown_is_printable() -> None:
    """No other call than `say` writes to the terminal, and consoles and logs are safe."""
    for path in Path(expertprune.__file__).parent.rglob("*.py"):
        assert not re.search(r"(?:click\.echo|sys\.stderr\.write)\((?!printable)", path.read_text()), path
    assert isinstance(terminal.output, terminal.SafeConsole)
    assert isinstance(terminal.messages, terminal.SafeConsole)


def test_names_of_an_expert_reach_neither_the_terminal_nor_the_card(
    tiny_build: tuple[Path, Path], tmp_path: Path
) -> None:
    base = about(tiny_build[0])["base"] | {"model": HOSTILE}
    folder = copied(tiny_build, tmp_path / "expert", base=base, name=HOSTILE, versions={HOSTILE: "1"})
    spec = about(folder)["spec"]
    spec["dimensions"]["domain"] = [HOSTILE]
    folder.joinpath("expertprune.json").write_text(json.dumps(about(folder) | {"spec": spec}))
    for command in ("inspect", "report"):
        assert not set(call(command, folder).output) & CONTROLS
    card = card_text(Expert.load(folder))
    assert "<script" not in card
    assert not set(card) & CONTROLS
