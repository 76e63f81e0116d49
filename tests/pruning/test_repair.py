"""The closed-form repair against slow references, and what it promises on tiny models."""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from expertprune.artifacts.plan import Plan
from expertprune.corpora.batches import Tokens, make_batches
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.streaming import load_streamed
from expertprune.pruning import unfinished
from expertprune.pruning.repair import Passengers
from expertprune.pruning.solve import Moments, TokenRows, before_norm, least_squares, token_weights
from expertprune.pruning.write import RepairInput, prune
from expertprune.spec.schema import Compensation
from expertprune.units import KeptUnits
from tests.oracle import load, plan_of, pruned, random_plan, resolved, stored_tensors
from tests.pruning.cutting import plan_by_layer, tiny_base, without
from tests.tiny import tiny_model, tiny_tokenizer

RIDGE = 200.0  # tokens; the documents here have about as many


def random_documents(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Token ids of documents of very different lengths, but few of them: 2, 3, 7, 16, 31."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (2, 3, 7, 16, 31)
    return [torch.randint(0, 64, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(count)]


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
    much as a tenth of a channel of the median gain. A token counts by its stream, however small its output is before the
    norm.
    """
    rms = dense.square().mean(1).sqrt()
    held = 0.1 * float(np.sort(gain.square().numpy())[(len(gain) - 1) // 2])
    rows = []
    for channel, factor in enumerate(gain.tolist()):
        both = factor**2 + held
        weights = np.concatenate([(weight / rms**2 * share / both).numpy() for share in (factor**2, held)])
        owed = torch.cat([wished[:, channel] / factor * rms, dense[:, channel]]) - own[:, channel].repeat(2)
        stacked = inputs.repeat(2, 1).numpy()
        rows.append(slow_least_squares(stacked, owed[:, None].numpy(), weights, damping_of(weight)))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("tokens", "kept", "ridge"), [(200, 15, 0.2), (900, 300, 0.2), (7, 15, 0.3), (200, 1, 200.0), (0, 5, 10.0)]
)
def test_least_squares_is_the_weighted_ridge(tokens: int, kept: int, ridge: float) -> None:
    """Inputs of very different sizes; the third one is never seen, and must not move."""
    rng = np.random.default_rng(tokens + kept)
    inputs = rng.normal(size=(tokens, kept)) * rng.uniform(0.1, 10, size=kept) + 0.5
    inputs[:, 2:3] = 0
    residual, weight = rng.normal(size=(tokens, 6)), rng.uniform(0.1, 3, size=tokens)
    moments = Moments.zeros(kept, 6, torch.device("cpu"))
    moments.add(*(torch.tensor(a, dtype=torch.float32) for a in (inputs, residual, weight)))
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
    rows = TokenRows()
    rows.add(torch.full((2, 5), torch.inf), torch.ones(2, 3), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"with a ridge of 1e-16 tokens; raise compensation\.ridge"):
        rows.solved(1e-16)


def test_channels_that_the_norm_silences_stay_what_they_are() -> None:
    """They cannot tell in the stream, and as large as they would have to be, they would silence all others."""
    for quiet in (1e-6, -1e-6, 0.0):
        norm = LlamaRMSNorm(5, eps=0.0).requires_grad_(False)
        norm.weight.copy_(torch.tensor([1.0, quiet, 1.0, 1.0, 1.0]))
        own, residual = torch.ones(1, 5), torch.tensor([[0.5, 0.3, 0.0, 0.0, 0.0]])
        owed, _ = before_norm(norm, residual, norm(own), own, own)
        torch.testing.assert_close(owed, torch.tensor([[0.5 / 1.1, 0.0, 0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)


def test_a_token_without_a_stream_weighs_nothing() -> None:
    """A weight of one over next to nothing would be all that the repair sees."""
    found = token_weights(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-3, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.08, 2e6]))


# --- repair, on tiny models

ALL = {"ffn": 22, "kv_groups": 2}
# Blocks whose outputs are added as they are, and through norms of their own.
FAMILIES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}, "gemma2": {}}


def save_changed(folder: Path, change: Callable[[Any], None], family: str = "llama", **config: Any) -> Path:
    """A tiny model saved after `change` was done to its weights."""
    model = tiny_model(family, **config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


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


PROMPT = 0.25  # the weight of two tokens of three


def asked(ids: list[int]) -> tuple[bool, ...]:
    return tuple(place % 3 == 1 for place in range(len(ids)))


def repair_input(base: ResolvedBase, documents: list[list[int]]) -> RepairInput:
    model = load_model(base.folder, torch.float32, torch.device("cpu"))
    tokens = [Tokens(tuple(ids), asked(ids)) for ids in documents]
    return RepairInput(model, make_batches(tokens, 256, prompt_weight=PROMPT), Compensation(ridge=RIDGE))


class Watched:
    """What blocks read, give and add, and the stream behind them, by layer and block: `[all tokens, channels]`, float64.

    Nothing is padded: documents of one length run together, from the shortest on.
    """

    @torch.no_grad()
    def __init__(self, model: Any, documents: list[list[int]]) -> None:
        seen, layers = defaultdict[Any, list[Tensor]](list), model.model.layers
        for index, layer in enumerate(layers):
            for name, module in (("layer", layer), ("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):

                def note(_: Any, inputs: Any, output: Any, of: tuple[int, str] = (index, name)) -> None:
                    seen[*of, "in"].append(inputs[0].flatten(0, 1))
                    seen[*of, "out"].append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

                module.register_forward_hook(note)
        for _, group in itertools.groupby(sorted(documents, key=len), len):
            model(torch.tensor(list(group)), use_cache=False)
        self.inputs, self.outputs, self.added, self.stream = {}, {}, {}, dict[tuple[int, str], Tensor]()
        for index, layer in enumerate(layers):
            stream = torch.cat(seen[index, "layer", "in"])
            for block, norm in zip(("attention", "ffn"), output_norms(layer) or (None, None), strict=True):
                inputs, output = (torch.cat(seen[index, block, side]) for side in ("in", "out"))
                added = output if norm is None else norm(output)
                stream = stream + added
                for kept, values in zip((self.inputs, self.outputs, self.added, self.stream),
                                        (inputs, output, added, stream), strict=True):  # fmt: skip
                    kept[index, block] = values.double()


# Both blocks of a layer, one of them, or none.
WIDTHS: list[list[dict[str, int]]] = [
    [{"ffn": 25, "kv_groups": 2}, {"ffn": 20}, {"kv_groups": 1}], [{}, {"heads_per_group": 1}, {}], [ALL] * 3,
]  # fmt: skip


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_repaired_weights_solve_their_ridge(widths: list[dict[str, int]], base: ResolvedBase, tmp_path: Path) -> None:
    assert_ridges_are_solved(base, plan_by_layer(base, widths), tmp_path)


@pytest.mark.parametrize(("gone", "widths"), [([2], {}), ([1, 2], ALL)])
def test_an_ffn_takes_over(gone: list[int], widths: dict[str, int], base: ResolvedBase, tmp_path: Path) -> None:
    """The last layer goes, or the two in the middle of four."""
    if len(gone) == 2:
        family, kinds = base.family.family, {"layer_types": None} if base.family.family == "gemma2" else {}
        longer = save_changed(tmp_path / "longer", spread_gains, family, num_hidden_layers=4, **kinds)
        base = resolved(longer, tmp_path / "store")
    assert_ridges_are_solved(base, without(base, gone, **widths), tmp_path)


@torch.no_grad()
def assert_ridges_are_solved(base: ResolvedBase, plan: Plan, tmp_path: Path) -> None:
    """Run the written expert itself: each projection must be the slow ridge's answer on what reaches it there.

    That holds layer by layer only if the prefix was the repaired one, the target the dense residual stream, and every
    token counted once, with the weight of its own target. An FFN before layers that go aims behind them. Projections that
    lost nothing, and take over nothing, stay as they were.
    """
    documents = random_documents()
    folder = pruned(plan, base, tmp_path / "expert", repair_input(base, documents))
    expert, before = (load_model(each, torch.float32, torch.device("cpu"))
                      for each in (folder, pruned(plan, base, tmp_path / "cut")))  # fmt: skip
    model = load(base.folder)
    ours, dense = Watched(expert, documents), Watched(model, documents)
    importance = torch.tensor([1 if each else PROMPT for ids in sorted(documents, key=len) for each in asked(ids)])
    staying = [layer for layer, kept in enumerate(plan.kept) if not kept.gone]
    for place, (layer, following) in enumerate(itertools.pairwise([*staying, len(plan.kept)])):
        shape, kept, norms = plan.shapes[layer], plan.kept[layer], output_norms(model.model.layers[layer])
        for block, path, lost, behind in (
            ("attention", "self_attn.o_proj", len(kept.query_heads) < shape.query_heads, layer),
            ("ffn", "mlp.down_proj", len(kept.ffn) < shape.ffn or following > layer + 1, following - 1),
        ):
            name = f"model.layers.{place}.{path}.weight"
            sliced, repaired = before.get_parameter(name).double(), expert.get_parameter(name).double()
            if not lost:
                assert torch.equal(sliced, repaired), name
                continue
            here, target, inputs = (place, block), dense.stream[behind, block], ours.inputs[place, block]
            weight, moved = importance.double() / target.square().mean(1), inputs @ (repaired - sliced).T
            if not norms:
                owed = target - (ours.stream[here] - moved)  # with the columns as they were cut
                change = slow_least_squares(inputs.numpy(), owed.numpy(), weight.numpy(), damping_of(weight))
            else:
                wished = target - (ours.stream[here] - ours.added[here])  # of what the norm gives
                norm = norms[block == "ffn"]
                gain, own = norm(torch.ones_like(norm.weight)).double(), ours.outputs[here] - moved
                change = slow_normed(inputs, own, wished, dense.outputs[layer, block], gain, weight)
            near = 3e-3 * np.abs(change).max()
            np.testing.assert_allclose((repaired - sliced).numpy(), change, atol=near, err_msg=name)
            assert np.abs(change).max() > 1e-3


def test_only_output_projections_change_and_nothing_of_the_running_model(base: ResolvedBase, tmp_path: Path) -> None:
    plan, given, steps = random_plan(base, seed=3, **ALL), repair_input(base, random_documents()), []
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    plain = stored_tensors(pruned(plan, base, tmp_path / "plain"))
    (tmp_path / "repaired").mkdir()
    prune(plan, base, tmp_path / "repaired", given, lambda: steps.append(None))
    repaired = stored_tensors(tmp_path / "repaired")
    assert {name: tensor.shape for name, tensor in plain.items()} == {k: tensor.shape for k, tensor in repaired.items()}
    assert {name for name in plain if not torch.equal(plain[name], repaired[name])} == {
        f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert len(steps) == 3, "one for each layer"
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())
    assert (given.model.config.intermediate_size, given.model.config.num_attention_heads) == (32, 6)
    assert all(not module._forward_hooks for module in given.model.modules())


def test_a_massive_neuron_can_be_cut(tmp_path: Path) -> None:
    def massive(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[5] *= 1e4

    base = resolved(save_changed(tmp_path / "base", massive, num_hidden_layers=1), tmp_path / "store")
    documents, whole = random_documents(40), base.layers[0].all_kept
    kept = tuple(unit for unit in whole.ffn if unit not in (2, 5, 11, 12))
    plan = plan_of(base, [KeptUnits(kept, whole.query_heads, whole.kv_groups)])
    pruned(plan, base, tmp_path / "plain")
    pruned(plan, base, tmp_path / "repaired", repair_input(base, documents))
    dense, plain, repaired = (
        Watched(load(tmp_path / name), documents).stream[0, "ffn"] for name in ("base", "plain", "repaired")
    )
    before, after = (((dense - each).square().mean(-1) / dense.square().mean(-1)).sum() for each in (plain, repaired))
    assert float(after) <= float(before), "each token counts in proportion to its own size"
    assert float(dense.abs().max()) > 1e3, "the neuron must be massive on these tokens"


# --- streamed layers, passengers, and after a kill --------------------------------------------------------------------


def given(model: Any, **more: Any) -> RepairInput:
    return RepairInput(model, make_batches(random_documents(), 256), Compensation(), **more)


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("family", "widths"), [("gemma3", ALL), ("qwen3_moe", {"kv_groups": 2})])
def test_streamed_layers_give_the_same_weights_and_each_block_runs_once(
    family: str, widths: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each batch of the base and once for each of the expert."""
    base = tiny_base(tmp_path, family, max_shard_size="20KB")
    plan, calls = random_plan(base, seed=3, **widths), []
    whole = load_model(base.folder, torch.float32)
    streamed = load_streamed(base.checkpoint, base.family, torch.float32, torch.device("cpu"))
    plain, one = pruned(plan, base, tmp_path / "plain"), pruned(plan, base, tmp_path / "one", given(whole))
    for kind in (type(whole.model.layers[0].mlp), type(whole.model.layers[0].self_attn)):

        def counted(*arguments: Any, forward: Any = kind.forward, of: Any = kind, **named: Any) -> Any:
            calls.append(of)
            return forward(*arguments, **named)

        monkeypatch.setattr(kind, "forward", counted)
    other = given(streamed)
    assert_same_tensors(stored_tensors(pruned(plan, base, tmp_path / "other", other)), stored_tensors(one))
    once = 2 * 3 * len(other.batches)
    assert {kind: calls.count(kind) for kind in calls} == dict.fromkeys(calls, once)
    assert len(calls) >= once
    changed = stored_tensors(one)
    assert not all(torch.equal(tensor, changed[name]) for name, tensor in stored_tensors(plain).items())


@pytest.mark.parametrize(("family", "stored"), [("llama", torch.bfloat16), ("gemma2", torch.float32)])
def test_passengers_arrive_as_in_the_written_expert(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Also where weights are rounded when they are written; the weights themselves do not depend on passengers."""
    base = tiny_base(tmp_path, family, max_shard_size="20KB", dtype=stored)
    plan = random_plan(base, seed=3, **ALL)
    aboard = Passengers(make_batches(random_documents(7, seed=5), 40))
    folder = pruned(plan, base, tmp_path / "expert", given(load_model(base.folder, torch.float32), passengers=aboard))
    alone = pruned(plan, base, tmp_path / "alone", given(load_model(base.folder, torch.float32)))
    assert {tensor.dtype for tensor in stored_tensors(folder).values()} == {stored}
    assert_same_tensors(stored_tensors(folder), stored_tensors(alone))
    for place, stream in ((base.folder, aboard.base), (folder, aboard.expert)):
        expected = TextRun(load_model(place, torch.float32), base.family, (), aboard.batches).finish()
        assert stream is not None
        for number in range(len(aboard.batches)):
            torch.testing.assert_close(stream.hidden[number], expected.hidden[number], atol=1e-5, rtol=1e-5)


class Killed(BaseException):
    pass


def test_what_a_killed_repair_leaves_is_taken_by_the_same_repair_alone(tmp_path: Path) -> None:
    """Each of these gives other weights: the ridge, the weight of prompts, which tokens are answers, and the dtype."""
    base = tiny_base(tmp_path)
    plan, model, places = random_plan(base, seed=3, **ALL), load_model(base.folder, torch.float32), tmp_path / "store"
    documents = random_documents()

    def left(base: ResolvedBase = base, ridge: float = RIDGE, prompt: float = PROMPT, answers: Any = asked) -> set[str]:
        """What lies in the store after a repair that is killed behind its first layer."""

        def step() -> None:
            raise Killed

        batches = make_batches([Tokens(tuple(ids), answers(ids)) for ids in documents], 256, prompt_weight=prompt)
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder, pytest.raises(Killed):
            prune(plan, base, Path(folder), RepairInput(model, batches, Compensation(ridge=ridge), store=places), step)
        return {path.name for path in (places / "repairs").iterdir()}

    assert len(left()) == len(left()) == 1
    changes: list[dict[str, Any]] = [
        {"ridge": 2 * RIDGE}, {"prompt": 0.5}, {"answers": lambda ids: (*asked(ids)[1:], True)},
        {"base": replace(base, dtype=torch.bfloat16)},
    ]  # fmt: skip
    assert [len(left(**each)) for each in changes] == [2, 3, 4, 5]


def test_a_killed_repair_goes_on_behind_the_last_finished_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_base(tmp_path, max_shard_size="20KB")
    plan, model = random_plan(base, seed=3, **ALL), load_model(base.folder, torch.float32)
    monkeypatch.setattr(unfinished, "PAUSE", 0.0)
    caplog.set_level("INFO", "expertprune")

    def run(name: str, where: Path, killed: bool = False) -> tuple[dict[str, Tensor], Tensor, int]:
        steps: list[int] = []

        def step() -> None:
            steps.append(1)
            if killed and len(steps) == 2:
                raise Killed

        (tmp_path / name).mkdir()
        aboard = Passengers(make_batches(random_documents(7, seed=5), 40))
        prune(plan, base, tmp_path / name, given(model, passengers=aboard, store=where), step)
        assert aboard.expert is not None
        return stored_tensors(tmp_path / name), aboard.expert.hidden[0], len(steps)

    with pytest.raises(Killed):
        run("killed", tmp_path / "store", killed=True)
    (kept,) = (tmp_path / "store" / "repairs").iterdir()
    modes = {each.stat().st_mode & 0o666 for each in kept.rglob("*") if each.is_file()}
    assert modes == {kept.stat().st_mode & 0o666}  # what the umask says, so that others may go on with it
    weights, hidden, steps = run("resumed", tmp_path / "store")
    assert steps == 3
    assert "the repair goes on behind layer 2" in caplog.text
    assert list((tmp_path / "store" / "repairs").iterdir()) == []
    undisturbed, expected, _ = run("undisturbed", tmp_path / "other")
    assert_same_tensors(weights, undisturbed)
    assert torch.equal(hidden, expected)
