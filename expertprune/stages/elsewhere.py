"""A prepared spec on the way to a process elsewhere, which shares the store and the base's folder."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertprune.errors import UsageError
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.validate import Found, Prepared, find, prepare


def sent(prepared: Prepared) -> dict[str, Any]:
    """A prepared spec as plain data: the arguments of `received`."""
    return {"spec": prepared.spec.document(), "store": str(prepared.store.resolve())}


def received(spec: Mapping[str, Any], store: str) -> Prepared:
    """The prepared spec again. Specs that differ in the budget alone share the running base."""
    parsed = _parsed(spec)
    kept = parsed.budget.retention  # it holds calibration documents back
    budget = {"retention": kept.model_dump()} if kept is not None else {"parameters": 0.5}
    key = json.dumps({**spec, "budget": budget}, sort_keys=True)
    return prepare(_found(key, store), parsed.budget)


@functools.lru_cache(maxsize=1)  # a base stays loaded from task to task; two would not fit
def _found(spec: str, store: str) -> Found:
    return find(_parsed(json.loads(spec)), Path(store))


def _parsed(spec: Mapping[str, Any]) -> Spec:
    return parse_spec(dict(spec), str(spec.get("name", "spec")), Path.cwd())


def check_same(task: str, expected: str, own: str) -> None:
    """Raises `UsageError` where this machine would make another result than the one that is asked for."""
    if own != expected:
        raise UsageError(
            f"{task}: {socket.gethostname()} would compute another result than the machine that asks: give base.device "
            "and base.dtype in the spec, and install the same versions of expertprune, torch and transformers"
        )
