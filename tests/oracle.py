"""Random plans, and the base with the dropped units masked: what a cut model is compared with.

Nothing here uses the family data: the names of the masked modules are written out.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from expertprune.artifacts.plan import BaseReference, LayerPlan, Parameters, Plan
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.pruning.write import RepairInput, prune
from expertprune.spec.schema import Base
from expertprune.units import KeptUnits, LayerShape
from tests.tiny import save_tiny

SHARDS = {"one file": "1GB", "several files": "20KB"}
IDS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(5))


def fetched(base: ResolvedBase) -> ResolvedBase:
    """The same base, with its weights in its folder."""
    base.checkpoint.fetch()
    return base


def resolved(folder: Path, store: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(folder)), store)


@dataclass
class Dense:
    """A base and its running model."""

    base: ResolvedBase
    model: Any


GetDense = Callable[..., Dense]


def bases_of(variants: Mapping[str, dict[str, Any]], root: Path) -> GetDense:
    """The base of a variant, in one file or several, made once."""

    @functools.cache
    def made(variant: str, shards: str) -> Dense:
        folder = save_tiny(root / f"{variant} {shards}", max_shard_size=SHARDS[shards], **variants[variant])
        assert len(list(folder.glob("*.safetensors"))) > 1 or shards == "one file"
        return Dense(resolved(folder, root / "store"), exact(folder))

    def get(variant: str, shards: str = "several files") -> Dense:
        return made(variant, shards)  # one key, however it is called

    return get


def random_units(
    shape: LayerShape,
    generator: torch.Generator,
    ffn: int | None = None,
    heads_per_group: int | None = None,
    kv_groups: int | None = None,
    experts: int | None = None,
) -> KeptUnits:
    """So many random units of one layer; all of a structure whose number is not given."""

    def choose(count: int | None, of: int) -> list[int]:
        return sorted(torch.randperm(of, generator=generator)[: of if count is None else count].tolist())

    per_group = shape.query_heads // max(1, shape.kv_heads)
    groups = choose(kv_groups if shape.kv_heads else 0, shape.kv_heads)
    heads = [group * per_group + head for group in groups for head in choose(heads_per_group, per_group)]
    if not shape.experts:
        return KeptUnits(tuple(choose(min(ffn or shape.ffn, shape.ffn), shape.ffn)), tuple(heads), tuple(groups))
    of = shape.experts // shape.expert_groups
    each = None if experts is None else experts // shape.expert_groups
    chosen = [group * of + expert for group in range(shape.expert_groups) for expert in choose(each, of)]
    neurons = [expert * shape.ffn + neuron for expert in chosen for neuron in choose(ffn, shape.ffn)]
    return KeptUnits(tuple(neurons), tuple(heads), tuple(groups), tuple(chosen))


def plan_of(base: ResolvedBase, kept: list[KeptUnits]) -> Plan:
    """A plan that keeps these units, layer by layer."""
    size = base.checkpoint.parameters
    return Plan(
        name="chosen by hand",
        base=BaseReference(model=base.name, digest=base.digest),
        parameters=Parameters(before=size, after=size),
        shapes=base.layers,
        layers=[LayerPlan(units) for units in kept],
    )


def random_plan(base: ResolvedBase, seed: int = 0, **widths: int) -> Plan:
    """A plan of random units, others in every layer, of the same number in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return plan_of(base, [random_units(shape, generator, **widths) for shape in base.layers])


def pruned(plan: Plan, base: ResolvedBase, folder: Path, repair_input: RepairInput | None = None) -> Path:
    folder.mkdir()
    prune(plan, base, folder, repair_input)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder in plain transformers; every tensor of it is used and none is made up."""
    config = read_json(folder / "config.json")
    eager = config.get("attn_logit_softcapping") is not None or config["model_type"] == "gpt_oss"
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        **({"attn_implementation": "eager"} if eager else {}),  # the only one that caps, and that knows sinks
    )
    assert not any(notes.values()), notes
    return model.eval().requires_grad_(False)


def exact(folder: Path) -> Any:
    """The folder in float64: processors that sum in other orders then differ far below the oracle's tolerance."""
    model = load(folder, torch.float64)
    model.set_experts_implementation("eager")  # the default one has no float64
    return model


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The oracle's tolerance, on logits of models in float64."""
    assert found.dtype is expected.dtype is torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


