"""How much of a LoRA adapter's effect is left when it is cut along with an expert.

    python -m bench.adapter --data DATA --out DIR

DATA is a folder of JSON lines: `task/gsm8k_*` and `domain/pubmedqa_*`, each with
`_calibration.jsonl` and `_report.jsonl`. One adapter of SmolLM2 is trained on the calibration rows
of each, all linear layers of the decoder at rank 8. Both are cut along with two experts of
profiles/english-medical-qa.yaml, repaired and not, which are built into DIR unless they are there.
Report rows are measured and choose nothing.

The effect of an adapter is what it takes off the bits per byte of its task. What is kept is the
expert's part of the base's effect, with its 95% interval over documents (paired bootstrap).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import expertprune
from expertprune.evaluation.retention import bootstrap
from expertprune.files import store_folder
from expertprune.models.base import resolve_base
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.schema import Base

from .cells import SMOLLM
from .measure import Blocks, Sums, blocks, losses
from .quality import UNREPAIRED
from .records import PACKAGES, Table, made, save_table
from .serving import SPEC

TASKS = {"GSM8K": "task/gsm8k", "PubMedQA": "domain/pubmedqa"}
EXPERTS: dict[str, dict[str, Any]] = {"repaired": {}, "not repaired": UNREPAIRED}
RANK, ALPHA, RATE = 8, 16, 1e-3
COLUMNS = ("task", "expert", "base", "with the adapter", "expert's own", "with the cut adapter", "effect kept (95%)")


def trained(base: Path, data: Blocks, out: Path) -> Path:
    """An adapter of the base, one step for each block, the rate falling to zero in a line."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_model(base, torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(data.ids))
    for row in data.ids:
        ids = row[None].to(model.device)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    adapted.save_pretrained(out)
    return out


def nats(folder: Path, data: Blocks, adapter: Path | None = None) -> Sums:
    """Losses of a model, with an adapter beside it or none."""
    model = load_model(folder, torch.float32)
    if adapter is None:
        return losses(model, data)
    from peft import PeftModel

    return losses(PeftModel.from_pretrained(model, adapter).merge_and_unload(), data)


def row(data: Blocks, size: int, found: dict[str, Sums]) -> list[str]:
    """Bits per byte of four models on `size` bytes, and the part of the effect that is kept."""
    bits = [f"{sums.nats.sum() / math.log(2) / size:.4f}" for sums in found.values()]
    base, adapted, expert, cut = (sums.nats for sums in found.values())

    def kept(documents: Any) -> Any:
        return (expert - cut)[documents].sum(-1) / (base - adapted)[documents].sum(-1)

    low, high = bootstrap(kept, len(base), 0)
    return [*bits, f"{float(kept(np.arange(len(base)))):.3f} ({low:.3f} to {high:.3f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="where experts and adapters are, or are made")
    parser.add_argument("--steps", type=int, default=32, help="blocks of 512 tokens to train on; default: 32")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of 512 tokens to measure; default: 8")
    parser.add_argument("--documents", type=int, default=24, help="calibration documents of each corpus; default: 24")
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
    arguments = parser.parse_args()
    out = arguments.out
    plain = {"evaluate.enabled": False, "calibration.documents": arguments.documents}
    folders = {name: out / name.replace(" ", "-") for name in EXPERTS}
    for name, changes in EXPERTS.items():
        if not folders[name].is_dir():
            expertprune.build(SPEC, folders[name], {**plain, **changes})
    base = resolve_base(Base(model=SMOLLM), store_folder())
    base.checkpoint.fetch()
    tokenizer = load_tokenizer(base.folder)
    table = Table(COLUMNS)
    for task in arguments.task or TASKS:
        path = TASKS[task]
        adapter = out / f"adapter-{task}"
        if not adapter.is_dir():
            trained(
                base.folder, blocks(arguments.data / f"{path}_calibration.jsonl", tokenizer, arguments.steps), adapter
            )
        data = blocks(arguments.data / f"{path}_report.jsonl", tokenizer, arguments.blocks)
        size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in data.ids)
        dense = {"base": nats(base.folder, data), "adapted": nats(base.folder, data, adapter)}
        for name, folder in folders.items():
            cut = out / f"{adapter.name}-{folder.name}"
            # The adapter names the base by the folder in the store that its GGUF file was converted to.
            expertprune.cut_adapter(adapter, folder, cut, overwrite=True, same_base=True)
            found = {**dense, "expert": nats(folder, data), "cut": nats(folder, data, cut)}
            table.add(task, name, *row(data, size, found))
    note = (
        f"Adapters of rank {RANK} (lora_alpha {ALPHA}), {arguments.steps} steps of 512 tokens (AdamW, {RATE:g} falling "
        f"to 0); {arguments.blocks} blocks of 512 tokens measured, in float32. Experts: {arguments.documents} calibration "
        "documents of each corpus."
    )
    save_table("adapter", table, made((*PACKAGES, "peft")), note)
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    main()
