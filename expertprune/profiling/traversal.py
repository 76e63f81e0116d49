"""One way through the model, forward and back, that measures all that a profile lacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from expertprune.artifacts.profile import FORWARD, VOCABULARY, ProfilePart
from expertprune.corpora.batches import Batch
from expertprune.engine.memory import graphs_are_kept, layer_sums
from expertprune.errors import CheckpointError
from expertprune.models.passes import Stream, TextRun
from expertprune.models.sources import is_streamed
from expertprune.models.spool import Spool
from expertprune.models.states import KeepStates, keep_nothing
from expertprune.profiling.forward import LayerCollector, predicted_tokens, token_weights
from expertprune.profiling.gradients import MaskGradients, Taped, Upstream, loss_gradient
from expertprune.profiling.observation import Observation, units_observed
from expertprune.profiling.regional import RegionalGradients
from expertprune.profiling.rows import RowMass
from expertprune.profiling.weights import weight_statistics
from expertprune.profiling.working import Working
from expertprune.progress import Progress, no_progress
from expertprune.relevance import Pass

Statistics = dict[str, Tensor]


class Collector(Protocol):
    """Sums of one layer and one part of a profile."""

    def add(self, batch: Batch, seen: Observation, before: Tensor, after: Tensor) -> None: ...

    def sums(self) -> Statistics: ...

    def tensors(self, index: int) -> Statistics: ...


class Traversal:
    """Measures several parts of a profile in one way through the model.

    Layer by layer, every batch passes forward; the hidden states before each layer stay in the
    spool where a gradient is wanted. The head gives the loss' gradients and the probabilities of
    vocabulary rows from the same logits. Then, from the last layer to the first, each layer is run
    again and differentiated, so only one layer's graph of one batch is held at a time.

    Where the whole model is resident and has room for a batch's graph in all layers, each batch goes
    forward and back alone, and nothing is run twice.
    """

    def __init__(
        self,
        text: TextRun,
        parts: Sequence[ProfilePart],
        seed: int = 0,
        working: Working | None = None,
        keep: KeepStates = keep_nothing,
        weights: dict[int, Statistics] | None = None,
    ) -> None:
        """
        Args:
            parts: what to measure; one gradient at most.
            seed: of the draws of a gradient against the model's own predictions.
            working: where finished layers are kept until all is done, and found after a kill.
            keep: takes the hidden states behind each layer, for a later pass.
            weights: the statistics of each layer's weights, which every corpus has; those that are not there yet are
                added.
        """
        self.text, self.seed, self.working, self.keep = text, seed, working or Working(None), keep
        self.weights = {} if weights is None else weights
        self.gradient = next((part for part in parts if part.made_by is Pass.GRADIENT), None)
        self.regional = next((part for part in parts if part.made_by is Pass.REGIONAL), None)
        self.layers, self.documents, self.device = len(text.shapes), text.documents, text.device
        self.found: dict[ProfilePart, Statistics] = {part: {} for part in parts}
        self.losses = torch.zeros(self.documents, device=self.device)
        self.mass = RowMass(text) if VOCABULARY in self.found and not self.working.has(VOCABULARY) else None

    @functools.cached_property
    def keeps_graphs(self) -> bool:
        """Whether a batch's graph in all layers, and the sums of all layers, fit the free memory of all members."""
        lacking = {"lacking": torch.tensor(float(not self._graphs_fit()), device=self.device)}
        self.text.together(lacking)
        return not bool(lacking["lacking"])

    def _graphs_fit(self) -> bool:
        if self.gradient is None or self.regional is not None or is_streamed(self.text.model):
            return False
        sums = sum(layer_sums(self.documents, shape) for shape in self.text.shapes)
        return graphs_are_kept(self.layers * graph_bytes(self.text), sums, self.text.source.room.free())

    @property
    def steps(self) -> int:
        """How often `run` calls `progress`."""
        if self.keeps_graphs:
            return len(self.text.batches)
        return self.layers + (len(self.text.batches) if self._has_head else 0) + (self.layers if self.gradient else 0)

    @property
    def _has_head(self) -> bool:
        return self.gradient is not None or VOCABULARY in self.found

    @torch.no_grad()  # not inference mode: a backward pass goes through what comes out
    def run(self, progress: Progress = no_progress) -> dict[ProfilePart, Statistics]:
        """The statistics of each part, by stored name (see `Profile`).

        Raises:
            CheckpointError: the model gives numbers that are not finite.
        """
        if FORWARD in self.found:
            self.found[FORWARD]["tokens"] = predicted_tokens(self.text)
            self.found[FORWARD]["weights"] = token_weights(self.text)
        if VOCABULARY in self.found and self.mass is None:
            self.found[VOCABULARY] = self.working.load(VOCABULARY)
        if self.keeps_graphs:
            self._batch_by_batch(progress)
        else:
            self._layer_by_layer(progress)
        return self.found

    # --- layer by layer ---------------------------------------------------------------------------

    def _layer_by_layer(self, progress: Progress) -> None:
        left, above = self._resumed()
        stream, before = self._forward(left, progress)
        if above is None and self._has_head:
            above = self._head(stream, progress)
            self._finish_losses()
        if self.mass is not None:
            self._finish(VOCABULARY, self.mass.sums(), self.mass.tensors)
        if self.gradient is not None and above is not None:
            self._back(self.gradient, stream, before, above, progress)

    def _resumed(self) -> tuple[int, list[Upstream] | None]:
        """How many layers are not finished by an earlier run, and the gradients above them; the others are read."""
        if self.gradient is None or self.mass is not None:
            return self.layers, None
        left, above = self.working.resumed(self.gradient, self.text)
        finished = [(part, index) for part in self.found if part != VOCABULARY for index in range(left, self.layers)]
        if not self.working.has(self.gradient) or not all(self.working.has(*each) for each in finished):
            return self.layers, None
        for part, index in finished:
            self.found[part] |= self.working.load(part, index)
        self.found[self.gradient] |= self.working.load(self.gradient)
        return left, above

    def _forward(self, until: int, progress: Progress) -> tuple[Stream, list[Spool]]:
        """Run all batches through the first `until` layers; the hidden states before each, for a gradient."""
        stream = self.text.start()
        before: list[Spool] = []
        for index, layer in self.text.layers(progress, until=until):
            collectors = dict(self._collectors(index, layer))
            if self.gradient is not None:
                before.append(stream.hidden.copy())
            with units_observed(layer, self.text.family, leaves=self.regional is not None) as seen:
                for number, batch in enumerate(self.text.batches):
                    entering = stream.hidden[number]
                    with torch.set_grad_enabled(self.regional in collectors):
                        after = stream.run(layer, index, number, entering)
                    stream.hidden[number] = after.detach()
                    self.keep(number, index, after.detach())
                    for collector in collectors.values():
                        collector.add(batch, seen, entering, after)
            for part, collector in collectors.items():
                self._finish(part, collector.sums(), collector.tensors, index)
        return stream, before

    def _collectors(self, index: int, layer: nn.Module) -> Iterator[tuple[ProfilePart, Collector]]:
        """Those of a layer's parts that need no gradient from above; finished ones are read instead."""
        made: dict[ProfilePart, Callable[[], Collector]] = {FORWARD: lambda: self._layer_collector(index, layer)}
        if self.regional is not None:
            made[self.regional] = lambda: RegionalGradients(self.text.shapes[index], self.documents, self.device)
        for part in made.keys() & self.found.keys():
            if self.working.has(part, index):
                self.found[part] |= self.working.load(part, index)
            else:
                yield part, made[part]()

    def _layer_collector(self, index: int, layer: nn.Module) -> LayerCollector:
        family, shape = self.text.family, self.text.shapes[index]
        if index not in self.weights:
            self.weights[index] = weight_statistics(layer, family, shape)
        return LayerCollector(layer, family, shape, self.documents, self.weights[index])

    def _head(self, stream: Stream, progress: Progress) -> list[Upstream]:
        """The gradients of all batches' losses behind the last layer, and the masses of vocabulary rows."""
        above: list[Upstream] = []
        for number in range(len(self.text.batches)):
            above += self._head_of(self.text.batches[number], stream.hidden[number])
            progress()
        return above

    def _head_of(self, batch: Batch, hidden: Tensor) -> Iterator[Upstream]:
        if self.gradient is not None:
            gradient = loss_gradient(self.text, batch, hidden, self.gradient.variant, self.seed, self.mass, self.losses)
            yield Upstream.at_the_head(gradient)
        elif self.mass is not None:
            for first, logits in self.text.logits(batch, hidden):
                self.mass.add(batch, first, torch.softmax(logits, -1))

    def _back(
        self, part: ProfilePart, stream: Stream, before: list[Spool], above: list[Upstream], progress: Progress
    ) -> None:
        """From the last of the layers that `before` has to the first."""
        for index, layer in self.text.layers(progress, last_first=True, until=len(before)):
            gradients = MaskGradients(self.text.shapes[index], self.documents, self.device, squares=True)
            inputs = before.pop()
            with units_observed(layer, self.text.family) as seen:
                for number, batch in enumerate(self.text.batches):
                    taped = Taped.run(stream, layer, index, number, inputs[number], seen)
                    above[number] = above[number].through(taped, batch, gradients)
            self._finish(part, gradients.sums(), gradients.tensors, index)
            self.working.keep(part, index, above, self.text)

    # --- batch by batch ---------------------------------------------------------------------------

    def _batch_by_batch(self, progress: Progress) -> None:
        assert self.gradient is not None
        text, layers = self.text, [layer for _, layer in self.text.layers()]
        collectors = [dict(self._collectors(*each)) for each in enumerate(layers)]
        gradients = [MaskGradients(shape, self.documents, self.device, squares=True) for shape in text.shapes]
        for number, one in enumerate(text.each_batch()):
            stream, batch, tapes = one.start(), one.batches[0], []
            for index, layer in enumerate(layers):
                with units_observed(layer, text.family) as seen:
                    tapes.append(Taped.run(stream, layer, index, 0, stream.hidden[0], seen))
                stream.hidden[0] = tapes[-1].after.detach()
                self.keep(number, index, stream.hidden[0])
                for collector in collectors[index].values():
                    collector.add(batch, tapes[-1].seen, tapes[-1].before.detach(), stream.hidden[0])
            (above,) = self._head_of(batch, stream.hidden[0])
            for index in reversed(range(self.layers)):
                above = above.through(tapes.pop(), batch, gradients[index])
            progress()
        for index in range(self.layers):
            for part, collector in collectors[index].items():
                self._finish(part, collector.sums(), collector.tensors, index)
            self._finish(self.gradient, gradients[index].sums(), gradients[index].tensors, index)
        self._finish_losses()
        if self.mass is not None:
            self._finish(VOCABULARY, self.mass.sums(), self.mass.tensors)

    # --- the end of a layer -----------------------------------------------------------------------

    def _finish_losses(self) -> None:
        if self.gradient is not None:
            self._finish(self.gradient, {"loss": self.losses}, lambda: {"loss": self.losses.cpu()})

    def _finish(self, part: ProfilePart, sums: Statistics, tensors: Callable[..., Statistics], *index: int) -> None:
        """The end of a layer, or of the head: add the sums of the team, and store what follows from them."""
        self.text.together(sums)
        finished = tensors(*index)
        bad = [name for name, tensor in finished.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise CheckpointError(f"{bad[0]}: the {part} pass gave values that are not finite: try base.dtype: float32")
        self.found[part] |= finished
        if not self.keeps_graphs:  # else all layers are finished at once, and the profile follows
            self.working.save(part, finished, *index)


def graph_bytes(text: TextRun) -> int:
    """The memory of the graph of the largest batch in the widest layer: measured by running it once."""
    if not text.batches:  # a member of a team without documents
        return 0
    widest = max(range(len(text.shapes)), key=lambda index: (text.shapes[index].ffn, text.shapes[index].query_heads))
    one = dataclasses.replace(text, batches=[max(text.batches, key=lambda batch: batch.ids.numel())])
    stream = one.start()
    sizes: dict[int, int] = {}
    with one.opened(widest) as layer, units_observed(layer, text.family) as seen:
        weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

        def note(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            taped = Taped.run(stream, layer, widest, 0, stream.hidden[0], seen)
        for tensor in (taped.before, taped.after, *taped.seen.inputs.values()):
            note(tensor)
    return sum(size for pointer, size in sizes.items() if pointer not in weights)
