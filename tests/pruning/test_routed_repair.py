"""Repair of routed experts, against least squares written out in float64."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertprune.engine.routed import RoutedSizes
from expertprune.models import precision
from expertprune.models.passes import TextRun
from expertprune.pruning import routed_repair, solve
from expertprune.pruning.repair import RepairJob, by_least_squares
from expertprune.pruning.routed_repair import RoutedMoments, RoutedRepair, RoutedSystem
from expertprune.pruning.write import RepairInput
from expertprune.spec.schema import Compensation
from tests.masks import tiny_of, token_lists
from tests.oracle import load, pruned, random_plan, random_units
from tests.pruning.cutting import tiny_base
from tests.pruning.routing import Array, gates_of, into_experts, neurons_of, numbers
from tests.tiny import tiny_model

RIDGE = 0.1  # tokens


def test_one_expert_is_the_ridge_regression_of_its_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    neurons, residual = torch.randn(40, 5, generator=generator), torch.randn(40, 3, generator=generator)
    gate, weight = torch.rand(40, generator=generator), torch.rand(40, generator=generator)
    inputs = numbers(neurons * gate[:, None])
    scale = numbers(weight)[:, None]
    gram, cross = inputs.T @ (scale * inputs), numbers(residual).T @ (scale * inputs)
    # forty tokens of unlike weights count as fewer
    seen = numbers(weight) * numbers(gate) ** 2
    effective = seen.sum() ** 2 / (seen**2).sum()
    energy = np.diag(gram)
    ridge = energy * (0.1 + (5 / effective) ** 2) + 1e-4 * np.median(energy)
    expected = cross @ np.linalg.inv(gram + np.diag(ridge))
    system = RoutedSystem.of(RoutedMoments(torch.tensor(gram).float(), torch.tensor(effective)), 0.1)
    before = torch.randn(3, 5, generator=generator)
    # what an earlier sweep has changed is no longer in the residual, and the wish for it is the same
    for done, left in ((0 * before, cross), (before, cross - numbers(before) @ gram)):
        found = system.change(torch.tensor(left).float(), done)
        np.testing.assert_allclose(numbers(found), expected, rtol=1e-4, atol=1e-6)


def test_equations_that_cannot_be_solved_give_nothing_finite() -> None:
    """What is not finite is refused when it is written; an unfinished factor would be written."""
    gram = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    system = RoutedSystem.of(RoutedMoments(gram, torch.tensor(1e9)), 1e-9)
    assert not system.change(torch.ones(2, 3), torch.zeros(2, 3)).isfinite().any()


def test_an_expert_that_few_tokens_come_to_stays_as_it_is() -> None:
    """Of 256 neurons, one token says one direction: without the second term, the change would fit it nearly exactly."""
    generator = torch.Generator().manual_seed(2)
    for tokens, most in ((0, 0.0), (1, 0.01), (8, 0.05), (16384, 1.01)):
        inputs = torch.randn(tokens, 256, generator=generator)
        wanted = torch.randn(6, 256, generator=generator)
        system = RoutedSystem.of(RoutedMoments(inputs.T @ inputs, torch.tensor(tokens)), 1e-4)
        change = system.change(wanted @ inputs.T @ inputs, torch.zeros(6, 256))
        assert (change @ inputs.T).norm() <= most * (wanted @ inputs.T).norm(), tokens
    assert (change - wanted).norm() < 0.01 * wanted.norm(), "enough tokens say what the change is"


class Layer:
    """The second layer of a tiny model whose first stays whole, and what of it is kept."""

    def __init__(self, name: str, widths: dict[str, int], **changes: Any) -> None:
        self.model = tiny_model(name, num_hidden_layers=2, **changes)
        self.of = tiny_of(self.model)
        first, self.shape = self.of.shapes
        self.units = random_units(self.shape, torch.Generator().manual_seed(3), **widths)
        self.kept = [first.all_kept, self.units]

    def repaired(self, text: TextRun) -> Array:
        """Output projections of kept experts, side by side, `[hidden, kept experts * kept neurons]`."""
        found = dict(by_least_squares(RepairJob(text, self.kept, Compensation(ridge=RIDGE))))
        family = self.of.family
        assert family.experts is not None
        names = [family.layer_prefix(1) + family.experts.output_of(expert) for expert in self.units.experts]
        assert set(found) == set(names)
        return np.concatenate([numbers(found[name]) for name in names], 1)


# Router weights are normalized in the first, not in the second.
@pytest.mark.parametrize(
    ("name", "widths"), [("mixtral", {"ffn": 12}), ("qwen2_moe", {"experts": 3, "ffn": 8})], ids=str
)
def test_a_layer_comes_close_to_the_best_that_its_kept_experts_can_do_together(
    name: str, widths: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Layer(name, widths)
    layer, texts, seen = of.model.model.layers[1], token_lists([60] * 40, seed=4), dict[str, Array]()
    text = of.of.text(texts, 600)
    after = of.repaired(text)
    for key, module in (("written", layer.mlp.experts), ("stream", layer)):
        module.register_forward_hook(
            lambda _, __, output, key=key: seen.update({key: numbers(output).reshape(-1, output.shape[-1])})
        )
    hidden = into_experts(of.model, 1, texts)
    written, importance = seen["written"], 1 / np.sqrt((seen["stream"] ** 2).mean(1, keepdims=True))
    down, gates, inputs, columns = layer.mlp.experts.down_proj, gates_of(of.model, 1, hidden, of.units.experts), [], []
    for place, expert in enumerate(of.units.experts):
        own = list(of.units.neurons_of(expert, of.shape))
        inputs.append(neurons_of(of.model, 1, hidden, expert)[:, own] * gates[:, place, None])
        columns.append(numbers(down[expert])[:, own])
    design, before = np.concatenate(inputs, 1), np.concatenate(columns, 1)
    best = np.linalg.lstsq(importance * design, importance * written, rcond=None)[0].T

    def error(columns: Array) -> float:
        return float(((importance * (written - design @ columns.T)) ** 2).sum())

    assert error(after) < 0.9 * error(before)
    # all that can be won at all, but for a tenth: the ridge, and experts solved one after the other
    assert error(before) - error(after) > 0.9 * (error(before) - error(best))
    monkeypatch.setattr(routed_repair, "KEPT", 0)  # equations that there is no room for are factorized again
    np.testing.assert_array_equal(of.repaired(text), after)


def test_the_tokens_of_an_expert_count_by_the_square_of_its_router_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of equal weight would say as much as those that come to it, with their streams' weights."""
    of, told, original = Layer("qwen2_moe", {"ffn": 8}), list[float](), RoutedSystem.of
    texts = token_lists([60] * 10, seed=4)

    def noted(moments: RoutedMoments, damping: float) -> RoutedSystem:
        told.append(float(moments.tokens))
        return original(moments, damping)

    monkeypatch.setattr(RoutedSystem, "of", noted)
    of.repaired(of.of.text(texts, 600))
    streams: list[Array] = []
    of.model.model.layers[1].register_forward_hook(lambda _, __, output: streams.append(numbers(output)))
    gates = gates_of(of.model, 1, into_experts(of.model, 1, texts), of.units.experts)
    weights = gates**2 / (streams[0].reshape(len(gates), -1) ** 2).mean(1, keepdims=True)
    expected = [own.sum() ** 2 / (own**2).sum() for own in weights.T if own.any()]
    assert told == pytest.approx(expected, rel=1e-3)
    assert len(set(expected)) > 1


