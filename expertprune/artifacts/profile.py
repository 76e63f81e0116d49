"""Profiles: the stored statistics of one model on one corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertprune.errors import CheckpointError
from expertprune.files import digest_of, parse_json, problems_of, staged_file
from expertprune.relevance import Pass
from expertprune.units import LayerShape

PROFILE_SCHEMA = 5


def halved(name: str, values: Tensor) -> dict[str, Tensor]:
    """Values in float16 as `name`, divided by `name.scale`, a power of two.

    The largest value comes near 2¹⁵. Massive activations would overflow half precision without a
    scale; with it, 29 binary orders of magnitude below the largest are kept.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    # At least float32's smallest normal number: the scale itself is stored in float32.
    scale = 2.0 ** max(math.ceil(math.log2(largest)) - 15, -126) if 0 < largest < math.inf else 1.0
    return {name: (values / scale).to(torch.float16), f"{name}.scale": torch.tensor(scale, dtype=torch.float32)}


@dataclass(frozen=True)
class ProfileKey:
    """What a profile depends on; its digest is the profile's name.

    Attributes:
        model: digest of the base's config and weights.
        tokenizer: digest of its tokenizer's files.
        corpus: digest of the documents' tokens and answers, in their order.
        max_tokens: where documents are cut.
        dtype: the type of the running base's weights, such as `float32`.
        device: the type of its device, such as `cuda`.
        attention: its implementation of attention, such as `sdpa`.
        versions: versions of the packages that compute, by name.
        code: digest of the code that computes statistics, and of the base's remote code if trusted.
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
        """Whether a profile of that digest was measured with the same means, and compares."""
        return digest.partition("-")[2] == self.means

    def same_text(self, digest: str | None) -> bool:
        """Whether a profile of that digest is of the same model and text."""
        return digest is not None and digest.partition("-")[0] == self.text


@dataclass(frozen=True)
class ProfilePart:
    """The result of one pass over a corpus, which has a file of its own.

    `variant` tells results of one pass apart: for the gradient pass, it is the loss.
    """

    made_by: Pass
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.made_by}-{self.variant}" if self.variant else str(self.made_by)

    def path(self, profile: Path) -> Path:
        """Its file, by the path of the profile, which holds the result of the forward pass."""
        return profile if self == FORWARD else profile.with_name(f"{profile.stem}.{self}.safetensors")


FORWARD = ProfilePart(Pass.FORWARD)
VOCABULARY = ProfilePart(Pass.VOCABULARY)


class ProfileAbout(BaseModel):
    """What the header of a profile says.

    Attributes:
        digest: the key's when it was measured; it is the profile's name.
        base: the name of the base.
        corpus: the name of the corpus.
        documents: digests of its documents.
        layers: the base's widths, layer by layer.
        tokens: how many tokens were read, padding left out.
        part: the name of the `ProfilePart`, except for the forward pass.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    digest: str
    key: ProfileKey
    base: str
    corpus: str
    documents: list[str]
    layers: list[LayerShape]
    tokens: int = Field(ge=0)
    part: str | None = None

    def document(self) -> dict[str, Any]:
        """What the file's header holds, as plain data."""
        return {"schema": PROFILE_SCHEMA, **self.model_dump(mode="json", exclude_none=True)}


