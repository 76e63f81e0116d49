"""A prepared spec on the way to a process elsewhere, which shares the store and the base's folder."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from expertprune.errors import UsageError
from expertprune.models.loading import run_dtype
from expertprune.models.running import RunningBase
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Spec
from expertprune.stages.validate import Found, Prepared, find, prepare


def sent(prepared: Prepared) -> dict[str, Any]:
    """A prepared spec as plain data: the arguments of `received`."""
    base = prepared.base
    means = {"device": base.device.type, "dtype": str(base.dtype).removeprefix("torch.")}
    return {"spec": prepared.spec.document(), "store": str(prepared.store.resolve()), "means": means}


def received(spec: Mapping[str, Any], store: str, means: Mapping[str, str]) -> Prepared:
    """The prepared spec again. Specs that differ in the budget alone share the running base.

    Args:
        means: the device and the dtype that the base runs with where the task comes from.
    """
    parsed = _parsed(spec)
    kept = parsed.budget.retention  # it holds calibration documents back
    budget = {"retention": kept.model_dump()} if kept is not None else {"parameters": 0.5}
    key = json.dumps({**spec, "budget": budget}, sort_keys=True)
    return prepare(_found(key, store, means["device"], means["dtype"]), parsed.budget)


@functools.lru_cache(maxsize=1)  # a base stays loaded from task to task; two would not fit
def _found(spec: str, store: str, device: str, dtype: str) -> Found:
    return run_with(find(_parsed(json.loads(spec)), Path(store)), device, dtype)


F = TypeVar("F", bound=Found)


def run_with(found: F, device: str | None, dtype: str = "auto") -> F:
    """What was found, with a base that runs on a type of device (`None`: as it does here).

    A GPU named in the spec stays. The machine that asks for tasks may lack the device.
    """
    if device is None:
        return found
    base = found.base
    place = base.device if base.device.type == device else torch.device(device)
    wanted = found.spec.base.dtype if dtype == "auto" else dtype
    base = replace(base, device=place, dtype=run_dtype(wanted, base.checkpoint.dtype, place))
    return replace(found, base=base, running=RunningBase(base))


def _parsed(spec: Mapping[str, Any]) -> Spec:
    return parse_spec(dict(spec), str(spec.get("name", "spec")), Path.cwd())


def check_same(task: str, expected: str, own: str) -> None:
    """Raises `UsageError` where this machine would make another result than the one that is asked for."""
    if own != expected:
        raise UsageError(
            f"{task}: {socket.gethostname()} would compute another result than the machine that asks: install the "
            "same versions of expertprune, torch and transformers, and give it the same files"
        )
