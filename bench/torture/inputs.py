"""The files that the fuzzer makes hostile, and the commands that read them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import save_file

from bench.torture.workplace import Workplace
from expertprune.cli import main
from expertprune.commands.terminal import reporting
from expertprune.corpora.catalogue import find_sources
from expertprune.corpora.documents import Document
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.loading import kept_file
from expertprune.files import shipped
from expertprune.serving import engine
from expertprune.spec.reading import load_spec

TEMPLATE = """{% for message in messages %}
{% if message.role == "system" %}{{ raise_exception("no system") }}{% endif %}
<|{{ message.role }}|>{{ message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
{% set unused = 9 * 9 %}
"""


@dataclass(frozen=True)
class Kind:
    """One kind of input: the file that is mutated, how it is read and written, and the commands that read it.

    Attributes:
        data: whether the file is mutated as data; else as bytes.
        group: kinds of one group share the turn of one kind.
    """

    name: str
    file: Path
    commands: list[list[str]]
    data: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = json.dumps
    group: str = ""


@click.command("check-folder")
@click.argument("folder")
@reporting
def check_folder(folder: str) -> None:
    """What `expertprune serve` checks of a folder before it starts vLLM, which takes half a minute."""
    engine.check_folder(folder)


def entry(arguments: list[str]) -> click.Command:
    """What runs a command: the command line, or `check_folder`."""
    return click.Group(commands=[check_folder]) if arguments[0] == check_folder.name else main


def kinds(place: Workplace, begin: Path) -> list[Kind]:
    """All kinds, over a plan, an expert and a base in the workplace, which may be damaged, and an export in `begin`."""
    folder, out = place.folder, str(place.out.parent / "made")
    plan, suite, gguf = folder / "plan.json", folder / "suite.yaml", folder / "model.gguf"
    expert, corpus = place.out, folder / "medical.path.jsonl"
    questions = [{"question": "w1 w2", "choices": ["w3", "w4"], "answer": 0}] * 4
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {
        "task": "choose", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    suite.write_text(yaml.safe_dump({"name": "mine", "perplexity": {}, "tasks": [{"file": "task.yaml"}]}))
    shutil.copy(begin / "expert.gguf", gguf)
    spec_of_gguf = folder / "gguf.yaml"
    spec_of_gguf.write_text(yaml.safe_dump({**yaml.safe_load(place.spec.read_text()), "base": str(gguf)}))
    check, base = ["validate", str(place.spec)], folder / "base"
    tables, kept = _spec_of_tables(place)
    other, compose = ["validate", str(tables)], ["compose", str(place.spec), "--out", f"{out}/plan.json"]
    evaluated = ["evaluate", str(expert)]
    rows = folder / "rows.yaml"
    rows.write_text(yaml.safe_dump(yaml.safe_load(place.spec.read_text()) | {"budget": {"vocabulary": 0.1}}))
    of_base = [check, ["validate", str(rows)]]
    of_folder = [evaluated, ["export", str(expert), "--out", f"{out}/x.gguf"], ["check-folder", str(expert)]]
    adapter = _adapter(folder)
    cut = ["adapter", str(adapter), "--expert", str(expert), "--out", f"{out}/adapter"]
    return [
        Kind("spec", place.spec, [check], yaml.safe_load, yaml.safe_dump),
        Kind("spec-text", place.spec, [check]),
        Kind("plan", plan, [["prune", str(plan), "--out", out], ["inspect", str(plan)]], json.loads),
        Kind(
            "expert",
            expert / "expertprune.json",
            [["inspect", str(expert)], ["report", str(expert)], evaluated],
            json.loads,
        ),
        Kind("weights", sorted(expert.glob("*.safetensors"))[0], [evaluated]),
        Kind("config", base / "config.json", of_base, json.loads),
        Kind("generation", base / "generation_config.json", of_base, json.loads),
        Kind("tokenizer", base / "tokenizer.json", of_base, json.loads),
        Kind("tokenizer-config", base / "tokenizer_config.json", of_base, json.loads),
        Kind("index", base / "model.safetensors.index.json", [check], json.loads),
        Kind("shard", sorted(base.glob("*.safetensors"))[0], [check]),
        Kind("gguf", gguf, [["validate", str(spec_of_gguf)]]),
        Kind("corpus", corpus, [check], _rows, _lines),
        Kind("corpus-text", corpus, [check]),
        Kind("csv", folder / "en.csv", [other]),
        Kind("parquet", folder / "medical.parquet", [other]),
        Kind("talk", folder / "talks.jsonl", [other], _rows, _lines),
        Kind("template", folder / "chat" / "chat_template.jinja", [other], str.splitlines, _joined),
        Kind("kept", kept, [other], _rows, _lines),
        Kind("profile", sorted((place.store / "profiles").glob("*.safetensors"))[0], [compose]),
        Kind("places", sorted((place.store / "places").glob("*.json"))[0], [["report", str(expert)]], json.loads),
        Kind("suite", suite, [[*evaluated, "--suite", str(suite)]], yaml.safe_load, yaml.safe_dump),
        Kind("task", folder / "task.yaml", [[*evaluated, "--suite", str(suite)]], yaml.safe_load, yaml.safe_dump),
        Kind("expert-config", expert / "config.json", of_folder, json.loads),
        Kind("expert-generation", expert / "generation_config.json", of_folder, json.loads),
        Kind("expert-tokenizer", expert / "tokenizer.json", of_folder, json.loads),
        Kind("expert-index", expert / "model.safetensors.index.json", of_folder, json.loads),
        Kind("adapter", adapter / "adapter_config.json", [cut], json.loads),
        Kind("adapter-weights", adapter / "adapter_model.safetensors", [cut]),
        *_shipped_specs(place),
        *_shipped_suites(place, evaluated),
    ]


def _adapter(folder: Path) -> Path:
    """A LoRA adapter of the base, as PEFT writes it."""
    made = folder / "adapter"
    made.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / "base"), "r": 2,
        "lora_alpha": 4, "target_modules": ["down_proj"], "bias": "none",
    }  # fmt: skip
    (made / "adapter_config.json").write_text(json.dumps(config))
    name, weights = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight", {}
    for layer in range(3):
        weights[name.format(layer, "A")], weights[name.format(layer, "B")] = torch.ones(2, 32), torch.ones(24, 2)
    save_file(weights, made / "adapter_model.safetensors", metadata={"format": "pt"})
    return made


def _shipped_specs(place: Workplace) -> Iterator[Kind]:
    """The specs that ship, for the tiny base."""
    for path in sorted(shipped("profiles").glob("*.yaml")):
        copy = place.folder / f"shipped-{path.name}"
        copy.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"base": str(place.folder / "base")}))
        command = ["validate", str(copy)]
        yield Kind(f"shipped-{path.stem}", copy, [command], yaml.safe_load, yaml.safe_dump, "shipped specs")


def _shipped_suites(place: Workplace, evaluated: list[str]) -> Iterator[Kind]:
    """The suites that ship and need no hub."""
    folder = place.folder / "suites"
    shutil.copytree(shipped("profiles") / "suites", folder, dirs_exist_ok=True)
    for path in sorted(folder.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())
        entries = [*data.get("tasks", ()), *data.get("generation", ())]
        if data.get("chat") or not all("file" in each for each in entries):
            continue
        command = [*evaluated, "--suite", str(path), "--limit", "2"]
        yield Kind(f"shipped-suite-{path.stem}", path, [command], yaml.safe_load, yaml.safe_dump, "shipped suites")


def _rows(text: str) -> Any:
    return [json.loads(line) for line in text.splitlines()]


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


def _joined(lines: Any) -> str:
    return "\n".join(map(str, lines if isinstance(lines, list) else [lines]))


def _spec_of_tables(place: Workplace) -> tuple[Path, Path]:
    """A spec whose corpora are CSV, parquet, conversations and rows of a data set, and the file that keeps those."""
    folder = place.folder
    shutil.copytree(folder / "base", folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    with (folder / "en.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "note"], *([text, 'a, "b"\nc'] for text in _texts(folder, "en.path"))])
    rows = [{"text": text, "more": {"number": 1, "list": ["a"]}} for text in _texts(folder, "medical.path")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "medical.parquet")
    for name, old in (("talks", "qa.path"), ("others", "qa.evaluation")):
        talks = [
            {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": text}]}
            for text in _texts(folder, old)
        ]
        (folder / f"{name}.jsonl").write_text(_lines(talks))
    data = yaml.safe_load(place.spec.read_text())
    sources = data["corpora"]["sources"]
    sources["en"]["path"], sources["medical"]["path"] = str(folder / "en.csv"), str(folder / "medical.parquet")
    paths = {"path": str(folder / "talks.jsonl"), "evaluation": str(folder / "others.jsonl")}
    sources["qa"] = {**paths, "messages": "messages"}
    sources["general"] = {"dataset": "somebody/texts", "evaluation_split": "test"}
    path = folder / "tables.yaml"
    path.write_text(yaml.safe_dump({**data, "base": str(folder / "chat")}))
    spec = load_spec(path)
    kept = kept_file(next(each for each in find_sources(spec).values() if each.dataset), spec, place.store)
    splits = {"calibration": "general.path", "evaluation": "general.evaluation"}
    documents = {split: [Document(text) for text in _texts(folder, name)] for split, name in splits.items()}
    KeptDocuments({}, documents).save(kept)
    return path, kept


def _texts(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
