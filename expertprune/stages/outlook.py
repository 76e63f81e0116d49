"""Forecast what experts of several sizes will keep, before anything is cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import Plan
from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.composition.excess import Foreseen, foreseen_corpora, times_lost
from expertprune.composition.folds import Fold, folds_of, optimism
from expertprune.composition.outlook import BROKEN, ForeseenSize, Outlook
from expertprune.composition.plan import Scored, compose, widths_of
from expertprune.composition.scoring import needed_part
from expertprune.composition.widths import LayerWidths, cuts_units
from expertprune.corpora.catalogue import unnamed_sources
from expertprune.corpora.documents import CorpusName, corpus_names
from expertprune.engine.team import team
from expertprune.errors import CheckpointError, PlanError, SpecError
from expertprune.evaluation.retention import bits_per_byte
from expertprune.files import store_folder
from expertprune.models.costs import looked_up
from expertprune.progress import Track, silent
from expertprune.relevance import Pass
from expertprune.spec.schema import Budget, Spec
from expertprune.stages.profile import is_repaired, profiles_of
from expertprune.stages.sizes import of_size, problem_of, sized_keys
from expertprune.stages.validate import Found, Prepared, SpecLike, about, as_spec, find, prepare
from expertprune.tokenizing.languages import LANGUAGES, known_languages
from expertprune.units import KeptUnits

SIZES = tuple(step / 20 for step in range(1, 11))
COMPARED = 0.25  # the size nearest to it is foreseen with the other allocation too
TESTED = 0.25  # of units or parameters: larger cuts than this, the law was not fitted to


def forecast(
    spec: SpecLike,
    sizes: Sequence[float] = SIZES,
    store: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    track: Track = silent,
    run: bool = True,
    built: str | Path | None = None,
) -> Outlook:
    """Foresee from profiles what experts of several sizes keep. Nothing is cut, and no expert is run.

    Args:
        sizes: fractions to remove in place of the spec's budget: of all parameters where it says `parameters`,
            `max_parameters` or `retention`, else of every structure that it names.
        run: whether profiles that are missing may be made.
        built: an expert of the same base that was built and evaluated. What each corpus lost there, over what
            profiles alone foresee of it, corrects every size.

    Raises:
        CheckpointError: `built` says nothing of these corpora, or was cut from another base.
        SpecError: illegal sizes, or a budget that is not foreseen: whole layers, or vocabulary rows alone.
        PlanError: no size can be reached.
    """
    parsed = as_spec(spec, overrides)
    keys = _keys(parsed.budget, sizes)
    with about(spec):
        found = find(parsed, store_folder(store), evaluate=False)
    prepared, unreachable = _prepared(found, {size: of_size(parsed.budget, keys, size) for size in sorted(sizes)})
    first = next(iter(prepared.values()))
    expert = _built(Path(built), first) if built is not None else None
    profiles = profiled(first, track, run, expert)
    foreseeing = Foreseeing(profiles)
    corrections = team().lead(lambda: foreseeing.times_lost(expert, first)) if expert is not None else {}
    reached: list[ForeseenSize] = []
    compared = min(prepared, key=lambda size: abs(size - COMPARED))
    with track("forecast", len(prepared)) as step:
        for size, each in prepared.items():
            try:
                plan, kept = team().lead(lambda each=each: foreseeing.sized(each, corrections))  # type: ignore[misc]
            except PlanError as error:
                unreachable[size] = str(error)
            else:
                instead = _instead(found, each, profiles, corrections) if size == compared else {}
                reached.append(_size(size, plan, each, kept, instead))
            step()
    if not reached:
        raise PlanError(f"no size can be reached; {_first(unreachable)}")
    return Outlook(
        name=parsed.name,
        base=found.base.name,
        parameters=found.base.checkpoint.parameters,
        allocation=next(iter(prepared.values())).spec.compose.allocation,
        sizes=reached,
        unreachable=unreachable,
        times_lost=corrections,
        breaks={name: _breaks(reached, name) for name in reached[0].corpora},
        warnings=list(_warnings(found, reached)),
    )


def profiled(
    prepared: Prepared, track: Track = silent, run: bool = True, expert: Expert | None = None
) -> dict[CorpusName, Profile]:
    """The profiles of all corpora with the gradient pass, whatever the spec's criterion needs beside it.

    Args:
        expert: one whose criterion shall score units too.
    """
    part = needed_part(expert.spec.relevance) if expert is not None else None
    return profiles_of(prepared, track, run, also=[_gradient(prepared.spec), *([part] if part is not None else [])])


def _gradient(spec: Spec) -> ProfilePart:
    return ProfilePart(Pass.GRADIENT, spec.relevance.loss)


class Foreseeing:
    """What experts of one spec keep at several sizes, by the profiles of `profiled`; sizes share the scores of units."""

    def __init__(self, profiles: Mapping[CorpusName, Profile]) -> None:
        self.profiles, self.folds, self.known = profiles, folds_of(profiles), Scored()

    def plan(self, prepared: Prepared, budget: Budget | None = None) -> Plan:
        """See `compose`."""
        return compose(prepared.spec, prepared.base, self.profiles, budget, self.known)

    def unseen(
        self,
        prepared: Prepared,
        plan: Plan,
        budget: Budget | None = None,
        spec: Spec | None = None,
        widths: Sequence[LayerWidths] | None = None,
    ) -> dict[str, float]:
        """How many times what the plan's own documents say other text loses, by corpus (see `optimism`).

        Args:
            budget: of the plan, where it is not the spec's.
            spec: by which the plan's units were chosen, where it is another one.
            widths: of the plan's layers, where they are not what the budget comes to.
        """

        def choose(fold: Fold) -> Sequence[KeptUnits] | None:
            known = fold.known if spec is None else None  # what is known are scores by the prepared one
            with contextlib.suppress(PlanError):  # which heads can go together depends on the scores
                return compose(spec or prepared.spec, prepared.base, fold.others, budget, known, widths).kept
            return None

        return optimism(self.profiles, _gradient(prepared.spec), plan.kept, self.folds, choose)

    def expected(self, prepared: Prepared, plan: Plan, times: Mapping[str, float]) -> dict[str, Foreseen]:
        """What the expert of a plan keeps of each corpus.

        Args:
            times: how many times what the plan's own documents say each corpus loses.
        """
        return foreseen_corpora(self.profiles, _gradient(prepared.spec), plan.kept, is_repaired(prepared.spec), times)

    def sized(self, prepared: Prepared, corrections: Mapping[str, float]) -> tuple[Plan, dict[str, Foreseen]]:
        """The plan of a spec, and what its expert keeps. Raises `PlanError` where its budget is not reachable."""
        plan = self.plan(prepared)
        return plan, self.expected(prepared, plan, _together(self.unseen(prepared, plan), corrections))

    def times_lost(self, expert: Expert, prepared: Prepared) -> dict[str, float]:
        """How many times what profiles foresee each corpus has lost, of those that were measured of an expert.

        Text that did not choose the expert's units says by itself what other text loses.
        """
        budget = expert.spec.budget
        if budget.retention is not None:  # a count is exact, where a fraction may ask for a step more
            budget = budget.model_copy(update={"retention": None, "max_parameters": expert.plan.parameters.after})
        same = {
            str(name)
            for name, each in self.profiles.items()
            if each.about.key.same_text(expert.plan.profiles.get(str(name)))
        }
        spec, widths = self._chosen_by(expert, prepared), widths_of(expert.plan, prepared.base)
        budgeted: Sequence[LayerWidths] = ()
        with contextlib.suppress(PlanError):
            budgeted = widths_of(compose(spec, prepared.base, self.profiles, budget), prepared.base)
        # A plan may have been edited: then no budget comes to these widths, and documents choose the units in them.
        own = widths if widths != budgeted else None
        times = self.unseen(prepared, expert.plan, budget, spec, own)
        foreseen = self.expected(prepared, expert.plan, {name: times[name] for name in same})
        return {
            name: times_lost(kept, foreseen[name].retention)
            for name, kept in _retention(expert).items()
            if name in foreseen
        }

    def _chosen_by(self, expert: Expert, prepared: Prepared) -> Spec:
        """The spec by which an expert's units were chosen, with the prepared one's corpora where some have no profile."""
        own = expert.spec
        if all(name in self.profiles for name in corpus_names(own)):
            return own
        return prepared.spec.model_copy(update={"relevance": own.relevance, "compose": own.compose})


def _together(times: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {name: value * more.get(name, 1.0) for name, value in times.items()}


def _built(folder: Path, prepared: Prepared) -> Expert:
    """An expert whose losses can be compared with what is foreseen. Raises `CheckpointError` for any other."""
    expert = Expert.load(folder)
    if expert.base.digest != prepared.base.digest:
        raise CheckpointError(
            f"{folder}: was cut from another base than the spec's; name an expert of {prepared.base.name}"
        )
    if expert.plan.gone or expert.plan.vocabulary is not None:
        what = "whole layers" if expert.plan.gone else "vocabulary rows"
        raise CheckpointError(f"{folder}: has lost {what}, whose cost is not foreseen; name an expert without that cut")
    if expert.plan.parameters.after == expert.plan.parameters.before:
        raise CheckpointError(f"{folder}: has lost nothing, so it says nothing of a cut; name an expert that was cut")
    if is_repaired(expert.spec) != is_repaired(prepared.spec):
        raise CheckpointError(
            f"{folder}: compensation.method is {expert.spec.compensation.method} there; name an expert of the spec's"
        )
    if not any(str(name) in _retention(expert) for name in prepared.corpora):
        names = ", ".join(map(str, prepared.corpora))
        raise CheckpointError(
            f"{folder}: bits per byte of {names} were not measured: run expertprune evaluate {folder}"
        )
    return expert


def _retention(expert: Expert) -> dict[str, float]:
    """Bits per byte of the base over the expert's, of each corpus of which a byte was measured."""
    measured = expert.evaluation.corpora if expert.evaluation is not None else {}
    found = {name: bits_per_byte(each.per_document).point for name, each in measured.items()}
    return {name: kept for name, kept in found.items() if math.isfinite(kept)}


