"""Criteria from stored profiles: their formulas written out, and what no criterion may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertprune.artifacts.profile import FORWARD, Profile, ProfilePart, halved, save_profile
from expertprune.composition.scoring import corpus_scores, needed_part, unit_statistics
from expertprune.corpora.batches import make_batches
from expertprune.corpora.documents import Document
from expertprune.errors import SpecError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.profiling.store import description, measure, profile_key, profile_path
from expertprune.relevance import Pass, criteria
from expertprune.spec.schema import Base, Budget, Dimensions, Relevance, Spec
from expertprune.units import DENSE, Structure
from tests.masks import (
    LENGTHS,
    Tiny,
    assert_near,
    ffn_output,
    mask_gradients,
    projection_inputs,
    regional_gradients,
    tiny,
    token_lists,
)
from tests.patching import everywhere
from tests.tiny import tiny_tokenizer

NAMES = {Structure.FFN: "ffn", Structure.QUERY_HEADS: "heads", Structure.KV_GROUPS: "groups"}
TEXT, DRAWN = (ProfilePart(Pass.GRADIENT, loss) for loss in ("language_model", "kl"))
REGIONAL = ProfilePart(Pass.REGIONAL)
PARTS = [TEXT, DRAWN, REGIONAL]
# Uniform numbers are drawn for the places in a layer, not for the units that happen to stand there.
ALL_BUT_RANDOM = sorted(name for name in criteria if Structure.FFN in criteria[name].structures and name != "random")
# One of each kind: plain, with biases, with norms behind the blocks, fused, with norms over all heads, without a gate.
KINDS = ["llama", "qwen2", "gemma3_text", "phi3", "olmo2", "starcoder2"]


@pytest.fixture
def _not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stay in float32, so that they compare closer than half precision allows."""

    def whole(name: str, values: Tensor) -> dict[str, Tensor]:
        return {name: values, f"{name}.scale": torch.tensor(1.0)}

    everywhere(monkeypatch, "expertprune.artifacts.profile.halved", whole)


def spec_of(criterion: str, loss: str = "language_model", **compose: Any) -> Spec:
    return Spec(
        name="made-up",
        base="nowhere",
        dimensions=Dimensions(language=["en"]),
        budget=Budget(ffn=2, kv_groups=1, query_heads=2),
        relevance=Relevance(criterion=criterion, loss=loss),
        compose=compose,
    )


@dataclass
class Bench:
    """A tiny model in a folder, and its profiles in a store."""

    base: ResolvedBase
    store: Path

    def profile(
        self, parts: Sequence[ProfilePart], tokens: list[list[int]] | None = None, tokens_per_batch: int = 30
    ) -> Profile:
        tokens = token_lists() if tokens is None else tokens
        model = load_model(self.base.folder, self.base.dtype)
        documents = [Document(" ".join(map(str, ids))) for ids in tokens]
        key = profile_key(self.base, documents, 32)
        text = TextRun(model, self.base.family, self.base.layers, make_batches(tokens, tokens_per_batch))
        path, about = profile_path(self.store, key), description(self.base, "language/en", documents, key)
        for part in (FORWARD, *parts):
            measure(text, part, path, about)
        return Profile(path)


def bench(of: Tiny, folder: Path) -> Bench:
    of.model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return Bench(resolve_base(Base(model=str(folder / "base")), folder / "store"), folder / "store")


def raw_scores(profile: Profile, criterion: str, structure: Structure, layer: int) -> Tensor:
    """`[documents, units]`"""
    statistics = unit_statistics(profile, structure, layer, 0, needed_part(spec_of(criterion).relevance))
    return criteria[criterion].score(statistics)


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.usefixtures("_not_halved")
def test_gradient_criteria_written_out(tmp_path: Path, family: str) -> None:
    of = tiny(family)
    expected = mask_gradients(of, token_lists())
    profile = bench(of, tmp_path).profile([TEXT])
    predicted = torch.tensor([length - 1.0 for length in LENGTHS], dtype=torch.float64)
    for layer in range(len(of.shapes)):
        for structure, name in NAMES.items():
            slope = expected[f"{name}.{layer}"]
            assert_near(raw_scores(profile, "taylor", structure, layer), slope.abs(), 1e-5, f"taylor {name}")
            fisher = slope**2 * predicted[:, None]
            assert_near(raw_scores(profile, "fisher", structure, layer), fisher, 1e-5, f"fisher {name}")


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.usefixtures("_not_halved")
def test_regional_written_out(tmp_path: Path, family: str) -> None:
    of = tiny(family)
    slopes = regional_gradients(of, token_lists())
    profile = bench(of, tmp_path).profile([REGIONAL])
    inputs = [projection_inputs(of, ids) for ids in token_lists()]
    for layer, module in enumerate(of.model.model.layers):
        for structure, name in NAMES.items():
            block, output = ("ffn", ffn_output(module)) if name == "ffn" else ("heads", module.self_attn.o_proj)
            weight = output.weight.detach().double().numpy()
            units = of.shapes[layer].units(structure)
            energy = [np.square(weight).sum(0) * np.square(each[f"{block}.{layer}"]).mean(0) for each in inputs]
            written = np.sqrt(np.array(energy).reshape(len(LENGTHS), units, -1).sum(2))
            expected = slopes[f"{name}.{layer}"].abs() + torch.tensor(written)
            assert_near(raw_scores(profile, "regional", structure, layer), expected, 1e-5, name)


