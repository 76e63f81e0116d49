"""Repair one pruned layer: its attention first, and then its FFN behind the repaired attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.arch import Block, Experts, Family
from expertprune.engine.memory import by_rows
from expertprune.engine.team import team
from expertprune.models.layers import Call, observed
from expertprune.models.passes import Stream, alone, real_tokens
from expertprune.models.spool import Spool
from expertprune.models.states import KeptStates
from expertprune.pruning.routed_repair import RoutedRepair
from expertprune.pruning.solve import Moments, TokenRows, before_norm, token_weights
from expertprune.units import KeptUnits, LayerShape, Structure


@dataclass(frozen=True)
class Dense:
    """What the base's layer did, batch by batch.

    Attributes:
        middle: the stream behind attention, if heads are cut.
        outputs: of the projections that lost inputs, where a norm follows them.
        forms: how many results beside the first each block returns, or `None` where it returns no
            tuple; by the block's path.
    """

    middle: Spool
    outputs: dict[Structure, Spool]
    forms: dict[str, int | None]


@dataclass(frozen=True)
class LayerRepair:
    """A layer of the base, and the same layer with the kept units only, which is repaired.

    Attributes:
        stored: the dtypes that weights are written in, by full name.
        together: adds sums of the other members of a team, in place (see `TextRun`).
        states: what is known of the base's hidden states.
        takes_over: whether the next layers go whole. Its FFN or routed experts then do their work
            too: they aim at the base's stream behind those layers (ReplaceMe, arXiv:2505.02819).
    """

    family: Family
    index: int
    layer: nn.Module
    small: nn.Module
    shape: LayerShape
    kept: KeptUnits
    stored: Mapping[str, torch.dtype]
    together: Callable[[dict[str, Tensor]], None] = alone
    states: KeptStates | None = None
    takes_over: bool = False

    def touches(self, structure: Structure) -> bool:
        """Whether the output projection of a block is solved for: it lost inputs, or takes over."""
        if structure is Structure.FFN:
            return self.family.has_ffn and (self.takes_over or len(self.kept.ffn) < self.shape.ffn)
        return len(self.kept.query_heads) < self.shape.query_heads

    @property
    def experts(self) -> Experts | None:
        """The layer's routed experts, where some of them or of their neurons are dropped, or they take over."""
        changed = self.takes_over or len(self.kept.ffn) < self.shape.neurons
        return self.family.experts_of(self.shape) if changed else None

    def weights(self, seen: Dense, dense: Stream, expert: Stream, ridge: float) -> Iterator[tuple[str, Tensor]]:
        """Full names and values of the weights that are solved for; the expert's stream is then behind the layer.

        Each block of the pruned layer runs once per batch.

        Args:
            seen: what `run_dense` gave.
            dense: the base's stream behind the layer, and behind those whose work it takes over.
        """
        if not self.touches(Structure.QUERY_HEADS):
            yield from self._behind_attention(dense, expert, seen, ridge, lambda number: None)
            return
        inputs = Spool(expert.hidden.room)
        yield self._solve_heads(expert, seen, inputs, ridge)
        projection = self.small.get_submodule(self.family.attention.output)
        attention = _StandIn(seen.forms.get(self._attention))

        def attend(number: int) -> None:
            attention.output = projection(inputs[number])

        with _replaced(self.small, self._attention, attention):
            yield from self._behind_attention(dense, expert, seen, ridge, attend)

    # --- the two blocks ---------------------------------------------------------------------------------------------

    def _solve_heads(self, expert: Stream, seen: Dense, inputs: Spool, ridge: float) -> tuple[str, Tensor]:
        """Repair the output of attention; `inputs` gets what goes into it. The stream stays as it is."""
        block, moments = self.family.attention, self._moments(Structure.QUERY_HEADS, expert)
        feed_forward = _StandIn(seen.forms.get(self._feed_forward), width=self.shape.hidden)
        with _replaced(self.small, self._feed_forward, feed_forward), observed(self.small, block.output) as calls:
            for number in range(len(expert.batches)):
                before = expert.hidden[number]
                expert.run(self.small, self.index, number, before)
                call = calls[block.output]
                after = before + _joined(self.small, block, call.output)
                self._add(moments, Structure.QUERY_HEADS, expert, number, seen, seen.middle[number], after, call)
                inputs.append(call.input)
        _, repaired = self._solved(Structure.QUERY_HEADS, moments, ridge)
        return self._name(Structure.QUERY_HEADS), repaired

    def _behind_attention(
        self, dense: Stream, expert: Stream, seen: Dense, ridge: float, attend: Callable[[int], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Run the whole layer, and repair the output of its FFN if it lost inputs.

        Args:
            attend: called before each batch, with its number.
        """
        if self.experts is not None:
            yield from self._solve_routed(self.experts, dense, expert, ridge, attend)
            return
        if not self.touches(Structure.FFN):
            for number in range(len(expert.batches)):
                attend(number)
                expert.hidden[number] = expert.run(self.small, self.index, number)
            return
        block, moments = self.family.ffn, self._moments(Structure.FFN, expert)
        inputs = Spool(expert.hidden.room)
        with observed(self.small, block.output) as calls:
            for number in range(len(expert.batches)):
                attend(number)
                after = expert.run(self.small, self.index, number)
                call = calls[block.output]
                self._add(moments, Structure.FFN, expert, number, seen, dense.hidden[number], after, call)
                expert.hidden[number] = after
                inputs.append(call.input)
        change, repaired = self._solved(Structure.FFN, moments, ridge)
        for number in range(len(expert.batches)):
            expert.hidden[number] = self._moved(expert.hidden[number], inputs[number], change)
        yield self._name(Structure.FFN), repaired

    def _solve_routed(
        self, experts: Experts, dense: Stream, expert: Stream, ridge: float, attend: Callable[[int], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Run the whole layer, and repair the outputs of its routed experts."""
        prefix = self.family.layer_prefix(self.index)
        names = [prefix + experts.output_of(number) for number in self.kept.experts]
        on_disk = (*names, prefix + experts.output, prefix + experts.stored.get(experts.output, ""))
        dtype = next((self.stored[name] for name in on_disk if name in self.stored), None)
        routed = RoutedRepair(self.small, experts, self.index, ridge, dtype, self.together)
        yield from zip(names, routed.solve(expert, dense.hidden, attend), strict=True)

    def _moved(self, after: Tensor, inputs: Tensor, change: Tensor) -> Tensor:
        """A batch behind the layer, once its FFN's output projection has changed."""
        block, more = self.family.ffn, inputs @ change.T
        if block.output_norm is None:
            return after + more
        now = self.small.get_submodule(block.output)(inputs)
        return after - _joined(self.small, block, now - more) + _joined(self.small, block, now)

    # --- moments and solution ---------------------------------------------------------------------------------------

    def run_dense(self, stream: Stream) -> Dense:
        """Advance the base's stream, and keep what the projections that lost inputs shall aim at.

        What an FFN without an output norm aims at is the stream itself; then known states do.
        """
        cut = [each for each in (Structure.QUERY_HEADS, Structure.FFN) if self.touches(each)]
        room = stream.hidden.room
        seen = Dense(Spool(room), {each: Spool(room) for each in cut}, {})
        heads = Structure.QUERY_HEADS in cut
        watched = [each for each in cut if each is Structure.QUERY_HEADS or self.family.block(each).output_norm]
        if not watched:
            stream.move(self.layer, self.index, self.states)
            return seen
        paths = [self.family.block(each).output for each in watched]
        with observed(self.layer, *paths, *([self._attention, self._feed_forward] if heads else [])) as calls:
            for step in stream.advance(self.layer, self.index):
                for structure in watched:
                    block = self.family.block(structure)
                    output = calls[block.output].output
                    if structure is Structure.QUERY_HEADS:
                        seen.middle.append(step.before + _joined(self.layer, block, output))
                    if block.output_norm is not None:
                        seen.outputs[structure].append(output)
        for path in (self._attention, self._feed_forward) if heads and stream.batches else ():
            output = calls[path].output
            seen.forms[path] = len(output) - 1 if isinstance(output, tuple) else None
        return seen

    def _moments(self, structure: Structure, stream: Stream) -> Moments | TokenRows:
        """Sums over tokens, or the tokens themselves where they are few."""
        weight = self.small.get_parameter(self.family.block(structure).output_weight)
        tokens = sum(batch.tokens for batch in stream.batches)
        if self.together is alone and by_rows(tokens, weight.shape[1]):
            return TokenRows()
        return Moments.zeros(weight.shape[1], weight.shape[0], weight.device)

    def _add(
        self,
        moments: Moments | TokenRows,
        structure: Structure,
        stream: Stream,
        number: int,
        seen: Dense,
        target: Tensor,
        after: Tensor,
        call: Call,
    ) -> None:
        """Add one batch: `target` and `after` are the base's and the expert's stream behind the block."""
        block, batch = self.family.block(structure), stream.batches[number]
        wanted = real_tokens(batch, target).float()
        residual = wanted - real_tokens(batch, after).float()
        weights = token_weights(wanted) * real_tokens(batch, batch.on(wanted.device).weights)
        inputs = real_tokens(batch, call.input).float()
        if block.output_norm is not None:
            given = (_joined(self.small, block, call.output), call.output, seen.outputs[structure][number])
            joined, own, output = (real_tokens(batch, states).float() for states in given)
            residual, scale = before_norm(self.small.get_submodule(block.output_norm), residual, joined, own, output)
            inputs, residual = inputs / scale, residual / scale  # as the norm does; it makes no token weigh more
        moments.add(inputs, residual, weights)

    def _solved(self, structure: Structure, moments: Moments | TokenRows, ridge: float) -> tuple[Tensor, Tensor]:
        """The change of a projection and its new weight, rounded as it is written; the layer has it now.

        Members of a team factorize the same sums, and each solves for some rows of the weight.
        """
        self.together(dict(moments.sums()))
        block = self.family.block(structure)
        weight = self.small.get_parameter(block.output_weight)
        change = moments.solved(ridge, team().own_range(weight.shape[0]))
        self.together({"change": change})
        repaired = weight.float() + change
        repaired = repaired.to(self.stored.get(self._name(structure), weight.dtype)).to(weight.dtype)
        self.small.get_submodule(block.output).weight = nn.Parameter(repaired, requires_grad=False)
        return repaired - weight, repaired

    def _name(self, structure: Structure) -> str:
        return f"{self.family.layer_prefix(self.index)}{self.family.block(structure).output_weight}"

    @property
    def _attention(self) -> str:
        """The path of the module that holds attention."""
        return self.family.attention.output.partition(".")[0]

    @property
    def _feed_forward(self) -> str:
        """The path of the module that holds the FFN or the routed experts."""
        experts = self.family.experts
        return (experts.module if experts is not None else self.family.ffn.output).partition(".")[0]


def _joined(layer: nn.Module, block: Block, output: Tensor) -> Tensor:
    """What a block adds to the residual stream, given its projection's output."""
    result: Tensor = output if block.output_norm is None else layer.get_submodule(block.output_norm)(output)
    return result


class _StandIn(nn.Module):
    """Takes the place of a block that need not run, and returns its results in its form.

    Attributes:
        output: what it returns; `None`: zeros of the block's width.
    """

    def __init__(self, further: int | None, width: int = 0) -> None:
        """`further`: how many results beside the first the block returns; `None`: it returns no tuple."""
        super().__init__()
        self._further, self._width = further, width
        self.output: Tensor | None = None

    def forward(self, *states: Tensor, **named: Any) -> Any:
        output = self.output
        if output is None:
            first = states[0] if states else next(iter(named.values()))
            output = first.new_zeros(*first.shape[:-1], self._width)
        return output if self._further is None else (output, *[None] * self._further)


@contextlib.contextmanager
def _replaced(layer: nn.Module, path: str, stand_in: nn.Module) -> Iterator[None]:
    """While open, `stand_in` takes the place of a child of the layer."""
    original = layer.get_submodule(path)
    setattr(layer, path, stand_in)
    try:
        yield
    finally:
        setattr(layer, path, original)
