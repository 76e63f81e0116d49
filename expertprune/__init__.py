"""expertprune: turn a general language model into a compact expert, without post-training.

The verbs are functions here, under the same names as the commands: `validate`, `forecast`, `profile`, `compose`, `prune`,
`build`, `evaluate`, `export`, `bench`, `sweep`, `compare`, `vocabulary`, `inspect`, `report` as `write_report`, `push` as
`push_to_hub`, `adapter` as `cut_adapter`, and `evaluate --suite` as `evaluate_suites`. `load_spec` reads a `Spec`, and
`load_engine` gives an expert's `vllm.LLM`. They are imported at their first use, so that `import expertprune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from expertprune.reporting.explain import describe as inspect
    from expertprune.reporting.page import report as write_report
    from expertprune.serving.engine import load_engine
    from expertprune.serving.throughput import bench
    from expertprune.spec.reading import load_spec
    from expertprune.spec.schema import Spec
    from expertprune.stages.adapter import cut_adapter
    from expertprune.stages.build import build
    from expertprune.stages.compare import compare
    from expertprune.stages.compose import compose
    from expertprune.stages.evaluate import evaluate
    from expertprune.stages.export import export
    from expertprune.stages.outlook import forecast
    from expertprune.stages.profile import profile
    from expertprune.stages.prune import prune
    from expertprune.stages.push import push as push_to_hub
    from expertprune.stages.suites import evaluate_suites
    from expertprune.stages.sweep import sweep
    from expertprune.stages.validate import validate
    from expertprune.stages.vocabulary import vocabulary

_PLACES = {
    **{
        stage: (f"expertprune.stages.{stage}", None)
        for stage in (
            "build",
            "compare",
            "compose",
            "evaluate",
            "export",
            "profile",
            "prune",
            "sweep",
            "validate",
            "vocabulary",
        )
    },
    "forecast": ("expertprune.stages.outlook", None),
    "inspect": ("expertprune.reporting.explain", "describe"),
    "evaluate_suites": ("expertprune.stages.suites", None),
    "bench": ("expertprune.serving.throughput", None),
    "load_engine": ("expertprune.serving.engine", None),
    "push_to_hub": ("expertprune.stages.push", "push"),
    "write_report": ("expertprune.reporting.page", "report"),
    "cut_adapter": ("expertprune.stages.adapter", None),
    "Spec": ("expertprune.spec.schema", None),
    "load_spec": ("expertprune.spec.reading", None),
}

__all__ = [
    "Spec",
    "__version__",
    "bench",
    "build",
    "compare",
    "compose",
    "cut_adapter",
    "evaluate",
    "evaluate_suites",
    "export",
    "forecast",
    "inspect",
    "load_engine",
    "load_spec",
    "profile",
    "prune",
    "push_to_hub",
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
