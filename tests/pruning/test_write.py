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
from expertprune.artifacts.plan import LayerPlan
from expertprune.composition.parameters import removed_parameters
from expertprune.composition.widths import LayerWidths
from expertprune.errors import CheckpointError, PlanError
from expertprune.files import staged_folder
from expertprune.models import shards
from expertprune.models.base import ResolvedBase
from expertprune.pruning.repair import Repair
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
    repair_input = RepairInput(None, [], Compensation(ridge=20)) if with_repair else None
    assert contents(pruned(plan, base, tmp_path / "expert", repair_input)) == contents(folder)


def test_budget_zero_gives_the_base_byte_for_byte(
    spec_data: dict[str, Any], tmp_path: Path, base: ResolvedBase
) -> None:
    spec_data["budget"] = {"ffn": 0, "query_heads": 0, "kv_groups": 0}
    plan = expertprune.compose(parse_spec(spec_data, "spec", tmp_path))
    assert not plan.cuts_layers
    assert plan.vocabulary is None
    assert contents(pruned(plan, base, tmp_path / "expert")) == contents(base.folder)


# --- refusals, before anything is written


def test_a_plan_fits_its_base_and_copies_of_it_alone(base: ResolvedBase, tmp_path: Path, store: Path) -> None:
    moved, changed = (Path(shutil.copytree(base.folder, tmp_path / name)) for name in ("moved", "changed"))
    check_plan(random_plan(base, ffn=20), resolved(moved, store))
    (changed / "config.json").write_text(json.dumps(read_json(changed / "config.json") | {"rms_norm_eps": 1e-3}))
    plan = random_plan(base, ffn=20)
    shapes = [dataclasses.replace(shape, ffn=33) for shape in plan.shapes]
    for other, problem in (
        (random_plan(resolved(save_tiny(tmp_path / "other", seed=1), store), ffn=20), "was made for .*for this base"),
        (random_plan(resolved(changed, store), ffn=20), "was made for .*for this base"),
        (dataclasses.replace(plan, shapes=shapes), "was edited: .*compose it again"),
    ):
        with pytest.raises(PlanError, match=problem):
            check_plan(other, base)


def test_head_counts_of_one_layer_that_the_config_cannot_say_are_refused(tmp_path: Path, store: Path) -> None:
    base = resolved(save_tiny(tmp_path / "base", num_key_value_heads=6), store)
    plan = random_plan(base)
    one = dataclasses.replace(plan.layers[1].kept, query_heads=(0, 1, 2, 4, 5), kv_groups=(0, 1, 2, 4, 5))
    plan = dataclasses.replace(plan, layers=[plan.layers[0], LayerPlan(one), *plan.layers[2:]])
    with pytest.raises(PlanError, match="5 query heads do not divide"):
        pruned(plan, base, tmp_path / "expert")
    assert list((tmp_path / "expert").iterdir()) == []


def test_full_disk_is_refused_before_anything_is_written(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = random_plan(base, ffn=20)
    free = bytes_needed(plan, base) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(CheckpointError, match=r"expert: needs .* MiB of disk, .* MiB are free"):
        pruned(plan, base, tmp_path / "expert")
    assert list((tmp_path / "expert").iterdir()) == []


# --- failures midway


def test_failure_midway_leaves_no_folder_and_keeps_the_expert_that_was_there(
    base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of shards fails at the third."""
    (pruned(random_plan(base, ffn=20), base, tmp_path / "expert") / "expertprune.json").write_text("{}")
    before = contents(tmp_path / "expert")
    real, paths = shards.written_file, []

    def written(path: Path, *args: Any) -> Any:
        paths.append(path)
        if len(paths) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args)

    monkeypatch.setattr(shards, "written_file", written)
    for out in (tmp_path / "new" / "expert", tmp_path / "expert"):
        paths.clear()
        with pytest.raises(CheckpointError, match="no room left on the disk"), staged_folder(out, overwrite=True) as at:
            prune(random_plan(base, ffn=12), base, at)
        assert len(paths) == 3
    assert contents(tmp_path / "expert") == before
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name not in ("expert", "new")]
    assert list((tmp_path / "new").iterdir()) == []


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
    method = Repair("bad", lambda *arguments: iter([(name, bad)]), runs_model=True)
    everywhere(monkeypatch, "expertprune.pruning.repair.check_repair", lambda _: method)
    with pytest.raises(CheckpointError, match=rf"{name}: the repair is not finite; raise compensation\.ridge"):
        pruned(random_plan(base, ffn=20), base, tmp_path / "expert", RepairInput(None, [], Compensation(ridge=20)))


# --- what comes along


def test_other_files_are_carried_unchanged(tmp_path: Path, store: Path) -> None:
    folder = save_tiny(tmp_path / "base", max_shard_size="20KB")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {  # transformers stores all but the default one in a folder of their own
        "default": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "tool_use": "tools: {{ messages }}",
    }
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (folder / "LICENSE").write_text("Apache")
    (folder / "README.md").write_text("the base's card")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    base = resolved(folder, store)
    expert = pruned(random_plan(base, ffn=20), base, tmp_path / "expert")
    carried = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"]
    carried += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    for name in carried:
        assert (expert / name).read_bytes() == (folder / name).read_bytes(), name
    weights = {"config.json", "model.safetensors.index.json", *base.checkpoint.shards}
    assert set(contents(expert)) == {*carried, *weights}
    loaded = AutoTokenizer.from_pretrained(expert)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.apply_chat_template([{"content": "the heart"}], tokenize=False) == "the heart"
    assert loaded("the heart pumps")["input_ids"] == [3, 4, 5]


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("llama", LayerWidths(20, 1, 2)),
        ("qwen2", LayerWidths(20, 2, 3)),
        ("qwen2", LayerWidths(20, 1, 2)),
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
