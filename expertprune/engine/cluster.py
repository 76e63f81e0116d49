"""Tasks on a Ray cluster."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertprune.engine.tasks import RemoteCall, Task
from expertprune.errors import ExpertpruneError, UnfinishedError, UsageError, first_line
from expertprune.progress import Board, Standing, Track, no_board, silent

_RETRIES = 3  # of a task whose worker dies; Ray runs it on another node where there is one
_LOOK = 0.5  # seconds between two looks at the tasks' progress
_KNOCK = 10.0  # seconds in which a cluster's address must answer
_PASSED_ON = "EXPERTPRUNE_"  # environment variables that tasks get too


@dataclass
class Cluster:
    """Run each task on a Ray cluster, over a store that all its nodes see.

    Attributes:
        address: of the cluster, such as `auto`; `None`: that of `RAY_ADDRESS`, else one on this machine.
        gpus: of each process; default: one where the cluster has GPUs.
        cpus: of each process; default: one beside a GPU, else all of a node.
        members: processes that share the passes of one task (see `engine.team`).
        board: shows how far the tasks are.
        tell: gets the link to Ray's dashboard.
    """

    address: str | None = None
    gpus: float | None = None
    cpus: float | None = None
    members: int = 1
    board: Board = no_board
    tell: Callable[[str], None] = lambda message: None
    _ray: Any = field(default=None, init=False, repr=False)

    def __enter__(self) -> Cluster:
        """Connect to the cluster.

        Raises:
            UsageError: Ray is not installed, the cluster does not answer, or has too little for one task.
        """
        self._ray = _connected(self.address, self.tell)
        try:
            self._demand()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    @property
    def device(self) -> str:
        """The type of device that tasks have."""
        return "cuda" if self.gpus else "cpu"

    def _demand(self) -> None:
        """Decide what a process needs. Raises `UsageError` where no node has it, or all together not for every member."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if self.gpus is None:
            self.gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        if self.cpus is None:
            self.cpus = 1 if self.gpus else min((node["CPU"] for node in nodes if node.get("CPU")), default=1)
        needed = {name: each for name, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each}
        fitting = sum(
            min((math.floor(round(node.get(name, 0) / each, 6)) for name, each in needed.items()), default=self.members)
            for node in nodes
        )
        if not fitting:
            raise UsageError(
                f"--engine ray: no node of the cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs, which a task needs: "
                "lower --cpus-per-task or --gpus-per-task"
            )
        if fitting < self.members:
            raise UsageError(
                f"--members {self.members}: the cluster has room for {fitting} processes of {self.cpus:g} CPUs and "
                f"{self.gpus:g} GPUs at a time; lower --members, --cpus-per-task or --gpus-per-task"
            )

    def run(self, tasks: Sequence[Task], track: Track, finished: Callable[[], object] | None = None) -> None:
        """Run the tasks that are not done, all at once as far as the cluster has room.

        Raises:
            UnfinishedError: a task's workers died again and again.
            UsageError: the nodes do not see the store of this machine.
            ExpertpruneError: what a task itself raised; the other tasks are run to their end first.
        """
        missing = [task for task in tasks if not task.done()]
        if not missing:
            return
        steps = self._steps()
        pending = {self._submitted(task, steps): task for task in missing}
        failures: list[ExpertpruneError] = []
        with self.board([task.name for task in missing]) as show:
            while pending:
                ready, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=_LOOK)
                with contextlib.suppress(self._ray.exceptions.RayError):  # tasks go on though nobody can tell how far
                    for name, standing in self._ray.get(steps.read.remote()).items():
                        show(name, standing)
                for reference in ready:
                    task = pending.pop(reference)
                    try:
                        self._check(task, reference)
                        show(task.name, Standing("done", 1, 1))
                    except ExpertpruneError as error:
                        show(task.name, Standing("failed", 0, 1))
                        failures.append(error)
                    if finished is not None:
                        finished()
        if failures:
            raise failures[0]

    def _steps(self) -> Any:
        """The actor that knows how far tasks are, on the node of this process: other nodes may die."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=True)
        return self._ray.remote(num_cpus=0)(_Steps).options(scheduling_strategy=here).remote()

    def _submitted(self, task: Task, steps: Any) -> Any:
        passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        resources = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.members == 1:
            run = self._ray.remote(_perform).options(**resources, max_retries=_RETRIES, name=task.name)
            return run.remote(task.name, task.elsewhere, passed, steps)
        from expertprune.engine.gathering import perform_in_team

        run = self._ray.remote(perform_in_team).options(
            num_cpus=0, max_retries=_RETRIES, retry_exceptions=[UnfinishedError], name=task.name
        )
        return run.remote(self.members, resources, _perform, (task.name, task.elsewhere, passed, steps))

    def _check(self, task: Task, reference: Any) -> None:
        """Take what a task returned, and see that its result has come to the store."""
        try:
            host = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExpertpruneError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise UnfinishedError(
                f"{task.name}: its worker died, {_RETRIES + 1} times in all ({first_line(error)}); what is finished stays: "
                "run the same command again"
            ) from None
        if not task.done():
            raise UsageError(
                f"{task.name}: {host} has done it, but its result is not in the store of this machine: give --store a "
                "folder that all nodes of the cluster see"
            )


def _connected(address: str | None, tell: Callable[[str], None]) -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("--engine ray: Ray is not installed; run: pip install 'expertprune[ray]'") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray would warn that it will change its default
    wanted = address or os.environ.get("RAY_ADDRESS")
    try:
        if wanted is not None:
            _knock(wanted)
        context = ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"--address: no Ray cluster answers at {wanted or 'this machine'} ({first_line(error)}); start one with "
            "'ray start --head', or leave --address and RAY_ADDRESS out for one on this machine"
        ) from None
    if context.dashboard_url:
        tell(f"dashboard: http://{context.dashboard_url}")
    return ray


def _knock(address: str) -> None:
    """Raises `OSError` where nobody listens at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()


# --- in the processes of the cluster ----------------------------------------------------------------------------------


class _Steps:
    """An actor that knows how far each task is."""

    def __init__(self) -> None:
        self._standings: dict[str, Standing] = {}

    def put(self, name: str, standing: Standing) -> None:
        self._standings[name] = standing

    def read(self) -> dict[str, Standing]:
        """What has changed since the last time."""
        changed, self._standings = self._standings, {}
        return changed


def _perform(name: str, call: RemoteCall, environment: dict[str, str], steps: Any, leads: bool = True) -> str:
    """Do a task; returns the name of the host."""
    os.environ.update(environment)
    call(_reported(name, steps) if leads else silent)
    return socket.gethostname()


def _reported(name: str, steps: Any) -> Track:
    @contextlib.contextmanager
    def track(stage: str, total: int) -> Iterator[Callable[[], None]]:
        done, told = 0, time.monotonic()
        steps.put.remote(name, Standing(stage, 0, total))

        def step() -> None:
            nonlocal done, told
            done += 1
            if time.monotonic() - told > _LOOK:
                told = time.monotonic()
                steps.put.remote(name, Standing(stage, done, total))

        yield step

    return track
