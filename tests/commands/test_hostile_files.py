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
from expertprune.corpora.reading import read_questions
from expertprune.errors import CheckpointError, SpecError
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


# --- YAML -----------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "digits": (f"calibration: {{seed: {'9' * 5000}}}", "not valid YAML"),
    "large": (f"calibration: {{seed: {'9' * 23}}}", "too large"),
    "not a number": ("budget: {ffn: .nan}", "budget.ffn: nan is not a number"),
    "infinite": ("budget: {ffn: .inf}", "budget.ffn: inf is not a number"),
    "no integer": ("budget: {ffn: !!int abc}", "not valid YAML"),
    "no date": ("budget: {ffn: 2024-13-45}", "not valid YAML"),
    "no boolean": ("budget: !!bool maybe", "not valid YAML"),
    "no time": ("budget: !!timestamp soon", "not valid YAML"),
    "no bytes": ("budget: !!binary 'ä'", "not valid YAML"),
    "laughs": (LAUGHS, "aliases"),
    "deep": ("a: " + "[" * 5000, "nested too deeply"),
    "deep and closed": ("a: " + "[" * 70 + "]" * 70, "nested too deeply"),
    "half a character": ('name: "\\ud800"', "half of a character"),
    "long": ("# " + "x" * 300_000, "larger than"),
    "python": ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_spec_of_hostile_yaml(tmp_path: Path, case: str) -> None:
    content, words = YAMLS[case]
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    message = refused("validate", path)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400"])
def test_no_key_takes_a_number_that_is_none(spec_file: Path, value: str) -> None:
    for key in ("budget.ffn", "budget.floor", "compensation.ridge", "compose.fusion.lambda", "budget.parameters"):
        assert "Traceback" not in refused("validate", spec_file, "--set", f"{key}={value}")


PATHS = {"a\0b": "NUL", "~nosuchuser/model": "home folder", "n" * 300: "too long", "/".join(["n"] * 3000): "too long"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["base.model", "corpora.catalogue", "corpora.sources.medical.path"])
def test_a_path_that_is_none(tmp_path: Path, spec_data: Data, key: str, path: str) -> None:
    spec_data["base"] = {"model": spec_data["base"]}
    *parents, last = key.split(".")
    inner = spec_data
    for parent in parents:
        inner = inner[parent]
    inner[last] = path
    message = refused("validate", written(tmp_path, spec_data))
    assert key in message
    assert PATHS[path] in message


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, spec_data: Data, kind: str) -> None:
    path = tmp_path / "mine.jsonl"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert f"it is a {kind}, not a file" in refused("validate", path)
    assert f"it is a {kind}, not a file" in refused("prune", path, "--out", tmp_path / "out")
    spec_data["corpora"]["sources"]["medical"]["path"] = str(path)
    assert f"it is a {kind}, not a file" in refused("validate", written(tmp_path, spec_data))


PARTS = ["tokenizer.json", "tokenizer_config.json", "config.json", "model-00002-of-*", "x.gguf", "folder"]


@pytest.mark.parametrize("part", PARTS)
def test_a_fifo_in_place_of_a_part_of_a_base_is_refused_at_once(
    tmp_path: Path, base: Path, spec_data: Data, part: str
) -> None:
    path = base if part == "folder" else next(base.glob(part), base / part)
    shutil.rmtree(path) if part == "folder" else path.unlink(missing_ok=True)
    os.mkfifo(path)
    spec_data["base"] = str(path if part == "x.gguf" else base)
    message = refused("validate", written(tmp_path, spec_data))
    assert str(path) in message
    assert "it is a FIFO, not a f" in message


# --- corpora --------------------------------------------------------------------------------------------------------

