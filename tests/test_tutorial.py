"""The commands of docs/tutorial.md run in their order, with a real vLLM and a stand-in of the hub; then docs/python.md."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertprune.serving.processes import free_port
from tests.documents import ROOT, blocks, commands, page
from tests.hub import Hub, environment, serving
from tests.serving.fake_endpoint import fake_endpoint

TUTORIAL = page("docs/tutorial.md")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in blocks("sh", TUTORIAL)
    for line in block.splitlines()
    if line.startswith(("expertprune ", "curl "))
]
NAMED = {shlex.split(command)[1]: command for command in COMMANDS if command.startswith("expertprune ")}
CURLS = [command for command in (*COMMANDS, *commands()) if command.startswith("curl ")]
FEW = {  # seconds, not minutes
    "calibration.documents": 2,
    "calibration.max_tokens": 128,
    "evaluate.documents": 2,
    "evaluate.max_tokens": 128,
}
SMALL = ("--enforce-eager", "--max-model-len", "256")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


def settings(store: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "EXPERTPRUNE_STORE": str(store), "PATH": path}


def run(words: list[str], place: Path, environment: dict[str, str], typed: str | None = None) -> str:
    """What a command prints."""
    if words[0] == "expertprune":
        words = [sys.executable, "-m", *words]
    done = subprocess.run(words, cwd=place, env=environment, input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout


def test_the_page_goes_from_data_to_the_hub_and_shows_the_spec_that_ships() -> None:
    assert list(NAMED) == ["init", "validate", "build", "inspect", "report", "serve", "chat", "push"]
    assert len(CURLS) == 2
    shipped = page("profiles/bicycle-support.yaml").partition("\n")[2]
    assert blocks("yaml", TUTORIAL)[0] == shipped


@pytest.mark.slow
def test_the_commands_until_there_is_an_expert(place: Path, real_store: Path) -> None:
    for name in ("init", "validate", "build", "inspect", "report"):
        fewer = [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")] if name == "build" else []
        run([*shlex.split(NAMED[name]), *fewer], place, settings(real_store))
    about = json.loads((place / "experts" / "support" / "expertprune.json").read_text())
    kept = about["plan"]["budget"]["ffn"]["kept"]
    assert sum(kept) == 36_864  # of 30 layers of 1536 together, 0.2 less: 576 times 64
    measured = about["evaluation"]["corpora"]["domain/bicycles"]
    assert measured["documents"] == 2
    assert 0.5 < measured["metrics"]["bits_per_byte"]["retention"] < 1.1
    assert (place / "experts" / "support" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.vllm
def test_what_is_served_answers_the_curl_lines_of_the_page_and_of_readme(
    place: Path, real_store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    port = str(free_port())
    words = shlex.split(NAMED["serve"].replace("8000", port))
    arguments = [sys.executable, "-m", *words, "--patience", "600", "--", *SMALL]
    variables = {**settings(real_store), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(arguments, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        said = [next(server.stdout, "") for _ in range(4)]  # it speaks once the server is healthy, or ends
        assert f"endpoint: http://127.0.0.1:{port}/v1\n" in said, (tmp_path / "log").read_text()
        for curl in CURLS:
            asked = shlex.split(curl.replace("8000", port).replace("english-medical-qa", "bicycle-support"))
            choice = json.loads(run(asked, place, variables))["choices"][0]
            assert (choice["text"] if "text" in choice else choice["message"]["content"]).strip()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130


@pytest.mark.slow
def test_both_answer_in_the_terminal(place: Path, real_store: Path) -> None:
    """With stand-ins of the two engines, under the names that the expert's folder gives them."""
    with (
        fake_endpoint(["Bleed the brake."], models=("smollm2-135m-instruct",)) as base,
        fake_endpoint(["Bleed the line."], models=("bicycle-support",)) as expert,
    ):
        words = [*shlex.split(NAMED["chat"]), "--base-url", base.url, "--expert-url", expert.url]
        shown = run(words, place, settings(real_store), "My brake lever is soft.\n")
        heard = [each.asked[0][1]["messages"][0]["content"] for each in (base, expert)]
    assert heard == ["My brake lever is soft."] * 2
    assert "Bleed the brake." in shown
    assert "Bleed the line." in shown


@pytest.mark.slow
def test_the_expert_is_pushed(place: Path, real_store: Path) -> None:
    folder = place / "experts" / "support"
    with serving(Hub()) as hub:
        run(shlex.split(NAMED["push"]), place, {**settings(real_store), **environment(hub, place / "hub")})
    files = hub.repositories["owner/bicycle-support"].files
    stays = {"report.html", "changes.json"}  # they show what evaluated the expert
    assert {name for name in files if name != ".gitattributes"} == {path.name for path in folder.iterdir()} - stays
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in files["README.md"].decode()
    assert not [name for name, content in files.items() if str(place).encode() in content]


@pytest.mark.slow
def test_the_python_snippet(place: Path, real_store: Path) -> None:
    """The same spec and documents, so the profiles of the tutorial are used again."""
    (place / "profiles").symlink_to(ROOT / "profiles")
    (snippet,) = blocks("python", page("docs/python.md"))
    fewer = snippet.replace('"calibration.documents": 6,', f"**{FEW},")
    assert fewer != snippet
    printed = run([sys.executable, "-c", fewer], place, settings(real_store))
    parameters, retention = printed.strip().splitlines()[-2:]
    assert parameters == str(134_515_008 - 30 * 1536 * 3 * 576 + 36_864 * 3 * 576)
    assert 0.5 < float(retention) < 1.1
