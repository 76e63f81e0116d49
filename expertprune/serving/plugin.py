"""vLLM's plugin: load experts whose layers have widths of their own.

vLLM builds all layers of a model from one config. For each of its classes this plugin registers `Expert<class>`, which
shows each layer a config with that layer's widths. vLLM's own classes stay unchanged.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from expertprune.arch import EXPERT, families

_MODELS = "vllm.model_executor.models."


def register() -> None:
    """The entry point in `vllm.general_plugins`. A model of vLLM is imported only when it is asked for."""
    from vllm import ModelRegistry

    for name in architectures():
        ModelRegistry.register_model(EXPERT + name, f"{__name__}:{EXPERT}{name}")


def architectures() -> list[str]:
    """The classes of vLLM whose layers can have widths of their own, from the families' files."""
    return sorted({name for family in families().values() for name in family.vllm_single_layers})


def __getattr__(name: str) -> Any:
    """Make `Expert<class>` when vLLM asks for it by name."""
    stock = name.removeprefix(EXPERT)
    if not name.startswith(EXPERT) or stock not in architectures():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    made = with_layer_widths(ModelRegistry.models[stock].load_model_cls())
    globals()[name] = made
    return made


def with_layer_widths(stock: Any) -> Any:
    """vLLM's class `stock` with each decoder layer built from its own layer's widths."""

    def build(self: Any, *, vllm_config: Any, prefix: str = "", **others: Any) -> None:
        with building_single_layers(vllm_config.model_config.hf_text_config):
            stock.__init__(self, vllm_config=vllm_config, prefix=prefix, **others)

    name = EXPERT + stock.__name__
    return type(name, (stock,), {"__init__": build, "__module__": __name__, "__qualname__": name})


@contextlib.contextmanager
def building_single_layers(config: Any) -> Iterator[None]:
    """While open, vLLM's `make_layers` builds layer i with the widths in `config.per_layer_config[i]`.

    vLLM's model classes hand `make_layers(count, build, prefix)` a function that builds the layer called `prefix.i` from
    the model's config, whichever the family; so the config shows that layer's widths while it runs.
    """
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(_MODELS) and hasattr(module, "make_layers"):
                stack.enter_context(mock.patch.object(module, "make_layers", _showing(config, module.make_layers)))
        yield


def _showing(config: Any, make_layers: Any) -> Any:
    """`make_layers` with `config` showing each layer's own widths while that layer is built."""

    def make(count: int, build: Any, prefix: str) -> Any:
        def one(prefix: str) -> Any:
            with layer_widths(config, int(prefix.rpartition(".")[2])):
                return build(prefix=prefix)

        return make_layers(count, one, prefix=prefix)

    return make


@contextlib.contextmanager
def layer_widths(config: Any, index: int) -> Iterator[None]:
    """While open, the config (of `transformers`) shows the widths of layer `index` as its own."""
    own = config.per_layer_config[index]
    names = config.per_layer_attributes or ()
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, getattr(own, name))
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
