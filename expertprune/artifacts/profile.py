"""Profiles: the stored statistics of one model on one corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.files import digest_of, staged_file
from expertprune.relevance import Pass
from expertprune.units import LayerShape

PROFILE_SCHEMA = 3


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
    """What a profile depends on; its digest is the profile's name.

    Attributes:
        model: digest of the base's config and weights.
        tokenizer: digest of its tokenizer's files.
        corpus: digest of the documents, in their order.
        max_tokens: where documents are cut.
        dtype: what the base runs in, such as `float32`.
        device: the type of the device that it runs on, such as `cuda`.
        attention: the implementation of attention that it is loaded with.
        versions: of the packages that compute, by name.
        code: digest of the code that computes the statistics, and of the base's own code where that is run.
    """

    model: str
    tokenizer: str
    corpus: str
    max_tokens: int
    dtype: str
    device: str
    attention: str
    versions: Mapping[str, str]
    code: str

    @property
    def text(self) -> str:
        """Digest of what is measured: the model and the text."""
        return digest_of([self.model, self.tokenizer, self.corpus, self.max_tokens])[:40]

    @property
    def means(self) -> str:
        """Digest of what it is measured with."""
        versions = dict(self.versions)
        return digest_of([PROFILE_SCHEMA, self.dtype, self.device, self.attention, versions, self.code])[:16]

    @property
    def digest(self) -> str:
        return f"{self.text}-{self.means}"

    def same_means(self, digest: str) -> bool:
        """Whether a profile of that digest was measured in the same way, so that numbers compare."""
        return digest.partition("-")[2] == self.means

    def same_text(self, digest: str | None) -> bool:
        """Whether a profile of that digest is of the same model and text, whatever it was measured with."""
        return digest is not None and digest.partition("-")[0] == self.text


@dataclass(frozen=True)
class ProfilePart:
    """What one pass over a corpus gave: a file of its own.

    `variant` tells results of one pass apart: for the gradient pass, its loss.
    """

    made_by: Pass
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.made_by}-{self.variant}" if self.variant else str(self.made_by)

    def path(self, profile: Path) -> Path:
        """Where it lies, by the path of the profile, which is the forward pass' own file."""
        return profile if self == FORWARD else profile.with_name(f"{profile.stem}.{self}.safetensors")


FORWARD = ProfilePart(Pass.FORWARD)
VOCABULARY = ProfilePart(Pass.VOCABULARY)


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
    - of layers with routed experts, `ffn` of the above is all neurons of all of them, each activation times the router's
      weight, and 0 on tokens that go elsewhere. For each routed expert, `[documents, experts]`, float32:
      `experts.l.routed`, how many tokens are routed to it; `experts.l.frequency`, their share of all tokens;
      `experts.l.norm_sum`, the sum over them of the router's weight times the norm of what it writes;
      `experts.l.impact`, the mean over all tokens of that product's square. And `experts.l.weight_norm` `[experts]`;
    - `stream.l.square` `[documents]`: mean square of the residual stream after the layer;
    - `tokens` `[documents]`: tokens of each document that the model predicts.

    Every other pass over the same corpus leaves a part beside it (see `ProfilePart`), `DIGEST.PART.safetensors`.
    `gradient-language_model`, `gradient-kl` and `regional` hold `ffn.l.value` and `heads.l.value` (and
    `experts.l.value`), `[documents, units]` in half precision with their scales. `vocabulary` holds, of each vocabulary
    row, `count` `[rows]`, int64, how often its token occurs, and `mass` `[rows]`, float32, the probability that the model
    puts on it, mean over positions.
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

    def part(self, part: ProfilePart) -> Profile | None:
        """What another pass over the same corpus gave, or `None` if it was not made."""
        path = part.path(self.path)
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
