"""vLLM's plugin: each layer is built while the config shows its own widths. vLLM itself is not needed here."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from expertprune.serving import plugin

WIDTHS = {
    "0": {"intermediate_size": 19},
    "2": {"intermediate_size": 8, "num_key_value_heads": 1, "num_attention_heads": 2},
}


def widths(config: Any) -> tuple[int, int, int]:
    return config.intermediate_size, config.num_attention_heads, config.num_key_value_heads


def test_each_layer_sees_its_own_widths_and_everything_else_the_global_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module such as vLLM's: `make_layers` builds layer after layer from a function that knows the config."""
    config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        per_layer_config=WIDTHS, allow_global_per_layer_attribute_access=True,
    )  # fmt: skip
    models: Any = ModuleType("vllm.model_executor.models.invented")
    models.make_layers = original = lambda count, build, prefix: [build(prefix=f"{prefix}.{i}") for i in range(count)]
    monkeypatch.setitem(sys.modules, models.__name__, models)

    class InventedForCausalLM:
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            known = vllm_config.model_config.hf_text_config
            self.before = widths(known)
            self.layers = models.make_layers(3, lambda prefix: (prefix, widths(config)), prefix=f"{prefix}model.layers")
            self.after = widths(known)

    made = plugin.with_layer_widths(InventedForCausalLM)
    assert made.__name__ == "ExpertInventedForCausalLM"
    built = made(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_text_config=config)))
    expected = [(19, 6, 3), (32, 6, 3), (8, 2, 1)]
    assert built.layers == [(f"model.layers.{i}", layer) for i, layer in enumerate(expected)]
    assert built.before == built.after == widths(config) == (32, 6, 3)
    assert models.make_layers is original


def test_vllm_finds_the_plugin_and_only_the_families_classes_are_made() -> None:
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found["expertprune"] == "expertprune.serving.plugin:register"
    with pytest.raises(AttributeError, match="ExpertBertForMaskedLM"):
        plugin.ExpertBertForMaskedLM  # noqa: B018


@pytest.mark.vllm
def test_vllm_registers_every_class_that_a_family_names() -> None:
    vllm = pytest.importorskip("vllm")
    plugin.register()
    registered = set(vllm.ModelRegistry.get_supported_archs())
    assert {*plugin.architectures(), *(f"Expert{name}" for name in plugin.architectures())} <= registered
