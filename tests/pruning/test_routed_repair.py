"""Repair of routed experts, against least squares written out in float64."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertprune.engine.routed import RoutedSizes
from expertprune.models.passes import TextRun
from expertprune.pruning import routed_repair, solve
from expertprune.pruning.repair import RepairJob, by_least_squares
from expertprune.pruning.routed_repair import RoutedMoments, RoutedRepair, RoutedSystem
from expertprune.pruning.write import RepairInput
from expertprune.spec.schema import Compensation
from expertprune.units import KeptUnits, LayerShape
from tests.masks import tiny_of, token_lists
from tests.oracle import load, plan_of, pruned, random_units, resolved
from tests.tiny import save_tiny, tiny_model

Array = NDArray[np.float64]
RIDGE = 0.1  # tokens


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


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
    """The last layer of a tiny model whose other layers stay whole, and what of it is kept."""

    def __init__(self, name: str, widths: dict[str, int], **changes: Any) -> None:
        self.model = tiny_model(name, **changes)
        self.of = tiny_of(self.model)
        self.index = len(self.of.shapes) - 1
        self.shape: LayerShape = self.of.shapes[-1]
        units = random_units(self.shape, torch.Generator().manual_seed(3), **widths)
        self.kept: list[KeptUnits] = [*(shape.all_kept for shape in self.of.shapes[:-1]), units]

    def repaired(self, text: TextRun) -> dict[int, Array]:
        """Output projections of kept experts, by their number."""
        found = dict(by_least_squares(RepairJob(text, self.kept, Compensation(ridge=RIDGE))))
        names = self.of.family.experts
        assert names is not None
        prefix = self.of.family.layer_prefix(self.index)
        kept = self.kept[-1].experts
        assert set(found) == {prefix + names.output_of(expert) for expert in kept}
        return {expert: numbers(found[prefix + names.output_of(expert)]) for expert in kept}

    def inside(self, text: list[list[int]]) -> tuple[Array, Array, Array, Array]:
        """Of all tokens: what the dense experts write, the stream behind, and the kept experts' router weights and inputs.

        The router chooses among the kept experts alone.
        """
        model, layer = self.model, self.model.model.layers[self.index]
        seen: dict[str, list[Array]] = {"written": [], "stream": [], "hidden": []}

        def note(name: str, value: torch.Tensor) -> None:
            seen[name].append(numbers(value.reshape(-1, value.shape[-1])))

        handles = [
            layer.mlp.experts.register_forward_hook(lambda _, __, output: note("written", output)),
            layer.register_forward_hook(lambda _, __, output: note("stream", output)),
            layer.mlp.experts.register_forward_pre_hook(lambda _, given: note("hidden", given[0])),
        ]
        with torch.no_grad():
            for ids in text:
                model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        written, stream, hidden = (np.concatenate(seen[name]) for name in ("written", "stream", "hidden"))
        kept = list(self.kept[-1].experts)
        logits = hidden @ numbers(layer.mlp.gate.weight)[kept].T
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        gates = np.where(chances >= np.sort(chances, 1)[:, -2:-1], chances, 0)
        if getattr(model.config, "norm_topk_prob", True):
            gates /= gates.sum(1, keepdims=True)
        return written, stream, gates, hidden

    def design(self, gates: Array, hidden: Array) -> Array:
        """`[tokens, kept experts * kept neurons]`: router weight times activation."""
        experts, parts = self.model.model.layers[self.index].mlp.experts, []
        for place, expert in enumerate(self.kept[-1].experts):
            gate, up = np.split(hidden @ numbers(experts.gate_up_proj[expert]).T, 2, axis=1)
            neurons = gate / (1 + np.exp(-gate)) * up
            own = neurons[:, list(self.kept[-1].neurons_of(expert, self.shape))]
            parts.append(own * gates[:, place, None])
        return np.concatenate(parts, 1)


CASES: list[tuple[str, dict[str, int]]] = [
    ("mixtral", {"ffn": 12}),
    ("mixtral", {"experts": 4}),
    ("qwen2_moe", {"experts": 3, "ffn": 8}),
    ("olmoe", {"experts": 4}),
]


@pytest.mark.parametrize(("name", "widths"), CASES, ids=str)
def test_a_layer_comes_close_to_the_best_that_its_kept_experts_can_do_together(
    name: str, widths: dict[str, int]
) -> None:
    layer = Layer(name, widths, num_hidden_layers=2)
    texts = token_lists([60] * 40, seed=4)
    repaired = layer.repaired(layer.of.text(texts, 600))
    written, stream, gates, hidden = layer.inside(texts)
    design = layer.design(gates, hidden)
    importance = 1 / np.sqrt((stream**2).mean(1, keepdims=True))
    best = np.linalg.lstsq(importance * design, importance * written, rcond=None)[0].T
    experts = layer.model.model.layers[layer.index].mlp.experts
    before = np.concatenate(
        [
            numbers(experts.down_proj[expert])[:, list(layer.kept[-1].neurons_of(expert, layer.shape))]
            for expert in layer.kept[-1].experts
        ],
        1,
    )
    after = np.concatenate([repaired[expert] for expert in layer.kept[-1].experts], 1)

    def error(columns: Array) -> float:
        return float(((importance * (written - design @ columns.T)) ** 2).sum())

    assert error(after) < 0.9 * error(before)
    # all that can be won at all, but for a tenth: the ridge, and experts solved one after the other
    assert error(before) - error(after) > 0.9 * (error(before) - error(best))


def test_equations_that_there_is_no_room_for_are_factorized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("mixtral", {"experts": 4}, num_hidden_layers=2)
    text = layer.of.text(token_lists([30] * 10, seed=4), 600)
    kept = layer.repaired(text)
    monkeypatch.setattr(routed_repair, "KEPT", 0)
    for expert, weight in layer.repaired(text).items():
        np.testing.assert_array_equal(weight, kept[expert])


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


@pytest.mark.parametrize(("devices", "narrow"), [(("cuda",), "ieee"), (("cuda", "cpu"), "tf32")])
def test_second_moments_alone_are_products_of_tf32_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], narrow: str
) -> None:
    """As if this processor were one."""
    setting = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr(torch.backends.cuda, "matmul", setting)
    monkeypatch.setattr(solve, "_NARROW", devices)
    layer = Layer("mixtral", {"ffn": 12}, num_hidden_layers=2)
    text = layer.of.text(token_lists([30] * 10, seed=4), 600)
    with Products(setting) as routed:
        layer.repaired(text)
    moments = {(12, 12), (layer.shape.hidden, 12)}
    assert {each for each in routed.seen if each[0] in moments} == {(shape, narrow) for shape in moments}
    assert {each[1] for each in routed.seen if each[0] not in moments} == {"ieee"}
    with Products(setting) as dense:
        solve.Moments.zeros(5, 3, torch.device("cpu")).add(torch.ones(7, 5), torch.ones(7, 3), torch.ones(7))
    assert dense.seen == {((5, 5), narrow), ((3, 5), narrow)}
    with pytest.raises(ValueError, match="in the block"), solve.narrow_products(torch.device("cpu")):
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
    layer = Layer("mixtral", {"ffn": ffn}, num_hidden_layers=2, intermediate_size=2 * ffn)
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


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_the_stream_behind_a_repaired_layer_is_what_the_written_expert_computes(
    name: str, tmp_path: Path, store: Path
) -> None:
    """Repaired layer by layer, in the order in which the expert runs them, and written in the right rows of its files."""
    base = resolved(save_tiny(tmp_path / "base", name), store)
    model = load(base.folder)
    generator = torch.Generator().manual_seed(5)
    plan = plan_of(base, [random_units(shape, generator, experts=4) for shape in base.layers])
    texts = token_lists([50] * 8, seed=6)
    batches = list(tiny_of(model).text(texts, 200).batches)
    cut = load(pruned(plan, base, tmp_path / "cut"))
    settings = Compensation(ridge=0.4)
    out = load(pruned(plan, base, tmp_path / "repaired", RepairInput(model, batches, settings)))
    errors = {}
    for kind, expert in (("cut", cut), ("repaired", out)):
        gaps = []
        for ids in texts:
            streams = [each.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
                       for each in (model, expert)]  # fmt: skip
            gaps.append((streams[0] - streams[1]).square().sum())
        errors[kind] = float(sum(gaps))
    assert errors["repaired"] < 0.8 * errors["cut"]
