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
from tests.profiles import made_up_about
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
SPACES_AND_BYTES = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def _trained(model: Any, trainer: Any, before: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(TEXT, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _finished(tokenizer: Tokenizer, decoder: Any, template: str, special: list[str] = SPECIAL) -> Tokenizer:
    """With its decoder, its special tokens and what it puts around a text."""
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(special)
    named = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return tokenizer


def _byte_level(ignore_merges: bool) -> Tokenizer:
    """As GPT-2's and Llama 3's: added tokens behind the model's own, as the latter has them."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model = _trained(models.BPE(), trainer, before)
    vocabulary = dict(model["vocab"])
    if ignore_merges:  # words that no merges make, found whole
        vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(["Ġpatientia", "xyzzy"])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = before
    _finished(tokenizer, decoders.ByteLevel(), "<s> $A", ["<s>", "</s>", "<|turn|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Gemma's: special tokens and bytes first, no word boundaries but spaces, and a merge for every way to split."""
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    model = _trained(models.BPE(), trainer, pre_tokenizers.Metaspace(prepend_scheme="never"))
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *BYTES, *model["vocab"]])}
    splits = [(piece[:cut], piece[cut:]) for piece in model["vocab"] for cut in range(1, len(piece))]
    merges = [split for split in splits if vocabulary.keys() >= set(split)]
    bpe = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return _finished(tokenizer, decoders.Sequence([*SPACES_AND_BYTES]), "<s> $A </s>")


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
    decoder = decoders.Sequence([*SPACES_AND_BYTES, decoders.Strip(" ", 1, 0)])
    return _finished(tokenizer, decoder, "$A </s>")


MAKERS = {
    "byte_level": functools.partial(_byte_level, ignore_merges=False),
    "byte_level_ignoring_merges": functools.partial(_byte_level, ignore_merges=True),
    "sentencepiece": _sentencepiece,
    "unigram": functools.partial(_unigram, spelled=True),
    "unigram_without_bytes": functools.partial(_unigram, spelled=False),
}
KINDS = tuple(MAKERS)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer of a kind; not to be changed."""
    return MAKERS[kind]()


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
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
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
    about = made_up_about(name, name, names, tokens=1)
    save_profile(folder / f"{name}.vocabulary.safetensors", about, statistics)
    return save_profile(folder / f"{name}.safetensors", about, {"tokens": torch.zeros(1)})
