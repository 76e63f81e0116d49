"""A team as a Ray placement group: processes that share the passes of one task."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from expertprune.errors import ExpertpruneError, UnfinishedError, first_line


def perform_in_team(
    members: int, resources: Mapping[str, float], function: Callable[..., str], given: tuple[Any, ...]
) -> str:
    """Run a function in every member of a team; returns what the first one returns.

    This is itself a task of Ray. It reserves the resources of all members together, and starts one
    process for each, with the variables by which `torch.distributed` finds the others.

    Raises:
        UnfinishedError: a member died.
        ExpertpruneError: what a member raised.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": resources["num_cpus"], **({"GPU": resources["num_gpus"]} if resources["num_gpus"] else {})}
    group = placement_group([bundle] * members, strategy="PACK")
    try:
        ray.get(group.ready())

        def placed(rank: int, target: Callable[..., Any]) -> Any:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            # A process ends with its task: its GPU memory and its group of torch.distributed go with it.
            return ray.remote(max_calls=1)(target).options(**resources, scheduling_strategy=strategy, max_retries=0)

        nodes = placement_group_table(group)["bundles_to_node_id"]
        here = {rank: [*nodes.values()].count(nodes[rank]) for rank in range(members)}
        address, port = ray.get(placed(0, free_address).remote())
        running = [
            placed(rank, _member).remote(rank, members, here[rank], address, port, function, given)
            for rank in range(members)
        ]
        return str(ray.get(running)[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ExpertpruneError) else error from None
    except ray.exceptions.RayError as error:
        raise UnfinishedError(f"a member of the team died: {first_line(error)}") from None
    finally:
        remove_placement_group(group)


def free_address() -> tuple[str, int]:
    """An address of this node by which others reach it, and a port that is free there."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(ray.util.get_node_ip_address()), int(probe.getsockname()[1])


def _member(
    rank: int, members: int, here: int, address: str, port: int, function: Callable[..., str], given: tuple[Any, ...]
) -> str:
    """Be one of `members`, of which `here` share this node's memory."""
    from expertprune.engine.team import joined

    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(members), LOCAL_WORLD_SIZE=str(here), MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )  # fmt: skip
    with joined():
        return function(*given, rank == 0)
