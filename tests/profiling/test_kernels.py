"""What a layer starts on the device for one batch: as much for one document as for many, and nothing that waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertprune.corpora.batches import Tokens, make_batches
from expertprune.models.passes import TextRun, real_tokens
from expertprune.profiling import traversal
from expertprune.profiling.rows import RowMass
from tests.masks import measured, tiny

# On a GPU each of these waits until all before it is done.
WAITING = ("_local_scalar_dense", "nonzero", "item", "bincount", "masked_select", "unique")


class Operators(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*given, **(named or {}))


def text_of(family: str, documents: int, chat: bool, **changes: Any) -> TextRun:
    """One batch, padded where there are several documents."""
    lengths = [6 + number % 3 for number in range(documents)]
    tokens = [
        Tokens(tuple(range(2, 2 + length)), tuple(place > 2 for place in range(length)) if chat else None)
        for length in lengths
    ]
    of = tiny(family, **changes)
    batches = make_batches(tokens, 10_000, pad=63, prompt_weight=0.5)
    assert len(batches) == 1
    return TextRun(of.model, of.family, of.shapes, batches)


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> Operators:
    """Counts what a method starts, from now on."""
    operators, run = Operators(), getattr(owner, method)

    def watched(*given: Any, **named: Any) -> Any:
        with operators:
            return run(*given, **named)

    monkeypatch.setattr(owner, method, watched)
    return operators


WATCHED: dict[str, tuple[type, str]] = {
    "forward": (traversal.LayerCollector, "add"),
    "language_model": (traversal.Upstream, "through"),
    "regional": (traversal.RegionalGradients, "add"),
    "vocabulary": (RowMass, "add"),
}


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "conversations"])
@pytest.mark.parametrize(
    ("family", "part"),
    [*(("llama", part) for part in WATCHED), ("qwen3_moe", "forward"), ("qwen3_moe", "language_model")],
)
def test_a_batch_starts_as_much_for_one_document_as_for_many_and_waits_for_nothing(
    family: str, part: str, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for documents in (2, 16):
        text = text_of(family, documents, chat)
        text.batches[0].on(text.device)  # copied there once, before the first layer
        with monkeypatch.context() as patched:
            operators = counted(patched, *WATCHED[part])
            measured(text, part)
        assert operators.found.total() > 0
        found.append(operators.found)
    assert found[0] == found[1]
    assert not {name for name in found[0] if name in WAITING}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_layer_that_is_observed_starts_nothing_that_waits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed experts too: their tokens are sorted, and one grouped product takes all of them."""
    text, run = text_of(family, 4, chat=False), traversal.Taped.run
    seen: list[Counter[str]] = []

    def watched(*given: Any, **named: Any) -> Any:
        with Operators() as operators:
            taped = run(*given, **named)
        seen.append(operators.found)
        return taped

    monkeypatch.setattr(traversal.Taped, "run", watched)
    measured(text, "language_model")
    assert seen
    assert not {name for found in seen for name in found if name in WAITING}
    if family == "qwen3_moe":
        assert all(found["_grouped_mm"] == 2 for found in seen)


@pytest.mark.parametrize("documents", [2, 16])
def test_leaving_padding_out_is_one_copy(documents: int) -> None:
    text = text_of("llama", documents, chat=False)
    (batch,) = text.batches
    states = torch.zeros(*batch.ids.shape, 3)
    batch.on(states.device)
    with Operators() as operators:
        real_tokens(batch, states)
    assert operators.found.total() <= 2


def test_norms_of_weights_are_taken_once_for_all_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    text, taken = text_of("llama", 2, chat=False), []
    monkeypatch.setattr(
        traversal, "weight_statistics", lambda *given: taken.append(given) or {"ffn.{layer}.weight_norm": torch.ones(1)}
    )
    weights: dict[int, traversal.Statistics] = {}
    for _ in range(2):
        found = traversal.Traversal(text, [traversal.FORWARD], weights=weights).run()
        assert found[traversal.FORWARD]["ffn.2.weight_norm"].tolist() == [1.0]
    assert len(taken) == len(text.shapes)