def test_fluctuation_is_the_variance_over_all_tokens_massive_means_included(tmp_path: Path) -> None:
    """One neuron gives a thousand, give or take one: the variance is what is left of squares a million times larger."""
    of = tiny("llama", mlp_bias=True)
    with torch.no_grad():
        mlp = of.model.model.layers[0].mlp
        mlp.gate_proj.weight[5] *= 0.1
        mlp.gate_proj.bias[5], mlp.up_proj.bias[5] = 1000.0, 1.0
        mlp.up_proj.weight[5] *= 0.001
    profile = bench(of, tmp_path).profile([])
    inputs = [projection_inputs(of, ids) for ids in token_lists()]
    for layer, module in enumerate(of.model.model.layers):
        for structure, name in NAMES.items():
            block, output = ("ffn", ffn_output(module)) if name == "ffn" else ("heads", module.self_attn.o_proj)
            values = np.concatenate([each[f"{block}.{layer}"] for each in inputs])
            weight = output.weight.detach().double().numpy()
            if (layer, name) == (0, "ffn"):
                assert abs(values[:, 5].mean()) > 300 * values[:, 5].std()
            each = (values.var(0) * np.square(weight).sum(0)).reshape(of.shapes[layer].units(structure), -1).sum(1)
            scores = raw_scores(profile, "fluctuation", structure, layer)
            assert scores.shape == (len(LENGTHS), len(each))
            for row in scores:  # a float32 near 1000 is known to 3e-5, so its distance of about 1 from the mean as well
                np.testing.assert_allclose(row.double().numpy(), each, rtol=2e-4, err_msg=f"{name} {layer}")


# --- units may stand in any order -----------------------------------------------------------------------------------


def permuted(of: Tiny, seed: int) -> list[dict[Structure, Tensor]]:
    """Move the units of every layer of a model about; returns which unit now stands in each place."""
    generator = torch.Generator().manual_seed(seed)
    moves = []
    for layer, shape in zip(of.model.model.layers, of.shapes, strict=True):
        neurons = torch.randperm(shape.ffn, generator=generator)
        groups = torch.randperm(shape.kv_heads, generator=generator)
        inside = [torch.randperm(shape.heads_per_group, generator=generator) for _ in groups]
        heads = torch.cat([g * shape.heads_per_group + order for g, order in zip(groups, inside, strict=True)])
        channels = torch.arange(shape.head_dim)
        queries, keys = ((units[:, None] * shape.head_dim + channels).flatten() for units in (heads, groups))
        attention = layer.self_attn
        fused = torch.cat([queries, shape.query_heads * shape.head_dim + torch.cat([keys, len(keys) + keys])])
        orders = {
            "gate_proj": neurons,
            "up_proj": neurons,
            "c_fc": neurons,
            "gate_up_proj": torch.cat([neurons, shape.ffn + neurons]),
        }
        orders |= {"q_proj": queries, "k_proj": keys, "v_proj": keys, "qkv_proj": fused}
        if hasattr(attention, "q_norm") and attention.q_norm.weight.numel() == len(queries):  # over all heads
            orders |= {"q_norm": queries, "k_norm": keys}
        for name, module in [*layer.mlp.named_children(), *attention.named_children()]:
            for parameter in module.parameters() if name in orders else ():
                parameter.data = parameter.data[orders[name]]
        ffn_output(layer).weight.data = ffn_output(layer).weight.data[:, neurons]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, queries]
        moves.append({Structure.FFN: neurons, Structure.QUERY_HEADS: heads, Structure.KV_GROUPS: groups})
    return moves


