"""What is foreseen from gradients, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, ProfilePart, halved, save_profile
from expertprune.composition.excess import Law, curvature, foreseen
from expertprune.errors import SpecError
from expertprune.relevance import Pass
from expertprune.units import KeptUnits, LayerShape
from tests.profiles import made_up_about

PART = ProfilePart(Pass.GRADIENT, "language_model")
DENSE = LayerShape(hidden=8, ffn=3, query_heads=2, kv_heads=1, head_dim=4)
ROUTED = LayerShape(hidden=8, ffn=2, query_heads=2, kv_heads=1, head_dim=4, experts=2)


def profile_of(folder: Path, shape: LayerShape, windows: int = 1, **norms: list[list[float]]) -> Profile:
    """Two documents of three tokens and one, with losses of 2 and 4 nats a token; gradients where norms are given.

    Args:
        windows: how often each of them stands there.
    """
    about = made_up_about(documents=["a", "b"] * windows, tokens=4 * windows, layers=[shape])
    path = folder / "p.safetensors"
    save_profile(path, about, {"tokens": torch.tensor([3.0, 1.0] * windows)})
    if norms:
        found: dict[str, Tensor] = {"loss": torch.tensor([2.0, 4.0] * windows)}
        for name, rows in norms.items():
            found |= halved(f"{name}.0.norm", torch.tensor(rows * windows))
        save_profile(PART.path(path), about, found)
    return Profile(path)


def test_the_curvature_is_half_the_sum_of_what_goes(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="domain/law lacks the gradient-language_model pass"):
        curvature(profile_of(tmp_path, DENSE), PART, [DENSE.all_kept])
    profile = profile_of(tmp_path, DENSE, ffn=[[9.0, 2.0, 1.0], [9.0, 1.0, 0.5]], heads=[[9.0, 4.0], [9.0, 2.0]])
    kept = KeptUnits(ffn=(0, 2), query_heads=(0,), kv_groups=(0,), experts=())
    # tokens times (2² + 4²) / 2 of the first, and (1² + 2²) / 2 of the second
    assert curvature(profile, PART, [kept]).tolist() == [3 * 10.0, 1 * 2.5]
    found = foreseen(profile, PART, [DENSE.all_kept], Law(1.0, 1.0, 0.3))
    assert (found.excess, found.low, found.retention, found.high) == (0.0, 1.0, 1.0, 1.0)


def test_a_routed_expert_that_goes_counts_once_and_neurons_of_others_each(tmp_path: Path) -> None:
    norms = {"ffn": [[1.0, 2.0, 3.0, 4.0]] * 2, "experts": [[3.0, 7.0]] * 2, "heads": [[9.0, 9.0]] * 2}
    kept = KeptUnits(ffn=(0,), query_heads=(0, 1), kv_groups=(0,), experts=(0,))
    # neuron 1 of the first routed expert, and the second whole: (2² + 7²) / 2
    assert curvature(profile_of(tmp_path, ROUTED, **norms), PART, [kept]).tolist() == [3 * 26.5, 26.5]


@pytest.mark.parametrize("windows", [1, 3])
def test_retention_and_interval(windows: int, tmp_path: Path) -> None:
    """Windows of one document are no further documents."""
    profile = profile_of(tmp_path, DENSE, windows, ffn=[[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]], heads=[[0.0, 0.0]] * 2)
    kept = KeptUnits(ffn=(0, 2), query_heads=(0, 1), kv_groups=(0,), experts=())
    found = foreseen(profile, PART, [kept], Law(scale=0.5, power=2.0, spread=0.3))
    mean, loss = (3 * 6.0 + 1 * 0.5) / 4, (3 * 2.0 + 1 * 4.0) / 4
    excess = 0.5 * mean**2
    assert found.excess == pytest.approx(excess)
    assert found.retention == pytest.approx(loss / (loss + excess))
    # both documents are 1.375 · 3 and 4.125 · 1 from the mean, so the ratio's standard error is 4.125 · √2 / 4 · √(2 / 1)
    deviation = math.hypot(0.3, 2 * (4.125 * 2 / 4) / mean)
    assert found.low == pytest.approx(loss / (loss + excess * math.exp(1.96 * deviation)))
    assert found.high == pytest.approx(loss / (loss + excess * math.exp(-1.96 * deviation)))
