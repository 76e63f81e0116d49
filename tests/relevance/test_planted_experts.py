"""Experts planted in a real model: the composer keeps those of the corpora that the expert is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertprune
from expertprune.artifacts.plan import Plan
from expertprune.models.base import resolve_base
from expertprune.spec.schema import Base, Spec
from tests.planted import bits, plant, texts, token_ids

pytestmark = pytest.mark.slow
# Expert `e` of every layer is for `ROLES[e]`.
ROLES = ["domain/medical", "task/math", "language/de", "language/fr"]
ENGLISH: dict[str, list[str]] = {"domain": ["medical"], "task": ["math"]}
OTHERS: dict[str, list[str]] = {"language": ["de", "fr"]}
TOKENS = 64


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """SmolLM2-135M with four experts in each layer, each of which lacks a tenth of the neurons."""
    folder = tmp_path_factory.mktemp("planted") / "mixture"
    dense = resolve_base(Base(model="smollm2-135m-instruct"), real_store).folder
    plant(dense, folder, ROLES, lacking=0.1, documents=12, tokens=TOKENS)
    return folder


@pytest.fixture(scope="module")
def held_out(mixture: Path) -> dict[str, Tensor]:
    """Token ids of documents that neither routers nor plans have seen."""
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    return {name: token_ids(tokenizer, texts(name, "evaluation", 8), TOKENS) for name in ROLES}


def plan_for(
    mixture: Path, store: Path, dimensions: Mapping[str, list[str]], relevance: Mapping[str, str] | None = None
) -> Plan:
    spec = {
        "name": "planted",
        "base": str(mixture),
        "dimensions": dimensions,
        "general": [],
        "budget": {"experts": 2},
        "calibration": {"documents": 6, "max_tokens": TOKENS},
        "relevance": relevance or {},
        "evaluate": {"enabled": False},
    }
    return expertprune.compose(Spec.model_validate(spec), store=store)


def measured(folder: Path, held_out: Mapping[str, Tensor]) -> dict[str, float]:
    """Bits per token of each corpus."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {name: bits(model, ids) for name, ids in held_out.items()}


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [(ENGLISH, (0, 1)), (OTHERS, (2, 3)), ({"domain": ["medical"], "language": ["de"]}, (0, 2))],
    ids=["medical and math", "German and French", "medical and German"],
)
def test_the_experts_of_the_dimensions_are_kept(
    dimensions: dict[str, list[str]], expected: tuple[int, int], mixture: Path, real_store: Path
) -> None:
    by_default = plan_for(mixture, real_store, dimensions)
    assert by_default.spec["relevance"]["experts"] == "reap"
    right = [layer.experts == expected for layer in by_default.kept]
    # One pair in six is right by chance. REAP is a mean over the tokens that come to an expert, however few they are, so
    # one that is seldom chosen but writes much can outlast another in single layers.
    assert sum(right) >= 0.75 * len(right), [layer.experts for layer in by_default.kept]
    by_frequency = plan_for(mixture, real_store, dimensions, {"criterion": "frequency"})
    assert [layer.experts for layer in by_frequency.kept] == [expected] * len(right)


def test_what_the_expert_is_for_stays_and_the_rest_goes(
    mixture: Path, held_out: dict[str, Tensor], real_store: Path, tmp_path: Path
) -> None:
    before, found = measured(mixture, held_out), {}
    for name, dimensions in (("english", ENGLISH), ("others", OTHERS)):
        plan = plan_for(mixture, real_store, dimensions)
        folder = expertprune.prune(plan, tmp_path / name, store=real_store)
        found[name] = {corpus: value - before[corpus] for corpus, value in measured(folder, held_out).items()}
    own = {"english": ROLES[:2], "others": ROLES[2:]}
    for name, other in (("english", "others"), ("others", "english")):
        for corpus in own[name]:
            kept, lost = found[name][corpus], found[other][corpus]
            assert lost > 1, f"{corpus} of {other}: {lost:.2f} bits per token more than before"
            assert kept < lost / 2, f"{corpus} of {name}: {kept:.2f} bits per token more, {lost:.2f} in the reverse"
