"""What profiling and repair cost, as ratios to a plain forward pass over the same batches, in one run.

    python bench/profiling.py                     # SmolLM2-135M-Instruct, the shipped corpora of the demonstration

Each round runs plain forward, profile, plain forward, repair; the ratio is taken round by round against the plain pass
just before it, and the median is printed. Peak memory is this process' largest resident set, minus the model's weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import expertprune
from expertprune.composition.plan import compose
from expertprune.models.passes import TextRun
from expertprune.profiling.forward import forward_pass
from expertprune.pruning.repair import by_least_squares


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=Path(__file__).parent.parent / "profiles/english-medical-qa.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    prepared = expertprune.validate(arguments.spec, {"base.dtype": arguments.dtype})
    base, model, batches = prepared.base, prepared.model, prepared.repair_batches()
    text = TextRun(model, base.family, base.layers, batches)
    plan = compose(prepared.spec, base, expertprune.profile(arguments.spec, overrides={"base.dtype": arguments.dtype}))

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            model(input_ids=batch.ids, use_cache=False)

    def profile() -> None:
        forward_pass(text)

    def mend() -> None:
        for _ in by_least_squares(text, plan.kept, prepared.spec.compensation):
            pass

    plain()  # warm
    rounds = []
    for _ in range(arguments.rounds):
        before_profile, profiled = seconds(plain), seconds(profile)
        before_repair, mended = seconds(plain), seconds(mend)
        rounds.append({"plain": before_profile, "profile": profiled / before_profile, "repair": mended / before_repair})
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - weights
    print(
        json.dumps(
            {
                "model": base.name,
                "dtype": str(base.dtype),
                "tokens": sum(batch.tokens for batch in batches),
                "longest": max(max(batch.lengths) for batch in batches),
                "plain_seconds": round(statistics.median(r["plain"] for r in rounds), 1),
                "profile_ratio": round(statistics.median(r["profile"] for r in rounds), 3),
                "repair_ratio": round(statistics.median(r["repair"] for r in rounds), 3),
                "peak_beyond_model_gib": round(peak / 2**30, 2),
                "rounds": rounds,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "threads": torch.get_num_threads(),
                "date": datetime.date.today().isoformat(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
