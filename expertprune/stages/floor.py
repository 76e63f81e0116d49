"""A small expert that keeps what the user asks for: the forecast chooses what is built and measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expertprune.artifacts.plan import Plan, RetentionFound
from expertprune.artifacts.profile import Profile
from expertprune.composition.excess import times_lost
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.plan import compose, widths_to_try
from expertprune.corpora.documents import CorpusName
from expertprune.engine.team import team
from expertprune.errors import PlanError
from expertprune.evaluation.measure import Measuring
from expertprune.evaluation.retention import bits_per_byte
from expertprune.progress import Track, silent
from expertprune.spec.schema import Budget, Evaluate, Retention
from expertprune.stages.evaluate import Meanwhile, measuring
from expertprune.stages.outlook import Foreseeing
from expertprune.stages.prune import write_weights
from expertprune.stages.validate import Prepared, validation_documents

log = logging.getLogger(__name__)


BUILDS = 3  # experts that are built at most
_CAREFUL = 1.5  # times what is foreseen, for the last build where none has held
_BETWEEN = 4  # budgets to try for each legal width, where layers may differ


@dataclass(frozen=True)
class FloorFound:
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

    What the cut of heads removes, where there is one, and what it removes with every layer at its own next
    legal width, and so on (see `widths_to_try`); where layers may differ, steps of a quarter of that (of a
    layer's own step, if there are fewer than four layers).
    """
    base, budget, spec = prepared.base, prepared.spec.budget, prepared.spec
    parts = 1 if spec.compose.allocation == "uniform" else min(_BETWEEN, len(base.layers))
    before, *sizes = (removed_parameters(base, widths) for widths in widths_to_try(spec, base))
    removed: list[float] = [before] if before > 0 else []
    for size in sizes:
        removed += [before + (size - before) * part / parts for part in range(1, parts + 1)]
        before = size
    fractions = [each / base.checkpoint.parameters * (1 - 1e-9) for each in removed]
    return [budget.model_copy(update={"retention": None, "parameters": fraction}) for fraction in fractions]


