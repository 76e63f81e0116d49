"""Run a model over the evaluation's text, and count the bits that it needs for each token.

A model reads every sequence layer by layer (`models.passes`). Its output head then predicts the
tokens that count, a few at a time, so neither a whole model nor a whole distribution is held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Batch, Tokens, make_batches
from expertprune.evaluation.arrays import Floats
from expertprune.models.passes import Step, Stream, TextRun, places_at_once
from expertprune.progress import Progress

TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Reading:
    """Sequences in batches, whose `documents` are numbers of sequences.

    A model is asked for the tokens of each that the loss counts on. Sequences without any are in no
    batch. In a team, `batches` are those of this member; `sequences` are always all.
    """

    sequences: tuple[Tokens, ...]
    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, sequences: Sequence[Tokens]) -> Reading:
        return cls(tuple(sequences), tuple(make_batches(sequences, TOKENS_PER_BATCH)))

    @classmethod
    def joined(cls, readings: Sequence[Reading]) -> Reading:
        """One after the other. Each keeps its batches, so its numbers do not depend on the others."""
        sequences: list[Tokens] = []
        batches: list[Batch] = []
        for reading in readings:
            first = len(sequences)
            batches += [
                replace(batch, documents=tuple(first + number for number in batch.documents))
                for batch in reading.batches
            ]
            sequences += reading.sequences
        return cls(tuple(sequences), tuple(batches))

    @property
    def tokens(self) -> Floats:
        """How many tokens each sequence asks for, `[sequences]`."""
        return np.array([each.predicted for each in self.sequences], dtype=np.float64)

    @property
    def sizes(self) -> Floats:
        """Bytes of what each sequence asks for, `[sequences]`."""
        return np.array([each.size for each in self.sequences], dtype=np.float64)


class Read(NamedTuple):
    """A model behind its last layer: what it made of every batch of a reading."""

    model: TextRun
    stream: Stream

    def logits(self, number: int, places: Places) -> Tensor:
        """Predictions at some places of a batch, `[places, vocabulary]`, float32."""
        return self.model.head(self.stream.hidden[number][places.rows, places.columns][:, None])[:, 0]


class Places(NamedTuple):
    """Where tokens of a batch are predicted, `[places]` each.

    `columns` are the positions before the tokens, `targets` the tokens, and `sequences` the
    sequences that they belong to.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor
    sequences: Tensor


def _places(batch: Batch, device: torch.device, at_once: int) -> Iterator[Places]:
    """All places of a batch that count, a few at a time."""
    rows, columns = batch.targets.nonzero(as_tuple=True)
    values = (rows, columns, batch.ids[rows, columns + 1], torch.tensor(batch.documents)[rows])
    for chunk in zip(*(each.split(at_once) for each in values), strict=True):
        yield Places(*(each.to(device) for each in chunk))


# --- reading ----------------------------------------------------------------------------------------------------------

# Gets a layer's number and the same batch of both models, behind that layer.
StepWatcher = Callable[[int, Step, Step], None]


@torch.no_grad()
def read(reading: Reading, model: TextRun, progress: Progress | None = None) -> Read:
    """Let one model read; `progress` is called after each layer."""
    return Read(model, replace(model, batches=reading.batches).finish(progress))


@torch.no_grad()
def read_together(
    reading: Reading,
    base: TextRun,
    expert: TextRun,
    watch: StepWatcher,
    progress: Progress | None = None,
    gone: Collection[int] = (),
) -> tuple[Read, Read]:
    """Let two models read in step, for whoever watches their layers side by side.

    Args:
        gone: the base's layers that the expert has not. Its hidden states pass their places unchanged.
    """
    runs = [replace(model, batches=reading.batches) for model in (base, expert)]
    mine, theirs = (run.start() for run in runs)
    layers = zip(runs[0].layers(progress), _with_gaps(runs[1].layers(progress), gone), strict=True)
    for (index, layer), own in layers:
        steps = theirs.stay() if own is None else theirs.advance(own[1], own[0])
        for ours, others in zip(mine.advance(layer, index), steps, strict=True):
            watch(index, ours, others)
    return Read(base, mine), Read(expert, theirs)


def _with_gaps(
    layers: Iterator[tuple[int, nn.Module]], gone: Collection[int]
) -> Iterator[tuple[int, nn.Module] | None]:
    """An expert's layers, and `None` in place of each layer of the base that is gone."""
    places = itertools.count()
    for layer in layers:
        while next(places) in gone:
            yield None
        yield layer
    while next(places) in gone:
        yield None


# --- what it cost -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Sums over what each sequence asks for, `[sequences]` each.

    `base` and `expert` are bits, `kl` is `KL(base ‖ expert)` in bits, and `agreed` counts the
    tokens of which both think the same one likeliest.
    """

    base: Floats
    expert: Floats
    kl: Floats
    agreed: Floats


@torch.no_grad()
def bits(reading: Reading, read: Read, progress: Progress | None = None) -> Floats:
    """Bits that one model needs for what each sequence asks for, `[sequences]`.

    Args:
        progress: called after each batch.
    """
    device, at_once = read.model.device, places_at_once(read.model.rows)
    sums = torch.zeros(len(reading.sequences), dtype=torch.float64, device=device)
    for number, batch in enumerate(reading.batches):
        for places in _places(batch, device, at_once):
            nats = torch.nn.functional.cross_entropy(read.logits(number, places), places.targets, reduction="none")
            sums.index_add_(0, places.sequences, nats.double())
        if progress is not None:
            progress()
    read.model.together({"bits": sums})
    found: Floats = sums.cpu().numpy() / math.log(2)
    return found


@torch.no_grad()
def compare(reading: Reading, base: Read, expert: Read, progress: Progress | None = None) -> Compared:
    """Two models with the same tokens on what each sequence asks for; `progress` as in `bits`."""
    device, at_once = base.model.device, places_at_once(base.model.rows, models=2)
    sums = torch.zeros(4, len(reading.sequences), dtype=torch.float64, device=device)
    for number, batch in enumerate(reading.batches):
        for places in _places(batch, device, at_once):
            p, q = (torch.log_softmax(each.logits(number, places), -1) for each in (base, expert))
            target = places.targets[:, None]
            found = (
                -p.gather(1, target)[:, 0],
                -q.gather(1, target)[:, 0],
                (p.exp() * (p - q)).sum(-1),
                p.argmax(-1) == q.argmax(-1),
            )
            for row, values in zip(sums, found, strict=True):
                row.index_add_(0, places.sequences, values.double())
        if progress is not None:
            progress()
    base.model.together({"compared": sums})
    mine, theirs, distance, agreed = sums.cpu().numpy()
    return Compared(mine / math.log(2), theirs / math.log(2), distance / math.log(2), agreed)
