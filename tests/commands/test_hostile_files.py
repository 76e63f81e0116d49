"""Files that no program should choke on: each is refused in a line that names it, soon, without a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bench.torture.children import import_rooms
from expertprune.errors import CheckpointError
from expertprune.files.reading import JSON_VALUES
from expertprune.models.gguf.reading import header_of, opened_gguf
from expertprune.serving.engine import check_folder
from tests.calling import call, call_json
from tests.limits import frugal
from tests.vocabularies import save_worded

Data = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What commands import takes seconds, which are not the refusals'."""
    import_rooms()


def refused(*arguments: Any) -> str:
    """The message of a command that refuses what it reads, soon and without much memory."""
    with frugal():
        message = call(*arguments, code=2).stderr
    assert "error: " in message.lower()
    return message


def written(folder: Path, data: Data) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def poison(folder: Path, tensor: str, row: int | None) -> None:
    """Put NaN into a row of a tensor, or into all of it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][slice(None) if row is None else row] = torch.nan
            save_file(tensors, path, metadata={"format": "pt"})


def test_a_row_that_is_not_finite_is_an_error_though_no_text_uses_it(
    tmp_path: Path, tiny_llama: Path, spec_data: Data
) -> None:
    spec_data["base"] = str(shutil.copytree(tiny_llama, tmp_path / "base"))
    poison(tmp_path / "base", "model.embed_tokens.weight", 2)  # <unk>
    message = refused("build", written(tmp_path, spec_data), "--out", tmp_path / "expert")
    assert "model.embed_tokens.weight holds values that are not finite" in message
    assert not (tmp_path / "expert").exists()


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


TEXT, ARRAY = number(8, 4), number(9, 4)  # types of values
KEY = number(1) + b"k"
NAMED = number(20) + b"general.architecture" + TEXT + number(5) + b"llama"
BLOCKS = number(17) + b"llama.block_count" + number(4, 4) + number(10**9, 4)
GGUFS = {  # number of tensors and of keys, what follows, and the message
    "counts": (2**60, 2**60, b"", "shorter than its header says"),
    "numbers": (0, 1, KEY + ARRAY + number(0, 4) + number(2**60), "shorter than its header says"),
    "texts": (0, 1, KEY + ARRAY + TEXT + number(2**60), "shorter than its header says"),
    "text": (0, 1, KEY + TEXT + number(2**63), "shorter than its header says"),
    "arrays": (0, 1, KEY + ARRAY + ARRAY + number(2) + ARRAY, "has an array of values of type 9"),
    "type": (0, 1, KEY + number(77, 4), "is of type 77"),
    "dimensions": (1, 0, KEY + number(9, 4), "has 9 dimensions"),
    "blocks": (0, 2, NAMED + BLOCKS, "llama.block_count is 1000000000, and it has only 0 tensors"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_gguf_file_that_promises_more_than_it_has(tmp_path: Path, case: str) -> None:
    tensors, keys, content, words = GGUFS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + number(tensors) + number(keys) + content + b"\0" * 1000)
    with pytest.raises(CheckpointError, match=words):
        header_of(path, opened_gguf(path))


# --- plans and experts ----------------------------------------------------------------------------------------------

PLANS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda data: data["layers"][0]["kept"].update(ffn="0-999999999999"), "there are only 32"),
    (lambda data: data["layers"][0]["of"].update(ffn=10**12), "layers.0.of.ffn"),
    (lambda data: data["parameters"].update(before=0), "parameters.before"),
    (lambda data: data["layers"].pop(0), "layer 1 stands where layer 0 belongs"),
    (lambda data: data["layers"].pop(), "was edited: its 2 layers are not the 3 of"),
    (lambda data: data.update(spec={"name": 3}), "error"),
]


def test_a_plan_of_wrong_types_and_sizes(tmp_path: Path, spec_data: Data) -> None:
    data = {**spec_data, "relevance": "magnitude", "compensation": "none"}
    path = tmp_path / "plan.json"
    call("compose", written(tmp_path, data), "--out", path)
    whole = path.read_text()
    for change, words in PLANS:
        plan = json.loads(whole)
        change(plan)
        path.write_text(json.dumps(plan))
        assert words in refused("prune", path, "--out", tmp_path / "expert")
    refused("inspect", path)


def test_millions_of_values_in_few_bytes(tmp_path: Path) -> None:
    """Mappings take most memory of what counts as so many values."""
    path, value = tmp_path / "plan.json", '{"ab": 1000}'
    most = JSON_VALUES // (1 + sum(map(value.count, ":[{")))
    for count, words in ((most - 1, "not a plan"), (most + 1, f"more than {JSON_VALUES:,} values")):
        path.write_text("[" + ",".join([value] * count) + "]")
        assert words in refused("prune", path, "--out", tmp_path / "expert")


OWN = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the weights have no more than"),
    "kind": ({"model_type": ["llama"]}, "model_type: must be a name"),
    "groups": ({"model_type": "olmoe", "num_experts": 4, "n_group": "x"}, "config.json"),
    "context": ({"max_position_embeddings": 2**40}, "context_length is 1099511627776"),
}


@pytest.mark.parametrize("case", OWN)
def test_a_folder_that_is_run_or_exported_has_a_config_of_wrong_types_and_sizes(
    expert: Path, tmp_path: Path, case: str
) -> None:
    """The base's config is checked before; this one is read by everything that runs it."""
    changes, words = OWN[case]
    worded = save_worded(tmp_path / "worded")
    for folder in (expert, worded):
        changed(folder / "config.json", lambda data: data | changes)
    assert words in refused("export", worded, "--out", tmp_path / "x.gguf")
    if case in ("context", "groups"):  # of which evaluation makes nothing
        return
    assert str(expert) in refused("evaluate", expert)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        check_folder(expert)