class _Forecast:
    """What each budget's expert will keep, corrected by the experts that were built.

    Args:
        budgets: of ascending size. It is assumed that a larger cut keeps less.
    """

    def __init__(self, prepared: Prepared, profiles: Mapping[CorpusName, Profile], budgets: Sequence[Budget]) -> None:
        self.prepared, self.budgets, self.foreseeing = prepared, budgets, Foreseeing(profiles)
        self._found: dict[int, FloorFound | None] = {}
        self._times: dict[str, float] = {}

    def foreseen(self, index: int) -> FloorFound | None:
        """As profiles alone have it; `None` where the floor of widths does not allow the cut."""
        if index not in self._found:
            self._found[index] = team().lead(lambda: _foreseen(self.prepared, self.foreseeing, self.budgets[index]))
        return self._found[index]

    def correct(self, index: int, kept: FloorFound) -> None:
        """Scale what each corpus loses, as an expert that was built says."""
        foreseen = self.foreseen(index)
        assert foreseen is not None
        for name, retention in kept.corpora.items():
            self._times[name] = times_lost(retention, foreseen.corpora[name])

    def holds(self, index: int, floor: Retention, margin: float) -> bool:
        """Whether a cut is foreseen to hold the floor, if it loses `margin` times what is foreseen."""
        foreseen = self.foreseen(index)
        if foreseen is None:
            return False
        lost = {name: (1 / kept - 1) * margin * self._times.get(name, 1.0) for name, kept in foreseen.corpora.items()}
        return FloorFound({name: 1 / (1 + each) for name, each in lost.items()}).holds(floor)

    def largest(self, low: int, high: int, floor: Retention, margin: float) -> int:
        """The largest cut between two that is foreseen to hold the floor; `low` if none is."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.holds(middle, floor, margin) else (low, middle)
        return low


def plan_by_retention(prepared: Prepared, profiles: Mapping[CorpusName, Profile], track: Track) -> Plan:
    """The plan of a large cut that holds the floor of `budget.retention`, in at most `BUILDS` builds.

    The forecast says which cut to build first (see `composition.excess`). The expert is repaired, and
    measured on calibration documents held back for it (`validation_documents`), which corrects the
    forecast for the next. It is assumed that a larger cut keeps less.

    Raises:
        PlanError: no cut that was built holds the floor; the message says what the smallest keeps.
    """
    floor = prepared.spec.budget.retention
    assert floor is not None
    budgets = budgets_to_try(prepared)
    forecast = _Forecast(prepared, profiles, budgets)
    low, high = -1, len(budgets)  # the largest that is known to hold, the smallest that is known not to
    tried: dict[int, tuple[Plan, FloorFound]] = {}
    evaluator = measuring_held_back(prepared)
    with track("retention", BUILDS) as step:
        for build in range(BUILDS):
            last = build == BUILDS - 1 and low < 0
            chosen = forecast.largest(low, high, floor, _CAREFUL if last else 1.0)
            if chosen == low and low >= 0:
                break
            chosen = max(chosen, 0)  # where nothing is foreseen to hold, the smallest cut may
            if chosen >= high:
                break
            tried[chosen] = _try(prepared, profiles, budgets[chosen], evaluator)
            kept = tried[chosen][1]
            log.info("removing %.4f of the parameters keeps %s", budgets[chosen].parameters, kept)
            forecast.correct(chosen, kept)
            low, high = (chosen, high) if kept.holds(floor) else (low, chosen)
            step()
    if low < 0:
        raise PlanError(_refusal(floor, budgets, {index: kept for index, (_, kept) in tried.items()}))
    plan, kept = tried[low]
    return plan.holding(RetentionFound(retention=floor, found=dict(kept.corpora)))


def _refusal(floor: Retention, budgets: Sequence[Budget], tried: Mapping[int, FloorFound]) -> str:
    wanted = ", ".join(f"{name} {value:g}" for name, value in floor.model_dump().items() if value is not None)
    smallest = min(tried)
    which = "the smallest" if smallest == 0 else f"the smallest of {len(tried)} that were built"
    heads = [f"budget.{key}" for key in ("query_heads", "kv_groups") if getattr(budgets[smallest], key)]
    smaller = f"cut fewer heads ({', '.join(heads)})" if heads and smallest == 0 else "lower budget.multiple_of"
    return (
        f"budget.retention: no cut keeps {wanted}; {which}, {budgets[smallest].parameters:.4f} of the parameters, "
        f"keeps {tried[smallest]}: lower budget.retention, calibrate on more text, or {smaller}"
    )


def _foreseen(prepared: Prepared, foreseeing: Foreseeing, budget: Budget) -> FloorFound | None:
    """What a budget's expert will keep; `None` where the floor of widths does not allow it."""
    try:
        plan = foreseeing.plan(prepared, budget)
    except PlanError as error:
        log.info("budget %g: %s", budget.parameters, error)
        return None
    found = foreseeing.expected(prepared, plan, foreseeing.unseen(prepared, plan, budget))
    return FloorFound({name: each.retention for name, each in found.items()})


def _try(
    prepared: Prepared, profiles: Mapping[CorpusName, Profile], budget: Budget, evaluator: Measuring
) -> tuple[Plan, FloorFound]:
    """The plan under one budget, and what its expert keeps."""
    plan = team().lead(lambda: compose(prepared.spec, prepared.base, profiles, budget))
    meanwhile = Meanwhile(evaluator)
    with team().temporary(prepared.store) as folder:
        write_weights(prepared, plan, folder, passengers=meanwhile.passengers)
        return plan, measure(prepared, meanwhile, folder)


def measuring_held_back(prepared: Prepared) -> Measuring:
    """What measures experts on the documents that were held back from calibration."""
    held_back = [replace(each, evaluation=tuple(validation_documents(each))) for each in prepared.corpora.values()]
    settings = Evaluate(metrics=["bits_per_byte"], max_tokens=prepared.spec.calibration.max_tokens)
    return measuring(prepared.running, held_back, settings, other_tokens=False, limit="calibration.max_tokens")


def measure(prepared: Prepared, meanwhile: Meanwhile, folder: Path) -> FloorFound:
    """What the expert in a folder keeps of each corpus' held-back documents."""
    found = meanwhile.result(folder, prepared.running, silent)
    return FloorFound({name: bits_per_byte(each.per_document).point for name, each in found.corpora.items()})
