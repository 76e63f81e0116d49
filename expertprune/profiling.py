"""Model and batches to a profile: one pass over a corpus, layer by layer, and every statistic that criteria need."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertprune import layerwise
from expertprune.arch import Block, Family
from expertprune.artifacts import Profile, ProfileKey, halved, part_path, save_profile
from expertprune.corpora import Batch, Document
from expertprune.errors import CheckpointError
from expertprune.files import digest_of
from expertprune.models import BaseModel
from expertprune.passes import count_documents, gradient_energies, gradient_pass, regional_pass, removal_pass
from expertprune.predictions import PART as VOCABULARY
from expertprune.predictions import vocabulary_pass
from expertprune.relevance import Pass
from expertprune.units import KeptUnits, LayerShape, Segment

log = logging.getLogger(__name__)
Progress = Callable[[], None]


class ChannelStatistics:
    """Sums over tokens of each channel of an output projection's input, per document and in total.

    Streaming: any way of cutting the documents into batches gives the same numbers. Summed in float64: the variance of a
    channel with a large mean is the small difference of large sums.
    """

    def __init__(self, documents: int, channels: int) -> None:
        self.square = torch.zeros(documents, channels)  # mean over the document's tokens
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.square_sum = torch.zeros(channels, dtype=torch.float64)

    def add(self, document: int, values: Tensor) -> None:
        """`values` is `[tokens, channels]`, float32."""
        square_sum = torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square().cpu()
        self.square[document] = square_sum / values.shape[0]
        self.sum += values.sum(0, dtype=torch.float64).cpu()
        self.square_sum += square_sum

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What is stored: half precision RMS with its scale, float64 totals (a variance is their small difference)."""
        return {
            **halved(f"{prefix}.rms", self.square.sqrt()),
            f"{prefix}.sum": self.sum,
            f"{prefix}.square_sum": self.square_sum,
        }


class LayerCollector:
    """The statistics of one layer, fed batch by batch with the inputs of its two output projections."""

    def __init__(self, layer: nn.Module, family: Family, shape: LayerShape, documents: int) -> None:
        self.shape = shape
        self.experts = RoutingStatistics(layer, family, documents, shape) if family.experts else None
        self._weights = _weight_statistics(layer, family, shape)
        self.ffn = ChannelStatistics(documents, shape.ffn if family.has_ffn else 0)
        self.heads = ChannelStatistics(documents, shape.query_heads * shape.head_dim)
        self.head_impact = torch.zeros(documents, shape.query_heads)
        self.group_impact = torch.zeros(documents, shape.kv_heads)
        self.stream = torch.zeros(documents)
        # Gram matrices of the output projection's columns, one per KV group: [kv_heads, group_dim, group_dim]
        columns = layer.get_parameter(family.attention.output_weight).float()
        columns = columns.unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0)
        self._gram = columns @ columns.transpose(1, 2)

    def update(self, batch: Batch, ffn: Tensor, heads: Tensor, stream: Tensor) -> None:
        """The inputs of both output projections and the layer's output, `[rows, tokens, channels]`; padding is left out.

        Channels: `ffn`, `query_heads * head_dim`, and `hidden` for the residual stream.
        """
        shape = self.shape
        for row, (document, length) in enumerate(zip(batch.documents, batch.lengths, strict=True)):
            self.stream[document] = stream[row, :length].float().square().mean().cpu()
            self.ffn.add(document, ffn[row, :length].float())
            values = heads[row, :length].float()
            grouped = values.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1)  # [kv_heads, tokens, group_dim]
            moment = grouped.transpose(1, 2) @ grouped  # [kv_heads, group_dim, group_dim]
            self.heads.add(document, values)
            # mean_t ‖W o_t‖² = ⟨WᵀW, mean_t o_t o_tᵀ⟩: the whole block for the group, the diagonal blocks for its heads
            change = moment * self._gram / length
            self.group_impact[document] = change.sum((1, 2)).cpu()
            blocks = change.unflatten(1, (-1, shape.head_dim)).unflatten(3, (-1, shape.head_dim))
            self.head_impact[document] = blocks.sum((2, 4)).diagonal(dim1=1, dim2=2).flatten().cpu()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        return {
            **(self.ffn.tensors(f"ffn.{index}") if self.experts is None else self.experts.tensors(index)),
            **self.heads.tensors(f"heads.{index}"),
            f"heads.{index}.impact": self.head_impact,
            f"groups.{index}.impact": self.group_impact,
            f"stream.{index}.square": self.stream,
            **{name.format(layer=index): tensor for name, tensor in self._weights.items()},
        }