class Products(TorchDispatchMode):
    """Notes the shape of every matrix product, and torch's precision of products while it runs."""

    def __init__(self, setting: SimpleNamespace) -> None:
        super().__init__()
        self.setting, self.seen = setting, set[tuple[tuple[int, ...], str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm_"):
            self.seen.add((tuple(found.shape), self.setting.fp32_precision))
        return found


def test_second_moments_alone_are_products_of_tf32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor were one; the setting is torch's own, and comes back behind an error, too."""
    setting, of = SimpleNamespace(fp32_precision="ieee"), Layer("mixtral", {"ffn": 12})
    text, moments = of.of.text(token_lists([30] * 10, seed=4), 600), {(12, 12), (of.shape.hidden, 12)}
    monkeypatch.setattr(torch.backends.cuda, "matmul", setting)
    for devices, narrow in ((("cuda",), "ieee"), (("cuda", "cpu"), "tf32")):
        monkeypatch.setattr(precision, "_NARROW", devices)
        with Products(setting) as routed:
            of.repaired(text)
        assert {each for each in routed.seen if each[0] in moments} == {(shape, narrow) for shape in moments}
        assert {each[1] for each in routed.seen if each[0] not in moments} == {"ieee"}
        with Products(setting) as dense:
            solve.Moments.zeros(5, 3, torch.device("cpu")).add(torch.ones(7, 5), torch.ones(7, 3), torch.ones(7))
        assert dense.seen == {((5, 5), narrow), ((3, 5), narrow)}
    with pytest.raises(ValueError, match="in the block"), precision.narrow_products(torch.device("cpu")):
        raise ValueError("in the block")
    assert setting.fp32_precision == "ieee"


class Live(TorchDispatchMode):
    """The most bytes of tensors that were made in the block and alive at a time; views share their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if torch.is_tensor(each):
                place, size = each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()
                if place in self._users or place not in given:
                    self.now += 0 if self._users.get(place) else size
                    self._users[place] = self._users.get(place, 0) + 1
                    weakref.finalize(each, self._gone, place, size)
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


@pytest.mark.parametrize(("documents", "ffn"), [(60, 16), (4, 256)])
def test_the_memory_of_a_repair_is_what_is_forecast(documents: int, ffn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens take most of it, and where matrices do."""
    layer = Layer("mixtral", {"ffn": ffn}, intermediate_size=2 * ffn)
    live, solve_ = Live(), RoutedRepair.solve

    def watched(*args: Any) -> torch.Tensor:
        with live:
            return solve_(*args)

    monkeypatch.setattr(RoutedRepair, "solve", watched)
    layer.repaired(layer.of.text(token_lists([60] * documents, seed=4), 600))
    hidden, tokens = layer.shape.hidden, 60 * documents
    sizes = RoutedSizes(experts=layer.shape.experts, ffn=ffn, hidden=hidden, chosen=2, repaired=True)
    # the streams' own states are counted elsewhere
    assert sizes.work(tokens, 4) + 4 * tokens * hidden == pytest.approx(live.peak, rel=0.25)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_stream_behind_a_repaired_layer_is_what_the_written_expert_computes(name: str, tmp_path: Path) -> None:
    """Repaired layer by layer, in the order in which the expert runs them, and written in the right rows of its files."""
    base = tiny_base(tmp_path, name)
    model, plan, texts = load(base.folder), random_plan(base, seed=5, experts=4), token_lists([50] * 8, seed=6)
    given = RepairInput(model, list(tiny_of(model).text(texts, 200).batches), Compensation(ridge=0.4))
    errors = []
    for folder in (pruned(plan, base, tmp_path / "cut"), pruned(plan, base, tmp_path / "repaired", given)):
        expert, ids = load(folder), torch.tensor(texts)
        streams = [each.model(input_ids=ids, use_cache=False).last_hidden_state for each in (model, expert)]
        errors.append(float((streams[0] - streams[1]).square().sum()))
    assert errors[1] < 0.8 * errors[0]
