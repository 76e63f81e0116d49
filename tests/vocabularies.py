"""Tiny trained tokenizers of every kind that can be cut, as the contents of their `tokenizer.json`."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from expertprune.artifacts.profile import Profile, save_profile
from expertprune.profiling.rows import FOLDS
from tests.tiny import tiny_model

TEXT = [
    "the heart pumps blood through the body and the judge reads the law of the land in the morning",
    "we sum the numbers 12 and 345, then we sum them again: 67 + 89 = 156; the sum is right",
    "Der Arzt hört das Herz des Patienten, während die Richterin über das Gesetz nachdenkt.",
    "Die Ärzte und die Richter lesen, hören und schreiben; das Gesetz gilt für die Ärzte.",
    "El médico escucha el corazón del paciente y la jueza lee la ley en la mañana.",
    "医生听病人的心脏。法官读法律。医生读书，法官听。医生和法官都读书。",
    "Врач слушает сердце пациента, а судья читает закон и думает о законе.",
    "aaaa aaa aa a  bb   bbb\n\nbbbb\tcc ccc",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("byte_level", "byte_level_ignoring_merges", "sentencepiece", "unigram", "unigram_without_bytes")


def _trained(model: Any, trainer: Any, before: Any, normalizer: Any = None) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXT, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _byte_level(ignore_merges: bool) -> Tokenizer:
    """As GPT-2's and Llama 3's: added tokens behind the model's own, as the latter has them."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model = _trained(models.BPE(), trainer, before)
    vocabulary = dict(model["vocab"])
    if ignore_merges:  # words that no merges make, found whole
        vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(["Ġpatientia", "xyzzy"])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|turn|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Gemma's: special tokens and bytes first, no word boundaries but spaces, and a merge for every way to split."""
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    model = _trained(models.BPE(), trainer, pre_tokenizers.Metaspace(prepend_scheme="never"))
    names = [*SPECIAL, *BYTES, *model["vocab"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in model["vocab"]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def _unigram(spelled: bool) -> Tokenizer:
    """As T5's or Llama's early ones: with bytes, or without, where an unknown character is `<unk>`."""
    trainer = trainers.UnigramTrainer(vocab_size=220, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False)
    model = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    pieces = [tuple(entry) for entry in model["vocab"]]
    if spelled:
        pieces[3:3] = [(byte, 0.0) for byte in BYTES]
    else:
        pieces.append(("qu", -9.0))  # "q" and "u" of it: no text has a "q", so the piece alone covers that character
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=spelled))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer of a kind; not to be changed."""
    return {
        "byte_level": lambda: _byte_level(False),
        "byte_level_ignoring_merges": lambda: _byte_level(True),
        "sentencepiece": _sentencepiece,
        "unigram": lambda: _unigram(True),
        "unigram_without_bytes": lambda: _unigram(False),
    }[kind]()


def data_of(kind: str) -> dict[str, Any]:
    """The contents of its `tokenizer.json`."""
    return json.loads(tokenizer_of(kind).to_str())


def words() -> list[str]:
    """Every word of the training text, once."""
    return sorted(set(itertools.chain.from_iterable(text.split() for text in TEXT)))


def save_worded(folder: Path, kind: str = "byte_level", family: str = "llama", rows: int = 0, **changes: Any) -> Path:
    """A tiny random model with a tokenizer of a kind; by default it has some rows more than there are tokens."""
    tokenizer = tokenizer_of(kind)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    ids = {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    settings = {"vocab_size": rows or -(-size // 64) * 64 + 64, "pad_token_id": ids["eos_token_id"], **ids, **changes}
    tiny_model(family, **settings).save_pretrained(folder, max_shard_size="20KB")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


ENGLISH, GERMAN, OTHER = TEXT[:2], TEXT[2:4], TEXT[4:7]


def worded_spec(base: Path, folder: Path, budget: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A spec for German text, with English as the general corpus, as plain data."""
    folder.mkdir(exist_ok=True, parents=True)
    parts = {"de": GERMAN, "general": ENGLISH}
    sources = {
        name: {
            "path": str(write_texts(folder / f"{name}.jsonl", [f"{text} {n}" for text in texts for n in range(3)])),
            "evaluation": str(write_texts(folder / f"{name}.evaluation.jsonl", [text[::-1] for text in texts])),
        }
        for name, texts in parts.items()
    }
    data = {
        "name": "worded",
        "base": str(base),
        "dimensions": {"language": "de"},
        "corpora": {"sources": sources},
        "budget": {"multiple_of": 4, **budget},
        "calibration": {"max_tokens": 64},
        "relevance": {"criterion": "impact"},
        "compose": {"allocation": "uniform"},
    }
    return {**data, **changes}


def counted_profile(folder: Path, name: str, rows: int, documents: list[list[int]], folds: list[int]) -> Profile:
    """A profile of documents that are given as tokens; the model finds every row equally probable."""
    counted = [torch.tensor(ids).unique(return_counts=True) for ids in documents]
    mass = torch.zeros(FOLDS, rows)
    for ids, fold in zip(documents, folds, strict=True):
        mass[fold] += len(ids) / rows
    statistics = {
        "mass": mass,
        "fold": torch.tensor(folds),
        "document": torch.cat([torch.full_like(found, number) for number, (found, _) in enumerate(counted)]),
        "row": torch.cat([found for found, _ in counted]),
        "occurrences": torch.cat([counts for _, counts in counted]),
    }
    names = [str(number) for number in range(len(documents))]
    about = {"digest": name, "corpus": name, "documents": names, "tokens": 1, "layers": []}
    save_profile(folder / f"{name}.vocabulary.safetensors", about, statistics)
    return save_profile(folder / f"{name}.safetensors", about, {"tokens": torch.zeros(1)})
