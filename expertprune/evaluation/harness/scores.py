"""What is asked of a model by a task, and what its answers score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from expertprune.evaluation.arrays import Floats


class Leaf(Protocol):
    """What is used of a task of lm-evaluation-harness, which has no types. A group of tasks has several leaves."""

    OUTPUT_TYPE: str
    config: Any
    eval_docs: Sequence[Any]
    instances: Sequence[Any]
    multiple_input: Any

    def aggregation(self) -> Mapping[str, Any]: ...
    def higher_is_better(self) -> Mapping[str, bool]: ...
    def get_config(self, key: str) -> Any: ...
    def set_config(self, key: str, value: Any) -> None: ...
    def set_fewshot_seed(self, seed: int) -> None: ...
    def build_all_requests(self, **settings: Any) -> None: ...
    def doc_to_text(self, document: Any, /) -> Any: ...
    def doc_to_target(self, document: Any, /) -> Any: ...
    def doc_to_choice(self, document: Any, /) -> Any: ...


@dataclass(frozen=True)
class Scores:
    """One model's score on each example of a task.

    The metric is `sum(values) / sum(weights)`, both `[examples]`: right answers over their number,
    or bits over bytes (words), of which less is better. `examples` are digests: the same prompt and
    target give the same one. `answers` are the choices that the model takes, or what is extracted
    from what it wrote; `texts` are what it wrote, where the task generates answers. `margins`, where
    it has choices, say by how many bits the right one lies above the best wrong one, `None` where
    there is not exactly one right choice.
    """

    metric: str
    values: Floats
    weights: Floats
    examples: tuple[str, ...]
    answers: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None
    margins: tuple[float | None, ...] | None = None

    def document(self) -> dict[str, Any]:
        """Plain data that gives the same scores back."""
        return {**vars(self), "values": self.values.tolist(), "weights": self.weights.tolist()}


@dataclass(frozen=True)
class Asked:
    """One example as people read it: its prompt without few-shot examples, its choices, and the right answer.

    `answer` is the number of the right choice, `None` where there is not exactly one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | None
    gold: str | None


def example_of(leaf: Leaf, document: Any, prompt: str, target: Any) -> Asked:
    """An example as people read it."""
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return Asked(prompt, (), None, target if isinstance(target, str) else None)
    choices = tuple(map(str, leaf.doc_to_choice(document)))
    right = leaf.doc_to_text(document) if leaf.multiple_input else target
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        return Asked(prompt, choices, None, None)
    return Asked(prompt, choices, right, choices[right])


def choice_scores(metric: str, choices: Sequence[str], found: Sequence[float]) -> Floats:
    """What a model makes of each choice, in bits, `[choices]`: as the metric compares them.

    Args:
        found: log-likelihoods of the choices. Where the metric is `acc_mutual_info`, those without
            the prompt follow, which count off.
    """
    bits = np.array(found[: len(choices)], dtype=np.float64) / math.log(2)
    if metric == "acc_mutual_info":
        return bits - np.array(found[len(choices) : 2 * len(choices)]) / math.log(2)
    if metric == "acc_norm":
        return bits / np.array([max(1, len(choice)) for choice in choices])
    if metric == "acc_bytes":
        return bits / np.array([max(1, len(choice.encode())) for choice in choices])
    return bits


def common_beginning(base: Sequence[str], expert: Sequence[str]) -> float:
    """The mean share of each text of the base, from its beginning, that the expert's has too."""

    def share(mine: str, theirs: str) -> float:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
        return sum(1 for _ in same) / len(mine) if mine else float(not theirs)

    return float(np.mean([share(*pair) for pair in zip(base, expert, strict=True)]))
