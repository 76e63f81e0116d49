"""Cut a LoRA adapter of a base along with an expert of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from expertprune.arch import Family
from expertprune.artifacts.adapter import Adapter, same_name
from expertprune.artifacts.expert import Description, Expert
from expertprune.errors import CheckpointError
from expertprune.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CUT_ALONG,
    check_output,
    require_room,
    staged_folder,
    write_json,
)
from expertprune.models.admission import causal_family
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.tensorfile import DTYPES, in_order, written_file
from expertprune.pruning.adapter_config import renumbered, renumbered_names
from expertprune.pruning.adapters import Along, TensorCut
from expertprune.units import new_positions

_SPARE = 2**20  # bytes of a config, generously


@dataclass(frozen=True)
class CutAdapter:
    """An adapter that was cut along.

    Attributes:
        folder: where it is.
        base: what it was trained for, as the expert's description names it.
        expert: the name of the expert that it fits now.
        plans: the number of plans that it was cut along.
        before, after: its parameters.
        rank: the largest of its ranks.
    """

    folder: Path
    base: str
    expert: str
    plans: int
    before: int
    after: int
    rank: int

    def document(self) -> dict[str, Any]:
        return {"kind": "adapter", **asdict(self), "folder": str(self.folder)}


def cut_adapter(
    adapter: str | Path, expert: str | Path, out: str | Path, overwrite: bool = False, same_base: bool = False
) -> CutAdapter:
    """Cut a PEFT LoRA adapter of an expert's base, or of a base that this one was cut from, along with the expert.

    No model is loaded, and the base need not be there. `out` gets the weights and the config that PEFT and vLLM read.

    Args:
        same_base: take the adapter's base for the expert's, though its name is another one. Shapes are checked anyway.

    Raises:
        CheckpointError: the adapter or the expert cannot be read, the adapter is of another base, or holds something that
            cannot be cut along; the message names it.
    """
    given, folder, out = Adapter.load(Path(adapter)), Path(expert), Path(out)
    made = Expert.load(folder)
    check_output(out, overwrite, ADAPTER, [given.folder, folder])
    fit = _fitting(given, made, same_base)
    config = _config(given, fit)
    require_room(out, given.weights.stat().st_size + _SPARE)
    with staged_folder(out, overwrite, ADAPTER) as temporary:
        after = _write_weights(given, fit, temporary / ADAPTER_WEIGHTS)
        write_json(
            temporary / ADAPTER_CONFIG, config | {"base_model_name_or_path": _reference(folder), "revision": None}
        )
    before = sum(info.parameters for info in given.tensors.values())
    return CutAdapter(out, fit.chain[0].base.model, made.name, len(fit.chain), before, after, max(given.config.ranks))


@dataclass(frozen=True)
class _Fit:
    """How an adapter is cut: the experts whose plans it follows, in order, and by tensor what each plan does to it."""

    family: Family
    chain: Sequence[Description]
    steps: Mapping[str, list[TensorCut]]

    @property
    def names(self) -> dict[str, str | None]:
        """The new name of each tensor."""
        return {name: step[-1].name for name, step in self.steps.items()}


def _fitting(adapter: Adapter, expert: Expert, same_base: bool) -> _Fit:
    """Find the base of an adapter among an expert's.

    An adapter of the expert's base is cut along the expert's plan; one of a base further back along all plans since.
    Where names do not tell, shapes do: two bases whose shapes fit give the same cut, unless layers or routed experts have
    other numbers.

    Raises:
        CheckpointError: no base fits, or several do and give different cuts.
    """
    lineage, said = expert.lineage, adapter.config.base_model_name_or_path
    named = [place for place, each in enumerate(lineage) if said is not None and same_name(each.base.model, said)]
    bases = ", which was cut from ".join(each.base.model for each in lineage)
    if not named and not same_base:
        if said is not None and same_name(str(expert.folder.resolve()), said):
            raise CheckpointError(
                f"{adapter.folder}: is an adapter of the expert {expert.name} itself; load it as it is"
            )
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG}: base_model_name_or_path is {said!r}, and the expert {expert.name} was cut "
            f"from {bases}; if it is the same model under another name, give --same-base"
        )
    checkpoint = Checkpoint(expert.folder)
    family = causal_family(checkpoint, trust_remote_code=True)  # none of it is run
    fits: list[_Fit] = []
    problems: list[CheckpointError] = []
    for place in reversed(named or range(len(lineage))):
        chain = lineage[place::-1]
        about = f"{chain[0].base.model}, the base of the expert {chain[0].name}"
        try:
            fits.append(_Fit(family, chain, _steps(adapter, _alongs(adapter, chain, family, checkpoint), about)))
        except CheckpointError as problem:
            problems.append(problem)
    if not fits:
        raise problems[0]
    if any(fit.names != fits[0].names for fit in fits):
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG}: shapes do not tell which base the adapter is of: {bases}; write its name "
            "as base_model_name_or_path"
        )
    return fits[0]


def _alongs(adapter: Adapter, chain: Sequence[Description], family: Family, checkpoint: Checkpoint) -> list[Along]:
    """Each plan of a chain, ready for the tensors that the one before it leaves."""
    alongs, parameters = [], adapter.config.target_parameters or []
    for first, expert in enumerate(chain):
        alongs.append(Along(family, chain[first:], checkpoint, parameters))
        if expert.plan.gone:
            parameters = renumbered_names(parameters, family.layers, new_positions(expert.plan.kept))
    return alongs


def _steps(adapter: Adapter, alongs: Sequence[Along], base: str) -> dict[str, list[TensorCut]]:
    """What is done to each tensor, plan by plan; raises `CheckpointError` where the first plan's base does not fit."""
    found: dict[str, list[TensorCut]] = {}
    for name, info in adapter.tensors.items():
        steps: list[TensorCut] = []
        try:
            for along in alongs:
                steps.append(along.step(steps[-1].name or "" if steps else name))
                if steps[-1].name is None:
                    break
        except CheckpointError as problem:
            raise CheckpointError(f"{adapter.weights}: does not go with {base}: {problem}") from None
        _check_shape(adapter, name, info.shape, steps[0].shape, base)
        _check_rank(adapter, name, info.shape, steps[0])
        found[name] = steps
    return found


