"""What a layer starts on the device for one batch: as much for one document as for many, and nothing that waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertprune.corpora.batches import Tokens, make_batches
from expertprune.models.passes import TextRun
from expertprune.profiling import traversal
from expertprune.profiling.rows import RowMass
from tests.masks import measured, tiny

# On a GPU each of these waits until all before it is done.
WAITING = {"_local_scalar_dense", "nonzero", "item", "bincount", "masked_select", "unique"}


class Operators(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*given, **(named or {}))


def text_of(family: str, documents: int, chat: bool = False) -> TextRun:
    """One batch, padded where there are several documents."""
    lengths = [6 + number % 3 for number in range(documents)]
    answers = [tuple(place > 2 for place in range(length)) if chat else None for length in lengths]
    tokens = [Tokens(tuple(range(2, 2 + length)), own) for length, own in zip(lengths, answers, strict=True)]
    of = tiny(family)
    return TextRun(of.model, of.family, of.shapes, make_batches(tokens, 10_000, pad=63, prompt_weight=0.5))


@pytest.mark.parametrize(
    ("family", "part", "owner", "method", "chat"),
    [
        ("llama", "forward", traversal.LayerCollector, "add", False),
        ("llama", "forward", traversal.LayerCollector, "add", True),
        ("llama", "language_model", traversal.Upstream, "through", True),
        ("llama", "regional", traversal.RegionalGradients, "add", True),
        ("llama", "vocabulary", RowMass, "add", True),
        # Tokens of routed experts are sorted, and one grouped product takes all of them.
        ("qwen3_moe", "forward", traversal.LayerCollector, "add", True),
        ("qwen3_moe", "language_model", traversal.Upstream, "through", True),
        ("qwen3_moe", "language_model", traversal.Taped, "run", False),
    ],
)
def test_a_batch_starts_as_much_for_one_document_as_for_many_and_waits_for_nothing(
    family: str, part: str, owner: type, method: str, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, run = [], getattr(owner, method)
    for documents in (2, 16):
        text, operators = text_of(family, documents, chat), Operators()
        (batch,) = text.batches
        batch.on(text.device)  # copied there once, before the first layer

        def watched(*given: Any, operators: Operators = operators, **named: Any) -> Any:
            with operators:
                return run(*given, **named)

        monkeypatch.setattr(owner, method, watched)
        measured(text, part)
        assert operators.found.total() > 0
        found.append(operators.found)
    assert found[0] == found[1]
    assert not WAITING & found[0].keys()
    assert (
        owner is not traversal.Taped or found[0]["_grouped_mm"] == 2 * 4
    )  # of each layer, and of the probe of its size


def test_norms_of_weights_are_taken_once_for_all_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    text, weights = text_of("llama", 2), dict[int, traversal.Statistics]()
    first, second = (traversal.Traversal(text, [traversal.FORWARD], weights=weights) for _ in range(2))
    found = first.run()[traversal.FORWARD]
    monkeypatch.setattr(traversal, "weight_statistics", lambda *_: pytest.fail("weights were read again"))
    again = second.run()[traversal.FORWARD]
    assert all(torch.equal(again[name], values) for name, values in found.items())
