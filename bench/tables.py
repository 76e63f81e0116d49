"""Write the tables of README.md and LOG.md from `bench/results/`, without models or data.

    python -m bench.tables [--check] [--picture]

A table stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`. `--check` writes nothing and
fails where a file differs from its results. `--picture` also draws pictures/tokens.png.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import claims, experts, instruct, quality, served_bytes
from .bytes import text as text_of_bytes
from .cells import stored
from .records import Table, stored_table
from .vocabulary import EXPERTS, text_of_expert

FOLDER = Path(__file__).parent
FILES = (FOLDER / "README.md", FOLDER / "LOG.md")
# Each is kept by a command of `bench`.
RECORDED = (
    "adapter",
    "constants",
    "cost",
    "cost_build",
    "cost_mixture",
    "forecast",
    "outlook",
    "scale_llama_8b_streamed_fisher",
    "scale_qwen3_30b_a3b_streamed_fisher",
    "quantize",
    "serving",
    "team",
    "team_hosts",
    "torture",
)


def _quality(table: Callable[[quality.Get], Table]) -> Callable[[], str]:
    return lambda: quality.text_of(table, stored)


TABLES: dict[str, Callable[[], str]] = {
    **{name: _quality(table) for name, table in quality.TABLES.items()},
    "retired_parts": _quality(partial(quality.parts, chosen=quality.RETIRED)),
    "retired_criterion": _quality(partial(quality.task, criteria=("obs",))),
    **{name: partial(stored_table, name) for name in RECORDED},
    "bytes": text_of_bytes,
    "claims": claims.text,
    "experts": experts.text,
    "instruct": instruct.text,
    "served_bytes": served_bytes.text,
    "vocabulary": lambda: "\n\n".join(text_of_expert(name) for name in EXPERTS),
}


def filled(text: str, source: str) -> str:
    """A document with each of its tables written anew; what stands outside the marks stays.

    Raises:
        ValueError: a mark names no table, or has no end.
    """

    def replaced(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise ValueError(f"{source}: <!-- {found['name']} --> names no table; there are: {', '.join(TABLES)}")
        return f"<!-- {found['name']} -->\n{TABLES[found['name']]()}\n<!-- /{found['name']} -->"

    result, count = re.subn(r"<!-- (?P<name>\w+) -->\n.*?<!-- /(?P=name) -->", replaced, text, flags=re.DOTALL)
    if count != len(re.findall(r"<!-- /?\w+ -->", text)) / 2:
        raise ValueError(f"{source}: every <!-- NAME --> needs a <!-- /NAME --> on a line of its own, and the reverse")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    parser.add_argument("--picture", action="store_true", help="draw pictures/tokens.png too")
    arguments = parser.parse_args()
    for path in FILES:
        old = path.read_text(encoding="utf-8")
        new = filled(old, path.name)
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"{path} differs from bench/results/: run python -m bench.tables")
    if arguments.picture:
        quality.draw_tokens(stored)


if __name__ == "__main__":
    main()
