"""Experts of every family through real vLLM on a CPU: the greedy tokens of transformers, and their probabilities.

Where layers have widths of their own, both with this package's plugin and without it, as vLLM comes. Beside some of them,
an adapter of the base that was cut along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import expertprune
from expertprune.arch import families
from expertprune.models.loading import load_model
from expertprune.units import GONE
from tests.adapters import LINEAR, expert_of, trained, with_adapter
from tests.oracle import plan_of, random_units, resolved
from tests.tiny import FAMILIES, save_tiny

# The first test waits for the engines of all.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2400)]

# Head sizes of vLLM's CPU kernels begin at 32.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    # vLLM's class has no bias on the output projection of this family's attention, and drops one without a word.
    "qwen3": {"attention_bias": False},
    # vLLM's class has no head of its own for this family.
    "gemma2": {"tie_word_embeddings": True},
}
PROMPTS = [[5, 9, 14, 3, 22, 41, 7, 30], [60, 2, 33]]
NEW = 8
OWN_WIDTHS = "widths of single layers"

SCRIPT = """
import gc, json, os, sys, traceback

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

out, plugin, prompts, new, *folders = sys.argv[1:]
if plugin == "plugin":
    from expertprune.serving.plugin import register

    register()
results = {}
for folder in folders:
    try:
        adapter = f"{folder}-adapter"
        engine = LLM(
            folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True,
            trust_remote_code=plugin != "plugin", enable_lora=os.path.isdir(adapter), max_lora_rank=8,
        )
        settings = SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True, detokenize=False, logprobs=0)
        inputs = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
        for name, lora in ((folder, None), (adapter, LoRARequest("adapter", 1, adapter))):
            if os.path.isdir(name):
                answers = engine.generate(inputs, settings, lora_request=lora, use_tqdm=False)
                results[name] = [
                    [(token, place[token].logprob) for token, place in zip(each.token_ids, each.logprobs)]
                    for each in (answer.outputs[0] for answer in answers)
                ]
        del engine
    except Exception as error:
        traceback.print_exc()
        results[folder] = f"{type(error).__name__}: {error}"
    gc.collect()
    cleanup_dist_env_and_memory()
    with open(out, "w") as file:
        json.dump(results, file)
"""


@dataclass
class Served:
    """Tokens and their log-probabilities by transformers and by vLLM (or its error), by family, expert and route.

    Those with an adapter have the name of its base's family with `ADAPTED` behind it.
    """

    expected: dict[tuple[str, str], list[list[tuple[int, float]]]]
    found: dict[tuple[str, str, str], Any]


def expert_kinds(name: str) -> dict[str, list[dict[str, int] | None]]:
    """What each layer keeps: the same, and, where the family's classes can be built so, other widths in each.

    One layer goes whole.
    """
    family = next(each for each in families().values() if each.family == name)
    heads = {"kv_groups": 1} if family.heads_are_units else {}
    units = {"ffn": 64} if family.has_ffn else {"experts": 4}
    kinds: dict[str, list[dict[str, int] | None]] = {"uniform": [{**units, **heads}, {**units, **heads}, None]}
    if family.vllm_single_layers:
        kinds[OWN_WIDTHS] = [{"ffn": 64}, None, {"ffn": 32, **heads}]
    return kinds


# Families that vLLM's CPU build cannot run as this test does: its router leaves out the bias that corrects the choice of a
# softmax router without groups; its linear attention wants bfloat16; its latent attention knows one head size only.
NOT_ON_CPUS = {"ernie4_5_moe", "qwen3_next", "deepseek_v2", "deepseek_v3"}
EXPERTS = [(name, kind) for name in FAMILIES if name not in NOT_ON_CPUS for kind in expert_kinds(name)]
CASES = [
    (*expert, route)
    for expert in EXPERTS
    for route in ("plugin", "stock")
    if expert[1] == OWN_WIDTHS or route == "plugin"
]
ADAPTED = " with an adapter"
# By family, the modules that the adapter changes.
ADAPTERS = {"llama": LINEAR, "gemma3": LINEAR, "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}


@torch.no_grad()
def generated(folder: Path, adapter: Path | None = None) -> list[list[tuple[int, float]]]:
    model = load_model(folder, torch.float32, torch.device("cpu"))
    if adapter is not None:
        model = with_adapter(model, adapter)
    answers = []
    for prompt in PROMPTS:
        ids, answer = list(prompt), []
        for _ in range(NEW):
            logs = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float(), -1)
            ids.append(int(logs.argmax()))
            answer.append((ids[-1], float(logs.max())))
        answers.append(answer)
    return answers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("served")
    folders = {}
    for number, (name, kind) in enumerate(EXPERTS):
        own = root / name
        # untied: a tied random model repeats the token that it reads
        sizes = {**SIZES, "tie_word_embeddings": False, **OWN_SIZES.get(name, {})}
        base = resolved(own if own.is_dir() else save_tiny(own, name, **sizes), root / "store")
        generator = torch.Generator().manual_seed(number)
        widths = zip(base.layers, expert_kinds(name)[kind], strict=True)
        units = [GONE if kept is None else random_units(shape, generator, **kept) for shape, kept in widths]
        folders[name, kind] = expert_of(plan_of(base, units), base, root / f"{name}-{number}")
    expected = {key: generated(folder) for key, folder in folders.items()}
    for (name, kind), folder in list(folders.items()):
        if name in ADAPTERS:
            whole = trained(root / name, root / f"{folder.name}-whole", target_modules=ADAPTERS[name])
            cut = folder.with_name(f"{folder.name}-adapter")
            expertprune.cut_adapter(whole, folder, cut)
            expected[name + ADAPTED, kind] = generated(folder, cut)
    found: dict[tuple[str, str, str], Any] = {}
    for route in ("plugin", "stock"):
        chosen = {key: folder for key, folder in folders.items() if (*key, route) in CASES}
        results, error = _by_vllm(root, route, list(chosen.values()))
        for (name, kind), folder in chosen.items():
            for each, place in ((name, str(folder)), (name + ADAPTED, f"{folder}-adapter")):
                found[each, kind, route] = results.get(place, f"vLLM ended: {error}")
    return Served(expected, found)


def _by_vllm(root: Path, route: str, folders: list[Path]) -> tuple[dict[str, Any], str]:
    """What vLLM generates for each folder, and the end of its log."""
    out, log = root / f"{route}.json", root / f"{route}.log"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **({"VLLM_PLUGINS": ""} if route == "stock" else {})}
    command = [sys.executable, "-c", SCRIPT, str(out), route, json.dumps(PROMPTS), str(NEW), *map(str, folders)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log.write_text(run.stdout + run.stderr)
    print(f"vLLM's log: {log}")
    assert out.is_file(), run.stderr[-3000:]
    return json.loads(out.read_text()), run.stderr[-500:]


@pytest.mark.parametrize(
    ("name", "kind", "route"),
    [*CASES, *((name + ADAPTED, kind, route) for name, kind, route in CASES if name in ADAPTERS)],
)
def test_vllm_generates_what_transformers_does(name: str, kind: str, route: str, served: Served) -> None:
    found, expected = served.found[name, kind, route], served.expected[name, kind]
    assert isinstance(found, list), found
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        # random models may repeat themselves; what they give a token tells experts apart nevertheless
        assert [log for _, log in ours] == pytest.approx([log for _, log in theirs], rel=1e-3, abs=1e-3)
