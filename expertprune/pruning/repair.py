"""Closed-form repair: solve for the kept columns of output projections, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expertprune.corpora.batches import Batch
from expertprune.models.passes import Stream, TextRun
from expertprune.models.states import KeptStates
from expertprune.progress import Progress
from expertprune.pruning.layer_repair import LayerRepair
from expertprune.pruning.slicing import pruned_layer
from expertprune.pruning.unfinished import Unfinished
from expertprune.registry import Registry
from expertprune.spec.schema import Compensation
from expertprune.units import KeptUnits

Weights = Iterator[tuple[str, Tensor]]


@dataclass
class Passengers:
    """Text that goes along through both models of a repair, and weighs nothing in it.

    Attributes:
        batches: what is to be measured.
        base: its stream through the base. Give it where it is known; else the repair runs it.
        expert: its stream through the layers as they are written. `None` unless the repair takes
            passengers, and until it is done.
    """

    batches: Sequence[Batch]
    base: Stream | None = None
    expert: Stream | None = None


@dataclass(frozen=True)
class RepairJob:
    """What a repair works on.

    Attributes:
        text: the running base with calibration text.
        kept: the units that each layer keeps.
        settings: the spec's `compensation`.
        stored: the dtypes that weights are written in, by full name. The layers behind a repaired
            one must see it as it is written.
        passengers: text that is measured meanwhile.
        unfinished: where to keep what is finished, so that a killed repair goes on from there.
        states: what is known of the base's hidden states. The repair releases them layer by layer.
    """

    text: TextRun
    kept: Sequence[KeptUnits]
    settings: Compensation
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    passengers: Passengers | None = None
    unfinished: Unfinished | None = None
    states: KeptStates | None = None


Method = Callable[[RepairJob, Progress | None], Weights]


@dataclass(frozen=True)
class Repair:
    """A named way to change the weights of a pruned model in closed form.

    Attributes:
        name: what a spec calls it.
        weights: its arguments are the job and a function to call after each layer. It yields full
            names of weights and their new values, in the pruned widths and the model's dtype. It
            may ignore the job's passengers, states and what is unfinished.
        runs_model: if off, `weights` is never called and no model is loaded for it.
    """

    name: str
    weights: Method
    runs_model: bool = True


repairs: Registry[Repair] = Registry("repair", group="expertprune.repairs")


def repair(name: str, runs_model: bool = True) -> Callable[[Method], Method]:
    """Register a function as the repair `name` (see `Repair`)."""

    def add(function: Method) -> Method:
        repairs.register(name, function.__module__)(Repair(name, function, runs_model))
        return function

    return add


def check_repair(name: str) -> Repair:
    """The repair of a name; raises `SpecError` with the nearest one."""
    return repairs.named(name, "compensation.method")


@repair("none", runs_model=False)
def none(job: RepairJob, progress: Progress | None = None) -> Weights:
    """Leave the kept columns as they are."""
    return iter(())


@repair("least_squares")
@torch.no_grad()
def by_least_squares(job: RepairJob, progress: Progress | None = None) -> Weights:
    """Solve every output projection that lost inputs again, layer by layer.

    Two streams run through the model: the base's, and the expert's. The target of a projection is
    the base's residual stream behind its block, so it also makes up for what earlier layers lost.
    Where whole layers go, the FFN before them aims at the stream behind them. A layer of the base
    need not run where its output is known and nothing else of it is needed.

    Raises:
        CheckpointError: the ridge is too small for these inputs.
    """
    text, kept = job.text, job.kept
    dense = text.start()
    expert = dense.copy()
    streams = {"dense": dense, "expert": expert, **_passenger_streams(job)}
    done = job.unfinished.restore(streams) if job.unfinished is not None else 0
    if progress is not None:
        for _ in range(done):
            progress()
    for index, layer in text.layers(progress, skip=done):
        next_goes = index + 1 < len(kept) and kept[index + 1].gone
        if kept[index].gone:
            dense.move(layer, index, job.states)
        else:
            small = pruned_layer(layer, text.family, index, text.shapes[index], kept[index], text.model.config)
            repaired = LayerRepair(
                text.family,
                index,
                layer,
                small,
                text.shapes[index],
                kept[index],
                job.stored,
                text.together,
                job.states,
                next_goes,
            )
            seen = repaired.run_dense(dense)
        _run_through(streams.get("passengers in the base"), layer, index)
        if job.states is not None:
            job.states.release(index)
        if next_goes:  # what the last layer that stays aims at lies behind the next one
            continue
        yield from repaired.weights(seen, dense, expert, job.settings.ridge)
        _run_through(streams.get("passengers"), small, repaired.index)
        del small, repaired, seen  # before the next layer is opened
        if job.unfinished is not None:
            job.unfinished.save(index + 1, streams)


def _passenger_streams(job: RepairJob) -> dict[str, Stream]:
    """The streams of the job's passengers, which find them in the job when the repair is done."""
    aboard = job.passengers
    if aboard is None:
        return {}
    start = job.text.over(aboard.batches).start()
    streams = {}
    if aboard.base is None:
        aboard.base = streams["passengers in the base"] = start.copy()
    aboard.expert = streams["passengers"] = start
    return streams


def _run_through(stream: Stream | None, layer: nn.Module, index: int) -> None:
    if stream is not None:
        stream.move(layer, index)
