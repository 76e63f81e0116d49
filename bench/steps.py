"""Where vLLM's time goes, step by step, for a base and its expert: what the limit in README's table leaves out.

    python -m bench.steps EXPERT... [--rounds 3 --prompts 8 --input-tokens 128 --output-tokens 48]

EXPERT has been measured by `bench.serving` (its `throughput.json` names both folders). All prompts are given at once to an
engine in a process of its own, base and expert in turn; the model's blocks and its output head are timed from within, and
the rest of a step is scheduling, sampling and Python. Medians over rounds. A step that computes prompts reads each weight
once for many tokens, so fewer bytes do not make it faster; fewer multiplications do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expertprune
from expertprune.serving.throughput import THROUGHPUT_FILE

PARTS = ("blocks", "head", "rest")


def measure(folder: Path, prompts: int, input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Seconds by kind of step (`prompt`, `token`) and part, and the number of steps; a first run warms up."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import SamplingParams

    engine = expertprune.load_engine(folder, max_model_len=512, disable_log_stats=True)
    spent = dict.fromkeys(("blocks", "head"), 0.0)
    computed = 0

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal computed
            if part == "blocks":
                computed = len(keywords["positions"] if "positions" in keywords else args[1])
            start = time.perf_counter()
            result = function(*args, **keywords)
            spent[part] += time.perf_counter() - start
            return result

        return call

    def watch(model: Any) -> None:
        model.forward = timed("blocks", model.forward)
        model.compute_logits = timed("head", model.compute_logits)

    engine.apply_model(watch)
    inner = engine.llm_engine
    totals = {kind: dict.fromkeys((*PARTS, "steps"), 0.0) for kind in ("prompt", "token")}
    for measured in (False, True):
        settings = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        for number in range(prompts):
            ids = [1000 + (7 * number + 13 * place) % 3000 for place in range(input_tokens)]
            inner.add_request(f"{measured}-{number}", {"prompt_token_ids": ids}, settings)
        while inner.has_unfinished_requests():
            spent.update(blocks=0.0, head=0.0)
            start = time.perf_counter()
            inner.step()
            whole = time.perf_counter() - start
            if measured:
                kind = totals["prompt" if computed > prompts else "token"]
                kind["steps"] += 1
                for part in ("blocks", "head"):
                    kind[part] += spent[part]
                kind["rest"] += whole - spent["blocks"] - spent["head"]
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=Path, nargs="+")
    parser.add_argument("--one", action="store_true", help="one folder, as JSON")
    for name, value in {"rounds": 3, "prompts": 8, "input-tokens": 128, "output-tokens": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sizes = (options.prompts, options.input_tokens, options.output_tokens)
    if options.one:
        print(json.dumps(measure(options.experts[0], *sizes)))
        return
    print("| model | steps | blocks, prompts (s) | head | rest | blocks, tokens (s) | head | rest |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    arguments = [f"--prompts={sizes[0]}", f"--input-tokens={sizes[1]}", f"--output-tokens={sizes[2]}"]
    for expert in options.experts:
        folders = json.loads((expert / THROUGHPUT_FILE).read_text(encoding="utf-8"))["folders"]
        runs: dict[str, list[Any]] = {role: [] for role in folders}
        for role in [*folders] * options.rounds:
            command = [sys.executable, "-m", "bench.steps", folders[role], "--one", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[role].append(json.loads(done.stdout.splitlines()[-1]))
        for role, found in runs.items():
            steps = " + ".join(f"{found[0][kind]['steps']:.0f}" for kind in ("prompt", "token"))
            parts = [(kind, part) for kind in ("prompt", "token") for part in PARTS]
            cells = [f"{statistics.median(run[kind][part] for run in found):.2f}" for kind, part in parts]
            name = expert.name if role == "expert" else f"base of {expert.name}"
            print("| " + " | ".join([name, steps, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
