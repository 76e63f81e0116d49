"""What a byte buys: a base and an expert of it, as they are and with weights of 8 and 4 bits.

    OMP_NUM_THREADS=1 python -m bench.bytes --data DATA --save

SmolLM2, and an expert without a quarter of its FFN neurons, as in the table of peers that repair
too: PubMedQA and WikiText-2 calibrate, seed 0, and both run in bfloat16. The weights of all linear
layers of the decoder are rounded to the nearest step; embeddings, output and norms stay in
bfloat16, as llm-compressor leaves them by default. Nothing is calibrated for the rounding: GPTQ and
AWQ, which llm-compressor makes, lose less at 4 bits.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import expertprune
from expertprune.arch import family_of
from expertprune.models.layers import decoder_layers

from .cells import Bench, Cell, built
from .measure import Sums, excess, losses
from .records import PACKAGES, Table, made, save_table

SCALE_BITS = 16  # a scale is stored in bfloat16
GROUPS = (128, 32)  # the first that divides a row


@dataclass(frozen=True)
class Scheme:
    """How the weights of linear layers are stored: `bits` each, and a scale for each row or group of a row."""

    bits: int
    grouped: bool

    def group(self, width: int) -> int:
        """How many weights of a row of `width` share a scale."""
        return next(size for size in GROUPS if width % size == 0) if self.grouped else width


SCHEMES: dict[str, Scheme | None] = {
    "bfloat16": None,
    "int8, a scale for each row": Scheme(8, grouped=False),
    f"4 bits, a scale for each {GROUPS[0]} or {GROUPS[1]}": Scheme(4, grouped=True),
}


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """A weight `[out, in]` at the nearest steps of symmetric scales, in its own dtype.

    The scale of `group` neighbours of a row is `max |w| / (2^(bits − 1) − 1/2)`, as in
    compressed-tensors, and a step is one of `−2^(bits − 1)` to `2^(bits − 1) − 1`.
    """
    top = 2 ** (bits - 1)
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1, keepdim=True) / (top - 0.5)).to(torch.bfloat16).float()
    steps = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top - 1)
    return (steps * scales).flatten(1).to(weight.dtype)


@torch.no_grad()
def quantized(model: Any, scheme: Scheme | None) -> tuple[Any, int]:
    """A copy of a model whose decoder's linear layers are rounded, and the bytes of all its tensors."""
    model = copy.deepcopy(model)
    bits = 8 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())  # tied ones once
    for layer in decoder_layers(model, family_of(model.config.model_type)) if scheme is not None else ():
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                weight, group = module.weight, scheme.group(module.in_features)
                weight.copy_(rounded(weight, scheme.bits, group))
                saved = 8 * weight.element_size() - scheme.bits
                bits += weight.numel() // group * SCALE_BITS - weight.numel() * saved
    return model, bits // 8


def table(bench: Bench) -> Table:
    """Base and expert by scheme: bytes, and what is lost against the base in bfloat16."""
    shape = Cell("base", piqa=0, dtype="bfloat16")
    cells = {"base": shape, "25% of the FFN removed": Cell("ours", piqa=0, dtype="bfloat16")}
    found = Table(["model", "weights", "MB", "of the base's", *(t for s in shape.sets for t in (s, "excess ln (95%)"))])
    base: dict[str, Sums] = {}
    whole = 0
    for name, cell in cells.items():
        prepared = expertprune.validate(bench.spec(cell))
        model, _ = built(cell, prepared, {})
        for weights, scheme in SCHEMES.items():
            small, size = quantized(model, scheme)
            sums = {each: losses(small, bench.blocks(prepared, each, cell.blocks)) for each in cell.sets}
            base, whole = base or sums, whole or size
            lost = {each: excess(base[each], sums[each]) for each in cell.sets}
            texts = [
                text
                for each, here in lost.items()
                for text in (f"{sums[each].perplexity:.2f}", f"{here.value:.3f} ({here.low:.3f} to {here.high:.3f})")
            ]
            found.add(name, weights, f"{size / 1e6:.1f}", f"{size / whole:.1%}", *texts)
            print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines, as for bench.quality")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results/")
    arguments = parser.parse_args()
    found = table(Bench(arguments.data.resolve()))
    if arguments.save:
        save_table("bytes", found, made(PACKAGES))


if __name__ == "__main__":
    main()
