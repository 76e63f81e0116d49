"""From a prepared spec to its plan: profile its corpora, then compose."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from expertprune.artifacts.plan import Plan
from expertprune.composition.plan import compose as compose_profiles
from expertprune.composition.rows import choose_rows
from expertprune.corpora.batches import Batch, make_batches, tokenize
from expertprune.corpora.documents import Document
from expertprune.files import digest_of, write_json
from expertprune.models.masking import Divergence
from expertprune.progress import Track
from expertprune.stages.profile import profiles_of
from expertprune.stages.validate import Prepared
from expertprune.units import KeptUnits


def decide(prepared: Prepared, track: Track, run: bool = True) -> Plan:
    """The plan of a spec whose budget says how much goes.

    Args:
        run: whether profiles that are missing may be made.

    Raises:
        SpecError: a profile is missing and must not be made.
        PlanError: the budget is not reachable.
    """
    spec, base = prepared.spec, prepared.base
    profiles = profiles_of(prepared, track, run=run)
    first = {str(name): profile.digest for name, profile in profiles.items()}
    kept: list[KeptUnits] | None = None
    rows = choose_rows(spec, base, profiles) if spec.budget.vocabulary is not None else None
    for number in range(1, spec.compose.rounds):
        kept = compose_profiles(spec, base, profiles, earlier=kept, part=number / spec.compose.rounds).kept
        profiles = profiles_of(prepared, track, kept, run)
    if spec.compose.allocation != "search":
        plan = compose_profiles(spec, base, profiles, earlier=kept, vocabulary=rows)
    else:
        with track("search", spec.compose.search.trials) as step:
            plan = compose_profiles(
                spec, base, profiles, _Remembered(prepared, list(first.values()), step), kept, vocabulary=rows
            )
    plan.profiles = first
    return plan


class _Remembered:
    """A search's fitness; what was tried is kept in the store, so a search that was interrupted goes on."""

    def __init__(self, prepared: Prepared, profiles: list[str], step: Callable[[], None]) -> None:
        spec = prepared.spec.document()
        sections = {key: spec[key] for key in ("relevance", "compose", "budget", "dimensions", "general")}
        name = digest_of([prepared.base.digest, str(prepared.base.dtype), profiles, sections])
        self.path: Path = prepared.store / "searches" / f"{name}.json"
        self._prepared, self._step = prepared, step
        self._divergence: Divergence | None = None
        self._known: dict[str, float] = {}
        with contextlib.suppress(OSError, json.JSONDecodeError):
            self._known = json.loads(self.path.read_text(encoding="utf-8"))

    def __call__(self, kept: Sequence[KeptUnits]) -> float:
        key = digest_of([asdict(units) for units in kept])
        if key not in self._known:
            if self._divergence is None:
                base = self._prepared.base
                batches = search_batches(self._prepared)
                self._divergence = Divergence(self._prepared.model, base.family, base.layers, batches)
            self._known[key] = self._divergence(kept)
            write_json(self.path, self._known)
        self._step()
        return self._known[key]


def search_batches(prepared: Prepared) -> list[Batch]:
    """Calibration text for the trials: documents of all corpora in turn, until there are tokens enough."""
    settings, most = prepared.spec.calibration, prepared.spec.compose.search.tokens
    queues = [list(prepared.calibration(name)[0]) for name in prepared.corpora]
    chosen: list[list[int]] = []
    seen: set[str] = set()
    while any(queues) and sum(map(len, chosen)) < most:
        for queue in filter(None, queues):
            document: Document = queue.pop(0)
            if document.digest not in seen and sum(map(len, chosen)) < most:
                seen.add(document.digest)
                chosen += tokenize([document], prepared.tokenizer, settings.max_tokens)
    return make_batches(chosen, settings.tokens_per_batch)
