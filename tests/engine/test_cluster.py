"""Tasks on a Ray cluster of two nodes on this machine: the local engine's numbers, also when a node is killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import expertprune
from expertprune.engine.cluster import Cluster
from expertprune.errors import UsageError
from expertprune.progress import Standing
from tests.calling import call
from tests.engine.test_team import check_same


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    """One corpus, so that there is one profile."""
    path = tmp_path / "tiny.yaml"
    one = {"dimensions": {"domain": "medical"}, "general": [], "evaluate": {"documents": 2}}
    path.write_text(yaml.safe_dump({**spec_data, **one}))
    return path


def test_ray_that_is_missing_is_one_line(spec_file: Path, no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["sweep", spec_file, "--budgets", "0.5", "--engine", "ray"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "ray", None)
        assert "run: pip install 'expertprune[ray]'" in call(*arguments, code=2).stderr
    pytest.importorskip("ray")
    assert "no Ray cluster answers at 127.0.0.1:1" in call(*arguments, "--address", "127.0.0.1:1", code=2).stderr


@pytest.mark.parametrize(
    ("nodes", "asked", "told"),
    [
        ([{"CPU": 4}, {"CPU": 4}], {"members": 2}, None),
        ([{"CPU": 4}, {"CPU": 4}], {"members": 3}, "room for 2 processes of 4 CPUs and 0 GPUs"),
        ([{"CPU": 4}, {"CPU": 5}], {"members": 4, "cpus": 2}, None),
        ([{"CPU": 4}, {"CPU": 5}], {"members": 5, "cpus": 2}, "room for 4 processes of 2 CPUs"),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 1, "GPU": 4}, {"CPU": 9}], {"members": 4}, "room for 3 processes of 1 CPUs and 1 G"),
        ([{"CPU": 16, "GPU": 1}], {"members": 10, "gpus": 0.1}, None),
        ([{"CPU": 16, "GPU": 1}], {"members": 11, "gpus": 0.1}, "room for 10 processes"),
        ([{"memory": 1}], {}, "no node of the cluster has 1 CPUs"),
    ],
)  # fmt: skip
def test_a_team_that_never_fits_the_cluster_is_refused(
    nodes: list[dict[str, float]], asked: dict[str, Any], told: str | None
) -> None:
    """A node that is gone does not count."""
    found = [{"Alive": True, "Resources": each} for each in nodes] + [{"Alive": False, "Resources": {"CPU": 64}}]
    cluster = Cluster(**asked)
    cluster._ray = SimpleNamespace(nodes=lambda: found)
    with contextlib.nullcontext() if told is None else pytest.raises(UsageError, match=told):
        cluster._demand()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that runs no tasks, and two nodes of one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.workers = [found.add_node(num_cpus=1) for _ in range(2)]
    yield found
    found.shutdown()


def stored_profiles(shared: Path) -> dict[Path, int]:
    """The profiles that are stored, and which file each is."""
    return {path: path.stat().st_ino for path in (shared / "profiles").glob("[!.]*.safetensors")}


@pytest.mark.slow
def test_a_sweep_survives_a_node_and_a_driver(tmp_path: Path, spec_file: Path, store: Path, nodes: Any) -> None:
    """The driver is killed when the profile is there, and a node while the next driver goes on. Nothing is done again."""
    budgets, shared, standings = [0.25, 0.5, 0.75], tmp_path / "shared", []
    arguments = ["sweep", spec_file, "--budgets", "0.25,0.5,0.75", "--store", shared]
    arguments += ["--engine", "ray", "--address", nodes.address, "--cpus-per-task", "1"]
    driver = subprocess.Popen([sys.executable, "-m", "expertprune", *map(str, arguments)], stderr=subprocess.PIPE)
    last = time.monotonic() + 300
    while not (before := stored_profiles(shared)):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < last
        time.sleep(0.05)
    driver.kill()
    driver.communicate()
    killed = []

    class Killing(Cluster):
        def run(self, tasks: Any, track: Any, finished: Any = None) -> None:
            def kill_once() -> None:
                if not killed:
                    killed.append(nodes.workers.pop())
                    nodes.remove_node(killed[0], allow_graceful=False)

            super().run(tasks, track, kill_once)

    def board(names: Any) -> Any:
        return contextlib.nullcontext(lambda name, standing: standings.append((name, standing)))

    with Killing(address=nodes.address, cpus=1, board=board) as engine:
        found = expertprune.sweep(spec_file, budgets, store=shared, engine=engine)
    assert killed
    assert found.document() == expertprune.sweep(spec_file, budgets, store=store).document()
    assert stored_profiles(shared) == before
    done = {name for name, standing in standings if standing == Standing("done", 1, 1)}
    assert done == {f"budget {budget}" for budget in budgets}


@pytest.mark.slow
def test_a_team_is_a_placement_group(tmp_path: Path, spec_file: Path, nodes: Any) -> None:
    """A team for its profile, and one for the expert."""
    while len(nodes.workers) < 2:  # one was killed
        nodes.workers.append(nodes.add_node(num_cpus=1))
    expertprune.build(spec_file, tmp_path / "one")
    with Cluster(address=nodes.address, cpus=1, members=2) as engine:
        expertprune.build(spec_file, tmp_path / "team", store=tmp_path / "shared", engine=engine)
    check_same(tmp_path / "one", tmp_path / "team")
    with pytest.raises(UsageError, match="no node of the cluster has 9 CPUs"), Cluster(nodes.address, cpus=9):
        pass
