"""Experts of every family through real vLLM on a CPU: the greedy tokens of transformers, and their probabilities.

Where layers have widths of their own, both with this package's plugin and without it, as vLLM comes. Beside some of them,
an adapter of the base that was cut along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

# Head sizes of vLLM's CPU kernels begin at 32. A tied random model repeats the token that it reads.
SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
OWN_SIZES: dict[str, dict[str, Any]] = {
    # vLLM's class has no bias on the output projection of this family's attention, and drops one without a word.
    "qwen3": {"attention_bias": False},
    # vLLM's class has no head of its own for this family.
    "gemma2": {"tie_word_embeddings": True},
}
PROMPTS = [[5, 9, 14, 3, 22, 41, 7, 30], [60, 2, 33]]
NEW = 8

# One process for all engines, as importing vLLM takes far longer than starting a tiny one. At each start and end of an
# engine vLLM collects garbage several times among all that it has imported, and the models are too small to be garbage
# that matters; nor does compiling a function pay.
SCRIPT = """
import gc, json, os, sys, traceback

gc.collect = lambda generation=2: 0
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the argument
sys.modules["expertprune"] = None  # for a while, as if it were not installed
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

out, prompts, new, *cases = sys.argv[1:]
results = {}
for route, folder in zip(cases[::2], cases[1::2]):
    if route == "plugin" and sys.modules["expertprune"] is None:
        del sys.modules["expertprune"]
        from expertprune.serving.plugin import register

        register()
    try:
        adapter = f"{folder}-adapter"
        engine = LLM(
            folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True,
            trust_remote_code=route == "stock", enable_lora=os.path.isdir(adapter), max_lora_rank=8,
            kv_cache_memory_bytes=2**23,
        )
        settings = SamplingParams(temperature=0, max_tokens=int(new), ignore_eos=True, detokenize=False, logprobs=0)
        inputs = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
        for name, lora in ((folder, None), (adapter, LoRARequest("adapter", 1, adapter))):
            if os.path.isdir(name):
                answers = engine.generate(inputs, settings, lora_request=lora, use_tqdm=False)
                results[f"{route} {name}"] = [
                    [(token, place[token].logprob) for token, place in zip(each.token_ids, each.logprobs)]
                    for each in (answer.outputs[0] for answer in answers)
                ]
        del engine
    except Exception as error:
        traceback.print_exc()
        results[f"{route} {folder}"] = f"{type(error).__name__}: {error}"
    cleanup_dist_env_and_memory()
    with open(out, "w") as file:
        json.dump(results, file)
"""

# Families that vLLM's CPU build cannot run as this test does: its router leaves out the bias that corrects the choice of a
# softmax router without groups; its linear attention wants bfloat16; its latent attention knows one head size only.
NOT_ON_CPUS = {"ernie4_5_moe", "qwen3_next", "deepseek_v2", "deepseek_v3"}
# In vLLM's Transformers backend these are no other than llama.
LIKE_LLAMA = {"qwen2", "qwen3"}
# By family, the modules that the adapter changes.
ADAPTERS = {"llama": LINEAR, "gemma3": LINEAR, "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
BY_NAME = {family.family: family for family in families().values()}


def routes_of_experts() -> dict[tuple[str, str], list[str]]:
    """By family and kind of widths, the routes into vLLM, if any.

    Where its classes can be built so, layers have widths of their own; what this shows of a family holds for one width
    in all layers, as in llama, too.
    """
    found = {}
    for name in FAMILIES:
        if name not in NOT_ON_CPUS:
            single = bool(BY_NAME[name].vllm_single_layers)
            found[name, "uniform"] = [] if single and name != "llama" else ["plugin"]
            if single:
                found[name, "own widths"] = ["plugin"] if name in LIKE_LLAMA else ["plugin", "stock"]
    return found


EXPERTS = routes_of_experts()
CASES = [(*expert, each, route) for expert in EXPERTS for route in EXPERTS[expert]
         for each in ("expert", "adapter") if each == "expert" or expert[0] in ADAPTERS]  # fmt: skip
Answers = list[list[tuple[int, float]]]  # to each prompt: tokens, and their log-probabilities


def widths(name: str, kind: str) -> list[dict[str, int] | None]:
    """What each layer keeps; one goes whole."""
    heads = {"kv_groups": 1} if BY_NAME[name].heads_are_units else {}
    units = {"ffn": 64} if BY_NAME[name].has_ffn else {"experts": 4}
    if kind == "uniform":
        return [{**units, **heads}, {**units, **heads}, None]
    return [{"ffn": 64}, None, {"ffn": 32, **heads}]


@torch.no_grad()
def generated(folder: Path, adapter: Path | None = None) -> Answers:
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


def by_vllm(root: Path, cases: list[tuple[str, Path]]) -> dict[str, Any]:
    """What vLLM generates by each route for each folder; the end of its log where it ended before."""
    out, log = root / "answers.json", root / "vllm.log"
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
        "TORCH_COMPILE_DISABLE": "1",
    }
    words = [text for route, folder in cases for text in (route, str(folder))]
    command = [sys.executable, "-c", SCRIPT, str(out), json.dumps(PROMPTS), str(NEW), *words]
    run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    log.write_text(run.stdout + run.stderr)
    print(f"vLLM's log: {log}")
    assert out.is_file(), run.stderr[-3000:]
    ended = {f"{route} {folder}": f"vLLM ended: {run.stderr[-500:]}" for route, folder in cases}
    return {**ended, **json.loads(out.read_text())}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[Answers, Any]]:
    """By case, what transformers answers, and vLLM (or its error)."""
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("served")
    folders, expected = {}, {}
    for number, (name, kind) in enumerate(EXPERTS):
        if not EXPERTS[name, kind]:
            continue
        own = root / name
        sizes = {**SIZES, **OWN_SIZES.get(name, {})}
        base = resolved(own if own.is_dir() else save_tiny(own, name, **sizes), root / "store")
        generator = torch.Generator().manual_seed(number)
        layers = zip(base.layers, widths(name, kind), strict=True)
        units = [GONE if kept is None else random_units(shape, generator, **kept) for shape, kept in layers]
        folder = folders[name, kind] = expert_of(plan_of(base, units), base, root / f"{name}-{number}")
        expected[name, kind, "expert"] = generated(folder)
        if name in ADAPTERS:
            whole = trained(own, root / f"{folder.name}-whole", target_modules=ADAPTERS[name])
            cut = folder.with_name(f"{folder.name}-adapter")
            expertprune.cut_adapter(whole, folder, cut)
            expected[name, kind, "adapter"] = generated(folder, cut)
    found = by_vllm(
        root,
        [(route, folders[expert]) for route in ("stock", "plugin") for expert in folders if route in EXPERTS[expert]],
    )
    endings = {"expert": "", "adapter": "-adapter"}
    return {
        (name, kind, each, route): (
            expected[name, kind, each],
            found.get(f"{route} {folders[name, kind]}{endings[each]}", "no answer"),
        )
        for name, kind, each, route in CASES
    }


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_vllm_generates_what_transformers_does(
    case: tuple[str, ...], answers: dict[tuple[str, ...], tuple[Answers, Any]]
) -> None:
    expected, found = answers[case]
    assert isinstance(found, list), found
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        # random models may repeat themselves; what they give a token tells experts apart nevertheless
        assert [log for _, log in ours] == pytest.approx([log for _, log in theirs], rel=1e-3, abs=1e-3)
