"""Timings: base and expert in turn behind vLLM, on the same prompts."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError

from expertprune.artifacts.record import Record
from expertprune.errors import CheckpointError
from expertprune.files import TIMING, problems_of, read_json, staged_output, to_json

Role = Literal["base", "expert"]
ROLES: tuple[Role, ...] = get_args(Role)


class Load(Record):
    """What the servers are asked: requests, tokens of each, how many at a time, and how often all of it.

    With `chat`, prompts are messages, which the servers put into the chat template.
    """

    prompts: int = 32
    input_tokens: int = 128
    output_tokens: int = 64
    concurrency: int = 8
    rounds: int = 3
    chat: bool = False


class Figures(Record):
    """What is timed of one model; `None` where vLLM or the driver does not say it."""

    output_tokens_per_second: float | None
    time_to_first_token_ms: float | None
    time_per_output_token_ms: float | None
    kv_cache_tokens: float | None
    memory_bytes: float | None
    load_seconds: float | None
    bytes_per_token: float


# By field of `Figures`: its name for people, and whether more of it is better.
METRICS = {
    "output_tokens_per_second": ("output tokens per second", True),
    "time_to_first_token_ms": ("time to first token, ms", False),
    "time_per_output_token_ms": ("time per output token, ms", False),
    "kv_cache_tokens": ("tokens of KV cache", True),
    "memory_bytes": ("memory, bytes", False),
    "load_seconds": ("load time, s", False),
    "bytes_per_token": ("weights read per token, bytes", False),
}


class Run(Figures):
    """One run of one model: its round, and the tokens that were read and generated in so many seconds."""

    model: Role
    round: int
    input_tokens: int
    output_tokens: int
    seconds: float


class Ratio(Record):
    """Expert over base in the same round: over all rounds the median, the smallest and the largest."""

    median: float
    low: float
    high: float


class Timing(Record):
    """What `expertprune bench` measured.

    Attributes:
        load, arguments: what both servers were asked, and the arguments of vLLM's command line that both had.
        names: of the two models.
        models: medians over rounds.
        runs: in the order in which they were made.
        ratios: by metric; those without a figure in some run are left out.
        limit: base over expert in bytes of weights read per token. Where reading weights is all that takes time, an
            expert generates that much faster.
        machine: in words.
    """

    kind: Literal["throughput"] = "throughput"
    load: Load
    arguments: list[str]
    names: dict[Role, str]
    models: dict[Role, Figures]
    runs: list[Run]
    ratios: dict[str, Ratio]
    limit: float
    machine: str
    versions: dict[str, str]

    @classmethod
    def of(
        cls, runs: list[Run], *, load: Load, arguments: list[str], names: dict[Role, str], machine: str,
        versions: dict[str, str],
    ) -> Self:  # fmt: skip
        """The timing of these runs: medians by model, ratios round by round."""
        base, expert = ([run for run in runs if run.model == role] for role in ROLES)
        figures: dict[Role, dict[str, float | None]] = {role: {} for role in ROLES}
        ratios = {}
        for metric in METRICS:
            of_base, of_expert = ([getattr(run, metric) for run in mine] for mine in (base, expert))
            known = None not in (*of_base, *of_expert)
            figures["base"][metric] = statistics.median(of_base) if known else None
            figures["expert"][metric] = statistics.median(of_expert) if known else None
            if known:
                pairs = [mine / other for mine, other in zip(of_expert, of_base, strict=True)]
                ratios[metric] = Ratio(median=statistics.median(pairs), low=min(pairs), high=max(pairs))
        return cls(
            load=load,
            arguments=arguments,
            names=names,
            models={role: Figures.model_validate(found) for role, found in figures.items()},
            runs=runs,
            ratios=ratios,
            limit=base[0].bytes_per_token / expert[0].bytes_per_token,
            machine=machine,
            versions=versions,
        )

    def document(self) -> dict[str, Any]:
        """Plain data that gives the same timing back."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write it in the place of an earlier timing. Raises `CheckpointError` if something else is there."""
        with staged_output(path, TIMING, overwrite=True) as made:
            made.write_text(to_json(self.document()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What a file holds; `None` if there is none.

        Raises:
            CheckpointError: it is no timing, or one of another version.
        """
        if not os.path.lexists(path):
            return None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            problems = "; ".join(problems_of(error, cls)[:3])
            raise CheckpointError(f"{path}: is no timing ({problems}); delete it and measure again") from None
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete it and measure again") from None