class RoutingStatistics:
    """How the router of one layer uses each expert on each document, `[documents, experts]` each, and what that gives.

    An expert's neuron counts as its activation times the router's weight, and as 0 on tokens that go elsewhere: that is what
    its column of the output projection multiplies.
    """

    def __init__(self, layer: nn.Module, family: Family, documents: int, shape: LayerShape) -> None:
        assert family.experts is not None
        self.layer, self.family, self.shape = layer, family.experts, shape
        self.tokens = torch.zeros(documents, 1)
        self.routed = torch.zeros(documents, shape.experts)
        self.norm = torch.zeros(documents, shape.experts)
        self.square = torch.zeros(documents, shape.experts)
        self.neurons = ChannelStatistics(documents, shape.neurons)  # sums over tokens of a document, not yet means
        run = [layer.get_parameter(tensor.name).float().square() for tensor in self.family.run]
        self.weight_norm = torch.stack([square.flatten(1).sum(1) for square in run]).sum(0).sqrt().cpu()
        owned = [
            square.sum(2 - tensor.axis).unflatten(1, (-1, shape.ffn)).sum(1)
            for square, tensor in zip(run, self.family.run, strict=True)
            if tensor.axis is not None
        ]
        self.neuron_norm = torch.stack(owned).sum(0).sqrt().flatten().cpu()

    def add(self, batch: Batch, call: layerwise.Routed) -> None:
        """One batch; each expert is run on the tokens that are routed to it, and on no others."""
        self.tokens[torch.tensor(batch.documents)] += torch.tensor(batch.lengths)[:, None]
        for share in layerwise.shares(self.layer, self.family, batch, call):
            norm = (torch.linalg.vector_norm(share.neurons @ share.read.T, dim=1) * share.weight).cpu()
            of, expert = share.document, share.expert
            self.routed[:, expert].index_add_(0, of, torch.ones(len(of)))
            self.norm[:, expert].index_add_(0, of, norm)
            self.square[:, expert].index_add_(0, of, norm.square())
            values = (share.neurons * share.weight[:, None]).double().cpu()
            own = slice(expert * self.shape.ffn, (expert + 1) * self.shape.ffn)
            self.neurons.square[:, own].index_add_(0, of, values.square().float())
            self.neurons.sum[own] += values.sum(0)
            self.neurons.square_sum[own] += values.square().sum(0)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        read = self.layer.get_parameter(self.family.output).float()
        self.neurons.square /= self.tokens
        return {
            **self.neurons.tensors(f"ffn.{index}"),
            f"ffn.{index}.output_l1": read.abs().sum(1).flatten().cpu(),
            f"ffn.{index}.output_l2": torch.linalg.vector_norm(read, dim=1).flatten().cpu(),
            f"ffn.{index}.weight_norm": self.neuron_norm,
            f"experts.{index}.frequency": self.routed / self.tokens,
            f"experts.{index}.routed_norm": self.norm / self.routed.clamp_min(1),
            f"experts.{index}.impact": self.square / self.tokens,
            f"experts.{index}.weight_norm": self.weight_norm,
        }


def _blocks(family: Family) -> list[tuple[str, Block]]:
    """The blocks whose output projection is listened to, by the names of their statistics."""
    return [("ffn", family.ffn), ("heads", family.attention)] if family.has_ffn else [("heads", family.attention)]


def _weight_statistics(layer: nn.Module, family: Family, shape: LayerShape) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for name, block in _blocks(family):
        weight = layer.get_parameter(block.output_weight).float()
        statistics[f"{name}.{{layer}}.output_l1"] = weight.abs().sum(0).cpu()
        statistics[f"{name}.{{layer}}.output_l2"] = torch.linalg.vector_norm(weight, dim=0).cpu()
    state = dict(layer.named_parameters())
    squares = {segment: torch.zeros(shape.segment_rows(segment)) for segment in Segment}
    for coupled in family.tensors:
        if coupled.name not in state:
            continue
        values = state[coupled.name].float().square()
        rows = values.flatten(1).sum(1) if coupled.axis == 0 and values.dim() > 1 else values
        rows = rows.sum(0) if coupled.axis == 1 else rows
        parts = rows.cpu().split([shape.segment_rows(segment) for segment in coupled.segments])
        for segment, part in zip(coupled.segments, parts, strict=True):
            squares[segment] += part
    queries = squares[Segment.QUERY].unflatten(0, (shape.query_heads, -1)).sum(1)
    keys = squares[Segment.KEY_VALUE].unflatten(0, (shape.kv_heads, -1)).sum(1)
    if family.has_ffn:
        statistics["ffn.{layer}.weight_norm"] = squares[Segment.FFN].sqrt()
    statistics["heads.{layer}.weight_norm"] = queries.sqrt()
    statistics["groups.{layer}.weight_norm"] = (queries.unflatten(0, (shape.kv_heads, -1)).sum(1) + keys).sqrt()
    return statistics


