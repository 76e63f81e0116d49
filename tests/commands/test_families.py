"""`expertprune families`: what is listed agrees with the families' files, and a folder can be checked."""

from __future__ import annotations

import json
from pathlib import Path

from expertprune.arch import families
from tests.calling import call
from tests.tiny import save_tiny


def test_every_family_is_listed_with_what_it_allows() -> None:
    entries = {entry["family"]: entry for entry in json.loads(call("families", "--json").output)["families"]}
    assert set(entries) == {family.family for family in families().values()}
    assert entries["olmo2"]["structures"] == ["ffn"]
    assert "q_norm and k_norm" in entries["olmo2"]["why_no_heads"]
    assert entries["llama"] == {
        "family": "llama",
        "model_types": ["llama"],
        "structures": ["ffn", "query_heads", "kv_groups"],
        "why_no_heads": "",
        "layer_widths": {"transformers": True, "vllm": True},
        "vllm_routes": {"plugin": "own class", "stock": "Transformers backend"},
    }
    assert entries["olmo2"]["vllm_routes"] == {}
    table = call("families").output
    assert all(name in table for name in entries)
    assert "The Transformers backend needs --trust-remote-code." in " ".join(table.split())
    served = {name for name, entry in entries.items() if entry["layer_widths"]["vllm"]}
    assert served == {"gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3"}


def test_a_listed_model_is_checked(tmp_path: Path) -> None:
    absent, folder = tmp_path / "absent", save_tiny(tmp_path / "model", "olmo2")
    assert f"error: --check: {absent}: no such folder" in call("families", "--check", absent, code=2).output
    assert "family olmo2 (listed); cutting equals masking: ffn, widths of single layers" in " ".join(
        call("families", "--check", folder).output.replace(str(folder), "").split()
    )
