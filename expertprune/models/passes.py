"""Run text through a decoder one layer at a time.

Every pass over calibration text goes this way: open a layer, run every batch through it, close
it. Between layers, only the hidden states of the batches are held, in a spool. So a model may be
larger than memory: its layers then come from a checkpoint (`models.sources`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertprune.arch import Family
from expertprune.corpora.batches import Batch, check_ids
from expertprune.models.layers import LayerRecorder, decoder_layers, head_only, layers_replaced
from expertprune.models.sources import LayerSource, source_of, trim
from expertprune.models.spool import Spool
from expertprune.models.states import KeptStates
from expertprune.progress import Progress
from expertprune.units import LayerShape

LOGITS = 2**25  # held at a time, of all models together: 128 MiB in float32


def real_tokens(batch: Batch, states: Tensor) -> Tensor:
    """Leave padding out: `[rows, tokens, channels]` to `[real tokens, channels]`."""
    placed, flat = batch.on(states.device), states.flatten(0, 1)
    return flat if placed.whole else flat.index_select(0, placed.real)


def places_at_once(vocabulary: int, models: int = 1) -> int:
    """At how many positions the logits of so many models are held at a time."""
    return max(1, LOGITS // (models * vocabulary))


def alone(sums: dict[str, Tensor]) -> None:
    """The sums of a team of one are complete."""


class Step(NamedTuple):
    """One batch that has just passed a layer; states are `[rows, tokens, hidden]`."""

    number: int
    batch: Batch
    before: Tensor
    after: Tensor

    def real(self, states: Tensor) -> Tensor:
        """The states of real tokens, `[tokens, channels]`."""
        return real_tokens(self.batch, states)


@dataclass
class Stream:
    """The hidden states of every batch before one layer, and the other arguments of every layer.

    `hidden[b]` is `[rows, tokens, hidden]`, on the device of the layers. `arguments[b][l]` are the
    keyword arguments of layer `l` (position embeddings, masks), shared between layers where the
    decoder shares them.
    """

    batches: Sequence[Batch]
    hidden: Spool
    arguments: list[list[dict[str, Any]]]

    def copy(self) -> Stream:
        """Another stream from here. Hidden states are never changed in place, so none is copied."""
        return Stream(self.batches, self.hidden.copy(), self.arguments)

    def run(self, layer: nn.Module, index: int, batch: int, before: Tensor | None = None) -> Tensor:
        """One batch's output of a layer, `[rows, tokens, hidden]`; the stream stays as it is.

        Args:
            before: what goes into the layer; default: the hidden states of the stream.
        """
        output = layer(self.hidden[batch] if before is None else before, **self.arguments[batch][index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def advance(self, layer: nn.Module, index: int) -> Iterator[Step]:
        """Run every batch through the layer at position `index`; the stream then holds its output.

        Yields:
            Each batch as soon as it is through. Where gradients are on, `Step.after` carries its
            graph; the stream holds the states without it.
        """
        for number, batch in enumerate(self.batches):
            before = self.hidden[number]
            after = self.run(layer, index, number, before)
            self.hidden[number] = after.detach()
            yield Step(number, batch, before, after)

    def stay(self) -> Iterator[Step]:
        """Every batch at the place of a layer that is gone: it comes out as it went in."""
        for number, batch in enumerate(self.batches):
            states = self.hidden[number]
            yield Step(number, batch, states, states)

    def move(self, layer: nn.Module, index: int, kept: KeptStates | None = None) -> None:
        """Go behind a layer. It runs only the batches whose states behind it are not kept."""
        for number, batch in enumerate(self.batches):
            states = kept.behind(index, batch) if kept is not None else None
            self.hidden[number] = self.run(layer, index, number) if states is None else states


@dataclass(frozen=True)
class TextRun:
    """A model and the text that runs through it: what every pass needs.

    Attributes:
        shapes: the widths of its layers; leave them empty where only hidden states are wanted.
        batches: those that run here.
        together: every pass calls it at the end of each layer with the layer's sums over documents,
            by name. It adds those of the other members of a team, in place.
        whole: the batches of all members, where there are others.
    """

    model: Any
    family: Family
    shapes: Sequence[LayerShape]
    batches: Sequence[Batch]
    together: Callable[[dict[str, Tensor]], None] = alone
    whole: Sequence[Batch] = ()

    @property
    def source(self) -> LayerSource:
        """Where its layers come from."""
        return source_of(self.model)

    @property
    def device(self) -> torch.device:
        """The device of layers and hidden states."""
        return self.source.device

    @property
    def rows(self) -> int:
        """The number of vocabulary rows."""
        rows: int = self.model.get_parameter(self.family.vocabulary[0]).shape[0]
        return rows

    @property
    def documents(self) -> int:
        """The number of documents, of all members."""
        return 1 + max(document for batch in self.everything for document in batch.documents)

    @property
    def tokens(self) -> int:
        """The number of real tokens, of all members."""
        return sum(batch.tokens for batch in self.everything)

    @property
    def everything(self) -> Sequence[Batch]:
        """The batches of all members of the team, perhaps cut in another way."""
        return self.whole or self.batches

    def over(self, batches: Sequence[Batch]) -> TextRun:
        """The same model over other text."""
        return replace(self, batches=batches, whole=())

    def each_batch(self) -> Iterator[TextRun]:
        """The same model with one batch each."""
        return (replace(self, batches=[batch]) for batch in self.batches)

    def opened(self, index: int, following: int | None = None) -> contextlib.AbstractContextManager[nn.Module]:
        """One decoder layer, ready to run on `device` while open.

        Args:
            following: the layer that is opened next; it may be read ahead.
        """
        return self.source.opened(decoder_layers(self.model, self.family)[index], index, following)

    def layers(
        self, progress: Progress | None = None, last_first: bool = False, skip: int = 0, until: int | None = None
    ) -> Iterator[tuple[int, nn.Module]]:
        """Open each layer in turn; call `progress` when one is closed.

        Args:
            skip: leave out the first so many layers.
            until: leave out this layer and those behind it.
        """
        number = len(decoder_layers(self.model, self.family))
        order = [*range(number)[skip:until]][:: -1 if last_first else 1]
        for index, following in itertools.zip_longest(order, order[1:]):
            with self.opened(index, following) as layer:
                yield index, layer
            if progress is not None:
                progress()

    @torch.no_grad()  # not inference mode: a backward pass may go through what comes out
    def start(self) -> Stream:
        """The stream before the first layer; the decoder itself makes the layers' arguments.

        What earlier passes held and freed is given back to the system first.
        """
        trim()
        check_ids(self.batches, self.rows)
        recorders = [LayerRecorder(layer) for layer in decoder_layers(self.model, self.family)]
        stream, decoder = Stream(self.batches, Spool(self.source.room), []), self.model.get_decoder()
        shared: dict[torch.Size, list[Any]] = {}  # masks take as much memory as states; most batches have one shape
        with layers_replaced(self.model, self.family, recorders):
            for batch in self.batches:
                decoder(input_ids=batch.ids.to(self.device), use_cache=False)
                stream.hidden.append(recorders[0].hidden)
                masks: dict[int, Tensor] = {}
                own: list[Any] = [
                    {name: _one_row(value, masks) for name, value in recorder.arguments.items()}
                    for recorder in recorders
                ]
                known = shared.setdefault(batch.ids.shape, own)
                stream.arguments.append(known if _alike(own, known, {}) else own)
        return stream

    def finish(self, progress: Progress | None = None) -> Stream:
        """The stream behind the last layer."""
        stream = self.start()
        for index, layer in self.layers(progress):
            stream.move(layer, index)
        return stream

    def logits(self, batch: Batch, hidden: Tensor, until: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The model's predictions of one batch, a few positions at a time.

        Logits of a large vocabulary over a whole batch could take more memory than the model.

        Args:
            hidden: the batch's output of the last layer, `[rows, tokens, hidden]`.
            until: stop before this position; default: the end.

        Yields:
            The first of some positions, and their logits, `[rows, positions, vocabulary]`, float32.
        """
        rows, length = batch.ids.shape
        end = length if until is None else until
        step = max(1, places_at_once(self.rows) // rows)
        for first in range(0, end, step):
            yield first, self.head(hidden[:, first : min(first + step, end)])

    def head(self, hidden: Tensor) -> Tensor:
        """Predictions behind some states of the last layer.

        From `[rows, positions, hidden]` to `[rows, positions, vocabulary]`, float32.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # any will do
        with head_only(self.model, self.family, hidden):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()


def _one_row(value: Any, known: dict[int, Tensor]) -> Any:
    """A mask whose rows are all the same, as one row that is seen several times; anything else as it is.

    Args:
        known: what came of tensors before, by their ids: layers share them.
    """
    if not isinstance(value, Tensor) or value.ndim < 4:
        return value
    if id(value) not in known:
        same = value[:1].expand_as(value)
        whole = value.stride(0) == 0 or not torch.equal(value, same)
        known[id(value)] = value if whole else value[:1].clone().expand_as(value)
    return known[id(value)]


def _alike(one: Any, other: Any, known: dict[tuple[int, int], bool]) -> bool:
    """Whether two structures hold the same numbers. `known` keeps what was compared before: layers share tensors."""
    if one is other:
        return True
    pair = id(one), id(other)
    if pair not in known:
        if type(one) is not type(other):
            known[pair] = False
        elif isinstance(one, Tensor):
            known[pair] = one.dtype == other.dtype and torch.equal(one, other)
        elif isinstance(one, dict):
            known[pair] = one.keys() == other.keys() and all(_alike(one[key], other[key], known) for key in one)
        elif isinstance(one, list | tuple):
            known[pair] = len(one) == len(other) and all(_alike(*each, known) for each in zip(one, other, strict=True))
        else:
            known[pair] = isinstance(one, bool | int | float | str) and one == other
    return known[pair]
