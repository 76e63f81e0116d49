"""Base and expert as the two sides of a chat: engines of our own, or endpoints that run already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertprune.artifacts.expert import Expert
from expertprune.artifacts.timing import ROLES, Role
from expertprune.files import folder_size, store_folder
from expertprune.formats import count, megabytes, percent
from expertprune.serving.chat.endpoints import Endpoint, connect
from expertprune.serving.processes import free_ports
from expertprune.serving.server import PATIENCE, Server, api_keys, log_file


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        size: its parameters and bytes for people; empty where they are not known.
        server: its engine, if it was started here.
    """

    role: Role
    name: str
    size: str
    endpoint: Endpoint
    server: Server | None = None

    @property
    def mode(self) -> str:
        """How it is asked."""
        return "chat template" if self.endpoint.chats else "no chat template: it continues the text"


@contextlib.contextmanager
def started(
    expert: Path,
    base: str | Path | None,
    arguments: Sequence[str],
    logs: Path,
    report: Callable[[str], None],
    store: Path | None = None,
    patience: float = PATIENCE,
) -> Iterator[list[Side]]:
    """Start an engine for the base and one for the expert; both run inside the block, and share the memory.

    Args:
        base: the base's folder, where it is no longer at its recorded place.
        arguments: of vLLM's command line, for both.
        logs: folder of the engines' logs.
        report: gets what is being done.

    Raises:
        CheckpointError: the folder is no expert, or its base cannot be found.
        UsageError: vLLM is missing, or memory is short.
        ServingError: an engine does not get healthy.
    """
    described, place = Expert.load(expert), store_folder(store)
    found = described.find_base(place, described.local_base(place, base))
    folders: dict[Role, Path] = {"base": found.folder, "expert": expert}
    servers: dict[Role, Server] = {}
    for role, port in zip(ROLES, free_ports(2), strict=True):
        log = log_file(logs, f"chat-{role}", port)
        servers[role] = Server(folders[role], port=port, arguments=arguments, log=log, model_name=role,
                               patience=patience, engines=2)  # fmt: skip
    names, sizes = {"base": described.base.model, "expert": described.name}, _sizes(described)
    keys = api_keys(arguments)
    with contextlib.ExitStack() as stack:
        sides = []
        for role, server in servers.items():  # one after the other: an engine measures free memory as it starts
            report(f"starting the {role}; vLLM's log: {server.log}")
            stack.enter_context(server)
            report(f"the {role} is healthy after {server.load_seconds:.0f} s")
            endpoint = connect(server.url, role, keys[0] if keys else None)
            sides.append(Side(role, names[role], sizes[role], endpoint, server))
        yield sides


def running(base_url: str, expert_url: str, expert: Path | None = None) -> list[Side]:
    """The sides of endpoints that run already. Their key, if they have one, is in the variable VLLM_API_KEY.

    Args:
        expert: its folder, which says the sizes and which models are meant where an endpoint serves several.

    Raises:
        UsageError: see `connect`, `api_keys`.
        CheckpointError: the folder is no expert.
    """
    key = next(iter(api_keys(())), None)
    described = Expert.load(expert) if expert is not None else None
    sizes = _sizes(described) if described is not None else dict.fromkeys(ROLES, "")
    wanted: dict[Role, str | None] = dict.fromkeys(ROLES)
    if described is not None:
        wanted = {"base": described.base.model.rpartition("/")[2], "expert": described.name}
    sides = []
    for role, url in zip(ROLES, (base_url, expert_url), strict=True):
        endpoint = connect(url, wanted[role], key)
        sides.append(Side(role, endpoint.model, sizes[role], endpoint))
    return sides


def _sizes(expert: Expert) -> dict[Role, str]:
    parameters, weights = expert.plan.parameters, expert.base.weight_bytes
    fraction = percent(parameters.after / parameters.before)
    return {
        "base": f"{count(parameters.before)} parameters, {megabytes(weights)}",
        "expert": f"{count(parameters.after)} parameters ({fraction}), {megabytes(folder_size(expert.folder))}",
    }