def _keys(budget: Budget, sizes: Sequence[float]) -> list[str]:
    """The keys that a size stands for. Raises `SpecError` with all that is wrong."""
    problems = [f"sizes: {problem}" for size in sizes if (problem := problem_of(size)) is not None]
    if not sizes:
        problems.append("sizes: name at least one, such as 0.25")
    if budget.layers:
        problems.append("budget.layers: what whole layers cost is not foreseen: leave it out, or sweep")
    elif not cuts_units(budget) and budget.retention is None:
        problems.append("budget: a forecast needs FFN neurons, heads or routed experts that go, or budget.parameters")
    if problems:
        raise SpecError(problems)
    return sized_keys(budget)


def _prepared(found: Found, budgets: Mapping[float, Budget]) -> tuple[dict[float, Prepared], dict[float, str]]:
    """The spec under each budget, and why others cannot be reached."""
    prepared: dict[float, Prepared] = {}
    unreachable: dict[float, str] = {}
    for size, budget in budgets.items():
        try:
            prepared[size] = prepare(found, budget)
        except PlanError as error:
            unreachable[size] = str(error)
    if not prepared:
        raise PlanError(f"no size can be reached; {_first(unreachable)}")
    return prepared, unreachable


def _first(unreachable: Mapping[float, str]) -> str:
    size, why = next(iter(unreachable.items()))
    return f"{size:g}: {why}"


