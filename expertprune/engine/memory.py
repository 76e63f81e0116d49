"""How much memory each stage takes, by arithmetic from shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from expertprune.corpora.batches import Batch
from expertprune.engine.routed import RoutedSizes
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.passes import places_at_once
from expertprune.models.running import to_stream
from expertprune.models.sources import trim
from expertprune.models.spool import SHARE, Limits
from expertprune.models.tensorfile import DTYPES
from expertprune.units import LayerShape

_PROCESS = 500 * 2**20  # of an interpreter with torch and transformers, before it loads a model


def process_bytes() -> int:
    """What this process takes now, tokenizer and corpora included; before it loads a model."""
    trim()
    used = psutil.Process().memory_info()
    return max(_PROCESS, used.rss - getattr(used, "shared", 0))


BLOCK = 2**24  # values of a weight that are in float32 at a time while its norms are taken, and their squares


_COPIES = 5  # of the logits that are held at a time: scores, probabilities, gradients, and what is in between


_COMPARED = 6  # the same, of each of base and expert, where they are compared


@dataclass(frozen=True)
class TextSize:
    """The size of some text. Padding counts: it is computed like the rest.

    Attributes:
        tokens: of all batches.
        batch: of the largest batch.
        width: of the longest document.
        predicted: tokens on which the loss counts, such as those of answers.
    """

    tokens: int
    batch: int
    width: int
    documents: int
    predicted: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> TextSize:
        return cls(
            sum(batch.ids.numel() for batch in batches),
            max((batch.ids.numel() for batch in batches), default=0),
            max((batch.ids.shape[1] for batch in batches), default=0),
            sum(len(batch.documents) for batch in batches),
            sum(int(batch.targets.sum()) for batch in batches),
        )


@dataclass(frozen=True)
class Sizes:
    """What of a base decides how much memory it takes; parameters are counted as they run.

    Attributes:
        value: bytes of a value in the run's dtype.
        routed: the routed experts that layers keep, if there are some.
        widest: the shape of the widest layer.
        stored: bytes of all weights as they are stored.
        parameters: of all; `layer`: of the largest decoder layer; `skeleton`: of all but the layers.
        tensor: of the largest tensor of a layer, in values.
        kept: the widths of projections' inputs in the expert, `ffn` and `heads`; the base's where they are not known yet.
        cut: whether inputs of the FFN's output projection go, and of the attention's.
        mapped: whether weights run as they are stored, on the CPU. Those that are not put together from several stored
            tensors then stay in the memory of their files, which the system takes back when it needs it.
    """

    value: int
    stored: int
    parameters: int
    layer: int
    skeleton: int
    tensor: int
    layers: int
    hidden: int
    vocabulary: int
    neurons: int
    routed: RoutedSizes | None
    widest: LayerShape
    heads: int
    kept: tuple[int, int]
    cut: tuple[bool, bool]
    normed: bool
    mapped: bool

    @classmethod
    def of(
        cls,
        base: ResolvedBase,
        kept: tuple[int, int] | None = None,
        cut: tuple[bool, bool] = (True, True),
        experts: int | None = None,
    ) -> Sizes:
        """Of a base. `kept` and `cut` are as in the attributes; of routed experts, so many stay of a layer.

        Where there are routed experts, `ffn` in `kept` and `cut` is of each.
        """
        tensors, prefix = base.checkpoint.tensors, f"{base.family.layers}."
        by_layer: dict[str, int] = {}
        for name, info in tensors.items():
            if name.startswith(prefix):
                layer = name.removeprefix(prefix).partition(".")[0]
                by_layer[layer] = by_layer.get(layer, 0) + info.parameters
        widest = max(base.layers, key=lambda shape: (shape.neurons, shape.query_heads * shape.head_dim))
        whole = (0 if base.family.experts else widest.ffn, widest.query_heads * widest.head_dim)
        within = [info.parameters for name, info in tensors.items() if name.startswith(prefix)]
        together = widest.neurons * widest.hidden * 2 if base.family.experts else 0  # gate and up of all routed experts
        routed = None
        if base.family.experts is not None:
            routed = RoutedSizes(
                experts=experts or widest.experts,
                ffn=widest.ffn if kept is None else kept[0],
                hidden=widest.hidden,
                chosen=max(1, base.family.experts_per_token(base.checkpoint.config)),
                repaired=cut[0],
            )
        return cls(
            value=base.dtype.itemsize,
            stored=sum(info.parameters * DTYPES[info.dtype].itemsize for info in tensors.values()),
            parameters=base.checkpoint.parameters,
            layer=max(by_layer.values()),
            skeleton=base.checkpoint.parameters - sum(by_layer.values()),
            tensor=max([together, *within]),
            layers=len(base.layers),
            hidden=widest.hidden,
            vocabulary=tensors[base.family.vocabulary[0]].shape[0],
            neurons=widest.neurons,
            routed=routed,
            widest=widest,
            heads=whole[1],
            kept=whole if kept is None else kept,
            cut=(cut[0] and base.family.has_ffn, cut[1]),
            normed=base.family.residual == "normed",
            mapped=base.device.type == "cpu" and _stored_as_it_runs(base),
        )

    def weights(self, streamed: bool) -> int:
        """Bytes of weights that are held: all, or the skeleton, the layer that runs and the one that is read."""
        return self.value * (self.skeleton + 2 * self.layer if streamed else self.parameters)

    def in_files(self, streamed: bool) -> int:
        """Those of `weights` that stay in the memory of mapped files."""
        if not self.mapped:
            return 0
        return self.value * (self.skeleton if streamed or self.routed else self.parameters)

    def states(self, tokens: int) -> int:
        """Bytes of hidden states."""
        return self.value * tokens * self.hidden

    def logits(self, batch: int, copies: int = _COPIES, models: int = 1) -> int:
        """Bytes while logits are held, a few positions at a time."""
        return 4 * copies * self.vocabulary * min(batch, places_at_once(self.vocabulary, models))

    @property
    def solved(self) -> int:
        """Bytes of the weights that a repair solves for, which wait on the disk until they are written."""
        each = sum(width for width, cut in zip(self.kept, self.cut, strict=True) if cut)
        if self.routed is not None and self.routed.repaired:
            each += self.routed.experts * self.routed.ffn
        return self.value * self.layers * self.hidden * each


@dataclass(frozen=True)
class Need:
    """What a stage holds beside the weights, in bytes.

    Attributes:
        work: at once, on the device.
        states: hidden states between layers; what memory has no room for goes to the spool.
        host: statistics in host memory until they are stored.
    """

    work: int = 0
    states: int = 0
    host: int = 0

    def __or__(self, other: Need) -> Need:
        """Whichever is more, of each."""
        return Need(max(self.work, other.work), max(self.states, other.states), max(self.host, other.host))


def profiling(
    sizes: Sizes, text: TextSize, graph: float, gradient: bool, keeps_graphs: bool, row_masses: bool = False
) -> Need:
    """A corpus' profile.

    A pass with gradients keeps the hidden states before every layer and the gradients behind one. Where it keeps the
    graphs of a batch in all layers, it needs no states, and holds the sums of all layers, and the logits beside them.

    Args:
        graph: bytes of one token's graph in one layer.
        row_masses: whether predictions are wanted without gradients too, for the rows of the vocabulary.
    """
    measured = layer_sums(text.documents, sizes.widest)
    # norms of weights, and Gram matrices of the attention's output
    moments = max(8 * min(BLOCK, sizes.tensor), 8 * sizes.hidden * sizes.heads)
    one = int(graph * text.batch)
    stored = 2 * 2 * text.documents * sizes.layers * (3 * sizes.neurons + sizes.heads)  # twice: when they are written
    if not gradient:
        logits = sizes.logits(text.batch) if row_masses else 0
        return Need(max(one, moments, logits) + measured, sizes.states(text.tokens), stored)
    at_once, logits = sizes.layers if keeps_graphs else 1, sizes.logits(text.batch)
    work = max(at_once * one + logits if keeps_graphs else max(one, logits), moments) + at_once * measured
    held = text.batch if keeps_graphs else (sizes.layers + 1) * text.tokens
    return Need(work, sizes.states(held), stored)


def layer_sums(documents: int, shape: LayerShape) -> int:
    """Bytes of a layer's sums while it is profiled.

    Of each document, every neuron has a square, a gradient and that one's square, and every channel of a head a square;
    units of attention have a few more. Output projections of attention have Gram matrices of groups and of heads.
    """
    heads = shape.query_heads * shape.head_dim
    grams = heads * (shape.heads_per_group + 1) * shape.head_dim
    return 4 * (documents * (3 * shape.neurons + 2 * heads) + grams)


def graphs_are_kept(graphs: int, sums: int, free: int) -> bool:
    """Whether a pass with gradients keeps a batch's graphs of all layers.

    Args:
        graphs: bytes of those.
        sums: bytes of the sums of all layers (see `layer_sums`).
        free: bytes that the device has free beside the model.
    """
    return graphs + sums <= SHARE * free


def by_rows(tokens: int, inputs: int) -> bool:
    """Whether a repair solves one equation for each token, and not one for each input of a projection.

    With fewer tokens than half the inputs, that takes less memory and less time.
    """
    return 2 * tokens < inputs


def stripes(width: int) -> Iterator[slice]:
    """At most eight ranges of rows of a symmetric matrix. To compute each from its diagonal on takes little over half."""
    step = max(128, math.ceil(width / 8))
    return (slice(first, min(first + step, width)) for first in range(0, width, step))


def repairing(sizes: Sizes, text: TextSize, graph: float, passengers: int = 0) -> Need:
    """A repair by least squares, with `passengers` tokens that are measured meanwhile.

    Two streams run. Where inputs of a projection go, what goes into it is kept, and what it aims at. The solution holds
    the gram matrix in float64, and the one in float32 while that is made; or the tokens' rows (see `by_rows`), those
    over the ridge, and their products. Routed experts have equations of their own (see `RoutedSizes.work`).
    """
    rows = [sizes.hidden, sizes.hidden]
    solved = 0
    for kept, cut, middle in zip(sizes.kept, sizes.cut, (0, sizes.hidden), strict=True):
        if cut:
            rows += [kept, middle] + ([sizes.hidden] if sizes.normed else [])
            if by_rows(text.tokens, kept):
                own = text.tokens * (20 * kept + 28 * sizes.hidden + 16 * text.tokens) + 12 * kept * sizes.hidden
            else:
                own = 12 * kept * kept + 20 * kept * sizes.hidden
            solved = max(solved, own)
    if sizes.routed is not None and sizes.routed.repaired:
        solved = max(solved, sizes.routed.work(text.tokens, sizes.value))
    small = sizes.value * sizes.layer
    states = sizes.value * (text.tokens * sum(rows) + 2 * passengers * sizes.hidden)
    return Need(max(solved, int(graph * text.batch)) + small, states)


def keeping(sizes: Sizes, profiled: TextSize, repaired: TextSize, gradient: bool, left: int) -> int:
    """Bytes of the hidden states that the profile of a corpus leaves for the repair; 0 where memory has no room.

    Args:
        profiled, repaired: text of the corpus, and of the repair.
        left: what memory still takes of hidden states. The passes come first.
    """
    own = sizes.layers * sizes.states(profiled.tokens)
    needed = profiling(sizes, profiled, 0.0, gradient, False) | repairing(sizes, repaired, 0.0)
    return own if own + needed.states <= left else 0


def evaluating(sizes: Sizes, text: TextSize, graph: float) -> Need:
    """Base and expert read the same text in step, and predict its tokens."""
    work = max(int(graph * text.batch), sizes.logits(text.batch, _COMPARED, models=2))
    return Need(work, 2 * sizes.states(text.tokens))


@dataclass(frozen=True)
class Memory:
    """Peaks of a stage, in bytes. On a CPU, `device` and `host` are the same memory, and `device` is 0."""

    device: int
    host: int
    spool: int

    @classmethod
    def of(cls, need: Need, weights: int, device: torch.device, limits: Limits, in_files: int = 0) -> Memory:
        """What a stage takes, given what is free: states stay in memory up to a share of what weights leave.

        Args:
            in_files: bytes of the weights that stay in the memory of mapped files.
        """
        on_gpu = device.type == "cuda"
        left = max(0, int(SHARE * (limits.free(device) - weights)))
        near = min(need.states, left)
        rest = need.states - near
        if not on_gpu:
            return cls(0, process_bytes() + weights - in_files + need.work + near + need.host, rest)
        pinned = min(rest, int(SHARE * limits.free(torch.device("cpu"))))
        return cls(weights + need.work + near, process_bytes() + need.host + pinned, rest - pinned)


def fitting(
    name: str,
    need: Need,
    weights: int,
    base: ResolvedBase,
    limits: Limits,
    in_files: int = 0,
    remedy: str = "lower calibration.tokens_per_batch",
) -> Memory:
    """What a stage takes; `in_files` is as in `Memory.of`, `remedy` what helps where one batch is too much.

    Raises:
        CheckpointError: it does not fit; the message says with which setting it would.
    """
    free, streamed = limits.free(base.device), to_stream(base.checkpoint, base, limits)
    where = "the device" if base.device.type == "cuda" else "memory"
    if weights > free and not streamed:
        raise CheckpointError(
            f"base.layers: the weights take {gibibytes(weights)}, and {where} has {gibibytes(free)} free; set base.layers: "
            "streamed, which holds one layer at a time"
        )
    if weights + need.work > free:
        other = "" if streamed else "set base.layers: streamed, or "
        raise CheckpointError(
            f"{name}: needs {gibibytes(weights + need.work)}, {gibibytes(need.work)} of it for one batch and for sums, and "
            f"{where} has {gibibytes(free)} free; {other}{remedy}"
        )
    memory = Memory.of(need, weights, base.device, limits, in_files)
    if memory.spool and limits.spool is None:
        raise CheckpointError(
            f"{name}: hidden states between layers take {gibibytes(need.states)}, {gibibytes(memory.spool)} more than there "
            "is room for; name a folder for them with --spool FOLDER, or lower calibration.documents"
        )
    return memory


def _stored_as_it_runs(base: ResolvedBase) -> bool:
    checkpoint = base.checkpoint
    return checkpoint.encoding is None and checkpoint.pending is None and checkpoint.dtype == base.dtype


def graph_estimate(base: ResolvedBase) -> float:
    """Bytes of one token's graph in one layer, by counting: what products, norms and activations keep."""
    shape = max(base.layers, key=lambda each: each.ffn)
    chosen = max(1, base.family.experts_per_token(base.checkpoint.config))
    return base.dtype.itemsize * (12 * shape.hidden + 6 * shape.ffn * chosen + 6 * shape.query_heads * shape.head_dim)


def together(texts: Sequence[TextSize]) -> TextSize:
    """Several texts as one."""
    return TextSize(
        sum(text.tokens for text in texts),
        max(text.batch for text in texts),
        max(text.width for text in texts),
        sum(text.documents for text in texts),
        sum(text.predicted for text in texts),
    )


def peak(each: Iterable[Memory]) -> Memory:
    """The largest of each kind."""
    every = list(each) or [Memory(0, 0, 0)]
    return Memory(*(max(getattr(one, name) for one in every) for name in ("device", "host", "spool")))


def gibibytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20):,} MiB"
