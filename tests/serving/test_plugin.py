"""vLLM's plugin: each layer is built while the config shows its own widths. vLLM itself is not needed here."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from expertprune.arch import families
from expertprune.serving import plugin

WIDTHS = {
    "0": {"intermediate_size": 19},
    "2": {"intermediate_size": 8, "num_key_value_heads": 1, "num_attention_heads": 2},
}


@pytest.fixture
def config() -> Any:
    return LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        per_layer_config=WIDTHS, allow_global_per_layer_attribute_access=True,
    )  # fmt: skip


def widths(config: Any) -> tuple[int, int, int]:
    return config.intermediate_size, config.num_attention_heads, config.num_key_value_heads


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module such as vLLM's: `make_layers` builds layer after layer from a function that knows the config."""
    module = ModuleType("vllm.model_executor.models.invented")
    module.make_layers = lambda count, build, prefix: [build(prefix=f"{prefix}.{i}") for i in range(count)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def stock(models: ModuleType) -> Any:
    class InventedForCausalLM:
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_text_config
            self.before = widths(config)
            self.layers = models.make_layers(
                config.num_hidden_layers, lambda prefix: (prefix, *widths(config)), prefix=f"{prefix}model.layers"
            )
            self.after = widths(config)

    return InventedForCausalLM


def test_each_layer_sees_its_own_widths_and_everything_else_the_global_ones(models: ModuleType, config: Any) -> None:
    made, original = plugin.with_layer_widths(stock(models)), models.make_layers
    built = made(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_text_config=config)))
    assert built.layers == [("model.layers.0", 19, 6, 3), ("model.layers.1", 32, 6, 3), ("model.layers.2", 8, 2, 1)]
    assert built.before == built.after == (32, 6, 3)
    assert models.make_layers is original
    assert made.__name__ == "ExpertInventedForCausalLM"


def test_a_layer_that_fails_leaves_the_config_as_it_was(config: Any) -> None:
    def build() -> None:
        with plugin.layer_widths(config, 2):
            assert widths(config) == (8, 2, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    assert widths(config) == (32, 6, 3)


def test_vllm_finds_the_plugin_and_only_the_families_classes_are_made() -> None:
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found["expertprune"] == "expertprune.serving.plugin:register"
    assert plugin.architectures() == sorted({n for family in families().values() for n in family.vllm_single_layers})
    with pytest.raises(AttributeError, match="ExpertBertForMaskedLM"):
        plugin.ExpertBertForMaskedLM  # noqa: B018


@pytest.mark.vllm
def test_vllm_registers_every_class_that_a_family_names() -> None:
    vllm = pytest.importorskip("vllm")
    plugin.register()
    registered = vllm.ModelRegistry.get_supported_archs()
    assert {f"Expert{name}" for name in plugin.architectures()} <= set(registered)
    assert set(plugin.architectures()) <= set(registered)