@pytest.mark.parametrize("family", ["phi3", "olmo2", "starcoder2"])  # others: against a reference, in test_forward
@pytest.mark.usefixtures("_not_halved")
def test_scores_follow_the_units_wherever_they_stand(tmp_path: Path, family: str) -> None:
    of = tiny(family)
    before = bench(of, tmp_path / "before").profile(PARTS)
    moves = permuted(of, 3)
    after = bench(of, tmp_path / "after").profile(PARTS)
    assert before.digest != after.digest
    for criterion in ALL_BUT_RANDOM:
        for loss in ("language_model", "kl"):
            spec = spec_of(criterion, loss)
            first, second = (corpus_scores(profile, list(DENSE), spec) for profile in (before, after))
            for structure in DENSE:
                for layer, move in enumerate(moves):
                    expected = first[structure].scaled[layer][move[structure]]
                    where = f"{criterion} {structure} {layer}"
                    assert_near(second[structure].scaled[layer], expected, 1e-4, where)
                    changed = not torch.allclose(expected, first[structure].scaled[layer], rtol=1e-3)
                    assert changed or torch.equal(move[structure], move[structure].sort().values), where


# --- documents may come in any order and in any batches -------------------------------------------------------------


def stored(profile: Profile, part: ProfilePart) -> dict[str, Tensor]:
    return load_file(part.path(profile.path))


@pytest.mark.usefixtures("_not_halved")
def test_batches_are_irrelevant_to_every_pass(tmp_path: Path) -> None:
    whole, single = (
        bench(tiny("llama"), tmp_path / str(size)).profile(PARTS, tokens_per_batch=size) for size in (10_000, 1)
    )
    for part in (FORWARD, *PARTS):
        expected, found = stored(whole, part), stored(single, part)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert_near(found[name], values, 1e-4, f"{part} {name}")


def test_two_runs_store_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for run in ("one", "two"):
        profile = bench(tiny("llama"), tmp_path / run).profile(PARTS)
        paths = [part.path(profile.path) for part in (FORWARD, *PARTS)]
        files.append({path.name: path.read_bytes().replace(str(tmp_path / run).encode(), b"") for path in paths})
    assert len(files[0]) == 1 + len(PARTS)
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


# --- parts ----------------------------------------------------------------------------------------------------------


def test_a_part_is_none_until_its_pass_was_made(tmp_path: Path) -> None:
    here = bench(tiny("llama"), tmp_path)
    profile = here.profile([])
    assert [profile.part(part) for part in PARTS] == [None] * len(PARTS)
    here.profile([REGIONAL])
    assert [profile.part(part) is not None for part in PARTS] == [part == REGIONAL for part in PARTS]
    part = profile.part(REGIONAL)
    assert part is not None
    assert (part.about["part"], part.digest, part.corpus) == ("regional", profile.digest, profile.corpus)


@pytest.mark.parametrize("criterion", sorted(name for name in criteria if criteria[name].needs))
def test_a_missing_pass_is_named(tmp_path: Path, criterion: str) -> None:
    profile = bench(tiny("llama"), tmp_path).profile([])
    for loss in ("language_model", "kl"):
        spec = spec_of(criterion, loss)
        part = f"gradient-{loss}" if criteria[criterion].needs is Pass.GRADIENT else "regional"
        with pytest.raises(SpecError, match=rf"language/en lacks the {part} pass .* run the profile stage"):
            corpus_scores(profile, [Structure.FFN], spec)


def test_the_two_losses_are_read_from_their_own_parts(tmp_path: Path) -> None:
    profile = bench(tiny("llama"), tmp_path).profile([TEXT, DRAWN])
    text, drawn = (
        corpus_scores(profile, [Structure.FFN], spec_of("fisher", loss))[Structure.FFN].scaled[0]
        for loss in ("language_model", "kl")
    )
    assert not torch.allclose(text, drawn, rtol=0.1)


# --- half precision -------------------------------------------------------------------------------------------------


def read_back(folder: Path, values: Tensor) -> Tensor:
    return save_profile(folder / "p.safetensors", {}, halved("x", values)).read_half("x")


@pytest.mark.parametrize("largest", [3.4e38, 1e6, 65504.0, 1.0, 1e-3, 1e-38, 2.0**-140])
def test_half_precision_keeps_any_magnitude(tmp_path: Path, largest: float) -> None:
    values = torch.tensor([[largest, -largest / 2], [largest / 1000, 0.0]])
    back = read_back(tmp_path, values)
    assert back.dtype == torch.float32
    np.testing.assert_allclose(back.double().numpy(), values.double().numpy(), rtol=2.0**-11, atol=2.0**-150)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (0,)])
def test_zeros_come_back_as_zeros(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = halved("x", torch.zeros(shape))
    assert float(stored["x.scale"]) == 1.0
    assert torch.equal(read_back(tmp_path, torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_is_seen(bad: float) -> None:
    assert not bool(halved("x", torch.tensor([1.0, bad]))["x"].isfinite().all())
