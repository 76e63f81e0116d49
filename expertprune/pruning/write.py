"""Write the expert's folder from a plan and the base's folder. The plan has decided everything."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertprune.arch import MODELING, PER_LAYER, Family, per_layer
from expertprune.artifacts.plan import Plan
from expertprune.corpora.batches import Batch
from expertprune.engine.team import team
from expertprune.errors import CheckpointError, PlanError, under
from expertprune.files import computed_by, digest_of, require_room, scratch_folder, working_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import class_of, decoder_class_of, within_decoder
from expertprune.models.passes import TextRun
from expertprune.models.shards import write_weights
from expertprune.models.states import KeptStates
from expertprune.models.tensorfile import DTYPES
from expertprune.progress import Progress
from expertprune.pruning.repair import Passengers, RepairJob, check_repair
from expertprune.pruning.slicing import cut_tensor, stored_experts
from expertprune.pruning.unfinished import Unfinished
from expertprune.spec.schema import Compensation
from expertprune.tokenizing import Renumbering, trimmed, write_tokenizer
from expertprune.units import KeptUnits, new_positions

_SPARE = 64 * 2**20  # tokenizer, cards and index, generously


@dataclass(frozen=True)
class RepairInput:
    """What a repair needs beside the plan.

    Attributes:
        model: the running base.
        batches: calibration text.
        passengers: text that is measured meanwhile, if the repair takes passengers.
        store: where a killed repair leaves what it has finished, for the next run of the same one.
        states: what is known of the base's hidden states (see `RepairJob`).
        own: this member's share of the batches; default: a share of any cut.
    """

    model: Any
    batches: Sequence[Batch]
    settings: Compensation
    passengers: Passengers | None = None
    store: Path | None = None
    states: KeptStates | None = None
    own: Sequence[Batch] | None = None


def check_plan(plan: Plan, base: ResolvedBase) -> None:
    """Raises `PlanError` if the plan was made for another base."""
    if plan.base.digest == base.digest and list(plan.shapes) != list(base.layers):
        raise PlanError(
            f"the plan {plan.name!r} was edited: its {len(plan.shapes)} layers are not the {len(base.layers)} of "
            f"{base.name}: compose it again"
        )
    if plan.base.digest != base.digest:
        raise PlanError(
            f"the plan {plan.name!r} was made for {plan.base.model} (digest {plan.base.digest[:12]}), "
            f"not for {base.name} (digest {base.digest[:12]}): compose it again for this base"
        )
    if plan.vocabulary is not None and plan.vocabulary.tokenizer != base.tokenizer_digest:
        raise PlanError(
            f"the plan {plan.name!r} cuts the vocabulary of another tokenizer than {base.name} has now: compose it again"
        )


def bytes_needed(plan: Plan, base: ResolvedBase) -> int:
    """Disk room for the expert, the spooled repairs included."""
    size = torch.empty(0, dtype=base.checkpoint.dtype).element_size()
    return int(plan.parameters.after * (size + 1.5)) + _SPARE  # repairs are in the run's dtype, up to float32


def prune(
    plan: Plan,
    base: ResolvedBase,
    folder: Path,
    repair_input: RepairInput | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the expert's model files into an existing, empty folder.

    Weights are sliced shard by shard, so one shard is in memory at a time; config, tokenizer and the rest come along.

    Args:
        plan: of this base (see `check_plan`).
        folder: usually a staged one, which becomes the output when everything is done.
        repair_input: for the closed-form repair; `None` for slicing alone.

    Raises:
        PlanError: the plan keeps tokens without the parts they are merged from.
        CheckpointError: the disk has no room, or the base or its tokenizer cannot be read.
    """
    if not team().leads:  # this member's part of the repair is all that it does
        with _solved_weights(plan, base, folder, repair_input, progress):
            return
    require_room(folder, bytes_needed(plan, base))
    config = base.family.pruned_config(base.checkpoint.config, plan.kept)
    rows = torch.tensor(plan.vocabulary.rows.index) if plan.vocabulary is not None else None
    with under("budget.vocabulary"):
        smaller = trimmed(base.vocabulary, plan.vocabulary.rows.kept) if plan.vocabulary is not None else None
    if plan.vocabulary is not None and smaller is not None:
        if tuple(smaller.ids) != plan.vocabulary.rows.kept:
            raise PlanError(
                f"the plan {plan.name!r} keeps tokens without the parts they are merged from: compose it again"
            )
        config = Renumbering(smaller.ids).config(config) | {"vocab_size": plan.vocabulary.rows.rows}
    with _solved_weights(plan, base, folder, repair_input, progress) as solved:
        _write_tensors(plan, base, folder, solved, rows)
    for path in base.checkpoint.carried_files:
        target = folder / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if smaller is not None:
        write_tokenizer(base.folder, folder, smaller)
    if config == base.checkpoint.config and base.checkpoint.encoding is None and not base.checkpoint.left_out:
        shutil.copyfile(base.folder / "config.json", folder / "config.json")
    else:
        (folder / f"{MODELING}.py").unlink(missing_ok=True)  # that of a base which had widths of single layers
        if PER_LAYER in config:
            (folder / f"{MODELING}.py").write_text(_modeling(config, base.family.layers))
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _solved_weights(
    plan: Plan, base: ResolvedBase, folder: Path, given: RepairInput | None, progress: Progress | None
) -> Iterator[Unfinished | None]:
    """The repaired weights, until they are written; `None` where nothing is repaired."""
    if given is None or not plan.cuts_layers:
        yield None
        return
    text = team().run(TextRun(given.model, base.family, plan.shapes, given.batches), given.own)
    stored = {name: DTYPES[info.dtype] for name, info in base.checkpoint.tensors.items() if info.dtype in DTYPES}
    job = RepairJob(text, plan.kept, given.settings, stored, given.passengers, states=given.states)
    weights = check_repair(given.settings.method).weights
    if not team().leads:
        for _ in weights(job, progress):
            pass
        yield None
        return
    if given.store is None or team().size > 1:  # members of a team would not have finished the same layers
        place = scratch_folder(folder / "repair")
    else:
        place = working_folder(given.store / "repairs" / f"{_digest(plan, base, given)}.unfinished")
    with place as folder:
        unfinished = Unfinished(folder)
        job = replace(job, unfinished=unfinished if team().size == 1 else None)
        for name, tensor in weights(job, progress):
            if not bool(tensor.isfinite().all()):
                raise CheckpointError(f"{name}: the repair is not finite; raise compensation.ridge")
            unfinished.put(name, tensor)
        yield unfinished


