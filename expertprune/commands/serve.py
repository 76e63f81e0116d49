"""`expertprune serve`."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertprune.commands.terminal import Finite, reporting, say, stopped_by_signals
from expertprune.files import store_folder

if TYPE_CHECKING:
    from expertprune.serving.server import Server

log = logging.getLogger(__name__)


@click.command()
@click.argument("folders", metavar="DIR... [-- VLLM ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Where to listen.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option(
    "--log", type=click.Path(file_okay=False, path_type=Path), help="Folder of vLLM's logs [default: STORE/logs]."
)
@click.option(
    "--patience", default=900.0, show_default=True, type=Finite(min=1), metavar="SECONDS",
    help="How long an engine may take to start.",
)  # fmt: skip
@reporting
def serve(folders: tuple[str, ...], port: int, host: str, log: Path | None, patience: float) -> None:
    """Serve experts through vLLM, behind one OpenAI-compatible endpoint.

    Each folder gets an engine of its own; the field "model" of a request chooses one. Arguments after -- go to vLLM.

    \b
    expertprune serve experts/medical-qa experts/german --port 8080 -- --max-num-seqs 64
    """
    places = list(itertools.takewhile(lambda text: not text.startswith("-"), folders))
    arguments = folders[len(places) :]
    if not places:
        raise click.UsageError("name at least one folder before --")
    logs = store_folder() / "logs" if log is None else log
    with stopped_by_signals():
        if len(places) == 1:
            _serve_one(places[0], port, host, arguments, logs, patience)
        else:
            _serve_several(places, port, host, arguments, logs, patience)


def _serve_one(folder: str, port: int, host: str, arguments: Sequence[str], logs: Path, patience: float) -> None:
    from expertprune.serving.engine import check_folder
    from expertprune.serving.server import Server, log_file

    log = log_file(logs, check_folder(folder).name, port)
    server = Server(folder, port=port, host=host, arguments=arguments, log=log, patience=patience)
    _report(f"starting {server.name}; vLLM's log: {server.log}")
    with server:
        _report(f"healthy after {server.load_seconds:.0f} s; {_tried(server)}")
        _tell(server.url, [server])
        while (failure := server.failure()) is None:
            time.sleep(0.25)
        raise failure


def _serve_several(
    folders: Sequence[str], port: int, host: str, arguments: Sequence[str], logs: Path, patience: float
) -> None:
    from expertprune.serving.deployment import Deployment

    deployment = Deployment(
        folders, port=port, host=host, arguments=arguments, logs=logs, report=_report, patience=patience
    )
    for server in deployment.servers.values():
        _report(f"{server.name}: vLLM's log: {server.log}")
    with deployment:
        for server in deployment.servers.values():
            _report(f"{server.name}: healthy after {server.load_seconds:.0f} s; {_tried(server)}")
        _tell(deployment.url, list(deployment.servers.values()))
        deployment.watch()


def _report(message: str) -> None:
    say(message, error=True)


def _tried(server: Server) -> str:
    """What the server answers, in words."""
    from expertprune.serving.server import PROMPT, QUESTION

    if server.servable.chat:
        return f"{QUESTION!r} is answered {server.complete()!r}"
    return f"{PROMPT!r} goes on {server.complete()!r}"


def _tell(url: str, servers: Sequence[Server]) -> None:
    """Print the endpoint and a curl line that tries it."""
    from expertprune.serving.server import trial

    say(f"endpoint: {url}")
    say(f"models:   {', '.join(server.name for server in servers)}")
    path, request = trial(servers[0].servable, servers[0].name, 16)
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if servers[0].keys else ""
    say(f"try it:   curl {url}/{path} -H 'Content-Type: application/json'{key} -d {body}")
    say("stop it:  Ctrl-C")
