"""From plan and base to the expert's folder: nothing lost, nothing written that should not be."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import expertprune
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.widths import LayerWidths
from expertprune.corpora.batches import Batch
from expertprune.errors import CheckpointError, PlanError
from expertprune.files import staged_folder
from expertprune.models import checkpoint
from expertprune.models.base import ResolvedBase
from expertprune.models.loading import load_model
from expertprune.pruning.write import RepairInput, bytes_needed, check_plan, prune
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Compensation
from tests.oracle import contents, pad_headers, plan_of, pruned, random_plan, read_json, resolved
from tests.patching import everywhere
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture
def base(tiny_llama: Path, store: Path) -> ResolvedBase:
    return resolved(tiny_llama, store)


# --- a plan that cuts nothing


@pytest.mark.parametrize(
    ("family", "shards", "with_repair"),
    [
        ("llama", "20KB", False),
        ("qwen2", "20KB", True),
        ("gemma3", "1GB", True),
        ("mixtral", "20KB", False),
        ("qwen3_moe", "1GB", True),
    ],
)
def test_nothing_cut_gives_the_base_byte_for_byte(
    family: str, shards: str, with_repair: bool, tmp_path: Path, store: Path
) -> None:
    folder = save_tiny(tmp_path / "base", family, shards)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = folder / "config.json"
    config.write_text(json.dumps(read_json(config), indent=1, sort_keys=False))  # not as we would write it
    pad_headers(folder)
    base = resolved(folder, store)
    plan = plan_of(base, [shape.all_kept for shape in base.layers])
    # A model that cannot run: nothing needs repair, so it must not be touched.
    repair_input = RepairInput(None, [], Compensation(damping=0.05)) if with_repair else None
    assert contents(pruned(plan, base, tmp_path / "expert", repair_input)) == contents(folder)


def test_budget_zero_gives_the_base_byte_for_byte(
    spec_data: dict[str, Any], tmp_path: Path, base: ResolvedBase
) -> None:
    spec_data["budget"] = {"ffn": 0, "query_heads": 0, "kv_groups": 0}
    plan = expertprune.compose(parse_spec(spec_data, "spec", tmp_path))
    assert plan.cuts_nothing
    assert contents(pruned(plan, base, tmp_path / "expert")) == contents(base.folder)


# --- refusals, before anything is written


def refused(plan: Any, base: ResolvedBase, folder: Path, error: type[Exception], message: str) -> None:
    folder.mkdir()
    with pytest.raises(error, match=message):
        prune(plan, base, folder)
    assert list(folder.iterdir()) == []


def test_plan_for_other_weights_is_refused(base: ResolvedBase, tmp_path: Path, store: Path) -> None:
    other = resolved(save_tiny(tmp_path / "other", seed=1), store)
    assert other.layers == base.layers
    refused(random_plan(other, ffn=20), base, tmp_path / "expert", PlanError, "was made for .*other.*compose it again")


def test_plan_for_another_config_is_refused(base: ResolvedBase, tmp_path: Path, store: Path) -> None:
    folder = Path(shutil.copytree(base.folder, tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | {"rms_norm_eps": 1e-3}))
    other = resolved(folder, store)
    refused(random_plan(other, ffn=20), base, tmp_path / "expert", PlanError, "compose it again for this base")


def test_plan_of_other_shapes_is_refused(base: ResolvedBase, tmp_path: Path) -> None:
    plan = random_plan(base, ffn=20)
    plan.shapes = [dataclasses.replace(shape, ffn=33) for shape in plan.shapes]
    refused(plan, base, tmp_path / "expert", PlanError, "compose it again for this base")


def test_copy_of_the_base_elsewhere_is_the_same_base(base: ResolvedBase, tmp_path: Path, store: Path) -> None:
    moved = resolved(Path(shutil.copytree(base.folder, tmp_path / "moved")), store)
    check_plan(random_plan(base, ffn=20), moved)


def test_head_counts_of_one_layer_that_the_config_cannot_say_are_refused(tmp_path: Path, store: Path) -> None:
    base = resolved(save_tiny(tmp_path / "base", num_key_value_heads=6), store)
    plan = random_plan(base)
    first = plan.layers[1].kept
    plan.layers[1].kept = dataclasses.replace(first, query_heads=(0, 1, 2, 4, 5), kv_groups=(0, 1, 2, 4, 5))
    refused(plan, base, tmp_path / "expert", PlanError, "5 query heads do not divide")


def test_full_disk_is_refused_before_anything_is_written(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(base, ffn=20)
    free = bytes_needed(plan, base) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    refused(plan, base, tmp_path / "expert", CheckpointError, "expert: needs .* MiB of disk, .* MiB are free")


def test_room_asked_for_covers_the_weights_in_their_dtype(base: ResolvedBase, tmp_path: Path, store: Path) -> None:
    half = resolved(save_tiny(tmp_path / "half", dtype=torch.bfloat16), store)
    for one, size in ((base, 4), (half, 2)):
        plan = dataclasses.replace(random_plan(one), parameters={"before": 10**11, "after": 10**11})
        assert size * 10**11 <= bytes_needed(plan, one) <= 2 * size * 10**11


# --- failures midway


def failing_save(after: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shard writer fails once it has written `after` shards; returns the paths that were asked for."""
    real, paths = checkpoint.save_file, []

    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        paths.append(path)
        if len(paths) > after:
            raise error
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save)
    return paths


