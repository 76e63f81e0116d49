"""Commands called in this process, as a user would type them."""

from __future__ import annotations

import json
from typing import Any

import click
from click.testing import CliRunner, Result

from expertprune.cli import main


def call(*arguments: Any, code: int = 0) -> Result:
    """A command's result; it must exit with `code`, and never with a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command makes of the words of its line. It does not run."""
    assert words[0] == "expertprune"
    parent = click.Context(main, info_name=words[0], **main.context_settings)
    with main.commands[words[1]].make_context(words[1], words[2:], parent=parent) as context:
        return dict(context.params)


def call_json(*arguments: Any) -> dict[str, Any]:
    """The one JSON object that a command prints on standard output."""
    data = strict(call(*arguments, "--json").stdout)
    assert isinstance(data, dict)
    return data


def strict(text: str) -> Any:
    """Text as JSON by the standard, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
