"""What commands share: options, progress bars, logs, tables, signals, and how errors are shown."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from expertprune.errors import ExpertpruneError, SpecError
from expertprune.files import (
    MEMORY_VARIABLE,
    SPOOL_VARIABLE,
    note_parents,
    parse_yaml,
    remove_all_leftovers,
    size_in_bytes,
    store_folder,
    to_json,
)
from expertprune.formats import printable
from expertprune.progress import foretold, watching, within_memory
from expertprune.spec.reading import TRUST

if TYPE_CHECKING:
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])


class SafeConsole(Console):
    """A console to which names in files that others wrote are text, never orders: in tables, bars and logs alike."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _console(stderr: bool = False) -> Console:
    console = SafeConsole(stderr=stderr)
    if not console.is_terminal:  # a pipe or a file has no width of its own
        console = SafeConsole(stderr=stderr, width=None if stderr else 120)
    return console


output, messages = _console(), _console(stderr=True)


def say(text: str, error: bool = False) -> None:
    """Print a line, on standard error if it is not the command's result; control characters are written out."""
    click.echo(printable(text), err=error)


class Finite(click.FloatRange):
    """A number within a range; NaN, which no range excludes, and infinity are none."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", parameter, context)
        return number


# The columns of a progress bar.
BAR = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left:"),
    TimeRemainingColumn(),
)


_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Clean up on a signal, then exit with 128 plus its number, as shells do (130 for Ctrl-C)."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    for name in _STOPPING:
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.number).name}; nothing is left running", error=True)
        sys.exit(128 + stopped.number)


def reporting(command: F) -> F:
    """Show an error as a message and exit with its code (2: the user's mistake); exit with 1 if interrupted."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        _log_to_terminal(logging.WARNING)
        # SIGTERM then cleans up as Ctrl-C does: temporary folders are removed.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            store = store_folder(kwargs.get("store"))
            remove_all_leftovers(store)
            note_parents(store)
            # Outside of any stage too, such as while a model is loaded.
            with watching(progress_bar), within_memory(command.__name__):
                return command(*args, **kwargs)
        except ExpertpruneError as error:
            problems = error.problems if isinstance(error, SpecError) else [str(error)]
            for problem in problems:
                say(f"error: {problem}", error=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # whoever read the output has enough
            sys.stdout = None  # type: ignore[assignment]  # else Python flushes it at its end, and fails again
            sys.exit(1)
        except OSError as error:  # of a disk, a permission, a name: the system's words say what
            if error.filename is None:
                raise
            say(f"error: {error.filename}: {error.strerror}", error=True)
            sys.exit(2)
        except KeyboardInterrupt as stopped:
            say("interrupted: no half-written file is left; the next run reuses the stored profiles", error=True)
            for note in getattr(stopped, "__notes__", ()):
                say(note, error=True)
            sys.exit(1)

    return run  # type: ignore[return-value]


def common(command: F) -> F:
    """Add `--json` and `--verbose`."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for machines.")(command)
    return click.option("-v", "--verbose", is_flag=True, callback=_logs, expose_value=False, help="Show logs.")(command)


def _logs(_: click.Context, __: click.Parameter, verbose: bool) -> None:
    _log_to_terminal(logging.INFO if verbose else logging.WARNING)


class _Once(logging.Filter):
    """Drops a warning that was shown before: a forecast of twenty experts meets each one twenty times.

    What happens to a server may happen again, and is shown again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.name.startswith("expertprune.serving"):
            return True
        text = record.getMessage()
        known = text in self._shown
        self._shown.add(text)
        return not known


def _log_to_terminal(level: int) -> None:
    """Show logs from this level on, unless they are shown already; what a build will take always."""
    handler = RichHandler(console=messages, show_path=False, markup=False)
    handler.addFilter(_Once())
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    foretold.setLevel(logging.INFO)


store_option = click.option(
    "--store", type=click.Path(file_okay=False, path_type=Path), envvar="EXPERTPRUNE_STORE",
    help="Folder of stored profiles [default: EXPERTPRUNE_STORE, else the user's cache].",
)  # fmt: skip


def _memory(_: click.Context, __: click.Parameter, value: str | None) -> None:
    """Passed on by the environment, which the processes that a command starts inherit."""
    if value is not None:
        try:
            os.environ[MEMORY_VARIABLE] = str(size_in_bytes(value))
        except ValueError as error:
            raise click.BadParameter(str(error)) from None


def _spool(_: click.Context, __: click.Parameter, value: Path | None) -> None:
    if value is not None:
        os.environ[SPOOL_VARIABLE] = str(value.expanduser().absolute())


def limits_options(command: F) -> F:
    """Add `--memory` and `--spool`: what the passes over text may use of this machine."""
    command = click.option(
        "--spool", type=click.Path(file_okay=False, path_type=Path), callback=_spool, expose_value=False,
        help="Folder for hidden states that memory has no room for [default: EXPERTPRUNE_SPOOL].",
    )(command)  # fmt: skip
    return click.option(
        "--memory", callback=_memory, expose_value=False, metavar="SIZE",
        help="Host memory for the model and hidden states, such as 12GiB [default: EXPERTPRUNE_MEMORY, else what is free].",
    )(command)  # fmt: skip


spec_argument = click.argument("spec", type=click.Path(path_type=Path))


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the expert that is there.")


overwrite_picture = click.option("--overwrite", is_flag=True, help="Replace the picture that is there.")


overwrite_file = click.option(
    "--overwrite", is_flag=True, help="Replace the file that is there, if it is of this kind."
)


def _base(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    from expertprune.arch import bundled_models

    if text is None or text in bundled_models() or not Path(text).exists():
        return text
    return str(Path(text).resolve())


base_option = click.option(
    "--base", metavar="PATH|NAME", callback=_base,
    help="The base's folder, if it has moved, or the name of a bundled model.",
)  # fmt: skip


def _settings(context: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    settings: dict[str, Any] = {TRUST: True} if context.meta.get(TRUST) else {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE, such as budget.ffn=0.3")
        try:
            settings[key.strip()] = parse_yaml(text, key.strip())
        except SpecError as error:
            raise click.BadParameter(f"{text!r} is not a YAML value: {error}") from None
    return settings


TRUST_HELP = "Run Python code that comes with the base, or with a suite's tasks. The code is named."


def _trust(context: click.Context, __: click.Parameter, trusted: bool) -> None:
    context.meta[TRUST] = trusted


def setting(example: str) -> Callable[[F], F]:
    """Add `--set`, and `--trust-remote-code`, which sets a key too: what a file says is no permission."""
    trust = click.option(
        "--trust-remote-code", is_flag=True, is_eager=True, expose_value=False, callback=_trust, help=TRUST_HELP
    )
    change = click.option(
        "--set", "overrides", multiple=True, callback=_settings, metavar="KEY=VALUE",
        help=f"Change a key of the spec, such as {example}.",
    )  # fmt: skip
    return lambda command: change(trust(command))


set_option = setting("budget.ffn=0.3")


_bars: list[Progress] = []  # those on the terminal: a stage within another adds its bar to the same display


@contextlib.contextmanager
def progress_bar(stage: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, with the time that the stage has taken and the time that is left."""
    with contextlib.ExitStack() as stack:
        progress = _bars[-1] if _bars else stack.enter_context(Progress(*BAR, console=messages))
        _bars.append(progress)
        stack.callback(_bars.pop)
        task, lock, done = progress.add_task(stage, total=steps), threading.Lock(), 0

        def step() -> None:
            nonlocal done
            with lock:  # some stages have threads of their own
                done += 1
                progress.update(task, completed=done, total=max(steps, done))

        with within_memory(stage):
            yield step
        progress.update(task, total=done, completed=done)


def show(as_json: bool, data: Any, text: Callable[[], Any]) -> None:
    """Print `data` as JSON, or what `text` returns: a string or something that rich can print."""
    shown = to_json(data) if as_json else text()
    if isinstance(shown, str):
        say(shown)
    else:
        output.print(shown)


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """A table of records that share their keys, which are its headers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*records[0])
    for record in records:
        table.add_row(*(Text(_cell(value)) for value in record.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def leading_comment(path: Path) -> str:
    """What a YAML file says about itself: the comment lines that it begins with, joined."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def print_expert(folder: Path, as_json: bool) -> None:
    """Print what an expert kept, its size, and how to serve it where vLLM can."""
    from expertprune.artifacts.expert import Expert
    from expertprune.files import folder_size, read_object
    from expertprune.reporting.tables import retention_table
    from expertprune.serving.engine import why_not_served

    expert = Expert.load(folder)
    if as_json:
        say(to_json({**expert.document(), "folder": str(folder), "bytes": folder_size(folder)}))
        return
    if expert.evaluation is not None:
        output.print(retention_table(expert.evaluation))
    before, after = expert.plan.parameters.before, expert.plan.parameters.after
    say(f"expert:     {folder} ({folder_size(folder) / 1e6:.1f} MB)")
    say(f"parameters: {after:,} of {before:,} ({after / before:.1%})")
    if why_not_served(read_object(folder / "config.json"), expert) is None:
        say(f"serve it:   expertprune serve {shlex.quote(str(folder))}")
