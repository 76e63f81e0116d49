"""How fast experts are through vLLM beside their bases: README's table.

    python -m bench.serving --out FOLDER [--only TEXT] [--rounds 3] [--readme README.md] [-- VLLM ARGUMENT...]

Builds each expert into FOLDER, unless it is there, and measures it as `expertprune bench` does. How good an expert is makes
no difference to its speed, so they are not repaired and not evaluated. Between the lines `<!-- serving -->` and
`<!-- /serving -->` of a README, the table is written anew.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import expertprune
from expertprune.commands.bench import number
from expertprune.serving.throughput import THROUGHPUT_FILE, Load

SPEC = Path(__file__).parent.parent / "profiles" / "english-medical-qa.yaml"
PLAIN = {
    "evaluate.enabled": False, "compensation.method": "none", "calibration.documents": 16,
    "relevance.criterion": "impact", "compose.allocation": "uniform",
}  # fmt: skip
SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
FFN, PER_LAYER = {"budget.ffn": 0.25}, {"compose.allocation": "global"}
# What stands in the table: base and what of the spec is changed. Gemma has one KV group, so none of it can go.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M, 25% of FFN": (SMOLLM, FFN),
    "SmolLM2-135M, 25% of FFN and a KV group": (SMOLLM, {**FFN, "budget.kv_groups": 1}),
    "SmolLM2-135M, 25% of FFN, widths per layer": (SMOLLM, {**FFN, **PER_LAYER}),
    "SmolLM2-135M, 16,384 rows": (SMOLLM, {"budget.ffn": 0, "budget.vocabulary": {"keep": 16_384}}),
    "Gemma 3 270M, 25% of FFN": (GEMMA, FFN),
    "Gemma 3 270M, 25% of FFN, widths per layer": (GEMMA, {**FFN, **PER_LAYER}),
    "Gemma 3 270M, 32,768 rows": (GEMMA, {"budget.ffn": 0, "budget.vocabulary": {"keep": 32_768}}),
}
HEADER = (
    "| expert | tokens/s, base | expert | ratio (pairs) | limit | of limit | first token | KV cache | memory | load |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def built(folder: Path, base: str, changes: dict[str, Any]) -> Path:
    """The expert's folder; what is there already stays."""
    if folder.exists():
        return folder
    return expertprune.build(SPEC, folder, {**PLAIN, "name": folder.name, "base": base, **changes})


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table; the last four columns are ratios, expert over base."""
    speed = result["ratios"]["output_tokens_per_second"]
    medians = [result["models"][role]["output_tokens_per_second"] for role in ("base", "expert")]
    cells = [name, *map(number, medians), f"{speed['median']:.3f} ({speed['low']:.3f} to {speed['high']:.3f})"]
    cells += [f"{result['limit']:.3f}", f"{speed['median'] / result['limit']:.0%}"]
    for metric in ("time_to_first_token_ms", "kv_cache_tokens", "memory_bytes", "load_seconds"):
        ratio = result["ratios"].get(metric)
        cells.append(f"{ratio['median']:.2f}" if ratio else "")
    return "| " + " | ".join(cells) + " |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table and what it was measured with."""
    first = next(iter(results.values()))
    load, versions = first["settings"], ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    about = (
        f"{load['rounds']} runs of each in turn, a server each: {load['prompts']} prompts of {load['input_tokens']} tokens, "
        f"{load['output_tokens']} new ones each, {load['concurrency']} at a time; {first['machine']}; {versions}."
    )
    return "\n".join([HEADER, *(row(name, result) for name, result in results.items()), "", about])


def fill(readme: Path, text: str) -> None:
    """Write the table between its marks; raises `ValueError` where a README has none."""
    old = readme.read_text(encoding="utf-8")
    new, count = re.subn(
        r"(<!-- serving -->\n).*?(<!-- /serving -->)",
        lambda found: f"{found[1]}{text}\n{found[2]}",
        old,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{readme}: has no lines <!-- serving --> and <!-- /serving -->")
    readme.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the experts are, or are built")
    parser.add_argument("--only", default="", help="the experts whose names hold this text")
    parser.add_argument("--measured", action="store_true", help="take what the experts' throughput.json says already")
    parser.add_argument("--readme", type=Path)
    defaults = vars(Load())
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("arguments", nargs="*", help="of vLLM, after --")
    options = parser.parse_args()
    load = Load(**{name: getattr(options, name) for name in defaults})
    results = {}
    for name, (base, changes) in EXPERTS.items():
        if options.only in name:
            folder = built(options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()), base, changes)
            if options.measured:
                results[name] = json.loads((folder / THROUGHPUT_FILE).read_text(encoding="utf-8"))
            else:
                results[name] = expertprune.bench(folder, load=load, arguments=options.arguments)
            print(row(name, results[name]), flush=True)
    text = table(results)
    print(f"\n{text}")
    if options.readme:
        fill(options.readme, text)


if __name__ == "__main__":
    main()
