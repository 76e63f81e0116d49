"""How often routed experts are chosen on a corpus, and what they write."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertprune.arch import Experts
from expertprune.artifacts.profile import halved
from expertprune.corpora.batches import Batch
from expertprune.models.routed import RoutedCall
from expertprune.units import LayerShape


class RoutingStatistics:
    """Sums over the tokens that are routed to each routed expert of one layer, per document.

    `routed` is their number, `norm` sums the norm of the expert's output times the router's weight,
    and `square` sums that product's square; each is `[documents * experts]`. `neurons` sums the
    squares of neurons, `[documents * experts, ffn]`, and `sum` their values, `[experts, ffn]`.

    A neuron counts as its activation times the router's weight, and as 0 on tokens that go
    elsewhere: that is what its column of the output projection multiplies.

    All sums stay on the layer's device until `tensors`, and `add` waits for nothing.
    """

    def __init__(self, layer: nn.Module, experts: Experts, documents: int, shape: LayerShape) -> None:
        self.shape, self.documents = shape, documents
        device, groups = experts.written(layer).device, documents * shape.experts
        self.tokens = torch.zeros(documents, 1, device=device)
        self.routed, self.norm, self.square = (torch.zeros(groups, device=device) for _ in range(3))
        self.neurons = torch.zeros(groups, shape.ffn, device=device)
        self.sum = torch.zeros(shape.experts, shape.ffn, dtype=torch.float64, device=device)

    def add(self, batch: Batch, call: RoutedCall) -> None:
        """Add one batch; padding is left out, and tokens weigh what the batch says."""
        placed, pairs = batch.on(self.tokens.device), call.pairs
        self.tokens.index_copy_(0, placed.documents, placed.totals[:, None])
        counts = placed.weights.flatten().index_select(0, pairs.token)
        document = placed.documents.index_select(0, pairs.token // batch.ids.shape[1])
        group = document * self.shape.experts + pairs.expert
        weight = pairs.weight.float()
        norm = torch.linalg.vector_norm(call.written, dim=1, dtype=torch.float32) * weight
        self.routed.index_add_(0, group, counts)
        self.norm.index_add_(0, group, norm * counts)
        self.square.index_add_(0, group, norm.square() * counts)
        values = call.neurons.float() * weight[:, None]
        batch_sum = torch.zeros_like(self.sum, dtype=torch.float32)
        self.sum += batch_sum.index_add_(0, pairs.expert, values * counts[:, None]).double()
        self.neurons.index_add_(0, group, values.square_().mul_(counts[:, None]))

    def sums(self) -> dict[str, Tensor]:
        """What is added over the members of a team, in place. A document is with one member only."""
        names = ("tokens", "routed", "norm", "square", "neurons", "sum")
        return {f"experts.{name}": getattr(self, name) for name in names}

    @property
    def finite(self) -> bool:
        """Whether all activations were finite."""
        return bool(self.neurons.isfinite().all() and self.norm.isfinite().all())

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Everything of this layer under its stored names."""
        tokens = self.tokens.cpu()
        routed, norm, square = (
            each.unflatten(0, (self.documents, -1)).cpu() for each in (self.routed, self.norm, self.square)
        )
        neurons = self.neurons.unflatten(0, (self.documents, -1)).flatten(1)
        return {
            **halved(f"ffn.{index}.rms", (neurons.cpu() / tokens).sqrt()),
            f"ffn.{index}.sum": self.sum.flatten().cpu(),
            f"ffn.{index}.square_sum": neurons.sum(0, dtype=torch.float64).cpu(),
            f"experts.{index}.routed": routed,
            f"experts.{index}.frequency": routed / tokens,
            f"experts.{index}.norm_sum": norm,
            f"experts.{index}.impact": square / tokens,
        }
