"""Write the figures of `make demo` into README.md.

    make demo && .venv/bin/expertprune bench experts/gemma-medical-qa
    python -m bench.demonstration [FOLDER]

They are read from the expert's folder (default: the one that `make demo` writes), and stand in
README.md between the lines `<!-- NAME -->` and `<!-- /NAME -->`: `demo` is the end of what the
command prints, `retention` the table of what the expert kept, `speed` the timing through vLLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.timing import Timing
from expertprune.errors import CheckpointError
from expertprune.files import THROUGHPUT_FILE, folder_size
from expertprune.reporting.tables import retention_rows

from .records import Table, made, paragraph

ROOT = Path(__file__).parent.parent
FOLDER = Path("experts") / "gemma-medical-qa"
COLUMNS = ("corpus", "metric", "base", "expert", "retention", "95% interval")


def printed(expert: Expert) -> str:
    """The last lines of `make demo`, as they stand in a clone."""
    before, after = expert.plan.parameters.before, expert.plan.parameters.after
    lines = [
        f"expert:     {FOLDER} ({folder_size(expert.folder) / 1e6:.1f} MB)",
        f"parameters: {after:,} of {before:,} ({after / before:.1%})",
        f"serve it:   expertprune serve {FOLDER}",
    ]
    return "\n".join(("", "```text", *lines, "```", ""))


def retained(expert: Expert) -> str:
    """The table that `make demo` prints, and how it was made.

    Raises:
        CheckpointError: the expert was not evaluated.
    """
    if expert.evaluation is None:
        raise CheckpointError(f"{expert.folder}: was not evaluated: run make demo")
    how = made()
    versions = ", ".join(f"{name} {expert.versions.get(name, version)}" for name, version in how["versions"].items())
    about = f"(`make demo`: {versions}, {how['dates'][0]}, commit {', '.join(how['commits'])}.)"
    return f"\n{Table(COLUMNS, retention_rows(expert.evaluation))}\n\n{paragraph(about)}\n"


def timed(timing: Timing) -> str:
    """How fast the expert is beside its base, in two sentences."""
    speed, load = timing.ratios["output_tokens_per_second"], timing.load
    base, own = (timing.models[role].output_tokens_per_second or 0 for role in ("base", "expert"))
    engine = ", ".join(f"{name} {version}" for name, version in timing.versions.items() if name.startswith("vllm"))
    return "\n" + paragraph(
        f"Through vLLM it generates {own:.1f} tokens/s where the base generates {base:.1f}: {speed.median:.2f} times as "
        f"fast ({speed.low:.2f} to {speed.high:.2f}). (`expertprune bench {FOLDER} --rounds {load.rounds} --prompts "
        f"{load.prompts}`: {load.input_tokens} tokens in, {load.output_tokens} out, {load.concurrency} requests at a "
        f"time; {engine}, {timing.machine}.)"
    ) + "\n"  # fmt: skip


def filled(text: str, parts: dict[str, str]) -> str:
    """A document with the text between the marks of each part written anew.

    Raises:
        ValueError: a part does not have its two marks once.
    """
    for name, inside in parts.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"the document needs <!-- {name} --> and {last} once each")
        before, _, rest = text.partition(first)
        text = before + first + inside + last + rest.partition(last)[2]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / FOLDER, help="the expert")
    folder = parser.parse_args().folder
    expert, timing = Expert.load(folder), Timing.read(folder / THROUGHPUT_FILE)
    parts = {"demo": printed(expert), "retention": retained(expert)}
    if timing is not None:
        parts["speed"] = timed(timing)
    else:
        print(f"{folder} was not timed: the sentence on speed stays", file=sys.stderr)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main()
