"""Builds of fewer layers, of streamed bases, and with hidden states that profiles leave for the repair."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP

import expertprune
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.plan import load_plan
from expertprune.errors import UsageError
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.sources import StreamedLayers, is_streamed
from expertprune.models.spool import Room
from expertprune.models.states import KeptStates
from expertprune.profiling import traversal
from expertprune.spec.reading import parse_spec
from expertprune.stages import evaluate as evaluating
from expertprune.stages.validate import validate
from tests.calling import call, call_json
from tests.oracle import stored_tensors
from tests.tiny import save_tiny
from tests.vocabularies import save_worded, worded_spec

Data = dict[str, Any]
Patch = pytest.MonkeyPatch


def written(data: Data, path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(data | changes))
    return path


def same(one: Path, other: Path, relative: float = 1e-5) -> None:
    """The tensors of two experts are the same, up to rounding."""
    mine, theirs = stored_tensors(one), stored_tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=relative)


def test_an_expert_of_fewer_layers_goes_the_whole_way(spec_data: Data, tmp_path: Path, store: Path) -> None:
    """One of three layers goes, and a quarter of the neurons of the others, ranked over both."""
    budget = {"layers": 1, "ffn": 0.25, "multiple_of": 4}
    spec = written(spec_data, tmp_path / "spec.yaml", budget=budget, compose={"allocation": "global"})
    checked = call_json("validate", spec, "--store", store)
    call("compose", spec, "--out", tmp_path / "plan.json", "--store", store)
    folder = expertprune.prune(tmp_path / "plan.json", tmp_path / "expert", store=store)
    plan = Expert.load(folder).plan
    assert plan.gone == load_plan(tmp_path / "plan.json").gone
    (gone,) = plan.gone
    assert plan.depth is not None
    assert plan.depth.relevance[gone] == min(plan.depth.relevance[1:])
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert Checkpoint(folder).parameters == plan.parameters.after == checked["expert"]["parameters"]
    assert sum(len(units.ffn) for units in plan.kept) == 48  # of 2 times 32
    assert f"2 of 3 (without {gone})" in call("inspect", folder).output
    assert "| layers, of the whole model | 2 | 3 |" in (folder / "README.md").read_text()
    again = written(spec_data, tmp_path / "again.yaml", base=str(folder), budget={"layers": 0.5}, compose={})
    smaller = expertprune.build(again, tmp_path / "smaller", store=store)
    assert Expert.load(smaller).plan.gone == (1,)
    assert json.loads((smaller / "config.json").read_text())["num_hidden_layers"] == 1


def test_layers_and_vocabulary_alone_give_a_stock_checkpoint_that_can_be_exported(tmp_path: Path, store: Path) -> None:
    base = save_worded(tmp_path / "base", num_hidden_layers=3)
    budget = {"layers": 1, "vocabulary": {"keep": 320}}
    spec = written(worded_spec(base, tmp_path / "texts", budget), tmp_path / "spec.yaml")
    folder = expertprune.build(spec, tmp_path / "expert", store=store)
    config, before = (json.loads((each / "config.json").read_text()) for each in (folder, base))
    changed = {key for key in config if not key.endswith("_token_id") and config[key] != before[key]}
    assert changed == {"num_hidden_layers", "vocab_size"}
    call("export", folder, "--out", tmp_path / "expert.gguf", "--type", "f32")
    reader = GGUFReader(tmp_path / "expert.gguf")
    assert reader.fields["llama.block_count"].contents() == 2
    assert {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_streamed_build_is_the_same(family: str, tmp_path: Path, spec_data: Data, monkeypatch: Patch) -> None:
    """There are about 10 kB of memory for hidden states; the resident build keeps its graphs."""
    for name in ("EXPERTPRUNE_MEMORY", "EXPERTPRUNE_SPOOL"):
        monkeypatch.setenv(name, "")  # what the command sets goes with the test
    opened, open_layer = [], StreamedLayers.opened
    monkeypatch.setattr(StreamedLayers, "opened", lambda *given: (opened.append(given[2]), open_layer(*given))[1])
    budget = {"layers": 1, "ffn": 0.5, "kv_groups": 1, "multiple_of": 8}
    base = save_tiny(tmp_path / "base", family, max_shard_size="20KB")
    changes = {"base": str(base), "relevance": {"criterion": "fisher"}, "budget": budget}
    common = ["build", written(spec_data, tmp_path / "spec.yaml", **changes), "--out"]
    call(*common, tmp_path / "resident", "--store", tmp_path / "store-1")
    assert not opened
    spool = tmp_path / "spool"
    monkeypatch.setattr("expertprune.models.spool.SHARE", 1e-5)
    limits = ["--memory", "1GiB", "--spool", spool]
    call(*common, tmp_path / "streamed", "--store", tmp_path / "store-2", "--set", "base.layers=streamed", *limits)
    assert len(opened) > 3 * 4  # layers of corpora at least
    assert spool.is_dir()
    gc.collect()
    assert os.listdir(spool) == []
    one, other = (Expert.load(tmp_path / each) for each in ("resident", "streamed"))
    assert one.plan.kept == other.plan.kept
    same(one.folder, other.folder, 1e-4)
    assert one.evaluation is not None
    assert other.evaluation is not None
    for corpus, result in one.evaluation.corpora.items():
        for metric, measured in result.metrics.items():
            found = other.evaluation.corpora[corpus].metrics[metric].expert
            assert found == pytest.approx(measured.expert, rel=1e-4), metric
    if family == "qwen3_moe":
        return
    ran: list[Any] = []
    against = evaluating.Measuring.against

    def noting(measuring: Any, expert: Any, *rest: Any) -> Any:
        ran.extend((measuring.base.model, expert.model))
        return against(measuring, expert, *rest)

    monkeypatch.setattr(evaluating.Measuring, "against", noting)
    again = expertprune.evaluate(other.folder, store=tmp_path / "store-2")
    assert [is_streamed(model) for model in ran] == [True, True], "neither model is whole in memory"
    for name, corpus in again.corpora.items():
        for mine, theirs in zip(corpus.per_document, other.evaluation.corpora[name].per_document, strict=True):
            assert (mine.base_bits, mine.expert_bits) == pytest.approx((theirs.base_bits, theirs.expert_bits), rel=1e-6)
    (tmp_path / "task.yaml").write_text("task: some")
    suite = written({"name": "mine"}, tmp_path / "suite.yaml", tasks=[{"file": "task.yaml"}])
    with pytest.raises(UsageError, match=r"layers are streamed \(base\.layers\): give --backend vllm"):
        expertprune.evaluate_suites(other.folder, [str(suite)], store=tmp_path / "store-2")


# --- hidden states that profiles leave for the repair --------------------------------------------------------------

REPAIR = "prune and repair"
DENSE = 32  # neurons of a layer of the base; every expert here has fewer
LAYERS = 3
stage = [""]  # what runs now; `staged` keeps it


@pytest.fixture
def runs(monkeypatch: Patch) -> Counter[tuple[str, int]]:
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
    """A track that says in `stage` what runs."""
    stage.append(name)
    yield lambda: None
    stage.pop()


@pytest.fixture
def data(spec_data: Data) -> Data:
    """Two corpora share documents, so one has batches of which the repair runs some rows, and one that it leaves out."""
    qa, general = (Path(spec_data["corpora"]["sources"][name]["path"]) for name in ("qa", "general"))
    shared, own = (path.read_text().splitlines(keepends=True) for path in (qa, general))
    general.write_text("".join([*shared[:7], *own[:5]]))
    return {**spec_data, "calibration": {"tokens_per_batch": 40}}


@pytest.mark.parametrize(
    ("family", "layers", "budget", "dense"),
    [
        ("llama", "resident", {"ffn": 0.25}, 0),
        ("llama", "run again", {"ffn": 0.25}, 0),
        ("llama", "streamed", {"ffn": 0.25}, 0),
        ("llama", "run again", {"ffn": 0.25, "kv_groups": 1}, LAYERS),  # what attention does is not kept
        ("gemma3_text", "resident", {"ffn": 0.25}, LAYERS),  # nor what goes into an output norm
    ],
)
def test_the_repair_is_the_same_with_what_profiles_leave(
    family: str, layers: str, budget: Data, dense: int, data: Data,
    tmp_path: Path, runs: Counter[tuple[str, int]], monkeypatch: Patch,
) -> None:  # fmt: skip
    if layers == "run again":
        monkeypatch.setattr(traversal, "graph_bytes", lambda text: 1 << 60)
    data["base"] = {"model": str(save_tiny(tmp_path / "base", family)), "layers": layers.replace("run again", "auto")}
    data |= {"evaluate": {"enabled": False}, "relevance": {"criterion": "fisher"}}
    spec, store = parse_spec({**data, "budget": {**budget, "multiple_of": 4}}, "spec", tmp_path), tmp_path / "own-store"
    batches = validate(spec, store=store).repair_batches()
    expertprune.build(spec, tmp_path / "kept", store=store, track=staged)
    assert runs[REPAIR, DENSE] == dense * len(batches)
    runs.clear()
    expertprune.build(spec, tmp_path / "computed", store=store, track=staged)
    assert (runs[REPAIR, DENSE], runs[REPAIR, 24]) == (LAYERS * len(batches),) * 2
    same(tmp_path / "kept", tmp_path / "computed")


def test_each_window_is_repaired_once_in_batches_of_the_profiles(data: Data, tmp_path: Path) -> None:
    prepared = validate(parse_spec(data, "spec", tmp_path))
    batches = prepared.repair_batches()
    windows = [tuple(row[:n].tolist()) for each in batches for row, n in zip(each.ids, each.lengths, strict=True)]
    every = {each.ids for text in prepared.calibration.values() for each in text.tokens}
    assert sorted(windows) == sorted(every)
    assert len(every) == 3 * 12 + 5
    for name, repaired in prepared.repaired().items():
        profiled = prepared.calibration[name].batches
        assert len(repaired) == len(profiled)
        assert name.is_general or all(one is other for one, other in zip(repaired, profiled, strict=True))


def test_states_are_not_kept_in_vain(
    data: Data, tmp_path: Path, runs: Counter[tuple[str, int]], monkeypatch: Patch
) -> None:
    held: list[list[int]] = []
    release = KeptStates.release
    monkeypatch.setattr(KeptStates, "release", lambda states, index: (
        release(states, index), held.append(sorted(states._held)))[0])  # fmt: skip
    spec = parse_spec({**data, "evaluate": {"enabled": False}}, "spec", tmp_path)
    expertprune.build(spec, tmp_path / "expert", store=tmp_path / "one-store", track=staged)
    assert (held, runs[REPAIR, DENSE]) == ([[1, 2], [2], []], 0)
    with monkeypatch.context() as patched:
        patched.setattr(Room, "left", 10_000)  # less than the states of a corpus
        expertprune.build(spec, tmp_path / "another", store=tmp_path / "another-store", track=staged)
    assert runs[REPAIR, DENSE] == LAYERS * len(validate(spec).repair_batches())
    monkeypatch.setattr(KeptStates, "keeping", lambda *_: pytest.fail("nobody asked for a repair"))
    expertprune.profile(spec, store=tmp_path / "third-store")
