"""A folder with a tiny base, specs and an expert, in which commands are tortured."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expertprune.artifacts.expert import Expert
from expertprune.models.checkpoint import Checkpoint

WORDS = [f"w{number}" for number in range(61)]


@dataclass(frozen=True)
class Workplace:
    """Where commands run: inputs in `folder`, outputs in `out`, and beside them files that must stay."""

    folder: Path

    @property
    def spec(self) -> Path:
        return self.folder / "spec.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out" / "expert"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @classmethod
    def make(cls, folder: Path, seed: int) -> Workplace:
        """A new one. A model of 3 layers and 4 corpora of 10 documents make a build take a second."""
        made = cls(folder)
        for each in (folder, made.temporary, made.out.parent):
            each.mkdir(parents=True)
        tokenizer = _tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=128,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size="20KB")
        tokenizer.save_pretrained(folder / "base")
        made.spec.write_text(yaml.safe_dump(made._spec_data(random.Random(seed))))
        (made.out.parent / "thesis.txt").write_text("precious")
        (made.out.parent / "photos").mkdir()
        (made.out.parent / "photos" / "1.jpg").write_text("precious")
        return made

    def _spec_data(self, chance: random.Random) -> dict[str, Any]:
        sources = {}
        for name in ("en", "medical", "qa", "general"):
            sources[name] = {key: str(self.folder / f"{name}.{key}.jsonl") for key in ("path", "evaluation")}
            for path in sources[name].values():
                texts = (" ".join(chance.choices(WORDS, k=chance.randint(6, 20))) for _ in range(10))
                Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return {
            "name": "tiny",
            "base": str(self.folder / "base"),
            "dimensions": {"language": "en", "domain": "medical", "task": "qa"},
            "corpora": {"sources": sources},
            "budget": {"ffn": 0.25, "multiple_of": 4},
            "relevance": {"criterion": "impact"},
        }

    def clear(self) -> None:
        """Remove outputs, store and temporary files."""
        for folder in (self.out, self.store, self.out.parent / "sweep"):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("expert.gguf", "plan.json"):
            (self.out.parent / name).unlink(missing_ok=True)

    def problems(self) -> list[str]:
        """What may never be, whatever happened: the user's files are gone, or an expert looks finished and is not."""
        found = []
        for name in ("thesis.txt", "photos/1.jpg"):
            path = self.out.parent / name
            if not path.is_file() or path.read_text() != "precious":
                found.append(f"{name} is gone")
        for folder in [path for path in self.out.parent.rglob("expertprune.json") if ".partial" not in str(path)]:
            try:
                Expert.load(folder.parent)
                Checkpoint(folder.parent)
            except Exception as error:
                found.append(f"{folder.parent.name} is not whole: {error}")
        return found

    def stored(self) -> set[str]:
        """Every file of the store, but for digests of files, which are named by the time of those, and for notes of
        folders, of which a run that finds its output begun has fewer.
        """
        files = (str(path.relative_to(self.store)) for path in self.store.rglob("*") if not path.is_dir())
        return {file for file in files if not file.startswith(("digests/", "parents/")) or "/." in file}

    def leftovers(self) -> list[str]:
        """What is left of killed commands."""
        folders = (self.out.parent, self.store, self.temporary)
        hidden = [path for folder in folders for path in folder.rglob(".*") if path.suffix in (".partial", ".replaced")]
        return [f"left over: {path}" for path in (*hidden, *self.temporary.iterdir())]


def first_commands(place: Workplace, begin: Path) -> list[list[str]]:
    """What makes an expert, its plan and its export, from which trials begin."""
    return [
        ["build", str(place.spec), "--out", str(place.out)],
        ["compose", str(place.spec), "--out", str(place.folder / "plan.json")],
        ["export", str(place.out), "--out", str(begin / "expert.gguf"), "--type", "f32"],
    ]


CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_chat_model(folder: Path, seed: int) -> Path:
    """A random model that vLLM can serve, with a chat template, in a new folder."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which GGUF files can hold."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(WORDS)], trainer)
    made.add_special_tokens(["<s>", "</s>"])
    template = {"single": "<s> $A", "special_tokens": [("<s>", made.token_to_id("<s>"))]}
    made.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder; empty where there is nothing."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def differences(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> list[str]:
    """Files that are missing, too many, or others than those of an undisturbed run."""
    return [f"{name} differs" for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
