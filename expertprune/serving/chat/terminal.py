"""A chat in a terminal: two columns, base and expert."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertprune.errors import ExpertpruneError
from expertprune.serving.chat.differences import first_difference
from expertprune.serving.chat.endpoints import ChatSettings, Ended
from expertprune.serving.chat.sides import Side

MARK = "reverse"
_REFRESH = 0.1  # seconds


@dataclass
class Speaker:
    """One side of a conversation, and its history.

    Attributes:
        answer: what it has said so far to the last prompt.
        about: its speed when it has ended, or why it failed.
    """

    side: Side
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: str = ""
    about: str = ""
    done: bool = True

    def hear(self, prompt: str) -> None:
        """Take a prompt, which `reply` answers."""
        self.answer, self.about, self.done = "", "", False
        self.messages.append({"role": "user", "content": prompt})

    def reply(self, settings: ChatSettings) -> None:
        """Answer the last prompt; a failure is said in `about`, and leaves no trace in the history."""
        try:
            for piece in self.side.endpoint.answer(self.messages, settings):
                if isinstance(piece, Ended):
                    self.about = piece.words
                else:
                    self.answer += piece
            self.messages.append({"role": "assistant", "content": self.answer})
        except ExpertpruneError as error:
            self.about = str(error)
            self.messages.pop()
        finally:
            self.done = True


def talk(
    sides: Sequence[Side], prompts: Iterable[str], settings: ChatSettings, console: Console, in_turn: bool = False
) -> None:
    """Put each prompt to both sides, and show their answers as they are written.

    Args:
        prompts: `/new` forgets the conversation.
        in_turn: let the sides answer one after the other.
    """
    speakers = [Speaker(side) for side in sides]
    for prompt in prompts:
        if prompt.strip() == "/new":
            speakers = [Speaker(side) for side in sides]
            continue
        if prompt.strip():
            _turn(speakers, prompt, settings, console, in_turn)


def _turn(speakers: Sequence[Speaker], prompt: str, settings: ChatSettings, console: Console, in_turn: bool) -> None:
    def ask(asked: Sequence[Speaker]) -> None:
        for speaker in asked:
            speaker.reply(settings)

    for speaker in speakers:
        speaker.hear(prompt)
    groups = [list(speakers)] if in_turn else [[speaker] for speaker in speakers]
    threads = [threading.Thread(target=ask, args=(group,), daemon=True) for group in groups]
    with Live(columns(speakers), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(_REFRESH)
            if console.is_terminal:
                live.update(columns(speakers), refresh=True)
        live.update(columns(speakers), refresh=True)
    if not console.is_terminal:  # there, the display leaves its last line open
        console.line()


def columns(speakers: Sequence[Speaker]) -> Table:
    """Both answers beside each other. The first word that differs is marked."""
    table = Table(expand=True, show_lines=True)
    for speaker in speakers:
        table.add_column(Text(f"{speaker.side.role}: {speaker.side.name}"), ratio=1)
    texts = []
    for speaker, other in zip(speakers, reversed(speakers), strict=True):
        text = Text(speaker.answer)
        if (found := first_difference(speaker.answer, other.answer, other.done)) is not None:
            text.stylize(MARK, *found)
        texts.append(text)
    table.add_row(*texts)
    table.add_row(*(Text(speaker.about or "…", style="dim") for speaker in speakers))
    return table
