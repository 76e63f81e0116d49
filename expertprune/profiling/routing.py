"""How often routed experts are chosen on a corpus, and what they write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.corpora.batches import Batch
from expertprune.models.layers import Routed, routed_shares
from expertprune.profiling.channels import ChannelStatistics
from expertprune.units import LayerShape


class RoutingStatistics:
    """Sums over the tokens that are routed to each routed expert of one layer, per document.

    `routed` is their number, `norm` sums the norm of the expert's output times the router's weight,
    and `square` sums that product's square; each is `[documents, experts]`.

    A neuron counts as its activation times the router's weight, and as 0 on tokens that go
    elsewhere: that is what its column of the output projection multiplies.
    """

    def __init__(self, layer: nn.Module, family: Family, documents: int, shape: LayerShape) -> None:
        assert family.experts is not None
        self.layer, self.family, self.shape = layer, family.experts, shape
        self.tokens = torch.zeros(documents, 1)
        self.routed = torch.zeros(documents, shape.experts)
        self.norm = torch.zeros(documents, shape.experts)
        self.square = torch.zeros(documents, shape.experts)
        # Here `square` sums over a document's tokens; it becomes a mean in `tensors`.
        self.neurons = ChannelStatistics(documents, shape.neurons)
        run = [layer.get_parameter(tensor.name).float().square() for tensor in self.family.run]
        self.weight_norm = torch.stack([square.flatten(1).sum(1) for square in run]).sum(0).sqrt().cpu()
        owned = [
            square.sum(2 - tensor.axis).unflatten(1, (-1, shape.ffn)).sum(1)
            for square, tensor in zip(run, self.family.run, strict=True)
            if tensor.axis is not None
        ]
        self.neuron_norm = torch.stack(owned).sum(0).sqrt().flatten().cpu()

    def add(self, batch: Batch, call: Routed) -> None:
        """Add one batch."""
        self.tokens[torch.tensor(batch.documents)] += torch.tensor(batch.lengths)[:, None]
        for share in routed_shares(self.layer, self.family, batch, call):
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

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place."""
        own = {"tokens": self.tokens, "routed": self.routed, "norm": self.norm, "square": self.square}
        return {**{f"experts.{name}": tensor for name, tensor in own.items()}, **self.neurons.sums("neurons")}

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        read = self.layer.get_parameter(self.family.output).float()
        self.neurons.square /= self.tokens
        return {
            **self.neurons.tensors(f"ffn.{index}"),
            f"ffn.{index}.output_l1": read.abs().sum(1).flatten().cpu(),
            f"ffn.{index}.output_l2": torch.linalg.vector_norm(read, dim=1).flatten().cpu(),
            f"ffn.{index}.weight_norm": self.neuron_norm,
            f"experts.{index}.routed": self.routed,
            f"experts.{index}.frequency": self.routed / self.tokens,
            f"experts.{index}.norm_sum": self.norm,
            f"experts.{index}.impact": self.square / self.tokens,
            f"experts.{index}.weight_norm": self.weight_norm,
        }
