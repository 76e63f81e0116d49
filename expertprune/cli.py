"""The command line: every command of `commands/`, one file each."""

from __future__ import annotations

import importlib
import pkgutil

import click

from expertprune import __version__, commands
from expertprune.commands.engines import in_team


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="expertprune")
@click.pass_context
def main(context: click.Context) -> None:
    """Turn a general language model into a compact expert for a language, a domain and a task.

    \b
    expertprune build profiles/english-medical-qa.yaml --out experts/medical-qa
    """
    command = main.commands.get(context.invoked_subcommand or "")
    if in_team() and command is not None and not getattr(command.callback, "as_team", False):
        raise click.UsageError(f"{command.name} is done by one process: run it without torchrun")


for found in pkgutil.iter_modules(commands.__path__):
    module = importlib.import_module(f"{commands.__name__}.{found.name}")
    for name, value in vars(module).items():
        if isinstance(value, click.Command) and not name.startswith("_"):  # a command of a command's own
            main.add_command(value)

if __name__ == "__main__":
    main()
