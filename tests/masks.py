"""Explicit masks on a model's units: derivatives by autograd through the whole model's ordinary forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expertprune.arch import Family, family_of
from expertprune.artifacts.profile import ProfilePart
from expertprune.corpora.batches import make_batches
from expertprune.models.passes import TextRun
from expertprune.profiling.traversal import Traversal
from expertprune.progress import no_progress
from expertprune.relevance import Pass
from expertprune.units import LayerShape
from tests.tiny import tiny_model

LENGTHS = (9, 2, 14, 5, 5, 11)
Function = Callable[[], Tensor]


def token_lists(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 64, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Tiny:
    """A tiny model, its family and its layers' shapes."""

    model: Any
    family: Family
    shapes: tuple[LayerShape, ...]

    def text(self, documents: Sequence[Sequence[int]], tokens_per_batch: int = 30, pad: int = 63) -> TextRun:
        """The model and documents to run through it."""
        return TextRun(self.model, self.family, self.shapes, make_batches(documents, tokens_per_batch, pad))

    def double(self) -> Tiny:
        """The same model in float64, for references without rounding; this one stays as it is."""
        copy = type(self.model)(self.model.config).double().eval()
        copy.load_state_dict(self.model.state_dict())
        copy.set_attn_implementation("eager")  # the only one that can be derived twice
        return Tiny(copy, self.family, self.shapes)


def tiny(family: str, **changes: Any) -> Tiny:
    return tiny_of(tiny_model(family, **changes))


def tiny_of(model: Any) -> Tiny:
    """A running model with what its family says about it."""
    family = family_of(model.config.model_type)
    return Tiny(model, family, family.layer_shapes(model.config.to_dict()))


def ffn_output(layer: Any) -> Any:
    """The output projection of a layer's FFN, by the names that the families give it."""
    return layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.c_proj


class Masks:
    """Masks of ones on the units of some layers; a query head's channels carry its own mask times its KV group's.

    With `tokens`, every token of a document has masks of its own: `[tokens, units]`.
    """

    def __init__(self, of: Tiny, layers: Sequence[int], tokens: int | None = None) -> None:
        self.of, self.layers = of, layers

        def ones(count: int) -> Tensor:
            size = (count,) if tokens is None else (tokens, count)
            return torch.ones(size, dtype=of.model.dtype, requires_grad=True)

        self.ffn = {layer: ones(of.shapes[layer].ffn) for layer in layers}
        self.heads = {layer: ones(of.shapes[layer].query_heads) for layer in layers}
        self.groups = {layer: ones(of.shapes[layer].kv_heads) for layer in layers}

    @property
    def leaves(self) -> list[Tensor]:
        return [each for masks in (self.ffn, self.heads, self.groups) for each in masks.values()]

    def names(self) -> list[str]:
        return [f"{name}.{layer}" for name in ("ffn", "heads", "groups") for layer in self.layers]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, the inputs of `down_proj` and `o_proj` are multiplied by the masks."""

        def times(factor: Function) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
            return lambda _, arguments: (arguments[0] * factor(),)

        handles = []
        for index in self.layers:
            layer, shape = self.of.model.model.layers[index], self.of.shapes[index]

            def of_heads(index: int = index, shape: LayerShape = shape) -> Tensor:
                masks = self.heads[index] * self.groups[index].repeat_interleave(shape.heads_per_group, -1)
                return masks.repeat_interleave(shape.head_dim, -1)

            handles.append(ffn_output(layer).register_forward_pre_hook(times(lambda i=index: self.ffn[i])))  # type: ignore[misc]
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(times(of_heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def cross_entropy(model: Any, ids: Sequence[int]) -> Tensor:
    """The mean loss of one document alone, each token predicted from those before it."""
    row = torch.tensor([list(ids)])
    logits = model(input_ids=row, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], row[0, 1:])


def mask_gradients(of: Tiny, documents: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`∂L_d/∂m_u` in float64, by name (`ffn.0`, `heads.2`, `groups.1`), `[documents, units]`."""
    exact = of.double()
    masks = Masks(exact, range(len(of.shapes)))
    rows = []
    with masks.hooked():
        for ids in documents:
            rows.append(torch.autograd.grad(cross_entropy(exact.model, ids), masks.leaves))
    return {name: torch.stack(each) for name, each in zip(masks.names(), zip(*rows, strict=True), strict=True)}