def _digest(plan: Plan, base: ResolvedBase, given: RepairInput) -> str:
    """Of everything that the numbers of a repair depend on, and the batches of its passengers.

    Whether the base's stream of the passengers is known does not count: a sweep that goes on may lack
    what the one that was killed knew, and still finds its folder. It then starts that repair again.
    """
    aboard = given.passengers
    ids = hashlib.sha256()
    for batch in [*given.batches, *(aboard.batches if aboard is not None else ())]:
        ids.update(repr((batch.lengths, batch.ids.tolist(), batch.weights.tolist())).encode())
    about = [plan.digest, base.digest, str(base.dtype), str(base.device), given.settings.model_dump()]
    return digest_of([about, ids.hexdigest(), computed_by(("arch", "models", "pruning"))])


def _write_tensors(
    plan: Plan, base: ResolvedBase, folder: Path, solved: Unfinished | None, rows: Tensor | None
) -> None:
    """Write the weights, sliced or solved for, shard by shard."""
    owners = {
        base.family.layer_prefix(layer) + coupled.name: (layer, coupled.name)
        for layer in new_positions(plan.kept)
        for coupled in base.family.tensors
    }

    single = stored_experts(plan, base.family)

    def transform(name: str, tensor: Tensor) -> Tensor | None:
        if name in single:
            repaired = solved.take(name) if solved is not None else None
            return single[name].cut(tensor) if repaired is None else repaired.to(tensor.dtype)
        if rows is not None and name in base.family.vocabulary:
            return tensor.index_select(0, rows)
        if name not in owners:
            return None
        layer, local = owners[name]
        repaired = solved.take(name) if solved is not None else None
        if repaired is None and solved is not None:
            repaired = _solved_together(base.family, layer, local, plan.kept[layer], solved)
        if repaired is not None:
            return repaired.to(tensor.dtype)
        cut = cut_tensor(local, tensor, base.family, plan.shapes[layer], plan.kept[layer])
        return None if cut is tensor else cut

    names = _moved(plan, base) | {old: stored.name for old, stored in single.items()}
    write_weights(base.checkpoint, folder, transform, _zero_tensors(plan, base), names)