@torch.inference_mode()
def collect(
    model: Any,
    family: Family,
    shapes: Sequence[LayerShape],
    batches: Sequence[Batch],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Every statistic of a corpus, by stored name (see `Profile`), from one pass.

    Args:
        batches: their `documents` number the rows of the per-document statistics.
        progress: called after each layer.

    Raises:
        CheckpointError: the model gives activations that are not finite.
    """
    documents = count_documents(batches)
    stream = layerwise.start(model, family, batches)
    statistics: dict[str, Tensor] = {"tokens": torch.zeros(documents)}
    for batch in batches:
        for document, length in zip(batch.documents, batch.lengths, strict=True):
            statistics["tokens"][document] = length - 1
    for index, layer in enumerate(layerwise.decoder_layers(model, family)):
        collector = LayerCollector(layer, family, shapes[index], documents)
        for number, batch in enumerate(batches):
            seen: dict[str, list[Tensor]] = {"ffn": [], "heads": []}
            calls: list[layerwise.Routed] = []
            with contextlib.ExitStack() as stack:
                for name, block in _blocks(family):
                    stack.enter_context(layerwise.observed(layer, block.output, seen[name]))
                if family.experts is not None:
                    stack.enter_context(layerwise.observed_routing(layer, family.experts, calls))
                stream.hidden[number] = stream.run(layer, index, number)
            if collector.experts is not None:
                collector.experts.add(batch, calls[0])
                seen["ffn"] = [seen["heads"][0][..., :0]]
            collector.update(batch, seen["ffn"][0], seen["heads"][0], stream.hidden[number])
        neurons = collector.ffn if collector.experts is None else collector.experts.neurons
        if not bool(neurons.square_sum.isfinite().all() and collector.heads.square_sum.isfinite().all()):
            raise CheckpointError(
                f"layer {index}: activations are not finite in {next(model.parameters()).dtype}: damaged weights, or "
                "too narrow a base.dtype (float32 and bfloat16 are wide)"
            )
        statistics |= collector.tensors(index)
        if progress is not None:
            progress()
    return statistics


def profile_key(
    base: BaseModel, documents: Sequence[Document], max_tokens: int, kept: Sequence[KeptUnits] | None = None
) -> ProfileKey:
    """What the profile of these documents depends on; `kept` where the base was profiled with other units masked."""
    model = base.digest if kept is None else digest_of([base.digest, [asdict(units) for units in kept]])
    digests = [digest_of(document.text) for document in documents]  # tokens see white space, so it counts here
    dtype = str(base.dtype).removeprefix("torch.")
    return ProfileKey(model, base.tokenizer_digest, digest_of(digests), max_tokens, dtype)


def profile_path(store: Path, key: ProfileKey) -> Path:
    return store / "profiles" / f"{key.digest}.safetensors"


def profile_corpus(
    model: Any,
    base: BaseModel,
    corpus: str,
    documents: Sequence[Document],
    batches: Sequence[Batch],
    key: ProfileKey,
    store: Path,
    progress: Progress | None = None,
) -> Profile:
    """Run the forward pass and store its profile under its digest."""
    statistics = collect(model, base.family, base.layers, batches, progress)
    return save_profile(profile_path(store, key), _about(base, corpus, documents, batches, key), statistics)


def profile_part(
    model: Any,
    base: BaseModel,
    corpus: str,
    documents: Sequence[Document],
    batches: Sequence[Batch],
    key: ProfileKey,
    store: Path,
    part: str,
    progress: Progress | None = None,
) -> Profile:
    """Run one of the other passes, as their parts are named (see `Profile`), and store its part."""
    kind, _, variant = part.partition("-")
    arguments = (model, base.family, base.layers, batches)
    if part == VOCABULARY:
        statistics = vocabulary_pass(model, base.family, batches, progress)
    elif kind == Pass.GRADIENT:
        statistics = gradient_pass(*arguments, variant, progress=progress)
    elif kind == Pass.REMOVAL:
        weights = gradient_energies(model, base.family, batches) if variant else None
        statistics = removal_pass(*arguments, weights, progress)
    else:
        statistics = regional_pass(*arguments, progress)
    bad = [name for name, tensor in statistics.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(f"{bad[0]}: the {part} pass gave values that are not finite: try base.dtype: float32")
    about = {**_about(base, corpus, documents, batches, key), "part": part}
    return save_profile(part_path(profile_path(store, key), part), about, statistics)


def _about(
    base: BaseModel, corpus: str, documents: Sequence[Document], batches: Sequence[Batch], key: ProfileKey
) -> dict[str, Any]:
    return {
        "digest": key.digest,
        "key": asdict(key),
        "base": base.name,
        "corpus": corpus,
        "documents": [document.digest for document in documents],
        "tokens": sum(batch.tokens for batch in batches),
        "layers": [asdict(shape) for shape in base.layers],
    }
