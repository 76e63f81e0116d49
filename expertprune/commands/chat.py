"""`expertprune chat`."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertprune.commands.terminal import (
    Finite,
    base_option,
    output,
    reporting,
    say,
    stopped_by_signals,
    store_option,
)
from expertprune.errors import UsageError
from expertprune.files import store_folder

if TYPE_CHECKING:
    from expertprune.serving.chat import ChatSettings, Side


@click.command()
@click.argument("arguments", metavar="[DIR] [-- VLLM ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--terminal", is_flag=True, help="Two columns in this terminal, instead of a page in the browser.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Of the page; 0: any.")
@click.option("--expert-url", metavar="URL", help="An endpoint of the expert that runs already, such as "
              "http://127.0.0.1:8000/v1; #NAME at its end names one of several models.")  # fmt: skip
@click.option("--base-url", metavar="URL", help="The same, of the base.")
@base_option
@click.option("--seed", default=0, show_default=True, help="Of both models' draws.")
@click.option("--temperature", default=0.0, show_default=True, type=Finite(0, 2), help="0 is greedy.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Of one answer.")
@click.option("--in-turn", is_flag=True, help="Let the two answer one after the other, to time them.")
@click.option(
    "--log", type=click.Path(file_okay=False, path_type=Path), help="Folder of vLLM's logs [default: STORE/logs]."
)
@store_option
@reporting
def chat(
    arguments: tuple[str, ...],
    terminal: bool,
    port: int,
    expert_url: str | None,
    base_url: str | None,
    base: str | None,
    seed: int,
    temperature: float,
    max_tokens: int,
    in_turn: bool,
    log: Path | None,
    store: Path | None,
) -> None:
    """Chat with an expert and its base side by side, in the browser or in the terminal.

    Both get the same messages and the same seed. The first word in which their answers differ is marked.
    Arguments after -- go to vLLM, for both. The page is for browsers on this machine.

    \b
    expertprune chat experts/medical-qa -- --max-model-len 2048
    """
    from expertprune.serving.chat import ChatSettings
    from expertprune.serving.processes import check_port

    places = list(itertools.takewhile(lambda text: not text.startswith("-"), arguments))
    if len(places) > 1:
        raise click.UsageError(f"{places[1]}: chat with one expert at a time")
    for option, value in (("--base", base), ("--log", log)):
        if value is not None and (expert_url or base_url):
            raise click.UsageError(f"{option} is for engines that are started here, not for --expert-url")
    expert = Path(places[0]) if places else None
    settings = ChatSettings(seed, temperature, max_tokens)
    logs = store_folder(store) / "logs" if log is None else log
    if not terminal and port:
        check_port("127.0.0.1", port)  # before engines take minutes to start
    with stopped_by_signals(), contextlib.ExitStack() as stack:
        sides = stack.enter_context(
            _sides(expert, base, (expert_url, base_url), arguments[len(places) :], logs, store)
        )  # fmt: skip
        if terminal:
            _in_terminal(sides, settings, in_turn)
        else:
            _in_browser(sides, port, settings, in_turn)


@contextlib.contextmanager
def _sides(
    expert: Path | None,
    base: str | None,
    urls: tuple[str | None, str | None],
    arguments: Sequence[str],
    logs: Path,
    store: Path | None,
) -> Iterator[list[Side]]:
    """Both sides, started here or found at their addresses."""
    from expertprune.serving.chat import running, started

    expert_url, base_url = urls
    if expert_url and base_url:
        if arguments:
            raise UsageError("arguments after -- are for engines that are started here, not for --expert-url")
        yield running(base_url, expert_url, expert)
        return
    if expert_url or base_url:
        raise UsageError("give both --expert-url and --base-url, or neither")
    if expert is None:
        raise click.UsageError("name the folder of an expert, or give --expert-url and --base-url")
    with started(expert, base, arguments, logs, lambda message: say(message, error=True), store) as sides:
        yield sides


def _in_terminal(sides: Sequence[Side], settings: ChatSettings, in_turn: bool) -> None:
    from expertprune.serving.chat.terminal import talk

    for side in sides:
        say(f"{side.role}: {side.name} ({', '.join(part for part in (side.size, side.mode) if part)})")
    say("Write a message. /new forgets the conversation; Ctrl-D ends the chat.")

    def prompts() -> Iterator[str]:
        while True:
            try:
                yield input("> ")
            except EOFError:
                return

    talk(sides, prompts(), settings, output, in_turn)


def _in_browser(sides: Sequence[Side], port: int, settings: ChatSettings, in_turn: bool) -> None:
    """Serve the page until a signal comes, or an engine dies."""
    from expertprune.serving.chat import Page

    with Page(sides, port, settings, in_turn) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        say(f"open:    {page.url}")
        say("stop it: Ctrl-C")
        try:
            while True:
                for side in sides:
                    if side.server is not None and (failure := side.server.failure()) is not None:
                        raise failure
                time.sleep(0.25)
        finally:
            page.shutdown()
