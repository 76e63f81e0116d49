"""Memory limits of containers and jobs, as the kernel shows them in files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from expertprune.models import containers
from expertprune.models.spool import Limits

NEW, OLD = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def group(folder: Path, names: tuple[str, str], limit: object, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "" if names is NEW else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached}\n{prefix}active_file 1\n")


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are shown; the machine has 1000 bytes free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(containers, "_OWN", tmp_path / "own")
    monkeypatch.setattr(containers, "_MOUNT", tmp_path / "mount")
    return tmp_path / "mount"


def free(mount: Path, own: str) -> Any:
    (mount.parent / "own").write_text(own)
    return Limits().free(torch.device("cpu"))


def test_what_a_container_leaves_is_free_and_no_more(mount: Path) -> None:
    assert free(mount, "0::/\n") == Limits().free(torch.device("cpu")) == 1000, "no container"
    group(mount, NEW, "max", 999)
    assert free(mount, "0::/\n") == 1000, "without a limit"
    group(mount, NEW, 800, 500, cached=99)
    assert free(mount, "0::/\n") == 400
    assert Limits(memory=300).free(torch.device("cpu")) == 300
    group(mount, NEW, 800, 950)
    assert free(mount, "0::/\n") == 0
    group(mount, NEW, 5000, 0)
    assert free(mount, "0::/\n") == 1000
    (mount.parent / "own").unlink()
    assert Limits().free(torch.device("cpu")) == 1000, "another system"


def test_the_group_around_a_jobs_own_may_have_the_limit(mount: Path) -> None:
    group(mount / "job_7", NEW, 700, 100)
    group(mount / "job_7" / "step_0", NEW, "max", 100)
    assert free(mount, "0::/job_7/step_0/task_1\n") == 601


def test_the_first_version_of_control_groups_counts_too(mount: Path) -> None:
    group(mount / "memory", OLD, 2**63 - 4096, 0)
    group(mount / "memory" / "docker" / "a:b", OLD, 600, 300, cached=49)
    assert free(mount, "9:cpu,cpuacct:/other\n4:memory:/docker/a:b\n0::/\n") == 350
    assert free(mount, "4:memory:/docker/of-the-host\n0::/\n") == 1000
