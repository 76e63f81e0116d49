"""A checkpoint run by transformers or by vLLM in a process of its own, which may be unable to import expertprune."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALONE = 'import sys; sys.modules["expertprune"] = None\n'  # before a script: it cannot import expertprune
TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
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
print("LOGITS " + json.dumps(logits))
print("TOKENS " + json.dumps(tokens))
"""

VLLM = """
import json, os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    folder, dtype, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    print("TOKENS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def run_script(
    script: str, folder: Path, dtype: str, tmp_path: Path, prompts: Sequence[str], what: str = "TOKENS"
) -> Any:
    """What a script prints under a heading: greedy tokens of each prompt, or the two largest logits of each step."""
    path = tmp_path / "script.py"
    path.write_text(script)
    arguments = [sys.executable, str(path), str(folder), dtype, json.dumps(prompts)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=800, cwd=tmp_path, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{what} ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix(f"{what} "))
