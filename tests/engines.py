"""Checkpoints run by transformers or by vLLM in a process of its own, which may be unable to import expertprune."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ALONE = 'import sys; sys.modules["expertprune"] = None\n'  # before a script: it cannot import expertprune
TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, checkpoints = map(json.loads, sys.argv[1:])
for folder, dtype in checkpoints:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, logits = [], []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=16, output_logits=True, return_dict_in_generate=True
        )
        tokens.append(output.sequences[0, inputs.input_ids.shape[1]:].tolist())
        logits.append([step[0].float().topk(2).values.tolist() for step in output.logits])
    print("ANSWER " + json.dumps([tokens, logits]))
"""

# Folders that need the plugin come last: expertprune becomes importable for them, and vLLM looks for plugins once more.
# Importing vLLM takes longer than all else; and at each start and end of an engine vLLM collects garbage several times
# among all that it has imported, so that once per engine is left.
VLLM = """
import gc, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["TORCH_COMPILE_DISABLE"] = "1"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the argument
from vllm import LLM, SamplingParams, plugins
from vllm.distributed import cleanup_dist_env_and_memory
collect, gc.collect = gc.collect, lambda generation=2: 0
prompts, checkpoints = map(json.loads, sys.argv[1:])
for folder, dtype, alone in checkpoints:
    if not alone and sys.modules["expertprune"] is None:
        del sys.modules["expertprune"]
        plugins.plugins_loaded = False
    engine = LLM(
        folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=2**28
    )
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    print("ANSWER " + json.dumps([[list(output.outputs[0].token_ids) for output in outputs], []]))
    del engine
    cleanup_dist_env_and_memory()
    collect()
"""


@dataclass(frozen=True)
class Answer:
    """To each prompt, the greedy tokens; by transformers also the two largest logits of each step."""

    tokens: list[list[int]]
    logits: list[list[list[float]]]


def by_transformers(checkpoints: Sequence[tuple[Path, str]], prompts: Sequence[str]) -> list[Answer]:
    """What folders generate in a dtype by transformers, where there is no expertprune."""
    return _run(ALONE + TRANSFORMERS, [[str(folder), dtype] for folder, dtype in checkpoints], prompts)


def by_vllm(alone: tuple[Path, str], plugged: tuple[Path, str], prompts: Sequence[str]) -> list[Answer]:
    """The same by vLLM, of a folder for which there is no expertprune, and of one that has the plugin."""
    return _run(ALONE + VLLM, [[str(alone[0]), alone[1], True], [str(plugged[0]), plugged[1], False]], prompts)


def _run(script: str, checkpoints: list[list[Any]], prompts: Sequence[str]) -> list[Answer]:
    arguments = [sys.executable, "-c", script, json.dumps(prompts), json.dumps(checkpoints)]
    with TemporaryDirectory() as here:  # which holds no expertprune
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=800, cwd=here, check=False)
    answers = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(checkpoints), done.stderr[-3000:]
    return [Answer(*json.loads(answer)) for answer in answers]
