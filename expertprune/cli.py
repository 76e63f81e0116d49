"""The command line: one command per stage."""

from __future__ import annotations

import importlib

import click

from expertprune import __version__

COMMANDS = (
    "bench",
    "build",
    "compare",
    "compose",
    "evaluate",
    "export",
    "families",
    "inspect",
    "profile",
    "prune",
    "report",
    "schema",
    "serve",
    "sweep",
    "validate",
    "vocabulary",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="expertprune")
def main() -> None:
    """Turn a general language model into a compact expert for a language, a domain and a task.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa
    """


for name in COMMANDS:
    main.add_command(getattr(importlib.import_module(f"expertprune.commands.{name}"), name))

if __name__ == "__main__":
    main()