def _check_shape(
    adapter: Adapter, name: str, shape: Sequence[int], expected: Sequence[int | None] | None, base: str
) -> None:
    """Raises `CheckpointError` where a tensor does not have the shape that the base gives it."""
    if expected is None:
        return
    wanted = [length if each is None else each for each, length in zip_longest(expected, shape)]
    if wanted != list(shape):
        raise CheckpointError(
            f"{adapter.weights}: does not go with {base}: {name} is {list(shape)}, and that base makes it {wanted}"
        )


def _check_rank(adapter: Adapter, name: str, shape: Sequence[int], step: TensorCut) -> None:
    """Raises `CheckpointError` where a tensor's rank is none of the config's, or `A` or `B` is without the other."""
    if step.rank_axis is None:
        return
    length = shape[step.rank_axis]
    if length not in {step.ranks * rank for rank in adapter.config.ranks}:
        raise CheckpointError(
            f"{adapter.weights}: {name} is of rank {length / step.ranks:g}, and {ADAPTER_CONFIG} says r: {adapter.config.r}"
        )
    swap = {"A": "B", "B": "A"}
    other = re.sub(r"\.lora_(embedding_)?([AB])\b", lambda found: f".lora_{found[1] or ''}{swap[found[2]]}", name)
    if other not in adapter.tensors:
        raise CheckpointError(f"{adapter.weights}: holds {name}, and no {other}; train or fetch the adapter again")


def _config(adapter: Adapter, fit: _Fit) -> dict[str, Any]:
    """The config of the cut adapter.

    Raises:
        CheckpointError: nothing of the adapter stays; or its config names tokens, layers or routed experts by numbers that
            change, in a way that cannot be renumbered.
    """
    where, config, chain = adapter.folder / ADAPTER_CONFIG, adapter.config, fit.chain
    lora = [new for old, new in fit.names.items() if ".lora_" in old]
    if not any(lora or fit.names.values()):  # PEFT loads no adapter that has only whole weights (modules_to_save)
        raise CheckpointError(
            f"{adapter.folder}: its LoRA changes only layers or routed experts that the expert does not have"
        )
    if any(each.plan.vocabulary is not None for each in chain):
        for key in ("trainable_token_indices", "alora_invocation_tokens"):
            if getattr(config, key):
                raise CheckpointError(
                    f"{where}: {key} names tokens by ids that the expert's smaller vocabulary does not have"
                )
    document = dict(adapter.document)
    if isinstance(config.init_lora_weights, str):  # PEFT would begin so again, which can fail for narrower layers
        document["init_lora_weights"] = True
    positions = {layer: layer for layer in range(len(chain[0].plan.shapes))}
    for each in chain:
        new = new_positions(each.plan.kept)
        positions = {layer: new[position] for layer, position in positions.items() if position in new}
    if len(positions) < len(chain[0].plan.shapes):
        try:
            return renumbered(document, fit.family.layers, positions)
        except CheckpointError as problem:
            raise CheckpointError(f"{where}: {problem}") from None
    numbered = [name for name in config.names if re.search(r"experts\\?\.\d", name)]
    if numbered and any(new != old for old, new in fit.names.items()):
        raise CheckpointError(f"{where}: {numbered[0]!r} names a routed expert by a number that changes in this expert")
    return document


def _write_weights(adapter: Adapter, fit: _Fit, path: Path) -> int:
    """Write what stays of all tensors, one in memory at a time; returns the number of parameters."""
    sources = {new: old for old, new in fit.names.items() if new is not None}
    infos = {new: adapter.tensors[old] for new, old in sources.items()}
    expected = {name: (DTYPES[info.dtype], info.shape) for name, info in infos.items()}
    metadata = {"format": "pt", CUT_ALONG: " ".join(each.plan.digest for each in fit.chain)}
    written = 0
    with written_file(path, expected, metadata) as file:
        for name in in_order({name: dtype for name, (dtype, _) in expected.items()}):
            tensor: Tensor = adapter.read(sources[name])
            for step in fit.steps[sources[name]]:
                tensor = step.cut(tensor)
            file.add(name, tensor)
            written += math.prod(tensor.shape)
    return written


def _reference(expert: Path) -> str:
    """How PEFT finds the expert from the current folder; its name alone where it lies elsewhere, for no place is told."""
    place = expert.resolve()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else place.name
