"""lm-evaluation-harness: its tasks on our models.

Prompts, likelihoods, generation, answer extraction and the metrics are its own; here is only what pairs them by example.
What a task's YAML names as `!function` is Python, and is run.
"""

from __future__ import annotations
