"""Chat templates in GGUF files: under the keys that llama.cpp reads, and rendered by it to the same text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from expertprune.models.loading import load_tokenizer
from expertprune.stages.export import export
from tests.calling import call, call_json
from tests.engine_of_gguf import engine_of, needs_engine
from tests.models.test_gguf import tiny

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}(calls){% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NAMED = {"default": PLAIN, "tool_use": TOOLS, "rag v2": "{{ messages[0].content }}"}
MESSAGES = [{"role": "user", "content": "the heart"}, {"role": "assistant", "content": "pumps"}]
MESSAGES += [{"role": "user", "content": "and then?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}


def chatty(folder: Path, template: str | dict[str, str]) -> Path:
    tokenizer = load_tokenizer(tiny(folder, "llama"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def templates_of(file: Path) -> dict[str, Any]:
    fields = GGUFReader(file).fields
    return {key: fields[key].contents() for key in fields if key.startswith("tokenizer.chat_template")}


def test_named_templates_have_keys_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers stores others than the default one in a folder of their own."""
    folder = chatty(tmp_path / "model", NAMED)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    found = templates_of(export(folder, tmp_path / "a.gguf", type="f32").path)
    assert sorted(found.pop("tokenizer.chat_templates")) == ["rag_v2", "tool_use"]
    assert found == {
        "tokenizer.chat_template": PLAIN,
        "tokenizer.chat_template.tool_use": TOOLS,
        "tokenizer.chat_template.rag_v2": NAMED["rag v2"],
    }
    assert not caplog.records
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in templates_of(export(folder, tmp_path / "b.gguf", type="f32").path)
    assert "has chat templates (" in caplog.text
    assert "and none named default, so llama.cpp takes ChatML" in caplog.text


@needs_engine
def test_llama_cpp_renders_the_same_text(tmp_path: Path) -> None:
    folder = chatty(tmp_path / "model", NAMED)
    tokenizer = load_tokenizer(folder)
    with engine_of(export(folder, tmp_path / "a.gguf", type="f32").path) as engine:
        plain = engine.ask("/apply-template", messages=MESSAGES)["prompt"]
        used = engine.ask("/apply-template", messages=MESSAGES, tools=[TOOL])["prompt"]
    wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert plain in (wanted, wanted.removeprefix(tokenizer.bos_token))  # llama.cpp adds BOS when it tokenizes
    assert used == "[look_up]" + "".join(message["content"] for message in MESSAGES)


def test_the_command_says_how_to_store_fewer_bits(tmp_path: Path) -> None:
    folder, file = tiny(tmp_path / "model", "llama"), tmp_path / "a model.gguf"
    said = call("export", folder, "--out", file).output
    assert f"llama-quantize '{file}' '{tmp_path / 'a model-q4_k_m.gguf'}' Q4_K_M" in said.replace("\n", " ")
    assert "llama-quantize" not in call("export", folder, "--out", file, "--overwrite", "--type", "q8_0").output
    assert call_json("export", folder, "--out", file, "--overwrite")["bytes"] == os.stat(file).st_size