@contextlib.contextmanager
def masked(model: Any, plan: Plan) -> Iterator[None]:
    """While open, the dropped units of a dense model are zero at the input of their output projection.

    Dropped experts have router logits of −∞; the columns of the down-projection that dropped neurons of the others own are
    zero.
    """

    def hook(mask: Tensor) -> Any:
        return lambda module, arguments: (arguments[0] * mask,)

    handles, restored = [], []
    for layer, kept, shape in zip(model.model.layers, plan.kept, plan.shapes, strict=True):
        if hasattr(layer.mlp, "experts"):
            router = layer.mlp.gate if hasattr(layer.mlp, "gate") else layer.mlp.router
            handles.append(router.register_forward_hook(without_experts(kept.experts)))
            down = layer.mlp.experts.down_proj  # [experts, hidden, neurons]
            restored.append((down, down.detach().clone()))
            down = down.transpose(1, 2) if layer.mlp.experts.is_transposed else down
            for expert in kept.experts:
                for neuron in range(down.shape[2]):
                    if expert * down.shape[2] + neuron not in kept.ffn:
                        down[expert, :, neuron] = 0
        elif shape.ffn:
            neurons: nn.Linear = layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.c_proj
            neuron_mask = torch.zeros(neurons.in_features)
            neuron_mask[list(kept.ffn)] = 1
            handles.append(neurons.register_forward_pre_hook(hook(neuron_mask)))
        if shape.query_heads:
            heads: nn.Linear = layer.self_attn.o_proj
            head_mask, head_dim = torch.zeros(heads.in_features), layer.self_attn.head_dim
            for head in kept.query_heads:
                head_mask[head * head_dim : (head + 1) * head_dim] = 1
            handles.append(heads.register_forward_pre_hook(hook(head_mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, values in restored:
            weight.copy_(values)


def without_experts(kept: tuple[int, ...]) -> Any:
    """A router whose other logits are −∞, step by step: scores, groups, the largest per token, and their weights."""

    def route(router: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        hidden = arguments[0].reshape(-1, router.weight.shape[1]).double()
        own, logits = hidden @ router.weight.double().T + getattr(router, "bias", 0), output[0]
        torch.testing.assert_close(logits.double(), own, rtol=1e-4, atol=1e-4)  # some routers stay in float32
        gone = torch.ones(logits.shape[1], dtype=torch.bool)
        gone[list(kept)] = False
        logits = logits.masked_fill(gone, -torch.inf)
        bias = getattr(router, "e_score_correction_bias", None)
        # of the families here, those whose correction lies in the router itself take the sigmoid, all others the softmax
        scores = torch.softmax(logits, -1) if bias is None else logits.sigmoid()
        if hasattr(router, "moe_statics"):
            bias = router.moe_statics.e_score_correction_bias[0]
        ranked = (scores if bias is None else scores + bias).masked_fill(gone, -torch.inf)
        if (groups := getattr(router, "num_group", None) or 1) > 1:
            of_groups = ranked.unflatten(1, (groups, -1))
            ranks = of_groups.amax(-1) if bias is None else of_groups.topk(2, -1).values.sum(-1)
            best = torch.zeros_like(ranks).scatter_(1, ranks.topk(router.topk_group, -1).indices, 1).bool()
            ranked = of_groups.masked_fill(~best[..., None], -torch.inf).flatten(1)
        chosen = ranked.topk(router.top_k, -1).indices
        weights = scores.gather(1, chosen)
        # where there is no such switch, it is always on, but for one family that never normalizes and scales instead
        if getattr(router, "norm_topk_prob", not hasattr(router, "topk_method")):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * getattr(router, "routed_scaling_factor", 1)
        return logits, weights.to(output[1].dtype), chosen

    return route


def generated(model: Any) -> Tensor:
    """A greedy continuation through the cache, which reads the head counts and windows again."""
    return model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)


def masked_logits(model: Any, plan: Plan, ids: Tensor = IDS) -> Tensor:
    with masked(model, plan):
        return logits_of(model, ids)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weights, whatever its index says."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def change_config(folder: Path, remove: Iterable[str] = (), **changes: Any) -> None:
    """Take keys out of a folder's config, and set others."""
    kept = {key: value for key, value in read_json(folder / "config.json").items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(kept | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder's only file of weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pad_headers(folder: Path) -> None:
    """Give the shards longer headers, as the format allows: the same tensors, in bytes that no writer here makes."""
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        path.write_bytes(
            (length + 64).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 64 + content[8 + length :]
        )
