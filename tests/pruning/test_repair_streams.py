"""Repairs on streamed layers, of passengers, with rounding, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertprune.corpora.batches import make_batches
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.models.passes import TextRun
from expertprune.models.streaming import load_streamed
from expertprune.pruning import unfinished
from expertprune.pruning.repair import Passengers
from expertprune.pruning.write import RepairInput, prune
from expertprune.spec.schema import Compensation
from tests.oracle import pruned, random_plan, resolved, stored_tensors
from tests.pruning.test_repair import random_documents
from tests.tiny import save_tiny

WIDTHS = {"ffn": 22, "kv_groups": 2}
CPU = torch.device("cpu")


def base_of(folder: Path, store: Path, family: str = "llama", dtype: Any = None) -> ResolvedBase:
    return resolved(save_tiny(folder, family, max_shard_size="20KB", dtype=dtype), store)


def given(model: Any, **more: Any) -> RepairInput:
    return RepairInput(model, make_batches(random_documents(), 256), Compensation(), **more)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_streamed_layers_give_the_same_weights(family: str, tmp_path: Path, store: Path) -> None:
    base = base_of(tmp_path / "base", store, family)
    plan = random_plan(base, seed=3, kv_groups=2, **({} if family == "qwen3_moe" else {"ffn": 22}))
    models = load_model(base.folder, torch.float32), load_streamed(base.checkpoint, base.family, torch.float32, CPU)
    one, other = (stored_tensors(pruned(plan, base, tmp_path / str(number), given(model)))
                  for number, model in enumerate(models))  # fmt: skip
    plain = stored_tensors(pruned(plan, base, tmp_path / "plain"))
    assert one.keys() == other.keys() == plain.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], plain[name]) for name in one)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_passengers_arrive_where_the_written_expert_takes_them(
    family: str, stored: torch.dtype, tmp_path: Path, store: Path
) -> None:
    """Also where weights are rounded when they are written; the weights themselves do not depend on passengers."""
    base = base_of(tmp_path / "base", store, family, stored)
    plan = random_plan(base, seed=3, **WIDTHS)
    aboard = Passengers(make_batches(random_documents(7, seed=5), 40))
    folder = pruned(plan, base, tmp_path / "expert", given(load_model(base.folder, torch.float32), passengers=aboard))
    without = pruned(plan, base, tmp_path / "without", given(load_model(base.folder, torch.float32)))
    assert all(torch.equal(tensor, stored_tensors(without)[name]) for name, tensor in stored_tensors(folder).items())
    for place, stream in ((base.folder, aboard.base), (folder, aboard.expert)):
        expected = TextRun(load_model(place, torch.float32), base.family, (), aboard.batches).finish()
        assert stream is not None
        for number in range(len(aboard.batches)):
            torch.testing.assert_close(stream.hidden[number], expected.hidden[number], atol=1e-5, rtol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layer", [1, 2])
def test_a_killed_repair_goes_on_behind_the_last_finished_layer(
    layer: int, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path / "base", store)
    plan, model = random_plan(base, seed=3, **WIDTHS), load_model(base.folder, torch.float32)
    monkeypatch.setattr(unfinished, "PAUSE", 0.0)
    opened: list[int] = []
    open_layer = TextRun.opened

    def counted(run: TextRun, index: int, following: int | None = None) -> Any:
        opened.append(index)
        return open_layer(run, index, following)

    monkeypatch.setattr(TextRun, "opened", counted)

    def run(name: str, where: Path, killed: bool = False) -> tuple[dict[str, Tensor], Tensor, int]:
        steps: list[int] = []

        def step() -> None:
            steps.append(1)
            if killed and len(steps) == layer:
                raise Killed

        opened.clear()
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
    assert opened == list(range(layer, 3))
    assert steps == 3
    assert list((tmp_path / "store" / "repairs").iterdir()) == []
    undisturbed, expected, _ = run("undisturbed", tmp_path / "other")
    assert opened == [0, 1, 2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in undisturbed.items())
    assert torch.equal(hidden, expected)


def test_each_block_of_a_layer_runs_once_for_the_base_and_once_for_the_expert(tmp_path: Path, store: Path) -> None:
    base = base_of(tmp_path / "base", store)
    model = load_model(base.folder, torch.float32)
    kind, calls = type(model.model.layers[0].mlp), {"mlp": 0, "attention": 0}

    def counting(of: str, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[of] += 1
            return forward(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "forward", counting("mlp", kind.forward))
        attention = type(model.model.layers[0].self_attn)
        patched.setattr(attention, "forward", counting("attention", attention.forward))
        repair_input = given(model)
        pruned(random_plan(base, seed=3, **WIDTHS), base, tmp_path / "expert", repair_input)
    once = 2 * 3 * len(repair_input.batches)
    assert calls == {"mlp": once, "attention": once}