def _size(
    removed: float, plan: Plan, prepared: Prepared, corpora: Mapping[str, Foreseen], instead: Mapping[str, Foreseen]
) -> ForeseenSize:
    before, after = plan.parameters.before, plan.parameters.after
    checkpoint, family = prepared.base.checkpoint, prepared.base.family
    own, more = looked_up(checkpoint, family), looked_up(checkpoint, family, prepared.rows)
    return ForeseenSize(removed, after, after / before, (before - own) / (after - more), corpora, instead)


def _instead(
    found: Found, chosen: Prepared, profiles: Mapping[CorpusName, Profile], corrections: Mapping[str, float]
) -> dict[str, Foreseen]:
    """What the other allocation would keep under the same budget; empty where the base or the budget has none."""
    try:
        prepared = _otherwise(found, chosen.spec)
        found_there: dict[str, Foreseen] = team().lead(lambda: Foreseeing(profiles).sized(prepared, corrections))[1]
    except PlanError:
        return {}
    return found_there


def _otherwise(found: Found, spec: Spec) -> Prepared:
    """The spec under the other allocation; raises `PlanError` where the base or the budget has none."""
    other = _other_allocation(spec.compose.allocation)
    changed = {"compose": spec.compose.model_copy(update={"allocation": other}), "serve_with": ["transformers"]}
    return prepare(replace(found, spec=spec.model_copy(update=changed)))


def _other_allocation(allocation: str) -> str:
    return "global" if allocation == "uniform" else "uniform"


def _breaks(sizes: Sequence[ForeseenSize], corpus: str) -> float | None:
    return next((size.removed for size in sizes if size.corpora[corpus].retention < BROKEN), None)


def notes(prepared: Prepared) -> Iterator[str]:
    """What a user should know before a build."""
    budget, chosen = prepared.spec.budget, prepared.spec.compose.allocation
    if prepared.allocation_left_open and not budget.layers and cuts_units(budget):
        with contextlib.suppress(PlanError):
            other = _otherwise(prepared, prepared.spec).spec.compose.allocation
            yield (
                f"compose.allocation: auto is {chosen} here; expertprune forecast says what {other} would keep beside "
                "it, before anything is cut"
            )
    yield from unnamed_languages(prepared)
    if unnamed := unnamed_sources(prepared.spec):
        yield f"corpora.sources: {', '.join(unnamed)}: no dimension, general or evaluate.others names it, so it is not read"


def unnamed_languages(found: Found) -> Iterator[str]:
    """A warning of languages that the base's tokenizer was made for and no corpus names, if there are some."""
    spec: Spec = found.spec
    named = set(spec.dimensions.language or ()) | set(spec.general)
    if not spec.dimensions.language or spec.general:
        named.add("en")  # what shipped corpora are in
    others = [LANGUAGES[code] for code in known_languages(found.base.tokenizer) if code not in named]
    if others:
        yield (
            f"the base's tokenizer was made for {', '.join(others)} too, and no corpus names them: they degrade most, "
            "and no forecast sees it; list what you need as a language or a general corpus"
        )


def _warnings(found: Found, sizes: Sequence[ForeseenSize]) -> Iterator[str]:
    yield from unnamed_languages(found)
    if found.spec.budget.vocabulary is not None:
        yield "vocabulary rows that go count in the size, but what they cost in bits is not foreseen"
    if any(size.removed > TESTED for size in sizes):
        yield f"figures of cuts above {TESTED:.0%} are extrapolated: no expert was built to test them"
