"""expertprune: turn a general language model into a compact expert, without post-training.

The verbs are functions here, under the same names as the commands: `validate`, `profile`, `compose`, `prune`, `build`,
`evaluate`, `export`, `bench`, `sweep`, `compare`, `vocabulary`, `inspect`, and `report` as `write_report`; `load_engine`
gives an expert's `vllm.LLM`. They are imported at their first use, so that `import expertprune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from expertprune.analysis import compare
    from expertprune.api import build, compose, evaluate, profile, prune, validate
    from expertprune.gguf_files import export
    from expertprune.inspection import describe as inspect
    from expertprune.measuring import evaluate_suites
    from expertprune.page import report as write_report
    from expertprune.serving.engine import load_engine
    from expertprune.serving.throughput import bench
    from expertprune.spec import Spec, load_spec
    from expertprune.sweeping import sweep
    from expertprune.tradeoff import vocabulary

_PLACES = {
    **dict.fromkeys(("build", "compose", "evaluate", "profile", "prune", "validate"), ("expertprune.api", None)),
    "compare": ("expertprune.analysis", None),
    "export": ("expertprune.gguf_files", None),
    "inspect": ("expertprune.inspection", "describe"),
    "evaluate_suites": ("expertprune.measuring", None),
    "sweep": ("expertprune.sweeping", None),
    "bench": ("expertprune.serving.throughput", None),
    "load_engine": ("expertprune.serving.engine", None),
    "write_report": ("expertprune.page", "report"),
    "vocabulary": ("expertprune.tradeoff", None),
    "Spec": ("expertprune.spec", None),
    "load_spec": ("expertprune.spec", None),
}

__all__ = [
    "Spec",
    "__version__",
    "bench",
    "build",
    "compare",
    "compose",
    "evaluate",
    "evaluate_suites",
    "export",
    "inspect",
    "load_engine",
    "load_spec",
    "profile",
    "prune",
    "sweep",
    "validate",
    "vocabulary",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'expertprune' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute or name)
