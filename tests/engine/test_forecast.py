"""Forecasts: memory by arithmetic that is written out here, time as what is measured, and what does not fit is refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from expertprune.corpora.batches import make_batches
from expertprune.engine import memory
from expertprune.engine.forecast import Forecast, Forecaster, Stage, Work
from expertprune.engine.memory import (
    Memory,
    Need,
    Sizes,
    TextSize,
    evaluating,
    layer_sums,
    profiling,
    repairing,
    stripes,
)
from expertprune.engine.rates import Rates, measured_rates
from expertprune.engine.routed import RoutedSizes
from expertprune.errors import CheckpointError
from expertprune.models import containers
from expertprune.models.base import ResolvedBase
from expertprune.models.spool import Limits
from expertprune.profiling.forward import LayerCollector
from expertprune.profiling.gradients import MaskGradients
from tests.masks import tiny
from tests.oracle import resolved
from tests.tiny import save_tiny

GIB = 2**30


@pytest.fixture
def base(tiny_llama: Path, store: Path) -> ResolvedBase:
    return resolved(tiny_llama, store)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is free on this machine."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
        monkeypatch.setattr(containers, "_left", list)  # whatever limit this process has

    set_to(100 * GIB)
    return set_to


# The tiny Llama: hidden 24, FFN 32, 6 heads of 4 and 3 KV heads, 3 layers, 64 tokens, float32.
LAYER = 3 * 24 * 32 + 2 * 24 * 24 + 2 * 24 * 12 + 2 * 24
SKELETON = 2 * 64 * 24 + 24


def test_needs_of_each_stage(base: ResolvedBase) -> None:
    sizes, text = Sizes.of(base, kept=(20, 24), cut=(True, False)), TextSize(1000, 100, 50, 10, 600)
    assert sizes.weights(streamed=False) == 4 * (3 * LAYER + SKELETON)
    assert sizes.weights(streamed=True) == 4 * (2 * LAYER + SKELETON)
    # stored in float32 as they run: the files hold them, but the layers that are read one by one
    assert (sizes.in_files(streamed=False), sizes.in_files(streamed=True)) == (4 * sizes.parameters, 4 * SKELETON)
    assert Sizes.of(replace(base, dtype=torch.bfloat16)).in_files(streamed=False) == 0
    grams = 4 * (3 * 8 * 8 + 6 * 4 * 4)  # of groups of two heads, and of heads
    sums, stored = 4 * 10 * (3 * 32 + 2 * 24) + grams, 4 * 10 * 3 * (3 * 32 + 24)
    logits, states = 5 * 4 * 100 * 64, 4 * 24 * 1000
    forward = profiling(sizes, text, 200.0, gradient=False, keeps_graphs=False)
    assert forward == Need(20_000 + sums, states, stored)
    # the hidden states before each of 3 layers, and the gradients behind one
    both = profiling(sizes, text, 200.0, gradient=True, keeps_graphs=False)
    assert both == Need(logits + sums, (3 + 1) * states, stored)
    kept = profiling(sizes, text, 2000.0, gradient=True, keeps_graphs=True)
    # all layers end together, and the logits are held beside their graphs
    assert kept == Need(3 * 200_000 + logits + 3 * sums, 4 * 24 * 100, stored)
    rows = profiling(sizes, text, 1.0, gradient=False, keeps_graphs=False, row_masses=True)
    assert rows == Need(logits + sums, states, stored)
    # two streams, and 20 values of each token that go into the FFN's output projection; passengers have two streams
    solved, streams = 8 * 20 * 20 + 4 * 20 * 20 + (8 + 8 + 4) * 20 * 24, 4 * (1000 * (24 + 24 + 20) + 2 * 70 * 24)
    assert repairing(sizes, text, 1.0, passengers=70) == Need(solved + 4 * LAYER, streams)
    assert evaluating(sizes, text, 1.0) == Need(6 * 4 * 100 * 64, 2 * states)  # batch by batch


def test_a_wide_gram_matrix_takes_little_over_half_of_its_products() -> None:
    """Eight stripes of 144 rows, each from its diagonal on: `(1 + 1/8) / 2` of the matrix."""
    assert sum((rows.stop - rows.start) * (1152 - rows.start) for rows in stripes(1152)) == 1152**2 * 9 / 16


def test_tokens_hold_padding_and_are_said_to() -> None:
    batches = make_batches([[1] * 5, [1] * 7, [1] * 20], tokens_per_batch=16)
    assert TextSize.of(batches) == TextSize(tokens=2 * 7 + 20, batch=20, width=20, documents=3, predicted=4 + 6 + 19)
    stages = (Stage("profile x", 1200, 95.0, Memory(2**30, 0, 0)), Stage("write", 0, 1.0, Memory(2**30, 0, 0)))
    _, profile, write = Forecast(False, stages, 0, 0, 0).lines()
    assert profile.startswith("profile x: 1,200 tokens with padding, 2 min, ")
    assert write.startswith("write: 1 s, ")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sums_of_a_layer_are_those_that_a_profile_holds(family: str) -> None:
    of, documents = tiny(family), 50
    layer, shape = of.model.model.layers[0], of.shapes[0]
    collector = LayerCollector(layer, of.family, shape, documents, {})
    held = [*collector.sums().values(), collector._group_gram, collector._head_gram]
    held += MaskGradients(shape, documents, squares=True).sums().values()
    assert layer_sums(documents, shape) == pytest.approx(sum(each.nbytes for each in held), rel=0.1)


def test_states_beyond_half_of_what_weights_leave_go_to_the_spool(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "process_bytes", lambda: GIB)
    free(10 * GIB)
    need, cpu = Need(work=1 * GIB, states=7 * GIB, host=2 * GIB), torch.device("cpu")
    found = Memory.of(need, 4 * GIB, cpu, Limits())
    assert found == Memory(0, GIB + 4 * GIB + 1 * GIB + 3 * GIB + 2 * GIB, 4 * GIB)
    assert Memory.of(need, 4 * GIB, cpu, Limits(memory=6 * GIB)).spool == 6 * GIB
    assert Memory.of(replace(need, states=3 * GIB), 4 * GIB, cpu, Limits()).spool == 0
    assert Memory.of(need, 4 * GIB, cpu, Limits(), in_files=1 * GIB) == replace(found, host=found.host - 1 * GIB)


def test_members_on_one_host_share_its_memory(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(16 * GIB)
    cpu = torch.device("cpu")
    alone = [Limits().free(cpu), Limits(memory=12 * GIB).free(cpu, taken=GIB)]
    assert alone == [16 * GIB, 11 * GIB]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [Limits().free(cpu), Limits(memory=12 * GIB).free(cpu, taken=GIB)] == [4 * GIB, 2 * GIB]


RATES = Rates(
    forward=1e-3,
    both=3e-3,
    graph=100.0,
    head=1e-6,
    head_both=3e-6,
    products=1e9,
    factors=1e9,
    norms=1e-6,
    fresh=1e-9,
    read=1e3,
    written=1e6,
)


def work_of(**changes: Any) -> Work:
    text = TextSize(1000, 100, 50, 10, 600)
    return replace(Work({"a": text, "b": text}, True, False, text, text, True, 0.75, 2_000_000), **changes)


def forecast_of(
    base: ResolvedBase, source: Any, limits: Limits | None = None, routed: RoutedSizes | None = None, **changes: Any
) -> Forecast:
    """`changes` are of the work."""
    sizes = replace(Sizes.of(base, kept=(20, 24), cut=(routed is None, False)), routed=routed)
    return Forecaster(replace(base, source=source), sizes, work_of(**changes), limits or Limits(), RATES).forecast()


def stages_of(*arguments: Any, **changes: Any) -> dict[str, Stage]:
    return {stage.name: stage for stage in forecast_of(*arguments, **changes).stages}


def test_seconds_of_each_stage(base: ResolvedBase, free: Any) -> None:
    stored, head = 4 * (3 * LAYER + SKELETON), 64 * 1e-6  # the head of a token
    resident = stages_of(base, "resident")
    # what heads of 4 channels and groups of two of them write
    written = 1000 * 3 * (6 * 2 * 4**2 + 3 * 2 * 8**2) / 1e9
    written += 1000 * 3 * 2 * (32 + 6 * 4 + 24) * 1e-6  # and two sums over each channel
    # graphs are kept: nothing runs twice, and their memory is new
    layers = 1000 * 3 * (3e-3 + 100 * 1e-9)
    assert resident["profile b"].seconds == pytest.approx(layers + 1000 * 3 * head + written)
    # the first one loads the model, and takes the norms of its layers
    more = stored / 1e3 + 3 * LAYER * 1e-6
    assert resident["profile a"].seconds == pytest.approx(resident["profile b"].seconds + more)
    # a token is added to the gram matrix of its inputs, and to their products with what is missing
    solved = 2 * 1000 * 20 * (20 + 24) / 1e9 + (20**3 / 3 + 2 * 20**2 * 24) / 1e9
    # the profiles leave the base's states of the 1,000 tokens that the repair reads
    layers = (2000 * 1.75 - 1000) * 3 * 1e-3
    assert resident["repair"].seconds == pytest.approx(layers + 3 * solved)
    assert resident["repair"].tokens == 2000
    assert resident["evaluate"].seconds == pytest.approx(600 * 2 * head)  # rode along: what is predicted is compared
    assert resident["write"].seconds == pytest.approx(stored / 1e3 + 2)
    way = 4 * 3 * LAYER / 1e3  # longer than what is computed meanwhile, forward and back
    assert stages_of(base, "streamed")["profile b"].seconds == pytest.approx(2 * way + 1000 * 3 * head + written)
    apart = forecast_of(base, "streamed", together=False, profiled={})
    assert [stage.name for stage in apart.stages] == ["repair", "write", "evaluate"]
    assert apart.stages[-1].seconds == pytest.approx(600 * 2 * head + 2 * way)
    assert apart.disk == 2_000_000 + 4 * 3 * 24 * 20  # what is solved waits in the store
    tried = stages_of(base, "resident", tried=3, held_back=TextSize(1000, 100, 50, 10, 600))[
        "retention, 3 experts at most"
    ]
    once = [resident[name].seconds for name in ("repair", "write", "evaluate")]
    assert (tried.seconds, tried.tokens) == (pytest.approx(3 * sum(once)), 6000)
    # 1000 tokens come to two each; in three sweeps the cross moment and the residual, neurons and Gram matrices once
    products = (3 * 4 + 4) * 2000 * 24 * 10 + 2 * 2000 * 10**2
    equations = 4 * (10**3 / 3 + 3 * 2 * 24 * 10**2)
    mixture = stages_of(base, "resident", routed=RoutedSizes(4, 10, 24, 2, True))
    assert mixture["repair"].seconds == pytest.approx(layers + 3 * (products / 1e9 + equations / 1e9), rel=1e-6)


@pytest.mark.parametrize(
    ("source", "available", "words"),
    [
        ("resident", 30_000, "the weights take 1 MiB, and memory has 1 MiB free; set base.layers: streamed"),
        ("resident", 70_000, "free; set base.layers: streamed, or lower calibration.tokens_per_batch"),
        ("streamed", 60_000, "free; lower calibration.tokens_per_batch"),
        ("streamed", 300_000, "name a folder for them with --spool FOLDER, or lower calibration.documents"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_that_helps(
    base: ResolvedBase, free: Any, source: Any, available: int, words: str
) -> None:
    free(available)
    with pytest.raises(CheckpointError) as caught:
        forecast_of(base, source)
    assert words in str(caught.value)


def test_states_that_profiles_leave_save_the_repair_passes(base: ResolvedBase, free: Any) -> None:
    """There is room for those of one corpus beside the 68 values of each of the repair's tokens."""
    one, needed, repaired = 4 * 3 * 24 * 1000, 4 * 68 * 2000, TextSize(2000, 100, 50, 20, 1200)
    stages = []
    for kept in (0, one):
        free(4 * (3 * LAYER + SKELETON) + 2 * (needed + kept + (one - 1)))  # half of the rest is for states
        stages.append(stages_of(base, "resident", repaired=repaired, evaluated=None)["repair"])
    assert stages[0].seconds - stages[1].seconds == pytest.approx(1000 * 3 * 1e-3)
    assert stages[1].memory.host - stages[0].memory.host == one


