"""Calibration that the base writes: kept in the store, cut to size, marked, and asked for once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from expertprune.corpora.documents import CorpusName
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.loading import load_corpora, load_corpus
from expertprune.errors import SpecError
from expertprune.models.base import resolve_base
from expertprune.serving import generation
from expertprune.serving.generation import Job, Sample
from expertprune.spec.reading import parse_spec
from expertprune.spec.sources import Source
from expertprune.stages.generate import generator
from tests.corpora.test_chat import CHATML
from tests.corpora.test_loading import write_rows
from tests.tiny import save_tiny, tiny_tokenizer

LAW = CorpusName("domain", "law")


class Writer:
    """Takes the place of the process with vLLM."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.jobs = texts, list[Job]()

    def __call__(self, job: Job, log: Path) -> list[Sample]:
        self.jobs.append(job)
        return [Sample(i % len(job.prompts), text, 4, not text.endswith("…")) for i, text in enumerate(self.texts)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def load(base: Path, store: Path, source: Source, write: bool = True, **calibration: int):  # type: ignore[no-untyped-def]
    data = {"name": "x", "base": str(base), "dimensions": {"domain": "law"}, "budget": {"ffn": 0.1}}
    data |= {"calibration": calibration, "corpora": {"sources": {"law": source.model_dump(by_alias=True)}}}
    spec = parse_spec(data, "my.yaml", Path("/nowhere"))
    return load_corpus(LAW, source, spec, store, generator(resolve_base(spec.base, store), spec, store, write))


def test_the_base_answers_the_prompts_of_a_corpus_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer(["law is law", "", "the heart pumps", "endless…", "law is law", "blood is blood", "a judge reads"])
    monkeypatch.setattr(generation, "generate", writer)
    rows = [{"ask": ask} for ask in ("the law", "a judge", "the heart")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    own = write_rows(tmp_path / "e.jsonl", [{"ask": "a judge"}])
    generate = {"tokens": 12, "temperature": 0.7, "seed": 5}
    source = Source.model_validate({"path": path, "evaluation": own, "prompt": "ask", "generate": generate})
    store = tmp_path / "store"
    with caplog.at_level(logging.WARNING):
        corpus = load(base, store, source)
    (job,) = writer.jobs
    # "<|im_start|>user\nthe law<|im_end|>\n<|im_start|>assistant\n" of the two prompts that evaluate nothing
    ids = [
        tiny_tokenizer()(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for ask in ("the law", "the heart")
    ]
    assert sorted(job.prompts) == sorted(ids)
    assert (job.folder, job.tokens, job.length, job.temperature, job.seed) == (str(base), 13, 512, 0.7, 5)
    # Three texts of four tokens are wanted: the empty one, the unfinished one and the repeated one do not count.
    assert [each.conversation.messages[-1]["content"] for each in corpus.calibration] == [
        "law is law", "the heart pumps", "blood is blood",
    ]  # fmt: skip
    asked = {each.conversation.messages[0]["content"] for each in corpus.calibration}
    assert asked == {"the law", "the heart"}
    assert corpus.generated == f"by {base} from prompts, temperature 0.7, seed 5"
    assert "writes 12 tokens through vLLM" in caplog.text

    assert load(base, store, source) == corpus
    assert len(writer.jobs) == 1
    (kept,) = (store / "generated").glob("*.jsonl")
    about = KeptDocuments.load(kept).about
    assert (about["base"], about["seed"], about["temperature"]) == (str(base), 5, 0.7)
    assert (
        len(load(base, store, source, write=False, max_tokens=99).calibration) == 3
    )  # not in the store: its own documents
    load(base, store, source, max_tokens=99)
    assert len(writer.jobs) == 2
    assert corpus.evaluation == ()  # a prompt alone evaluates nothing
    write_rows(tmp_path / "e.jsonl", [{"ask": "a judge", "say": "reads"}])
    answered = load(base, store, source.model_copy(update={"completion": "say"}))
    assert [each.conversation.messages[-1]["content"] for each in answered.evaluation] == ["reads"]
    assert answered.calibration == corpus.calibration


def test_no_prompt_is_asked_that_evaluates_on_another_corpus(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(["law is law"])
    monkeypatch.setattr(generation, "generate", writer)
    paths = {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"ask": ask, "say": "is"} for ask in asked])
        for name, asked in (("law", ("the law", "the heart")), ("other", ("blood",)), ("both", ("the heart",)))
    }
    fields = {"prompt": "ask", "completion": "say"}
    sources = {
        "law": {"path": paths["law"], "evaluation": paths["other"], "generate": {"tokens": 4}, **fields},
        "medical": {"path": paths["other"], "evaluation": paths["both"], **fields},
    }
    data = {"name": "x", "base": str(base), "budget": {"ffn": 0.1}, "general": [], "corpora": {"sources": sources}}
    spec = parse_spec({**data, "dimensions": {"domain": ["law", "medical"]}}, "my.yaml", tmp_path)
    load_corpora(spec, tmp_path / "store", generator(resolve_base(spec.base, tmp_path), spec, tmp_path / "store"))
    (job,) = writer.jobs
    assert job.prompts == [
        tiny_tokenizer()("<|im_start|>user\nthe law<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    ]


def test_texts_of_no_use_are_an_error_that_says_why(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", Writer(["", "-", "law law law law law law law law law law law"]))
    path = write_rows(tmp_path / "a.jsonl", ["the law is a law", "a judge reads"])
    source = Source.model_validate({"path": path, "evaluation": path, "generate": {"from": "continuation"}})
    with pytest.raises(SpecError) as caught:
        load(base, tmp_path / "store", source)
    assert caught.value.problems == ["corpora.sources.law.generate: no opening is left: all of them evaluate"]
    own = write_rows(tmp_path / "e.jsonl", ["we sum numbers"])
    with pytest.raises(SpecError) as caught:
        load(base, tmp_path / "store", source.model_copy(update={"evaluation": [own]}))
    (line,) = caught.value.problems
    assert line.startswith("corpora.sources.law.generate: none of 3 texts is of use: 2 empty, 1 repeating itself; ")
    with pytest.raises(SpecError, match="no opening is shorter than calibration"):
        load(base, tmp_path / "store", source.model_copy(update={"evaluation": [own]}), max_tokens=17)
    assert not (tmp_path / "store" / "generated").exists()