def test_an_exported_tokenizer_with_ids_that_no_vocabulary_has(tmp_path: Path) -> None:
    far = 2**31  # a list of so many tokens would take 8 GB
    changed(save_worded(tmp_path / "base") / "tokenizer.json", lambda data: data["model"]["vocab"].update(far=far))
    assert f"token 'far' has the id {far}" in refused("export", tmp_path / "base", "--out", tmp_path / "x.gguf")


@pytest.mark.parametrize(("name", "value"), [("MEMORY", "abc"), ("SPOOL", "~nosuchuser/x")])
def test_limits_of_the_environment_that_are_none(
    expert: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"EXPERTPRUNE_{name}", value)
    assert f"EXPERTPRUNE_{name}: '{value}'" in refused("evaluate", expert)


def test_an_expert_of_damaged_weights(expert: Path) -> None:
    path = sorted(expert.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert str(expert) in refused("evaluate", expert)
    path.unlink()
    os.mkfifo(path)
    for command in (["evaluate", expert], ["export", expert, "--out", expert.parent / "x.gguf"]):
        assert f"{path}: it is a FIFO, not a file" in refused(*command)
    path.unlink()
    path.write_bytes(whole)
    poison(expert, "model.norm.weight", None)
    assert "the expert gives values that are not finite" in refused("evaluate", expert)


def test_a_corpus_that_predicts_nothing_or_too_long_a_question(
    tmp_path: Path, spec_data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """Where questions predict something, it is only warned of."""
    spec_data |= {"relevance": "magnitude", "compensation": "none"}
    short, asked, qa = tmp_path / "short.jsonl", tmp_path / "questions.jsonl", spec_data["corpora"]["sources"]["qa"]
    short.write_text('{"text": "a"}\n')
    qa["evaluation"] = str(short)
    build = ("build", written(tmp_path, spec_data), "--out", tmp_path / "expert", "--overwrite")
    problem = "corpus task/qa: every evaluation document is shorter than two tokens"
    assert f"sources.qa: evaluation: {problem.partition(': ')[2]}; give it longer ones" in refused(*build)
    qa["questions"] = str(asked)
    written(tmp_path, spec_data)
    asked.write_text('{"question": "the", "choices": ["heart", "pumps"], "answer": 0}\n' * 4)
    call(*build)
    warned = [record.levelname for record in caplog.records if f"{problem}: only its questions" in record.message]
    assert warned == ["WARNING"]  # which the terminal shows
    asked.write_text(json.dumps({"question": "the " * 200, "choices": ["heart", "pumps"], "answer": 0}))
    assert "sources.qa: questions: question 1 has 20" in refused(*build)


def test_the_report_of_an_expert_with_one_corpus(tmp_path: Path, spec_data: Data, warm: Path) -> None:
    """There is nothing that its profile could be compared with."""
    data = {**spec_data, "dimensions": {"language": "en"}, "general": [], "evaluate": {"enabled": False}}
    call("build", written(tmp_path, data), "--out", tmp_path / "expert")
    assert call_json("report", tmp_path / "expert")["experts"][0]["name"] == "tiny"