def segment_norms(of: Tiny, documents: Sequence[Sequence[int]], segment: int) -> dict[str, Tensor]:
    """`sqrt(Σ_s (∂L_d/∂m_us)²)` in float64 over masks on `segment` tokens in a row, by name, `[documents, units]`."""
    exact = of.double()
    found: dict[str, list[Tensor]] = {}
    for ids in documents:
        masks = Masks(exact, range(len(of.shapes)), len(ids))
        with masks.hooked():
            each = torch.autograd.grad(cross_entropy(exact.model, ids), masks.leaves)
        for name, by_token in zip(masks.names(), each, strict=True):
            sums = torch.stack([part.sum(0) for part in by_token.split(segment)])
            found.setdefault(name, []).append(sums.square().sum(0).sqrt())
    return {name: torch.stack(rows) for name, rows in found.items()}


def regional_gradients(of: Tiny, documents: list[list[int]]) -> dict[str, Tensor]:
    """The whole model with masks on one layer only: how the mean norm of that layer's output changes with them."""
    exact, result, outputs = of.double(), {}, []
    for index, layer in enumerate(exact.model.model.layers):
        masks, rows = Masks(exact, [index]), []
        handle = layer.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        with masks.hooked():
            for ids in documents:
                exact.model(input_ids=torch.tensor([ids]), use_cache=False)
                rows.append(torch.autograd.grad(outputs.pop()[0].square().sum(-1).sqrt().mean(), masks.leaves))
        handle.remove()
        result |= {name: torch.stack(each) for name, each in zip(masks.names(), zip(*rows, strict=True), strict=True)}
    return result


def measured(text: TextRun, part: str, seed: int = 0, progress: Any = no_progress) -> dict[str, Tensor]:
    """One part of a profile: `forward`, `regional`, `vocabulary`, or a gradient by its loss."""
    made = Pass(part) if part in set(Pass) else Pass.GRADIENT
    wanted = ProfilePart(made, part if made is Pass.GRADIENT else "")
    return Traversal(text, [wanted], seed).run(progress)[wanted]


def layer_activations(of: Tiny, ids: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Of one document alone, the inputs of `down_proj` (`ffn.0`) and `o_proj` (`heads.0`), and what a layer gives.

    `[tokens, channels]` each; the last are `stream.0` and so on, behind what the first layer gets, `stream.-1`.
    """
    seen: dict[str, NDArray[np.float64]] = {}

    def note(name: str, tensor: Any) -> None:
        seen[name] = (tensor[0] if isinstance(tensor, tuple) else tensor)[0].double().numpy()

    handles = []
    for index, layer in enumerate(of.model.model.layers):
        for name, module in ((f"ffn.{index}", ffn_output(layer)), (f"heads.{index}", layer.self_attn.o_proj)):
            handles.append(module.register_forward_pre_hook(lambda _, given, name=name: note(name, given)))
        handles.append(layer.register_forward_hook(lambda _, __, output, i=index: note(f"stream.{i}", output)))
    handles.append(of.model.model.layers[0].register_forward_pre_hook(lambda _, given: note("stream.-1", given[0])))
    with torch.no_grad():
        of.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def assert_near(actual: Tensor, expected: Tensor, relative: float, name: str = "") -> None:
    """Equal up to a part `relative` of each number, or of the largest where sums cancel."""
    largest = float(expected.abs().max())
    assert largest > 0, name
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=relative, atol=relative * largest, msg=lambda text: f"{name}: {text}"
    )