class Profile:
    """The stored statistics of one model on one corpus: a safetensors file with a header.

    Statistics are read one tensor at a time, so a profile may be larger than memory. For layer `l`:

    - `ffn.l.rms` `[documents, ffn]`, float16 with a scale (see `halved`): root mean square of each
      input of the FFN's output projection over a document's tokens;
    - `ffn.l.sum`, `ffn.l.square_sum` `[ffn]`, float64: weighted sums over all tokens;
    - `heads.l.rms`, `heads.l.sum`, `heads.l.square_sum`: the same of the attention's output
      projection, `[..., query_heads * head_dim]`;
    - `heads.l.impact` `[documents, query_heads]`, `groups.l.impact` `[documents, kv_heads]`,
      float32: mean squared norm of what the head, or the group, adds to the layer's output;
    - `*.l.output_l1`, `*.l.output_l2` `[channels]`, float32: norms of the projection's columns;
    - `ffn.l.weight_norm`, `heads.l.weight_norm`, `groups.l.weight_norm` `[units]`: Frobenius norm
      of all weights that a unit owns;
    - `stream.l.square` `[documents]`: mean square of the residual stream behind the layer;
    - `stream.l.influence` `[documents]`: mean over tokens of `1 − cos(x, y)`, where the layer turns
      the residual stream `x` into `y` (ShortGPT's block influence, arXiv:2403.03853);
    - `tokens` `[documents]`: how many tokens of each document the model predicts;
    - `weights` `[documents]`, float32: the sum of the weights of its tokens, of which a prompt's
      weigh `calibration.prompt_weight`. In sums and means here, tokens count by their weight.

    In a layer with routed experts, `ffn` stands for all neurons of all of them. Each activation
    counts times the router's weight, and 0 on tokens that go elsewhere. Of the routed experts,
    `[documents, experts]`, float32:

    - `experts.l.routed`: how many tokens are routed to each, by their weight;
    - `experts.l.frequency`: their share of all tokens;
    - `experts.l.norm_sum`: the sum over them of the router's weight times the norm of the output;
    - `experts.l.impact`: the mean over all tokens of that product's square;
    - `experts.l.weight_norm`: as above, `[experts]`.

    Every other pass over the same corpus has a file of its own beside it, a `ProfilePart`.
    `gradient-language_model`, `gradient-kl` and `regional` hold `ffn.l.value`, `heads.l.value` and
    `experts.l.value`, `[documents, units]`, float16 with a scale: derivatives with respect to the
    units' masks. A gradient's file also holds

    - `ffn.l.norm`, `heads.l.norm`, `groups.l.norm` and `experts.l.norm`, `[documents, units]`,
      float16 with a scale: the norm of the derivatives with respect to a mask of its own on each
      segment of 8 tokens;
    - `loss` `[documents]`, float32: the mean loss of each document's own tokens, in nats.

    `vocabulary` holds:

    - `mass` `[folds, rows]`, float32: the probability that the model puts on each vocabulary row,
      summed over the positions of a fold's documents;
    - `fold` `[documents]`: the fold of each document;
    - `document`, `row`, `occurrences` `[entries]`: how often each row's token occurs in each
      document that has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        damaged = f"{path}: not a readable profile"
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {}).get("expertprune", "{}"), str(path))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such profile") from None
        except (SafetensorError, CheckpointError, OSError) as error:
            raise CheckpointError(f"{damaged} ({error}); delete it and profile again") from None
        if not isinstance(header, dict) or "schema" not in header:
            raise CheckpointError(f"{path}: is no profile")
        if header.get("schema") != PROFILE_SCHEMA:
            raise CheckpointError(f"{path}: a profile of schema {header.get('schema')}, not {PROFILE_SCHEMA}")
        try:
            self.about = ProfileAbout.model_validate(header)
        except ValidationError as error:
            problems = "; ".join(problems_of(error, ProfileAbout))
            raise CheckpointError(f"{damaged} ({problems}); delete it and profile again") from None

    def read(self, name: str) -> Tensor:
        """One statistic, as stored."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {error}; delete this profile and profile again") from None
        return tensor

    def part(self, part: ProfilePart) -> Profile | None:
        """What another pass over the same corpus measured; `None` if it was not made."""
        path = part.path(self.path)
        return Profile(path) if path.is_file() else None

    def read_half(self, name: str) -> Tensor:
        """A statistic that is stored with a scale (see `halved`), float32."""
        return self.read(name).float().mul_(self.read(f"{name}.scale"))

    @property
    def digest(self) -> str:
        return self.about.digest

    @property
    def corpus(self) -> str:
        return self.about.corpus

    @property
    def documents(self) -> list[str]:
        return self.about.documents

    @property
    def tokens(self) -> int:
        return self.about.tokens

    @property
    def layers(self) -> list[LayerShape]:
        return self.about.layers


def save_profile(path: Path, about: ProfileAbout, statistics: dict[str, Tensor]) -> Profile:
    """Write a profile, whole or not at all."""
    with staged_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in statistics.items()},
            temporary,
            metadata={"expertprune": json.dumps(about.document())},
        )
    return Profile(path)
