"""Files beside the tokenizer: every id in step, nothing that contradicts it left; and languages that it was made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from expertprune.errors import CheckpointError
from expertprune.tokenizing import (
    Renumbering,
    Vocabulary,
    essential_ids,
    read_vocabulary,
    trimmed,
    with_added,
    write_tokenizer,
)
from expertprune.tokenizing.companions import read_settings
from expertprune.tokenizing.languages import known_languages
from tests.oracle import read_json
from tests.vocabularies import data_of, tokenizer_of


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("eos_token_id", 7, 2),
        ("eos_token_id", [5, 9], [1, 3]),
        ("pad_token_id", None, None),
        ("pad_token_id", 8, None),  # a token that is gone, or never was
        ("image_token_index", 5, 1),
        ("suppress_tokens", [5, 6, 9], [1, 3]),
        ("bad_words_ids", [[5, 7], [6, 7], [9]], [[1, 2], [3]]),
        ("force_words_ids", [[[5], [6]], [[6]]], [[[1]]]),
        ("forced_decoder_ids", [[1, 7], [2, 6]], [[1, 2]]),
        ("sequence_bias", [[[5, 9], -1.5], [[6], 2.0]], [[[1, 3], -1.5]]),
        ("hidden_size", 5, 5),
        ("layer_types", ["a", "b"], ["a", "b"]),
        ("add_bos_token", True, True),
    ],
)
def test_a_config_names_the_new_ids(key: str, old: Any, new: Any) -> None:
    assert Renumbering({0: 0, 5: 1, 7: 2, 9: 3}).config({key: old, "other": 5}) == {key: new, "other": 5}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with everything that can stand beside a byte-level tokenizer."""
    folder = tmp_path / "base"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("byte_level"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    turn = "'<|turn|>' + m['role'] + '\\n' + m['content']"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}Gesetz"
    tokenizer.save_pretrained(folder)
    data = data_of("byte_level")
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    config = read_json(folder / "tokenizer_config.json")
    config["added_tokens_decoder"] = {str(t["id"]): {"content": t["content"]} for t in data["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in data["model"]["merges"]))
    (folder / "tokenizer.model").write_bytes(b"the whole vocabulary in another form")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": added["</s>"]}))
    settings = {"eos_token_id": [added["</s>"], added["<|turn|>"]], "stop_strings": ["Richter"]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def written(base: Path, folder: Path) -> tuple[Vocabulary, dict[int, int]]:
    """The smallest tokenizer there can be, beside what was carried; the base's, and the new id by the old."""
    vocabulary = read_vocabulary(base)
    kept = essential_ids(vocabulary, base, AutoTokenizer.from_pretrained(base))
    result = trimmed(vocabulary, set().union(*kept.values()))
    shutil.copytree(base, folder)
    write_tokenizer(base, folder, result)
    return vocabulary, result.ids


def test_every_file_tells_the_same_ids_and_transformers_reads_them(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    old, ids = written(base, folder)
    data = read_json(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    assert read_json(folder / "added_tokens.json") == added == {name: ids[index] for name, index in old.added.items()}
    assert read_json(folder / "vocab.json") == data["model"]["vocab"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in data["model"]["merges"])])
    assert (folder / "merges.txt").read_text().rstrip() == merges
    known = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert {int(index): token["content"] for index, token in known.items()} == {i: name for name, i in added.items()}
    settings = read_json(folder / "generation_config.json")
    assert settings["eos_token_id"] == [added["</s>"], added["<|turn|>"]]
    assert data["post_processor"]["special_tokens"]["<s>"]["ids"] == [added["<s>"]]
    assert not (folder / "tokenizer.model").exists()
    before, after = (AutoTokenizer.from_pretrained(each) for each in (base, folder))
    assert len(after) == len(ids) < len(before) - 100
    assert (after.bos_token_id, after.eos_token_id) == (ids[before.bos_token_id], ids[before.eos_token_id])
    messages = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "345"}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": False}
    found, expected = (each.apply_chat_template(messages, **options) for each in (after, before))
    assert [ids[index] for index in expected] == found  # what the template writes is kept as it was
    stop = before("Richter", add_special_tokens=False)["input_ids"]  # as are stop strings
    assert after("Richter", add_special_tokens=False)["input_ids"] == [ids[index] for index in stop]
    assert len(stop) < len("Richter")


@pytest.mark.parametrize("answer", ["{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_text_that_a_template_writes_for_some_conversations_only_stays(base: Path, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = f"{{% if tools %}}Richter{{% endif %}}{{% for m in messages %}}{answer}{{% endfor %}}"
    word = tokenizer("Richter", add_special_tokens=False)["input_ids"]
    assert len(word) < len("Richter")
    assert set(word) <= essential_ids(read_vocabulary(base), base, tokenizer)["chat template"]


def test_tokenizers_that_need_code_or_have_no_fast_form_are_refused_by_name(base: Path) -> None:
    config = read_json(base / "tokenizer_config.json") | {"tokenizer_class": "OwnTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(CheckpointError, match=r"OwnTokenizer.*code of its own"):
        read_vocabulary(base)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"OwnTokenizer.*slow"):
        read_vocabulary(base)


def test_a_key_that_holds_no_token_ids_is_told_what_it_must_hold(base: Path) -> None:
    for key, value, words in (
        ("eos_token_id", "2", "must be a token id, or a list of token ids (found 2)"),
        ("bad_words_ids", [7], "must be a list of lists of token ids (found [7])"),
        ("added_tokens_decoder", {"x": {}}, "must be a mapping whose keys are token ids (found {'x': {}})"),
    ):
        path = base / "generation_config.json"
        path.write_text(json.dumps({key: value}))
        with pytest.raises(CheckpointError) as caught:
            read_settings(path)
        assert str(caught.value) == f"{path}: {key}: {words}"


def test_placeholders_may_go_unless_they_have_a_role(base: Path, tmp_path: Path) -> None:
    """`<unused..>` are rows that nobody trained; one that a setting names is somebody's."""
    loaded = PreTrainedTokenizerFast.from_pretrained(base)
    loaded.add_tokens(["<unused0>", "<unused1>", "<|reserved_special_token_12|>", "<tool_2>", "<|im_start|>"])
    loaded.save_pretrained(base)
    config = read_json(base / "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "image_token": "<unused1>"}))
    vocabulary, ids = written(base, tmp_path / "smaller")
    placeholders = {"<unused0>", "<unused1>", "<|reserved_special_token_12|>"}
    assert {vocabulary.by_id[index] for index in vocabulary.placeholders} == placeholders
    new = AutoTokenizer.from_pretrained(tmp_path / "smaller")
    assert {"<unused1>", "<tool_2>", "<|im_start|>", "</s>"} <= set(new.get_vocab())
    assert (placeholders - {"<unused1>"}).isdisjoint(new.get_vocab())
    assert len(new) == len(ids)
    text = "Gesetz<unused0><unused1>"
    assert new.decode(new(text, add_special_tokens=False)["input_ids"]) == text


def test_a_language_that_takes_many_more_tokens_than_english_is_not_known() -> None:
    """12 words of English, at most 13 of the other Latin languages; 20 signs of Chinese are 60 bytes."""

    def words_and_letters(text: str, **_: Any) -> dict[str, list[str]]:
        """One token for each word of Latin letters, one for each byte of every other script."""
        tokens: list[str] = []
        for word in text.split():
            tokens += [word] if all(ord(letter) < 0x250 for letter in word) else [chr(byte) for byte in word.encode()]
        return {"input_ids": tokens}

    assert known_languages(words_and_letters) == ["en", "de", "fr", "es", "pt", "it"]


@pytest.fixture
def half_told(base: Path) -> Path:
    """A base whose `tokenizer.json` does not know the tokens of its chat; the files beside it do."""
    first = len(read_vocabulary(base).by_id)
    config = read_json(base / "tokenizer_config.json")
    names = ("<|im_start|>", "<|im_end|>")
    config["added_tokens_decoder"] |= {
        str(first + i): {"content": name, "special": True, "normalized": False} for i, name in enumerate(names)
    }
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}))
    return base


def test_tokens_that_only_the_settings_name_stay_whole(half_told: Path, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(half_told)
    chat = before("<|im_start|>12<|im_end|>[PAD]", add_special_tokens=False)["input_ids"]
    vocabulary = with_added(read_vocabulary(half_told), before, 512, half_told)
    result = trimmed(vocabulary, set().union(*essential_ids(vocabulary, half_told, before).values()))
    folder = tmp_path / "expert"
    shutil.copytree(half_told, folder)
    write_tokenizer(half_told, folder, result)
    after = AutoTokenizer.from_pretrained(folder)
    found = after("<|im_start|>12<|im_end|>[PAD]", add_special_tokens=False)["input_ids"]
    assert found == [result.ids[index] for index in chat]
    assert (after.eos_token_id, after.pad_token_id) == (result.ids[chat[-2]], result.ids[chat[-1]])
    assert len(after) == len(result.ids)
    few = with_added(read_vocabulary(half_told), before, chat[-2], half_told)
    assert "<|im_start|>" in few.added
    assert not few.added.keys() & {"<|im_end|>", "[PAD]"}, "the model has no rows for them"


def test_files_of_a_tokenizer_that_disagree_are_refused(half_told: Path) -> None:
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(half_told), read_vocabulary(half_told)
    data = vocabulary.data | {"added_tokens": vocabulary.data["added_tokens"][:1]}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json and the files beside it disagree.*'</s>' the id 7"):
        with_added(
            Vocabulary(data, "tokenizer.json"),
            SimpleNamespace(added_tokens_decoder={7: tokenizer.added_tokens_decoder[vocabulary.added["</s>"]]}),
            512,
            half_told,
        )