ROWS = {
    "deep": ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    "half a character": ('{"text": "the \\ud800 heart"}', "half of a character"),
    "digits": (f'{{"text": {"9" * 5000}}}', "not valid JSON"),
    "not a number": ('{"text": NaN}', "NaN is no number of JSON"),
    "bytes": ("\udcff", "not UTF-8"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_corpus_of_hostile_json(tmp_path: Path, spec_data: Data, case: str) -> None:
    content, words = ROWS[case]
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a heart"}\n' + content + "\n", errors="surrogateescape")
    spec_data["corpora"]["sources"]["medical"]["path"] = str(path)
    message = refused("validate", written(tmp_path, spec_data))
    assert f"{path}, line 2: " in message
    assert words in message


def test_a_format_in_a_template_is_an_error(tmp_path: Path, spec_data: Data) -> None:
    for template in ("{text:>9}", "{text!r}"):
        spec_data["corpora"]["sources"]["medical"]["template"] = template
        assert "text: formats, such as" in refused("validate", written(tmp_path, spec_data))


def test_a_question_has_two_choices_or_more(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "is", "choices": ["the heart"], "answer": 0}\n')
    with pytest.raises(SpecError, match="line 1: a question needs two choices or more"):
        read_questions(path)


# --- bases ----------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Data, str]] = {
    "architectures": (
        {"architectures": "LlamaForCausalLM"},
        "architectures: must be a list of names (found 'LlamaForCausalLM')",
    ),
    "architecture": ({"architectures": [3]}, "architectures: must be a list of names"),
    "kind": ({"model_type": ["llama"]}, "model_type: must be a name"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the weights have no more than"),
    "width": ({"hidden_size": 2**40}, "hidden_size is"),
    "rows": ({"vocab_size": 2**40}, "vocab_size is"),
    "no rows": ({"vocab_size": "64"}, "config.json"),
    "text": ({"hidden_size": "24"}, "must be a positive whole number"),
    "yes": ({"num_attention_heads": True}, "must be a positive whole number"),
    "rope": ({"rope_parameters": [1]}, "config.json"),
    "digits": ({"rms_norm_eps": 10**30}, "too large"),
    "context": ({"max_position_embeddings": "long"}, "config.json"),
    "window": ({"sliding_window": {}, "tie_word_embeddings": "no"}, "config.json"),
}


@pytest.fixture
def base(tmp_path: Path, tiny_llama: Path, spec_data: Data) -> Path:
    """A copy of the base that may be damaged, and which the spec names."""
    spec_data["base"] = str(shutil.copytree(tiny_llama, tmp_path / "base"))
    return tmp_path / "base"


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_wrong_types_and_sizes(tmp_path: Path, base: Path, spec_data: Data, case: str) -> None:
    changes, words = CONFIGS[case]
    changed(base / "config.json", lambda data: data | changes)
    assert words in refused("validate", written(tmp_path, spec_data))


TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda data: [data],
    "model": lambda data: data | {"model": []},
    "ids": lambda data: data["model"].update(vocab=dict.fromkeys(data["model"]["vocab"], "0")),
    "added": lambda data: data | {"added_tokens": {"id": "x"}},
    "post": lambda data: data | {"post_processor": {"type": "TemplateProcessing", "single": [{"Nothing": 0}]}},
    "beyond": lambda data: data["model"].update(vocab={k: v + 60 for k, v in data["model"]["vocab"].items()}),
    "far": lambda data: data["model"]["vocab"].update(far=2**31),  # its list would take 8 GB
}
SAYS = {"beyond": "the model's vocabulary has 64 rows", "far": "token 'far' has the id 2147483648"}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_of_wrong_types_or_ids(tmp_path: Path, base: Path, spec_data: Data, case: str) -> None:
    changed(base / "tokenizer.json", TOKENIZERS[case])
    message = refused("validate", written(tmp_path, spec_data))
    assert SAYS.get(case, "tokenizer") in message


@pytest.mark.parametrize("listed", [[], {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b"}}])
def test_an_index_of_wrong_types(tmp_path: Path, base: Path, spec_data: Data, listed: Any) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps(listed))
    assert "model.safetensors.index.json" in refused("validate", written(tmp_path, spec_data))


def poison(folder: Path, tensor: str, row: int | None) -> None:
    """Put NaN into a row of a tensor, or into all of it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][slice(None) if row is None else row] = torch.nan
            save_file(tensors, path, metadata={"format": "pt"})


def test_a_row_that_is_not_finite_is_an_error_though_no_text_uses_it(
    tmp_path: Path, base: Path, spec_data: Data
) -> None:
    poison(base, "model.embed_tokens.weight", 2)  # <unk>
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


@pytest.fixture
def expert(tiny_build: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERTPRUNE_STORE", str(tiny_build[1]))
    return Path(shutil.copytree(tiny_build[0], tmp_path / "expert"))


PLANS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "range": (lambda data: data["layers"][0]["kept"].update(ffn="0-999999999999"), "there are only 32"),
    "width": (lambda data: data["layers"][0]["of"].update(ffn=10**12), "layers.0.of.ffn"),
    "no heads": (lambda data: data["layers"][0]["of"].update(kv_heads=0), "kv_groups must keep nothing"),
    "heads": (lambda data: data["layers"][0]["of"].update(kv_heads=4), "are no multiple of"),
    "nothing": (lambda data: data["parameters"].update(before=0), "parameters.before"),
    "first": (lambda data: data["layers"].pop(0), "layer 1 stands where layer 0 belongs"),
    "last": (lambda data: data["layers"].pop(), "was edited: its 2 layers are not the 3 of"),
    "spec": (lambda data: data.update(spec={"name": 3}), "error"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_of_wrong_types_and_sizes(tmp_path: Path, spec_data: Data, case: str) -> None:
    change, words = PLANS[case]
    data = {**spec_data, "relevance": "magnitude", "compensation": "none"}
    call("compose", written(tmp_path, data), "--out", tmp_path / "plan.json")
    changed(tmp_path / "plan.json", lambda plan: change(plan) and None)
    assert words in refused("prune", tmp_path / "plan.json", "--out", tmp_path / "expert")
    if case == "spec":
        refused("inspect", tmp_path / "plan.json")


@pytest.mark.parametrize("value", ["[]", "{}", '"ab"', "1000", '{"ab": 1000}'])
def test_millions_of_values_in_few_bytes(tmp_path: Path, value: str) -> None:
    path = tmp_path / "plan.json"
    most = JSON_VALUES // (1 + sum(map(value.count, ":[{")))
    for number, words in ((most - 1, "not a plan"), (most + 1, f"more than {JSON_VALUES:,} values")):
        path.write_text("[" + ",".join([value] * number) + "]")
        assert words in refused("prune", path, "--out", tmp_path / "expert")


def test_a_fifo_in_place_of_an_expert_s_weights(expert: Path) -> None:
    path = sorted(expert.glob("*.safetensors"))[0]
    path.unlink()
    os.mkfifo(path)
    for command in (["evaluate", expert], ["export", expert, "--out", expert.parent / "x.gguf"]):
        assert f"{path}: it is a FIFO, not a file" in refused(*command)


OWN = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the weights have no more than"),
    "rows": ({"vocab_size": 2**40}, "vocab_size is"),
    "kind": ({"model_type": ["llama"]}, "model_type: must be a name"),
    "groups": ({"model_type": "olmoe", "num_experts": 4, "n_group": "x"}, "config.json"),
    "strict": ({"rms_norm_eps": "x"}, "config.json"),
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
    if case != "strict":  # which vLLM itself reads
        with pytest.raises(CheckpointError, match=re.escape(words)):
            check_folder(expert)


def test_an_exported_tokenizer_with_ids_that_no_vocabulary_has(tmp_path: Path) -> None:
    changed(save_worded(tmp_path / "base") / "tokenizer.json", TOKENIZERS["far"])
    assert SAYS["far"] in refused("export", tmp_path / "base", "--out", tmp_path / "x.gguf")


SETTINGS: dict[str, Data] = {
    "stop_strings": {"stop_strings": 5},
    "text": {"stop_strings": [5]},
    "forced_decoder_ids": {"forced_decoder_ids": "abc"},
    "pair": {"forced_decoder_ids": [[1]]},
    "suppress_tokens": {"suppress_tokens": [[1]]},
    "bad_words_ids": {"bad_words_ids": [3]},
    "eos_token_id": {"eos_token_id": {"id": 1}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_wrong_types_beside_a_vocabulary_that_is_cut(tmp_path: Path, spec_data: Data, case: str) -> None:
    spec_data["base"] = str(save_worded(tmp_path / "base"))
    spec_data["budget"] = {"vocabulary": 0.9}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(SETTINGS[case]))
    (key,) = SETTINGS[case]
    assert f"generation_config.json: {key}: " in refused("validate", written(tmp_path, spec_data))


@pytest.mark.parametrize(("name", "value"), [("MEMORY", "abc"), ("SPOOL", "~nosuchuser/x")])
def test_limits_of_the_environment_that_are_none(
    expert: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"EXPERTPRUNE_{name}", value)
    assert f"EXPERTPRUNE_{name}: '{value}'" in refused("evaluate", expert)


def test_an_expert_with_truncated_weights(expert: Path) -> None:
    path = sorted(expert.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-50])
    assert str(expert) in refused("evaluate", expert)


def test_an_expert_of_damaged_numbers(expert: Path) -> None:
    poison(expert, "model.norm.weight", None)
    assert "the expert gives values that are not finite" in refused("evaluate", expert)


def test_a_corpus_that_predicts_nothing(tmp_path: Path, spec_data: Data) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "a"}\n')
    spec_data["corpora"]["sources"]["qa"]["evaluation"] = str(path)
    message = refused("build", written(tmp_path, spec_data), "--out", tmp_path / "expert")
    assert "corpus task/qa: every evaluation document is shorter than two tokens" in message


def test_a_corpus_of_which_only_questions_predict_something_is_warned_of(
    tmp_path: Path, spec_data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    path, asked = tmp_path / "short.jsonl", tmp_path / "questions.jsonl"
    path.write_text('{"text": "a"}\n')
    asked.write_text('{"question": "the", "choices": ["heart", "pumps"], "answer": 0}\n' * 4)
    spec_data["corpora"]["sources"]["qa"] |= {"evaluation": str(path), "questions": str(asked)}
    call("build", written(tmp_path, spec_data), "--out", tmp_path / "expert")
    (warned,) = [record for record in caplog.records if "predict" in record.message or "shorter" in record.message]
    assert warned.levelname == "WARNING"  # which the terminal shows
    assert "corpus task/qa: every evaluation document is shorter than two tokens: only its questions" in warned.message


def test_a_question_longer_than_the_context_is_refused(tmp_path: Path, spec_data: Data) -> None:
    asked = tmp_path / "questions.jsonl"
    asked.write_text(json.dumps({"question": "the " * 5000, "choices": ["heart", "pumps"], "answer": 0}))
    spec_data["corpora"]["sources"]["qa"]["questions"] = str(asked)
    message = refused("build", written(tmp_path, spec_data), "--out", tmp_path / "expert")
    assert "corpus task/qa: a question has 500" in message


def test_the_report_of_an_expert_with_one_corpus(tmp_path: Path, spec_data: Data) -> None:
    """There is nothing that its profile could be compared with."""
    data = {**spec_data, "dimensions": {"language": "en"}, "general": [], "evaluate": {"enabled": False}}
    call("build", written(tmp_path, data), "--out", tmp_path / "expert")
    found = call_json("report", tmp_path / "expert")["experts"][0]
    assert found["name"] == "tiny"