def test_a_spool_takes_what_memory_does_not(base: ResolvedBase, free: Any, tmp_path: Path) -> None:
    free(300_000)
    found = forecast_of(base, "streamed", Limits(spool=tmp_path), evaluated=None)
    assert found.memory.spool > 0
    assert any("of spool" in line for line in found.lines())


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_a_layer_is_measured_as_it_runs(
    family: str, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is timed runs, and takes 2 seconds."""
    wide = {"hidden_size": 192, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 8}
    base = resolved(save_tiny(tmp_path / "model", family, **wide), store)
    monkeypatch.setattr("expertprune.engine.rates._seconds", lambda run, device: (run(), 2.0)[1])
    rates = measured_rates(base, tokens=512, width=64, scratch=tmp_path)
    assert rates.forward == rates.both == 2.0 / 512
    product, values = 2.0 / (2048 * 64), 2.0 / (512 * 64)  # of 2,048 tokens; of the logits of a batch
    assert rates.head == product + values / 2
    assert rates.head_both == 2 * product + values
    width = 256 if family == "qwen3_moe" else 1024  # a routed expert has equations of its own
    assert rates.products == 2 * width**3 / 2.0
    assert rates.factors == (width**3 / 3 + 2 * width**2 * 192) / 2.0
    # at least the layer's input, output and what goes into its down projections, in float32
    assert rates.graph > 4 * (2 * 192 + (256 * 2 if family == "qwen3_moe" else 1024))
    assert min(rates.head, rates.head_both, rates.products, rates.factors, rates.read, rates.written) > 0
    assert not list(tmp_path.glob(".rate*"))


def test_the_graph_of_the_timed_layer_is_freed(base: ResolvedBase, tmp_path: Path) -> None:
    gc.freeze()  # what is there already need not be looked at
    try:
        measured_rates(base, tokens=64, width=16, scratch=tmp_path)
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    finally:
        gc.unfreeze()
    assert not [each for each in tensors if each.grad_fn is not None]