def _moved(plan: Plan, base: ResolvedBase) -> dict[str, str | None]:
    """From names of tensors in the base's layers to those in the expert's; `None` where the layer goes."""
    if not plan.gone:
        return {}
    family, names = base.family, list(base.checkpoint.tensors)
    positions: dict[int, int | None] = {**dict.fromkeys(plan.gone), **new_positions(plan.kept)}
    prefixes = {
        family.layer_prefix(layer): None if position is None else family.layer_prefix(position)
        for layer, position in positions.items()
    }
    return {
        name: None if new is None else new + name.removeprefix(old)
        for old, new in prefixes.items()
        for name in names
        if name.startswith(old)
    }


def _modeling(config: Mapping[str, Any], layers: str) -> str:
    """The code that an expert with widths of single layers carries, for users who have no expertprune."""
    causal = class_of(dict(config))
    decoder = decoder_class_of(causal, dict(config))
    lines = [
        inspect.getsource(per_layer),
        "",
        f"from transformers import {causal.__name__}, {decoder.__name__}  # noqa: E402",
        "",
        f'ExpertModel = model_with_layer_widths({decoder.__name__}, "{within_decoder(causal, layers)}")',
        f"ExpertForCausalLM = with_layer_widths({causal.__name__}, ExpertModel)",
        "",
    ]
    return "\n".join(lines)


def _solved_together(family: Family, layer: int, name: str, kept: KeptUnits, solved: Unfinished) -> Tensor | None:
    """The repaired output projections of a layer's routed experts as one tensor, if the checkpoint stores them so.

    `None` where `name` is another tensor, or none of them was repaired.
    """
    experts = family.experts
    if experts is None or name not in (experts.output, experts.stored.get(experts.output)):
        return None
    found = [solved.take(family.layer_prefix(layer) + experts.output_of(expert)) for expert in kept.experts]
    parts = [part for part in found if part is not None]
    if not parts:
        return None
    whole = torch.stack(parts)
    return whole.transpose(1, 2) if experts.transposed else whole


def _zero_tensors(plan: Plan, base: ResolvedBase) -> Callable[[str], Iterator[tuple[str, Tensor]]]:
    """Tensors that the config's rewrite asks for, zero, in every layer, in the file of the output projection."""
    family, rewrite = base.family, base.family.when_heads_change
    positions = new_positions(plan.kept)
    pairs = [(plan.shapes[layer], plan.kept[layer]) for layer in positions]
    changed = any(family.heads_changed(shape, kept.shape(shape)) for shape, kept in pairs)

    def extra(file: str) -> Iterator[tuple[str, Tensor]]:
        if rewrite is None or not changed:
            return
        for layer, position in positions.items():
            anchor = base.checkpoint.tensors[family.layer_prefix(layer) + family.attention.output_weight]
            if anchor.file == file:
                for name in rewrite.zero_tensors:
                    zeros = torch.zeros(plan.shapes[layer].hidden, dtype=base.checkpoint.dtype)
                    yield family.layer_prefix(position) + name, zeros

    return extra
