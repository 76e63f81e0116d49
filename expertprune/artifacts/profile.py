"""Profiles: the stored statistics of one model on one corpus."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.files import digest_of, staged_file
from expertprune.units import (
    LayerShape,
)

PROFILE_SCHEMA = 2


def halved(name: str, values: Tensor) -> dict[str, Tensor]:
    """Values as float16 under `name`, after division by `name.scale`, a power of two that puts the largest near 2¹⁵.

    Massive activations overflow half precision, and a scale leaves 29 binary orders of magnitude below the largest.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    # no smaller than float32's smallest normal number, below which a scale would vanish itself
    scale = 2.0 ** max(math.ceil(math.log2(largest)) - 15, -126) if 0 < largest < math.inf else 1.0
    return {name: (values / scale).to(torch.float16), f"{name}.scale": torch.tensor(scale, dtype=torch.float32)}


@dataclass(frozen=True)
class ProfileKey:
    """What a profile depends on; its digest is the profile's name."""

    model: str
    tokenizer: str
    corpus: str
    max_tokens: int
    dtype: str

    @property
    def digest(self) -> str:
        return digest_of([PROFILE_SCHEMA, asdict(self)])


class Profile:
    """The stored statistics of one (model, corpus) pair: one safetensors file, its description in the header.

    Statistics are read one tensor at a time, so a profile larger than memory is no problem. For layer `l`:

    - `ffn.l.rms` `[documents, ffn]`, float16: root mean square of each `down_proj` input over a document's tokens,
      times `ffn.l.rms.scale`, a power of two that puts the largest value near the top of half precision;
    - `ffn.l.sum`, `ffn.l.square_sum` `[ffn]`, float64: over all tokens;
    - `heads.l.rms`, `.rms.scale`, `.sum`, `.square_sum`: the same for the channels of the `o_proj` input;
    - `heads.l.impact` `[documents, query_heads]` and `groups.l.impact` `[documents, kv_heads]`, float32: mean squared
      change of the attention's output without the head, without the group;
    - `*.l.output_l1`, `*.l.output_l2` `[channels]`, float32: norms of the output projection's columns;
    - `ffn.l.weight_norm`, `heads.l.weight_norm`, `groups.l.weight_norm` `[units]`: Frobenius norm of all that a unit owns;
    - of layers of experts, where `ffn` of the above is all neurons of all experts, each time the router's weight, and 0 on
      tokens that go elsewhere: `experts.l.frequency`, `experts.l.impact`, `experts.l.routed_norm`
      `[documents, experts]`, float32: how often each is chosen, mean squared norm of what it writes, and mean norm of that
      on the tokens routed to it, both times the router's weight; `experts.l.weight_norm` `[experts]`;
    - `stream.l.square` `[documents]`: mean square of the residual stream after the layer;
    - `tokens` `[documents]`: tokens of each document that the model predicts.

    What other passes over the same corpus give lies in parts beside it, `DIGEST.PART.safetensors`, one for each pass
    that was made: `gradient-language_model`, `gradient-kl`, `regional`. Each holds `ffn.l.value` and `heads.l.value`
    (and `experts.l.value`), `[documents, units]` in half precision with their scales. The part `vocabulary` holds, of
    each vocabulary row, `count` `[rows]`, int64, how often its token occurs, and `mass` `[rows]`, float32, the
    probability that the model puts on it, mean over positions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.about: dict[str, Any] = json.loads((file.metadata() or {}).get("expertprune", "{}"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such profile") from None
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable profile ({error}); delete it and profile again") from None
        if not isinstance(self.about, dict):
            raise CheckpointError(f"{path}: not a profile; delete it and profile again")
        if self.about.get("schema") != PROFILE_SCHEMA:
            raise CheckpointError(f"{path}: a profile of schema {self.about.get('schema')}, not {PROFILE_SCHEMA}")

    def read(self, name: str) -> Tensor:
        """One statistic, as stored."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def part(self, name: str) -> Profile | None:
        """What another pass over the same corpus gave, or `None` if it was not made."""
        path = part_path(self.path, name)
        return Profile(path) if path.is_file() else None

    def read_half(self, name: str) -> Tensor:
        """A statistic that was stored in half precision with its scale, float32."""
        return self.read(name).float().mul_(self.read(f"{name}.scale"))

    @property
    def digest(self) -> str:
        return str(self.about["digest"])

    @property
    def corpus(self) -> str:
        return str(self.about["corpus"])

    @property
    def documents(self) -> list[str]:
        return list(self.about["documents"])

    @property
    def tokens(self) -> int:
        return int(self.about["tokens"])

    @property
    def layers(self) -> list[LayerShape]:
        return [LayerShape(**shape) for shape in self.about["layers"]]


def part_path(profile: Path, part: str) -> Path:
    """Where a part of a profile lies."""
    return profile.with_name(f"{profile.stem}.{part}.safetensors")


def save_profile(path: Path, about: dict[str, Any], statistics: dict[str, Tensor]) -> Profile:
    """Write a profile, whole or not at all."""
    about = {"schema": PROFILE_SCHEMA, **about}
    with staged_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in statistics.items()},
            temporary,
            metadata={"expertprune": json.dumps(about)},
        )
    return Profile(path)
