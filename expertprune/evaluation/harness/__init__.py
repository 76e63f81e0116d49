"""lm-evaluation-harness: its tasks on our models.

The library makes prompts, scores, generates, extracts answers and computes metrics; this package
pairs them by example. A task's YAML may name Python functions with `!function`; the library runs
them.
"""

from __future__ import annotations
