"""Hidden states that profiles leave for the repair: the same weights, and fewer layers of the base to run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP

import expertprune
from expertprune.models.spool import Room
from expertprune.models.states import KeptStates
from expertprune.profiling import traversal
from expertprune.spec.reading import parse_spec
from expertprune.stages.validate import validate
from tests.oracle import stored_tensors
from tests.tiny import save_tiny

REPAIR = "prune and repair"
DENSE = 32  # neurons of a layer of the base; every expert here has fewer
LAYERS = 3
stage = [""]  # what runs now; `staged` keeps it


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often an FFN ran, by the stage that ran it and its number of neurons."""
    found: Counter[tuple[str, int]] = Counter()

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(mlp: Any, *args: Any, **kwargs: Any) -> Any:
            found[stage[-1], mlp.down_proj.weight.shape[1]] += 1
            return forward(mlp, *args, **kwargs)

        return call

    for kind in (LlamaMLP, Gemma3MLP):
        monkeypatch.setattr(kind, "forward", counting(kind.forward))
    return found


@contextlib.contextmanager
def staged(name: str, steps: int) -> Iterator[Callable[[], None]]:
    """A track that says in `stage` what runs; sweeps write the budget before it."""
    stage.append(name.rpartition(": ")[2])
    yield lambda: None
    stage.pop()


@pytest.fixture
def data(spec_data: dict[str, Any]) -> dict[str, Any]:
    """Two corpora share documents, so one has batches of which the repair runs some rows, and one that it leaves out."""
    sources = spec_data["corpora"]["sources"]
    qa, general = (Path(sources[name]["path"]) for name in ("qa", "general"))
    shared = qa.read_text().splitlines(keepends=True)[:7]
    general.write_text("".join([*shared, *general.read_text().splitlines(keepends=True)[:5]]))
    spec_data["calibration"] = {"tokens_per_batch": 40}
    return spec_data


def same(one: Path, other: Path) -> None:
    mine, theirs = stored_tensors(one), stored_tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "criterion", "layers", "budget", "dense"),
    [
        ("llama", "impact", "resident", {"ffn": 0.25}, 0),
        ("llama", "fisher", "resident", {"ffn": 0.25}, 0),
        ("llama", "fisher", "run again", {"ffn": 0.25}, 0),
        ("llama", "fisher", "streamed", {"ffn": 0.25}, 0),
        ("llama", "fisher", "run again", {"ffn": 0.25, "kv_groups": 1}, LAYERS),  # what attention does is not kept
        ("gemma3_text", "fisher", "resident", {"ffn": 0.25}, LAYERS),  # nor what goes into an output norm
    ],
)
def test_the_repair_is_the_same_with_what_profiles_leave(
    family: str, criterion: str, layers: str, budget: dict[str, Any], dense: int, data: dict[str, Any],
    tmp_path: Path, runs: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if layers == "run again":
        monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)
    base = {"model": str(save_tiny(tmp_path / "base", family)), "layers": "streamed" if layers == "streamed" else "auto"}
    data |= {"base": base, "evaluate": {"enabled": False}}
    data |= {"relevance": {"criterion": criterion}, "budget": {**budget, "multiple_of": 4}}
    spec, store = parse_spec(data, "spec", tmp_path), tmp_path / "own-store"
    batches = validate(spec, store=store).repair_batches()
    expertprune.build(spec, tmp_path / "kept", store=store, track=staged)
    assert runs[REPAIR, DENSE] == dense * len(batches)
    runs.clear()
    expertprune.build(spec, tmp_path / "computed", store=store, track=staged)
    assert runs[REPAIR, DENSE] == LAYERS * len(batches)
    assert runs[REPAIR, 24] == LAYERS * len(batches)
    same(tmp_path / "kept", tmp_path / "computed")


def test_each_window_is_repaired_once_and_batches_stay_those_of_the_profiles(
    data: dict[str, Any], tmp_path: Path
) -> None:
    prepared = validate(parse_spec(data, "spec", tmp_path))
    windows = [
        tuple(batch.ids[row, :length].tolist())
        for batch in prepared.repair_batches()
        for row, length in enumerate(batch.lengths)
    ]
    every = {each.ids for text in prepared.calibration.values() for each in text.tokens}
    assert sorted(windows) == sorted(every)
    assert len(every) == 3 * 12 + 5
    for name, repaired in prepared.repaired().items():
        profiled = prepared.calibration[name].batches
        assert len(repaired) == len(profiled)
        assert name.is_general or all(one is other for one, other in zip(repaired, profiled, strict=True))


def test_a_sweep_keeps_them_for_all_budgets(
    data: dict[str, Any], tmp_path: Path, runs: Counter[tuple[str, int]]
) -> None:
    """The evaluation's documents still run through the base, once."""
    spec = parse_spec(data, "spec", tmp_path)
    expertprune.sweep(spec, [0.25, 0.5], tmp_path / "sweep", keep=True, store=tmp_path / "own-store", track=staged)
    swept = runs[REPAIR, DENSE]
    runs.clear()
    expertprune.build(spec, tmp_path / "one", store=tmp_path / "own-store", track=staged)
    assert swept == runs[REPAIR, DENSE] - LAYERS * len(validate(spec).repair_batches()) > 0
    same(tmp_path / "sweep" / "tiny-0.25", tmp_path / "one")


def test_nothing_is_kept_where_passes_need_the_memory(
    data: dict[str, Any], tmp_path: Path, runs: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "left", 10_000)  # less than the states of a corpus
    spec = parse_spec({**data, "evaluate": {"enabled": False}}, "spec", tmp_path)
    expertprune.build(spec, tmp_path / "expert", store=tmp_path / "own-store", track=staged)
    assert runs[REPAIR, DENSE] == LAYERS * len(validate(spec).repair_batches())


def test_they_are_released_layer_by_layer_and_profiles_alone_keep_none(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    release = KeptStates.release

    def noted(states: KeptStates, index: int) -> None:
        release(states, index)
        held.append(sorted(states._held))

    monkeypatch.setattr(KeptStates, "release", noted)
    spec = parse_spec({**data, "evaluate": {"enabled": False}}, "spec", tmp_path)
    expertprune.build(spec, tmp_path / "expert", store=tmp_path / "own-store")
    assert held == [[1, 2], [2], []]
    monkeypatch.setattr(KeptStates, "keeping", lambda *_: pytest.fail("nobody asked for a repair"))
    expertprune.profile(spec, store=tmp_path / "another-store")
