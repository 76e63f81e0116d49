"""The smallest expert that keeps what the user asks for, found by trying budgets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from expertprune.artifacts.plan import Plan, RetentionFound
from expertprune.artifacts.profile import Profile
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.plan import compose
from expertprune.composition.widths import LayerWidths, legal_ffn
from expertprune.corpora.documents import CorpusName
from expertprune.engine.team import team
from expertprune.errors import PlanError
from expertprune.evaluation.measure import Measuring
from expertprune.evaluation.retention import bits_per_byte
from expertprune.progress import Track, silent
from expertprune.spec.schema import Budget, Evaluate, Retention
from expertprune.stages.evaluate import Meanwhile, measuring
from expertprune.stages.prune import write_weights
from expertprune.stages.validate import Prepared, validation_documents

log = logging.getLogger(__name__)


_BETWEEN = 4  # budgets to try for each legal width, where layers may differ


@dataclass(frozen=True)
class Kept:
    """What an expert keeps of each corpus' held-back documents: bits per byte of the base over the
    expert's.
    """

    corpora: Mapping[str, float]

    @property
    def expert(self) -> float:
        """The least over the corpora of the dimensions."""
        return min(value for name, value in self.corpora.items() if not CorpusName.parse(name).is_general)

    @property
    def general(self) -> float:
        """The least over the general corpora; infinite where there are none."""
        kept = (value for name, value in self.corpora.items() if CorpusName.parse(name).is_general)
        return min(kept, default=float("inf"))

    def holds(self, floor: Retention) -> bool:
        return self.expert >= (floor.expert or 0) and self.general >= (floor.general or 0)

    def __str__(self) -> str:
        general = f", general {self.general:.4f}" if self.general != float("inf") else ""
        return f"expert {self.expert:.4f}{general}"


def budgets_to_try(prepared: Prepared) -> list[Budget]:
    """Budgets of ascending size, as parameters of the whole model.

    What every layer loses at the FFN's legal widths; where layers may differ, steps of a quarter of
    that (of a layer's own step, if there are fewer than four layers).
    """
    base, budget, shape = prepared.base, prepared.spec.budget, prepared.base.layers[0]
    parts = 1 if prepared.spec.compose.allocation == "uniform" else min(_BETWEEN, len(base.layers))
    found, before = [], 0
    for width in reversed(legal_ffn(shape, budget.ffn_step, budget.floor)[:-1]):
        layer = replace(LayerWidths.own(shape), ffn=width)
        removed = removed_parameters(base, [layer] * len(base.layers))
        for part in range(1, parts + 1):
            fraction = (before + (removed - before) * part / parts) / base.checkpoint.parameters
            found.append(budget.model_copy(update={"retention": None, "parameters": fraction * (1 - 1e-9)}))
        before = removed
    return found


def plan_by_retention(prepared: Prepared, profiles: Mapping[CorpusName, Profile], track: Track) -> Plan:
    """The plan of the largest cut that holds the floor of `budget.retention`, by bisection over
    budgets.

    Every try is a whole expert, repaired, measured on calibration documents held back for it
    (`validation_documents`). It is assumed that a larger cut keeps less.

    Raises:
        PlanError: not even the smallest cut holds the floor; the message says what it keeps.
    """
    spec = prepared.spec
    floor = spec.budget.retention
    assert floor is not None
    budgets = budgets_to_try(prepared)
    if not budgets:
        raise PlanError("budget.retention: there is no smaller width to try; lower budget.multiple_of or budget.floor")
    low, high = -1, len(budgets)  # the largest that is known to hold, the smallest that is known not to
    tried: dict[int, tuple[Plan, Kept]] = {}
    evaluator = measuring_held_back(prepared)
    with track("retention", len(budgets).bit_length() + 1) as step:
        middle = 0
        while high - low > 1:
            try:
                tried[middle] = _try(prepared, profiles, budgets[middle], evaluator)
            except PlanError as error:  # more than the floor of widths allows
                log.info("budget %g: %s", budgets[middle].parameters, error)
                high = middle
            else:
                kept = tried[middle][1]
                log.info("removing %.4f of the parameters keeps %s", budgets[middle].parameters, kept)
                low, high = (middle, high) if kept.holds(floor) else (low, middle)
            step()
            middle = (low + high) // 2
    if low < 0:
        best = tried[0][1] if 0 in tried else None
        wanted = ", ".join(f"{name} {value:g}" for name, value in floor.model_dump().items() if value is not None)
        raise PlanError(
            f"budget.retention: no cut keeps {wanted}; the smallest, {budgets[0].parameters:.4f} of the parameters, "
            f"keeps {best}: lower the floor, calibrate on more text, or lower budget.multiple_of"
        )
    plan, kept = tried[low]
    requested = RetentionFound(retention=floor, found=dict(kept.corpora))
    budget = {name: entry.model_copy(update={"requested": requested}) for name, entry in plan.budget.items()}
    return replace(plan, spec=spec.document(), budget=budget)


def _try(
    prepared: Prepared, profiles: Mapping[CorpusName, Profile], budget: Budget, evaluator: Measuring
) -> tuple[Plan, Kept]:
    """The plan under one budget, and what its expert keeps."""
    spec = prepared.spec.model_copy(update={"budget": budget})
    plan = team().lead(lambda: compose(spec, prepared.base, profiles))
    meanwhile = Meanwhile(evaluator)
    with team().temporary(prepared.store) as folder:
        write_weights(prepared, plan, folder, passengers=meanwhile.passengers)
        return plan, measure(prepared, meanwhile, folder)


def measuring_held_back(prepared: Prepared) -> Measuring:
    """What measures experts on the documents that were held back from calibration."""
    held_back = [replace(each, evaluation=tuple(validation_documents(each))) for each in prepared.corpora.values()]
    settings = Evaluate(metrics=["bits_per_byte"], max_tokens=prepared.spec.calibration.max_tokens)
    return measuring(prepared.running, held_back, settings, other_tokens=False)


def measure(prepared: Prepared, meanwhile: Meanwhile, folder: Path) -> Kept:
    """What the expert in a folder keeps of each corpus' held-back documents."""
    found = meanwhile.result(folder, prepared.running, silent)
    return Kept({name: bits_per_byte(each.per_document).point for name, each in found.corpora.items()})