@pytest.mark.parametrize("written", [0, 2])
def test_write_that_fails_midway_leaves_no_folder(
    written: int, base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = failing_save(written, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    out = tmp_path / "place" / "expert"
    with pytest.raises(CheckpointError, match="expert: no room left on the disk"), staged_folder(out) as folder:
        prune(random_plan(base, ffn=20), base, folder)
    assert len(paths) == written + 1
    assert list((tmp_path / "place").iterdir()) == []


def test_failure_keeps_the_expert_that_was_there(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pruned(random_plan(base, ffn=20), base, tmp_path / "expert")
    (out / "expertprune.json").write_text("{}")
    before = contents(out)
    failing_save(1, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    with pytest.raises(CheckpointError), staged_folder(out, overwrite=True) as folder:
        prune(random_plan(base, ffn=12), base, folder)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_disk_that_is_really_full_is_said(tmp_path: Path, store: Path) -> None:
    """A limit on the size of files makes the real writer fail, as a full disk would."""
    base = resolved(save_tiny(tmp_path / "base"), store)
    plan, out = random_plan(base, ffn=20), tmp_path / "expert"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(CheckpointError, match="no room left on the disk"), staged_folder(out) as folder:
            prune(plan, base, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_repair_that_is_not_finite_is_refused(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    bad = torch.full((24, 20), 1.0)
    bad[3, 4] = float("nan")
    everywhere(monkeypatch, "expertprune.pruning.repair.repair", lambda *arguments: iter([(name, bad)]))
    with pytest.raises(CheckpointError, match=rf"{name}: the repair is not finite; raise compensation\.damping"):
        pruned(random_plan(base, ffn=20), base, tmp_path / "expert", RepairInput(None, [], Compensation(damping=0.05)))


# --- what comes along


def test_other_files_are_carried_unchanged(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", max_shard_size="20KB")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (folder / "LICENSE").write_text("Apache")
    (folder / "README.md").write_text("the base's card")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    base = resolved(folder, store)
    expert = pruned(random_plan(base, ffn=20), base, tmp_path / "expert")
    carried = ["generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "LICENSE"]
    for name in carried:
        assert (expert / name).read_bytes() == (folder / name).read_bytes(), name
    weights = {"config.json", "model.safetensors.index.json", *base.checkpoint.shards}
    assert set(contents(expert)) == {*carried, *weights}
    loaded = AutoTokenizer.from_pretrained(expert)
    assert loaded.apply_chat_template([{"content": "the heart"}], tokenize=False) == "the heart"
    assert loaded("the heart pumps")["input_ids"] == [3, 4, 5]


def test_named_chat_templates_are_carried(tmp_path: Path, store: Path) -> None:
    """transformers stores all but the default one in a folder of their own."""
    folder = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    tokenizer.save_pretrained(folder)
    base = resolved(folder, store)
    expert = pruned(random_plan(base, ffn=20), base, tmp_path / "expert")
    assert AutoTokenizer.from_pretrained(expert).chat_template == tokenizer.chat_template


def test_repairs_leave_nothing_behind(base: ResolvedBase, tmp_path: Path) -> None:
    ids = torch.arange(40).reshape(2, 20)
    batches = [Batch(ids, (20, 20), (0, 1))]
    model = load_model(base.folder, torch.float32, torch.device("cpu"))
    plan = random_plan(base, ffn=20)
    plain = pruned(plan, base, tmp_path / "plain")
    repaired = pruned(plan, base, tmp_path / "repaired", RepairInput(model, batches, Compensation(damping=0.05)))
    assert set(contents(repaired)) == set(contents(plain))
    assert [path for path in repaired.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("llama", LayerWidths(20, 1, 2)),
        ("qwen2", LayerWidths(20, 2, 3)),
        ("qwen2", LayerWidths(20, 1, 2)),
        ("gemma3", LayerWidths(20, 1, 2)),
    ],
)
def test_parameters_that_a_budget_promises_are_those_written(
    family: str, widths: LayerWidths, tmp_path: Path, store: Path
) -> None:
    base = resolved(save_tiny(tmp_path / "base", family), store)
    plan = random_plan(base, ffn=widths.ffn, heads_per_group=widths.heads_per_group, kv_groups=widths.kv_groups)
    expert = resolved(pruned(plan, base, tmp_path / "expert"), store)
    assert expert.checkpoint.parameters == base.checkpoint.parameters - removed_parameters(
        base, [widths] * len(base.layers)
    )
