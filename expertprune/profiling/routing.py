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
        self.experts, self.shape, self.documents = experts, shape, documents
        self.read = experts.written(layer)
        device, groups = self.read.device, documents * shape.experts
        self.tokens = torch.zeros(documents, 1, device=device)
        self.routed, self.norm, self.square = (torch.zeros(groups, device=device) for _ in range(3))
        self.neurons = torch.zeros(groups, shape.ffn, device=device)
        self.sum = torch.zeros(shape.experts, shape.ffn, dtype=torch.float64, device=device)
        self.weights = self._weight_norms(layer)

    def _weight_norms(self, layer: nn.Module) -> dict[str, Tensor]:
        """Norms of weights: what each routed expert and each neuron owns, and columns of outputs."""
        values = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        l1, squares = _column_sums(self.read)
        owned, neurons = squares.sum(1), squares.clone()
        for tensor in self.experts.run:
            if tensor.name == self.experts.output:
                continue
            of_all = values[tensor.name].movedim(tensor.expert_axis, 0)
            if tensor.axis == 1:
                _, own = _column_sums(of_all)
            elif of_all.dim() == 3:  # along rows torch needs no copy
                own = torch.linalg.vector_norm(of_all, dim=2, dtype=torch.float32).square()
            else:
                own = of_all.float().square().reshape(self.shape.experts, -1)
            owned += own.sum(1)
            if tensor.axis is not None:
                neurons += tensor.by_neuron(own, self.shape.ffn)
        return {"output_l1": l1, "output_l2": squares.sqrt(), "neuron": neurons.sqrt(), "expert": owned.sqrt()}

    def add(self, batch: Batch, call: RoutedCall) -> None:
        """Add one batch; padding is left out, and tokens weigh what the batch says."""
        weights = batch.weights  # built on the CPU, so that the device is not waited for
        self.tokens[list(batch.documents)] += weights.sum(1, keepdim=True).to(self.tokens.device)
        document = torch.tensor(batch.documents)[:, None].expand(batch.ids.shape)
        pairs = call.pairs
        counts, document = (each.flatten().to(pairs.token.device)[pairs.token] for each in (weights, document))
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
            f"ffn.{index}.output_l1": self.weights["output_l1"].flatten().cpu(),
            f"ffn.{index}.output_l2": self.weights["output_l2"].flatten().cpu(),
            f"ffn.{index}.weight_norm": self.weights["neuron"].flatten().cpu(),
            f"experts.{index}.routed": routed,
            f"experts.{index}.frequency": routed / tokens,
            f"experts.{index}.norm_sum": norm,
            f"experts.{index}.impact": square / tokens,
            f"experts.{index}.weight_norm": self.weights["expert"].cpu(),
        }


def _column_sums(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of absolute values and of squares of columns, `[matrices, rows, columns]` to `[matrices, columns]`.

    One matrix at a time, in one buffer: float32 copies of all would take twice the layer's memory.
    """
    buffer = torch.empty(matrices.shape[1:], dtype=torch.float32, device=matrices.device)
    ones = torch.ones(matrices.shape[1], device=matrices.device)
    absolute = torch.empty(matrices.shape[0], matrices.shape[2], device=matrices.device)
    squared = torch.empty_like(absolute)
    for number, matrix in enumerate(matrices):
        torch.mv(buffer.copy_(matrix).abs_().T, ones, out=absolute[number])
        torch.mv(buffer.square_().T, ones, out=squared[number])
    return absolute, squared
