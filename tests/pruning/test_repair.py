"""The closed-form repair against slow references, and what it promises on tiny models."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from expertprune.artifacts.plan import Plan
from expertprune.corpora.batches import Batch, make_batches
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.pruning.repair import RepairJob, repairs
from expertprune.pruning.solve import Moments, TokenRows, before_norm, least_squares, token_weights
from expertprune.pruning.write import RepairInput, prune
from expertprune.spec.schema import Compensation
from expertprune.units import GONE, KeptUnits
from tests.oracle import load, plan_of, pruned, random_plan, random_units, resolved, stored_tensors
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

RIDGE = 200.0  # tokens; the documents here have about as many


def random_documents(count: int = 24, longest: int = 31, seed: int = 0) -> list[list[int]]:
    """Token ids of documents of very different lengths, but few of them: 2, 3, 7, 16, 31."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for length in (2, 3, 7, 16, 31) if length <= longest]
    return [torch.randint(0, 64, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(count)]


def moments_of(inputs: Tensor, residual: Tensor, weight: Tensor) -> Moments:
    moments = Moments.zeros(inputs.shape[1], residual.shape[1], torch.device("cpu"))
    moments.add(inputs, residual, weight)
    return moments


def damping_of(weight: Tensor, ridge: float = RIDGE) -> float:
    """The ridge relative to the energy of so many tokens of unlike weights, by Kish's effective sample size."""
    numbers = weight.double().numpy()
    return float(ridge * (numbers**2).sum() / numbers.sum() ** 2) if len(numbers) else ridge


def ridge_of(inputs: np.ndarray, weight: np.ndarray, damping: float) -> np.ndarray:
    """What each column is damped by: its own energy, and a thousandth of the median energy, `[kept]`."""
    energy = (weight[:, None] * inputs**2).sum(0)
    return damping * (energy + np.sort(energy)[(len(energy) - 1) // 2] / 1000)


def slow_least_squares(inputs: np.ndarray, residual: np.ndarray, weight: np.ndarray, damping: float) -> np.ndarray:
    """The weighted ridge by an augmented QR solve, no normal equations, `[hidden, kept]`."""
    root = np.sqrt(weight)[:, None]
    damped = np.diag(np.sqrt(ridge_of(inputs, weight, damping)))
    left = np.concatenate([root * inputs, damped])
    right = np.concatenate([root * residual, np.zeros((inputs.shape[1], residual.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


def slow_normed(inputs: Tensor, own: Tensor, wished: Tensor, dense: Tensor, gain: Tensor, weight: Tensor) -> np.ndarray:
    """The answer behind an output norm, channel by channel, with two rows a token: its part of the stream, and itself.

    In the units of the norm's output, `γ v / rms` shall be what is wished, and `v / rms` the dense one, which counts as
    much as a channel of the median gain.
    """
    rms = dense.square().mean(1).sqrt()
    typical = float(np.sort(gain.square().numpy())[(len(gain) - 1) // 2])
    rows = []
    for channel, factor in enumerate(gain.tolist()):
        both = factor**2 + typical
        weights = np.concatenate([(weight / rms**2 * share / both).numpy() for share in (factor**2, typical)])
        owed = torch.cat([wished[:, channel] / factor * rms, dense[:, channel]]) - own[:, channel].repeat(2)
        stacked = inputs.repeat(2, 1).numpy()
        rows.append(slow_least_squares(stacked, owed[:, None].numpy(), weights, damping_of(weight / rms**2)))
    return np.concatenate(rows)


@torch.no_grad()
def gains_of(norm: Any) -> Tensor:
    """What each channel is multiplied with, `[hidden]`, float64."""
    gains: Tensor = norm(torch.ones_like(norm.weight)).double()
    return gains


def weighted_error(target: Tensor, states: Tensor) -> float:
    """Squared error of the residual stream, each token in proportion to its own size."""
    target, states = target.double(), states.double()
    return float(((target - states).square().mean(-1) / target.square().mean(-1)).sum())


# --- least_squares and its moments


@pytest.mark.parametrize(
    ("tokens", "kept", "ridge"), [(200, 15, 0.2), (900, 300, 0.2), (7, 15, 0.3), (200, 1, 200.0), (0, 5, 10.0)]
)
def test_least_squares_is_the_weighted_ridge(tokens: int, kept: int, ridge: float) -> None:
    """Inputs of very different sizes; the third one is never seen, and must not move."""
    rng = np.random.default_rng(tokens + kept)
    inputs = rng.normal(size=(tokens, kept)) * rng.uniform(0.1, 10, size=kept) + 0.5
    inputs[:, 2:3] = 0
    residual, weight = rng.normal(size=(tokens, 6)), rng.uniform(0.1, 3, size=tokens)
    moments = moments_of(*(torch.tensor(a, dtype=torch.float32) for a in (inputs, residual, weight)))
    found = least_squares(moments, ridge)
    expected = slow_least_squares(inputs, residual, weight, damping_of(torch.tensor(weight), ridge))
    assert not found[:, 2:3].any()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max(initial=0))
    assert found.dtype == torch.float32
    if tokens:  # the same from the tokens themselves, in two batches
        rows = TokenRows()
        for part in (slice(None, 3), slice(3, None)):
            rows.add(*(torch.tensor(a[part], dtype=torch.float32) for a in (inputs, residual, weight)))
        directly = rows.solved(ridge)
        assert not directly[:, 2:3].any()
        np.testing.assert_allclose(directly.numpy(), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def test_a_gram_matrix_that_cannot_be_solved_asks_for_more_ridge() -> None:
    moments = Moments(-torch.eye(3), torch.ones(2, 3), torch.tensor([5.0, 5.0]))
    with pytest.raises(CheckpointError, match=r"with a ridge of 1\.5 tokens; raise compensation\.ridge"):
        least_squares(moments, 1.5)


def test_token_weight_is_one_over_the_mean_square() -> None:
    stream = torch.tensor([[1.0, -1.0], [3.0, 1.0], [100.0, 0.0]])
    expected = torch.tensor([1.0, 1 / 5, 1 / 5000])  # (1+1)/2, (9+1)/2, (10000+0)/2
    torch.testing.assert_close(token_weights(stream), expected)
    assert bool(token_weights(torch.zeros(1, 2)).isfinite().all())


# --- repair, on tiny models

CUTS = {"ffn": {"ffn": 22}, "heads": {"heads_per_group": 1}, "both": {"ffn": 22, "kv_groups": 2}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "gemma3": {},
    "gemma2": {},
}


def spread_gains(model: Any) -> None:
    """Where outputs pass a norm, give its channels gains two orders of magnitude apart."""
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        for norm in output_norms(layer):
            gain = torch.randn(norm.weight.shape, generator=generator).mul(1.2).exp()
            norm.weight.copy_(gain - (norm(torch.ones_like(gain)) - norm.weight).round())  # Gemma's are 1 + weight


def output_norms(layer: Any) -> list[Any]:
    """The norms behind attention and FFN; none in the families whose outputs are added as they are."""
    if not hasattr(layer, "post_feedforward_layernorm"):
        return []
    return [layer.post_attention_layernorm, layer.post_feedforward_layernorm]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResolvedBase:
    root = tmp_path_factory.mktemp("compensation")
    folder = save_changed(root / "base", spread_gains, request.param, **FAMILIES[request.param])
    return resolved(folder, root / "store")


def repair_input(base: ResolvedBase, ridge: float = RIDGE, documents: list[list[int]] | None = None) -> RepairInput:
    model = load_model(base.folder, torch.float32, torch.device("cpu"))
    return RepairInput(model, make_batches(documents or random_documents(), 256), Compensation(ridge=ridge))


def repaired_weights(base: ResolvedBase, kept: list[KeptUnits], batches: list[Batch]) -> dict[str, Tensor]:
    text = TextRun(load_model(base.folder, torch.float32, torch.device("cpu")), base.family, base.layers, batches)
    settings = Compensation(ridge=RIDGE)
    return dict(repairs[settings.method].weights(RepairJob(text, kept, settings), None))


class Watched:
    """The streams of a model over documents, without any padding: `[all tokens, channels]` per layer.

    Documents of one length run together, so the order of tokens is another than the documents', but the same for every
    model.
    """

    @torch.no_grad()
    def __init__(self, model: Any, documents: list[list[int]]) -> None:
        self.norms = [output_norms(layer) or None for layer in model.model.layers]
        self.seen: dict[tuple[int, str, str], list[Tensor]] = defaultdict(list)
        handles = []
        for index, layer in enumerate(model.model.layers):
            for name, module in (("layer", layer), ("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):

                def note(_: Any, inputs: Any, output: Any, of: tuple[int, str] = (index, name)) -> None:
                    self.seen[*of, "in"].append(inputs[0].flatten(0, 1))
                    self.seen[*of, "out"].append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

                handles.append(module.register_forward_hook(note))
        for length in sorted({len(ids) for ids in documents}):
            model(torch.tensor([ids for ids in documents if len(ids) == length]), use_cache=False)
        for handle in handles:
            handle.remove()

    def stream(self, layer: int, after: str) -> Tensor:
        """The residual stream after a block of a layer, as the sum that the architecture makes it."""
        total = torch.cat(self.seen[layer, "layer", "in"]) + self.added(layer, "attention")
        return total if after == "attention" else total + self.added(layer, "ffn")

    def output(self, layer: int, block: str) -> Tensor:
        """What a block's output projection gives."""
        return torch.cat(self.seen[layer, block, "out"])

    @torch.no_grad()
    def added(self, layer: int, block: str) -> Tensor:
        """What a block adds to the stream."""
        output, norms = self.output(layer, block), self.norms[layer]
        added: Tensor = output if norms is None else norms[block == "ffn"](output)
        return added

    def inputs(self, layer: int, block: str) -> Tensor:
        return torch.cat(self.seen[layer, block, "in"])


@pytest.mark.parametrize("cut", CUTS)
def test_every_repaired_weight_solves_its_ridge_in_the_stream_of_the_expert(
    cut: str, base: ResolvedBase, tmp_path: Path
) -> None:
    assert_ridges_are_solved(base, random_plan(base, seed=3, **CUTS[cut]), tmp_path)


@pytest.mark.parametrize(
    "widths", [[{"ffn": 25, "kv_groups": 2}, {"ffn": 20}, {"kv_groups": 1}], [{}, {"heads_per_group": 1}, {}]]
)
def test_layers_of_their_own_widths_are_repaired_and_those_that_lost_nothing_are_not(
    widths: list[dict[str, int]], tmp_path: Path, store: Path
) -> None:
    base, generator = resolved(save_tiny(tmp_path / "base", "llama"), store), torch.Generator().manual_seed(3)
    kept = [random_units(shape, generator, **each) for shape, each in zip(base.layers, widths, strict=True)]
    assert_ridges_are_solved(base, plan_of(base, kept), tmp_path)


@pytest.mark.parametrize("widths", [{}, {"ffn": 22, "kv_groups": 2}])
def test_the_ffn_before_layers_that_go_takes_over(
    widths: dict[str, int], base: ResolvedBase, tmp_path: Path, store: Path
) -> None:
    """The last layer goes, or the two in the middle of four."""
    assert_ridges_are_solved(base, without(base, [2], **widths), tmp_path)
    longer = (
        {"num_hidden_layers": 4, "layer_types": None}
        if base.family.family.startswith("gemma")
        else {"num_hidden_layers": 4}
    )
    base = resolved(save_changed(tmp_path / "longer", spread_gains, base.family.model_types[0], **longer), store)
    (tmp_path / "second").mkdir()
    assert_ridges_are_solved(base, without(base, [1, 2], **widths), tmp_path / "second")


def without(base: ResolvedBase, gone: Sequence[int], **widths: int) -> Plan:
    plan = random_plan(base, seed=3, **widths)
    return plan_of(base, [GONE if layer in gone else units for layer, units in enumerate(plan.kept)])


def assert_ridges_are_solved(base: ResolvedBase, plan: Plan, tmp_path: Path) -> None:
    """Run the written expert itself: each projection must be the slow ridge's answer on what reaches it there.

    That holds layer by layer only if the prefix was the repaired one, the target the dense residual stream, and every
    token counted once, with the weight of its own target. An FFN before layers that go aims behind them. Projections that
    lost nothing, and take over nothing, stay as they were.
    """
    documents = random_documents()
    folder = pruned(plan, base, tmp_path / "expert", repair_input(base, documents=documents))
    expert, before = (load_model(each, torch.float32, torch.device("cpu"))
                      for each in (folder, pruned(plan, base, tmp_path / "cut")))  # fmt: skip
    ours, dense = Watched(expert, documents), Watched(load(base.folder), documents)
    staying = [layer for layer, kept in enumerate(plan.kept) if not kept.gone]
    for place, (layer, following) in enumerate(itertools.pairwise([*staying, len(plan.kept)])):
        shape, kept = plan.shapes[layer], plan.kept[layer]
        for block, path, lost, behind in (
            ("attention", "self_attn.o_proj", len(kept.query_heads) < shape.query_heads, layer),
            ("ffn", "mlp.down_proj", len(kept.ffn) < shape.ffn or following > layer + 1, following - 1),
        ):
            name = f"model.layers.{place}.{path}.weight"
            sliced, repaired = before.get_parameter(name).double(), expert.get_parameter(name).double()
            if not lost:
                assert torch.equal(sliced, repaired), name
                continue
            target, reached = dense.stream(behind, block).double(), ours.stream(place, block).double()
            inputs = ours.inputs(place, block).double()
            weight = 1 / target.square().mean(1)
            if dense.norms[layer] is None:
                owed = target - (reached - inputs @ (repaired - sliced).T)  # with the columns as they were cut
                change = slow_least_squares(inputs.numpy(), owed.numpy(), weight.numpy(), damping_of(weight))
            else:
                own = (ours.output(place, block) - inputs @ (repaired - sliced).T).double()
                wished = target - (reached - ours.added(place, block))  # of what the norm gives
                norm, output = dense.norms[layer][block == "ffn"], dense.output(layer, block).double()
                change = slow_normed(inputs, own, wished, output, gains_of(norm), weight)
            np.testing.assert_allclose(
                (repaired - sliced).numpy(), change, atol=3e-3 * np.abs(change).max(), err_msg=name
            )
            assert np.abs(change).max() > 1e-3


def test_only_output_projections_are_changed(base: ResolvedBase, tmp_path: Path) -> None:
    plan = random_plan(base, seed=3, **CUTS["both"])
    plain = stored_tensors(pruned(plan, base, tmp_path / "plain"))
    repaired = stored_tensors(pruned(plan, base, tmp_path / "repaired", repair_input(base)))
    assert plain.keys() == repaired.keys()
    changed = {name for name in plain if not torch.equal(plain[name], repaired[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert all(plain[name].shape == repaired[name].shape for name in plain)


def test_batches_and_padding_do_not_matter(base: ResolvedBase) -> None:
    documents = random_documents()
    kept = random_plan(base, seed=4, **CUTS["both"]).kept
    alone = repaired_weights(base, kept, make_batches(documents, 1))
    assert len(alone) == 6
    for tokens, pad in ((100, 0), (100_000, 63)):
        together = repaired_weights(base, kept, make_batches(documents, tokens, pad))
        assert together.keys() == alone.keys()
        for name, weight in together.items():
            torch.testing.assert_close(weight, alone[name], atol=1e-4, rtol=1e-4)


def test_the_running_model_is_left_as_it_was_and_steps_are_reported_once_a_layer(
    base: ResolvedBase, tmp_path: Path
) -> None:
    given, steps = repair_input(base), []
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    (tmp_path / "expert").mkdir()
    prune(random_plan(base, **CUTS["both"]), base, tmp_path / "expert", given, lambda: steps.append(None))
    assert len(steps) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())
    assert (given.model.config.intermediate_size, given.model.config.num_attention_heads) == (32, 6)
    assert all(not module._forward_hooks for module in given.model.modules())


def save_changed(folder: Path, change: Callable[[Any], None], family: str = "llama", **config: Any) -> Path:
    """A tiny model saved after `change` was done to its weights."""
    model = tiny_model(family, **config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_massive_neuron_can_be_cut(tmp_path: Path, store: Path) -> None:
    def massive(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[5] *= 1e4

    base = resolved(save_changed(tmp_path / "base", massive, num_hidden_layers=1), store)
    documents = random_documents(40)
    shape = base.layers[0]
    kept = tuple(i for i in range(32) if i not in (2, 5, 11, 12))
    plan = plan_of(base, [KeptUnits(kept, shape.all_kept.query_heads, shape.all_kept.kv_groups)])
    plain = load(pruned(plan, base, tmp_path / "plain"))
    repaired = load(pruned(plan, base, tmp_path / "repaired", repair_input(base, documents=documents)))
    assert all(bool(tensor.isfinite().all()) for tensor in stored_tensors(tmp_path / "repaired").values())
    dense = Watched(load(base.folder), documents).stream(0, "ffn")
    before, after = (weighted_error(dense, Watched(model, documents).stream(0, "ffn")) for model in (plain, repaired))
    assert after <= before
    assert float(dense.abs().max()) > 1e3, "the neuron must be massive on these tokens"


# --- output norms ---------------------------------------------------------------------------------------------------


def a_norm(gain: Tensor) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(gain.numel(), eps=0.0)
    norm.weight.data.copy_(gain)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("quiet", [1e-6, -1e-6, 0.0])
def test_channels_that_the_norm_silences_stay_what_they_are(quiet: float) -> None:
    """They cannot tell in the stream, and as large as they would have to be, they would silence all others."""
    norm = a_norm(torch.tensor([1.0, quiet, 1.0, 1.0, 1.0]))
    own = torch.ones(1, 5)
    residual = torch.tensor([[0.5, 0.3, 0.0, 0.0, 0.0]])
    owed, _ = before_norm(norm, residual, norm(own), own, own)
    torch.testing.assert_close(owed, torch.tensor([[0.25, 0.0, 0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)
