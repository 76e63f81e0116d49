"""What a build will take: memory by arithmetic from shapes, time from a few seconds of measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expertprune.engine.memory import (
    Memory,
    Need,
    Sizes,
    TextSize,
    by_rows,
    evaluating,
    fitting,
    gibibytes,
    graphs_are_kept,
    keeping,
    layer_sums,
    peak,
    profiling,
    repairing,
    stripes,
)
from expertprune.engine.rates import Rates, measured_rates
from expertprune.models.base import ResolvedBase
from expertprune.models.running import to_stream
from expertprune.models.spool import SHARE, Limits
from expertprune.models.tensorfile import absent_bytes


@dataclass(frozen=True)
class Work:
    """What is to be done with a base.

    Attributes:
        profiled: text of each corpus that has no profile yet.
        gradient: whether the criterion needs gradients of the loss.
        vocabulary: whether probabilities of tokens are wanted.
        repaired: text of the repair; `None` where there is none.
        evaluated: text that base and expert read.
        together: whether the evaluation's text goes along with the repair's.
        kept: of parameters that layers have, the part that stays.
        rows: of the vocabulary's rows, the part that stays.
        written: bytes of the expert.
        tried: experts that are built at most before this one, for `budget.retention`.
        held_back: text that they are measured on.
    """

    profiled: Mapping[str, TextSize]
    gradient: bool
    vocabulary: bool
    repaired: TextSize | None
    evaluated: TextSize | None
    together: bool
    kept: float
    written: int
    rows: float = 1.0
    tried: int = 0
    held_back: TextSize | None = None

    @property
    def texts(self) -> list[TextSize]:
        """All texts that are read."""
        others = (self.repaired, self.evaluated, self.held_back)
        return [*self.profiled.values(), *(text for text in others if text is not None)]


@dataclass(frozen=True)
class Stage:
    """One stage: its name, the tokens that it runs, padding included, its time in seconds, and its peaks."""

    name: str
    tokens: int
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Forecast:
    """What a build will take.

    Attributes:
        streamed: whether layers are streamed.
        written: bytes of the expert, or of the largest of several.
        fetched: bytes of the base's weights that are still to come.
        stored: bytes of profiles, and of repaired weights until they are written.
    """

    streamed: bool
    stages: tuple[Stage, ...]
    written: int
    fetched: int
    stored: int

    @property
    def disk(self) -> int:
        """Bytes of all files but the spool."""
        return self.written + self.fetched + self.stored

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> Memory:
        return peak(stage.memory for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """Plain data, in bytes and seconds."""
        return {
            "layers": "streamed" if self.streamed else "resident",
            "seconds": round(self.seconds, 1),
            "memory": asdict(self.memory),
            "disk": self.disk,
            "stages": [
                {"name": each.name, "tokens": each.tokens, "seconds": round(each.seconds, 1), **asdict(each.memory)}
                for each in self.stages
            ],
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        total = self.memory
        device = [f"{gibibytes(total.device)} on the device"] if total.device else []
        spool = [f"{gibibytes(total.spool)} of spool"] if total.spool else []
        room = ", ".join([*device, f"{gibibytes(total.host)} of memory", *spool, f"{gibibytes(self.disk)} of disk"])
        yield f"{duration(self.seconds)}; {room}; layers {'streamed' if self.streamed else 'resident'}"
        for each in self.stages:
            room = gibibytes(each.memory.device or each.memory.host)
            tokens = f"{each.tokens:,} tokens with padding, " if each.tokens else ""
            yield f"{each.name}: {tokens}{duration(each.seconds)}, {room}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Forecaster:
    """Forecasts work with one base on this machine.

    Raises:
        CheckpointError: the work does not fit into memory, and the message says with which setting it would.
    """

    def __init__(self, base: ResolvedBase, sizes: Sizes, work: Work, limits: Limits, rates: Rates) -> None:
        self.base, self.sizes, self.work, self.limits, self.rates = base, sizes, work, limits, rates
        self.streamed = to_stream(base.checkpoint, base, limits)
        self.weights = sizes.weights(self.streamed)

    @classmethod
    def measured(cls, base: ResolvedBase, sizes: Sizes, work: Work, limits: Limits, scratch: Path) -> Forecaster:
        """With rates that are measured now, unless shapes alone say that it does not fit."""
        cls(base, sizes, work, limits, Rates.of_shapes(base)).forecast()
        largest = max(work.texts, key=lambda text: text.batch, default=TextSize(1, 1, 1, 1, 1))
        return cls(base, sizes, work, limits, measured_rates(base, largest.batch, largest.width, scratch))

    def forecast(self) -> Forecast:
        """The forecast; see the class for what it refuses."""
        return self.of_experts({"": (self.sizes, self.work)})

    def of_experts(self, experts: Mapping[str, tuple[Sizes, Work]]) -> Forecast:
        """The forecast of several experts of the base, by name. What is profiled is this one's work, and done once."""
        pending, folder = self.base.checkpoint.pending, self.base.checkpoint.folder
        fetched = absent_bytes(folder, pending.tensors) if pending is not None else 0
        stages, kept, stored = self._profiles()
        written = solved = 0
        for name, (sizes, work) in experts.items():
            one = Forecaster(self.base, sizes, work, self.limits, self.rates)
            stages += [
                replace(stage, name=f"{name}: {stage.name}" if name else stage.name) for stage in one._expert(kept)
            ]
            written, solved = max(written, work.written), max(solved, sizes.solved if work.repaired is not None else 0)
        return Forecast(self.streamed, tuple(stages), written, fetched, stored + solved)

    def _profiles(self) -> tuple[list[Stage], int, int]:
        """The stages of profiles; bytes of states that they leave for repairs, and of what they store."""
        work, kept, stored = self.work, 0, 0
        stages = []
        for name, text in work.profiled.items():
            keeps = self._keeps_graphs(text)
            need = profiling(self.sizes, text, self.rates.graph, work.gradient, keeps, work.vocabulary)
            stored += need.host
            own = self._kept_states(text, kept)
            kept += own
            shared = own if work.gradient and not keeps else 0  # with the states before each layer
            need = self._beside(need, kept - shared)
            stages.append(self._stage(f"profile {name}", text.tokens, self._profile_seconds(name, text, keeps), need))
        return stages, kept, stored

    def _expert(self, kept: int) -> Iterator[Stage]:
        """The stages of an expert whose corpora are profiled; `kept` are bytes of states that profiles have left."""
        work, graph = self.work, self.rates.graph
        if work.tried and work.held_back is not None:
            yield self._tried(work.tried, work.held_back, kept)
        along = work.evaluated.tokens if work.evaluated is not None and work.together else 0
        if work.repaired is not None:
            need = self._beside(repairing(self.sizes, work.repaired, graph, along), kept)
            seconds = self._repair_seconds(work.repaired, along, kept)
            yield self._stage("repair", work.repaired.tokens + along, seconds, need)
        yield self._stage("write", 0, self._write_seconds(), Need(4 * self.sizes.tensor))
        if work.evaluated is not None:
            need = evaluating(self.sizes, work.evaluated, graph)
            seconds, tokens = self._evaluation_seconds(work.evaluated), work.evaluated.tokens
            yield self._stage("evaluate", tokens, seconds, need, "set evaluate.enabled: false, and evaluate elsewhere")

    def _tried(self, number: int, text: TextSize, kept: int) -> Stage:
        """Experts that are built and measured on held-back text, to find the one that holds a floor."""
        need, tokens, seconds = evaluating(self.sizes, text, self.rates.graph), text.tokens, self._write_seconds()
        if self.work.repaired is not None:
            need |= self._beside(repairing(self.sizes, self.work.repaired, self.rates.graph, text.tokens), kept)
            tokens += self.work.repaired.tokens
            seconds += self._repair_seconds(self.work.repaired, text.tokens, kept)
        seconds += self._reading_seconds(text, along=self.work.repaired is not None)
        return self._stage(f"retention, {number} experts at most", number * tokens, number * seconds, need)

    def _stage(self, name: str, tokens: int, seconds: float, need: Need, *remedy: str) -> Stage:
        in_files = self.sizes.in_files(self.streamed)
        return Stage(
            name, tokens, seconds, fitting(name, need, self.weights, self.base, self.limits, in_files, *remedy)
        )

    def _keeps_graphs(self, text: TextSize) -> bool:
        """Whether a batch's graph in all layers is kept, as the traversal decides."""
        if not self.work.gradient or self.streamed:
            return False
        graphs = int(self.sizes.layers * self.rates.graph * text.batch)
        sums = self.sizes.layers * layer_sums(text.documents, self.sizes.widest)
        return graphs_are_kept(graphs, sums, self.limits.free(self.base.device) - self.weights)

    def _kept_states(self, text: TextSize, before: int) -> int:
        """Bytes that the profile of a text leaves for the repair, behind those that have left so many bytes."""
        if self.work.repaired is None:
            return 0
        return keeping(self.sizes, text, self.work.repaired, self.work.gradient, self._room - before)

    def _beside(self, need: Need, kept: int) -> Need:
        """What a stage needs while so many bytes are kept for the repair, which give way where both do not fit."""
        return replace(need, states=max(need.states, min(need.states + kept, self._room)))

    @property
    def _room(self) -> int:
        """Bytes of hidden states that memory takes beside the weights."""
        return int(SHARE * (self.limits.free(self.base.device) - self.weights))

    # --- seconds ----------------------------------------------------------------------------------------------------

    def _pass(self, seconds: float) -> float:
        """A way through all layers, which are read meanwhile if they are streamed."""
        if not self.streamed:
            return seconds
        return max(
            seconds,
            (self.sizes.stored * self.sizes.layer * self.sizes.layers / self.sizes.parameters) / self.rates.read,
        )

    def _loading(self) -> float:
        """Weights that are read before the first pass."""
        part = self.sizes.skeleton / self.sizes.parameters if self.streamed else 1.0
        return part * self.sizes.stored / self.rates.read

    def _profile_seconds(self, name: str, text: TextSize, keeps_graphs: bool) -> float:
        layers, rates = text.tokens * self.sizes.layers, self.rates
        is_first = name == next(iter(self.work.profiled))
        first = self._statistics_seconds(text, weights=is_first) + (self._loading() if is_first else 0.0)
        values = text.tokens * self.sizes.vocabulary
        if not self.work.gradient:
            return first + self._pass(layers * rates.forward) + (values * rates.head if self.work.vocabulary else 0.0)
        if keeps_graphs:
            return first + layers * (rates.both + rates.graph * rates.fresh) + values * rates.head_both
        return first + self._pass(layers * rates.forward) + self._pass(layers * rates.both) + values * rates.head_both

    def _statistics_seconds(self, text: TextSize, weights: bool) -> float:
        """Sums over a text: of each channel, and what each attention head and group writes, by its Gram matrix.

        Args:
            weights: those of the weights too.
        """
        sizes, shape, rates = self.sizes, self.sizes.widest, self.rates
        channels = shape.ffn + shape.query_heads * shape.head_dim + shape.hidden
        products = 2 * shape.query_heads * shape.head_dim**2 * (1 + shape.heads_per_group)
        once = (sizes.parameters - sizes.skeleton) * rates.norms if weights else 0.0
        return text.tokens * sizes.layers * (products / rates.products + 2 * channels * rates.norms) + once

    def _repair_seconds(self, text: TextSize, along: int, kept_states: int) -> float:
        sizes, rates = self.sizes, self.rates
        watched = sizes.cut[1] or sizes.normed  # the base's layers run for more than their output
        known = 0 if watched else min(text.tokens, kept_states // (sizes.layers * sizes.states(1)))
        layers = ((text.tokens + along) * (1 + self.work.kept) - known) * sizes.layers * rates.forward
        solved = 0.0
        for kept, cut in zip(sizes.kept, sizes.cut, strict=True):
            if not cut:
                continue
            if by_rows(text.tokens, kept):
                products = 2 * text.tokens * (kept + sizes.hidden) + text.tokens**2 / 3 + 2 * kept * sizes.hidden
                solved += text.tokens * products / rates.factors
            else:
                gram = sum((rows.stop - rows.start) * (kept - rows.start) for rows in stripes(kept))
                moments = 2 * text.tokens * (gram + kept * sizes.hidden)
                solved += moments / rates.products + (kept**3 / 3 + 2 * kept**2 * sizes.hidden) / rates.factors
        if sizes.routed is not None and sizes.routed.repaired:
            products, equations = sizes.routed.operations(text.tokens)
            solved += products / rates.products + equations / rates.factors
        return self._pass(layers + sizes.layers * solved) + (0.0 if self.work.profiled else self._loading())

    def _write_seconds(self) -> float:
        return self.sizes.stored / self.rates.read + self.work.written / self.rates.written

    def _evaluation_seconds(self, text: TextSize) -> float:
        return self._reading_seconds(text, along=self.work.together and self.work.repaired is not None)

    def _reading_seconds(self, text: TextSize, along: bool) -> float:
        """What base and expert make of a text, and their layers too unless it went along with the repair."""
        head = (1 + self.work.rows) * text.predicted * self.sizes.vocabulary * self.rates.head
        if along:
            return head
        return head + 2 * self._pass(text.tokens * self.sizes.layers * self.rates.forward * (1 + self.work.kept) / 2)
