"""Calibration that the base writes: kept in the store, cut to size, marked, and asked for once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.kept import KeptDocuments
from expertprune.corpora.loading import load_corpora, load_corpus
from expertprune.errors import SpecError
from expertprune.models.base import resolve_base
from expertprune.serving import generation
from expertprune.serving.generation import Job, Sample
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base
from expertprune.spec.sources import Source
from expertprune.stages.generate import generator
from tests.corpora.test_chat import CHATML
from tests.corpora.test_loading import write_rows
from tests.tiny import save_tiny, tiny_tokenizer

Patch = pytest.MonkeyPatch

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


def load(base: Path, store: Path, source: Source, write: bool = True, **calibration: int) -> Corpus:
    data = {"name": "x", "base": str(base), "dimensions": {"domain": "law"}, "budget": {"ffn": 0.1}}
    data |= {"calibration": calibration, "corpora": {"sources": {"law": source.model_dump(by_alias=True)}}}
    spec = parse_spec(data, "my.yaml", Path("/nowhere"))
    return load_corpus(LAW, source, spec, store, generator(resolve_base(spec.base, store), spec, store, write))


def prompts(*asked: str) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(f"<|im_start|>user\n{each}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for each in asked]


def said(documents: Sequence[Document]) -> list[tuple[str, ...]]:
    return [tuple(message["content"] for message in each.conversation.messages) for each in documents]


def test_the_base_answers_the_prompts_of_a_corpus_once(
    base: Path, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer(["law is law", "", "the heart pumps", "endless…", "law is law", "blood is blood", "a judge reads"])
    monkeypatch.setattr(generation, "generate", writer)
    path = write_rows(tmp_path / "a.jsonl", [{"ask": ask} for ask in ("the law", "a judge", "the heart")])
    own, store = write_rows(tmp_path / "e.jsonl", [{"ask": "a judge"}]), tmp_path / "store"
    generate = {"tokens": 12, "temperature": 0.7, "seed": 5}
    source = Source.model_validate({"path": path, "evaluation": own, "prompt": "ask", "generate": generate})
    with caplog.at_level(logging.WARNING):
        corpus = load(base, store, source)
    (job,) = writer.jobs
    assert sorted(job.prompts) == sorted(prompts("the law", "the heart"))  # the two that evaluate nothing
    # calibration.max_tokens is 512, and vLLM refuses more than the base's context.
    assert (job.folder, job.tokens, job.length, job.temperature, job.seed) == (str(base), 13, 128, 0.7, 5)
    # Three texts of four tokens are wanted: the empty one, the unfinished one and the repeated one do not count.
    asked, answers = zip(*said(corpus.calibration), strict=True)
    assert answers == ("law is law", "the heart pumps", "blood is blood")
    assert set(asked) == {"the law", "the heart"}
    assert corpus.evaluation == ()  # a prompt alone evaluates nothing
    assert corpus.generated == f"by {base} from prompts, temperature 0.7, seed 5"
    assert "writes 12 tokens through vLLM" in caplog.text

    assert load(base, store, source) == corpus
    assert len(writer.jobs) == 1
    (kept,) = (store / "generated").glob("*.jsonl")
    about = KeptDocuments.load(kept).about
    assert (about["base"], about["seed"], about["temperature"]) == (str(base), 5, 0.7)
    own_documents = load(base, store, source, write=False, max_tokens=99).calibration  # others are not in the store
    assert len(own_documents) == 3
    load(base, store, source, max_tokens=99)
    assert len(writer.jobs) == 2
    write_rows(tmp_path / "e.jsonl", [{"ask": "a judge", "say": "reads"}])
    answered = load(base, store, source.model_copy(update={"completion": "say"}))
    assert said(answered.evaluation) == [("a judge", "reads")]
    assert answered.calibration == corpus.calibration


def test_what_a_base_has_written_is_of_that_base_and_of_how_it_was_asked(
    base: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    writer, store = Writer(["law is law"]), tmp_path / "store"
    monkeypatch.setattr(generation, "generate", writer)
    path, own = (write_rows(tmp_path / f"{ask}.jsonl", [{"ask": f"the {ask}"}]) for ask in ("law", "heart"))
    other = save_tiny(tmp_path / "other", seed=1)  # the same tokenizer, and other weights
    for file in (*base.glob("*token*"), *base.glob("*.jinja")):
        shutil.copy(file, other)
    digests = [resolve_base(Base(model=str(each)), store).tokenizer_digest for each in (base, other)]
    assert digests[0] == digests[1]
    asked: list[tuple[Path, dict[str, float]]] = [
        (base, {}), (base, {}), (other, {}), (base, {"seed": 1}), (base, {"temperature": 0.5}), (base, {"tokens": 3}),
    ]  # fmt: skip
    jobs = []
    for folder, settings in asked:
        generate = {"tokens": 4, **settings}
        source = {"path": path, "evaluation": own, "prompt": "ask", "generate": generate}
        load(folder, store, Source.model_validate(source))
        jobs.append(len(writer.jobs))
    assert jobs == [1, 1, 2, 3, 4, 5]


def test_no_prompt_is_asked_that_evaluates_elsewhere(base: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    writer = Writer(["law is law"])
    monkeypatch.setattr(generation, "generate", writer)
    law, other, both = (
        write_rows(tmp_path / f"{number}.jsonl", [{"ask": ask, "say": "is"} for ask in asked])
        for number, asked in enumerate((("the law", "the heart"), ("blood",), ("the heart",)))
    )
    fields = {"prompt": "ask", "completion": "say"}
    sources = {
        "law": {"path": law, "evaluation": other, "generate": {"tokens": 4}, **fields},
        "medical": {"path": other, "evaluation": both, **fields},
    }
    data = {"name": "x", "base": str(base), "budget": {"ffn": 0.1}, "general": [], "corpora": {"sources": sources}}
    spec = parse_spec({**data, "dimensions": {"domain": ["law", "medical"]}}, "my.yaml", tmp_path)
    load_corpora(spec, tmp_path / "store", generator(resolve_base(spec.base, tmp_path), spec, tmp_path / "store"))
    assert [job.prompts for job in writer.jobs] == [prompts("the law")]


def test_texts_of_no_use_are_an_error(base: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(generation, "generate", Writer(["", "-", "law law law law law law law law law law law"]))
    path = write_rows(tmp_path / "a.jsonl", ["the law is a law", "a judge reads"])
    own = write_rows(tmp_path / "e.jsonl", ["we sum numbers"])
    none = "none of 3 texts is of use: 2 empty, 1 repeating itself; "
    for evaluation, calibration, problem in (
        (path, {}, "no opening is left: all of them evaluate"),
        (own, {}, none),
        (own, {"max_tokens": 17}, "no opening is shorter than calibration"),
    ):
        source = {"path": path, "evaluation": evaluation, "generate": {"from": "continuation"}}
        with pytest.raises(SpecError, match=rf"^corpora\.sources\.law\.generate: {problem}"):
            load(base, tmp_path / "store", Source.model_validate(source), **calibration)
    assert not (tmp_path / "store" / "generated").exists()
