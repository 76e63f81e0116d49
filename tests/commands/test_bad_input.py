"""What a user can get wrong: each exits with 2 and says what to do, before a model is loaded, and leaves nothing behind."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from bench.torture.children import import_rooms
from expertprune.files import places
from tests.calling import call, call_json
from tests.conftest import refuse_to_load
from tests.limits import frugal
from tests.oracle import contents
from tests.patching import everywhere
from tests.vocabularies import save_worded

Data = dict[str, Any]


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999"])
def test_no_option_takes_a_number_that_is_none(value: str) -> None:
    for command, option in (("serve", "--patience"), ("chat", "--temperature"), ("profile", "--gpus-per-task")):
        assert f"Invalid value for '{option}'" in call(command, f"{option}={value}", "nowhere", code=2).stderr


class Workplace:
    """A folder with a spec, where commands run and nothing may stay behind."""

    def __init__(self, folder: Path, data: Data, store: Path) -> None:
        self.folder, self.data, self.store = folder, data, store
        self.spec, self.out = folder / "tiny.yaml", folder / "expert"
        self.text = ""  # of the spec, instead of the data

    def source(self, name: str) -> Data:
        source: Data = self.data["corpora"]["sources"][name]
        return source

    def own_model(self) -> Path:
        """A copy of the base that may be damaged, and which the spec names."""
        folder = self.folder / "model"
        shutil.copytree(self.data["base"], folder)
        self.data["base"] = str(folder)
        return folder

    def write(self) -> None:
        self.spec.write_text(self.text or yaml.safe_dump(self.data))

    def run(self, *arguments: Any, code: int) -> str:
        return call(*arguments, code=code).stderr

    def refused(self, *arguments: Any) -> str:
        """The message of a command that fails and changes nothing: neither here nor among the profiles."""
        before = self.everything()
        message = self.run(*arguments, code=2)
        assert self.everything() == before
        assert re.search("^[Ee]rror: ", message, re.MULTILINE)
        return message

    def everything(self) -> tuple[list[Path], dict[str, bytes], list[Path]]:
        return sorted(self.folder.rglob("*")), contents(self.folder), sorted((self.store / "profiles").glob("*"))

    def build_refused(self) -> str:
        self.write()
        return self.refused("build", self.spec, "--out", self.out)


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What commands import takes seconds, which are not the refusals'."""
    import_rooms()


@pytest.fixture
def workplace(tmp_path: Path, spec_data: Data, store: Path) -> Workplace:
    place = Workplace(tmp_path, spec_data, store)
    place.write()
    return place


# --- what a spec, its corpora and its base can hold -----------------------------------------------------------------

Prepare = Callable[[Workplace], Any]
MEDICAL = "corpora.sources.medical.path"


def spec(**changes: Any) -> Prepare:
    return lambda place: place.data.update(changes)


def key(name: str, value: Any) -> Prepare:
    """Another value at a dotted key of the spec."""

    def prepare(place: Workplace) -> None:
        *parents, last = name.split(".")
        place.data["base"] = {"model": place.data["base"]}
        functools.reduce(lambda inner, parent: inner[parent], parents, place.data)[last] = value

    return prepare


def content(text: str) -> Prepare:
    """The text of the spec itself."""
    return lambda place: setattr(place, "text", text)


def corpus(make: Callable[[Path], Any] | str) -> Prepare:
    """What a corpus reads: something that is made there, or a file of this second line."""

    def prepare(place: Workplace) -> None:
        path = place.folder / "mine.jsonl"
        place.source("medical")["path"] = str(path)
        path.write_text('{"text": "heart"}\n' + make) if isinstance(make, str) else make(path)

    return prepare


def nested(field: str) -> Prepare:
    """A corpus whose rows hold a list, and the path of a field in them."""

    def prepare(place: Workplace) -> None:
        source = place.source("medical")
        source["path"], source["field"] = str(place.folder / "mine.jsonl"), field
        Path(source["path"]).write_text('{"m": ["heart", "heart"]}\n')

    return prepare


def questions(text: str) -> Prepare:
    """A corpus with one question, for a base of 128 positions."""

    def prepare(place: Workplace) -> None:
        config(max_position_embeddings=128)(place)
        path = place.folder / "questions.jsonl"
        path.write_text(json.dumps({"question": text, "choices": ["heart", "law"], "answer": 0}) + "\n")
        place.source("medical")["questions"] = str(path)

    return prepare


def short(place: Workplace) -> None:
    path = place.folder / "short.jsonl"
    path.write_text('{"text": "heart"}\n{"text": "law"}\n')
    place.source("medical")["evaluation"] = str(path)


def fifo(part: str) -> Prepare:
    """A FIFO in the place of a part of the base, or of its folder."""

    def prepare(place: Workplace) -> None:
        folder = place.own_model()
        path = next(folder.glob(part), folder / part) if part else folder
        shutil.rmtree(path) if path == folder else path.unlink(missing_ok=True)
        os.mkfifo(path)
        if part == "x.gguf":
            place.data["base"] = str(path)

    return prepare


def generation(**settings: Any) -> Prepare:
    """Settings beside a vocabulary that is cut."""

    def prepare(place: Workplace) -> None:
        folder = save_worded(place.folder / "worded")
        place.data |= {"base": str(folder), "budget": {"vocabulary": 0.9}}
        (folder / "generation_config.json").write_text(json.dumps(settings))

    return prepare


def base(change: Callable[[Any], Any] | str, name: str = "config.json") -> Prepare:
    """A file of the base with other content, or with its data changed."""

    def prepare(place: Workplace) -> None:
        path = place.own_model() / name
        data = None if isinstance(change, str) else json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps(change(data) or data))

    return prepare


def config(**changes: Any) -> Prepare:
    return base(lambda data: data | changes)


def tokenizer(change: Callable[[Any], Any] | str) -> Prepare:
    return base(change, "tokenizer.json")


def misspelt(place: Workplace) -> None:
    sources = place.data["corpora"]["sources"]
    sources["medicla"] = sources.pop("medical")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED: list[tuple[Prepare, str]] = [
    (spec(bugdet={"ffn": 0.2}), "tiny.yaml: unknown key 'bugdet'; did you mean 'budget'?"),
    (spec(base="owner/model"), "base.model: 'owner/model' is not in the local cache and the hub cannot be reached"),
    (spec(evaluate={"corpora": "finance"}), "evaluate.corpora: 'finance' is none of the spec's corpora: language/en"),
    (misspelt, "corpora.sources.medicla: no corpus has this name; did you mean 'medical'?"),
    (spec(general=[], budget={"retention": {"general": 0.9}}), "budget.retention.general: 'general' names no corpus"),
    (spec(dimensions={"language": [False]}), "put the name in quotes, such as 'no'"),
    (spec(calibration={"documents": True}), "calibration.documents: must be a number (found True)"),
    (spec(compensation={"ridge": True}), "compensation.ridge: must be a number (found True)"),
    (spec(evaluate={"corpora": []}), "evaluate.corpora: "),
    (key(MEDICAL, []), f"{MEDICAL}: "),
    (key("base.revision", "v9"), "base.revision: goes with a hub id only"),
    (nested("m.²"), "mine.jsonl, line 1: has no field 'm.²'"),
    (questions("heart " * 300), "corpora.sources.medical: questions: question 1 has 305 tokens with a choice, and the"),
    (short, "corpora.sources.medical: evaluation: every evaluation document is shorter than two tokens"),
    # YAML that no program should choke on
    (content(f"calibration: {{seed: {'9' * 5000}}}"), "not valid YAML"),
    (content(f"calibration: {{seed: {'9' * 23}}}"), "too large"),
    (content("budget: {ffn: 2024-13-45}"), "not valid YAML"),
    (content("budget: !!bool maybe"), "not valid YAML"),
    (content("name: !!python/object/apply:os.system ['true']"), "not valid YAML"),
    (content(LAUGHS), "aliases"),
    (content("&a name: {b: &c {d: *c}}\n"), "aliases hold themselves"),
    (content("name: a\nbudget:\n  ffn: 0.5\n  ffn: 0.25\n"), "budget.ffn: stands twice, in lines 3 and 4; keep one"),
    (content("a: " + "[" * 2000), "nested too deeply"),
    (content("a: " + "[" * 70 + "]" * 70), "nested too deeply"),
    (content('name: "\\ud800"'), "half of a character"),
    (content("# " + "x" * 300_000), "larger than"),
    (key("budget.ffn", math.nan), "budget.ffn: nan is not a number"),
    (key("base.model", "a\0b"), "base.model: .*NUL"),
    (key("base.model", "/".join(["n"] * 3000)), "base.model: .*too long"),
    (key("corpora.catalogue", "~nosuchuser/model"), "corpora.catalogue: .*home folder"),
    (key(MEDICAL, "n" * 300), f"{MEDICAL}.*too long"),
    # corpora
    (corpus("not json"), "mine.jsonl, line 2: not valid JSON"),
    (corpus('{"text": ' + "[" * 5000 + "]" * 5000 + "}"), "mine.jsonl, line 2: .*nested too deeply"),
    (corpus('{"text": "the \\ud800 heart"}'), "mine.jsonl, line 2: .*half of a character"),
    (corpus(f'{{"text": {"9" * 5000}}}'), "mine.jsonl, line 2: not valid JSON"),
    (corpus('{"text": NaN}'), "mine.jsonl, line 2: .*NaN is no number of JSON"),
    (corpus(""), "corpora.sources.medical: every document is shorter than two tokens"),
    (corpus(os.mkfifo), "mine.jsonl: it is a FIFO, not a file"),
    (corpus(os.mkdir), "mine.jsonl: it is a folder, not a file"),
    (
        corpus(lambda path: path.symlink_to("/dev/zero")),
        "corpora.sources.medical.path: /dev/zero: it is a device, not a file",
    ),
    # bases
    (fifo(""), "model: it is a FIFO, not a folder"),
    *[
        (fifo(part), f"{part.rstrip('*')}.*: .*it is a FIFO, not a f")
        for part in ("tokenizer.json", "tokenizer_config.json", "config.json", "model-00002-of-*", "x.gguf")
    ],
    (config(architectures="LlamaForCausalLM"), "architectures: must be a list of names (found 'LlamaForCausalLM')"),
    (config(model_type=["llama"]), "model_type: must be a name"),
    (config(model_type="lama"), "model_type 'lama' is not supported; did you mean 'llama'?"),
    (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, and the weights have no more than"),
    (config(hidden_size=2**40), "hidden_size is"),
    (config(vocab_size=2**40), "vocab_size is"),
    (config(num_attention_heads=True), "must be a positive whole number"),
    (config(rope_parameters=[1]), "config.json"),
    (config(rms_norm_eps=10**30), "too large"),
    (config(max_position_embeddings="long"), "config.json"),
    (config(sliding_window={}, tie_word_embeddings="no"), "config.json"),
    (tokenizer("{"), "tokenizer.json: not valid JSON"),
    (tokenizer("{}"), "the tokenizer cannot be loaded"),
    (tokenizer(lambda data: [data]), "tokenizer"),
    (tokenizer(lambda data: data | {"model": []}), "tokenizer"),
    (tokenizer(lambda data: data | {"added_tokens": {"id": "x"}}), "tokenizer"),
    (tokenizer(lambda data: data["model"].update(vocab=dict.fromkeys(data["model"]["vocab"], "0"))), "tokenizer"),
    (tokenizer(lambda data: data["model"]["vocab"].update(w9=99)), "the model's vocabulary has 64 rows"),
    (tokenizer(lambda data: data["model"]["vocab"].update(w9=2**31)), "token 'w9' has the id 2147483648"),  # 8 GB
    (generation(stop_strings=[5]), "generation_config.json: stop_strings: "),
    (generation(forced_decoder_ids=[[1]]), "generation_config.json: forced_decoder_ids: "),
    (generation(bad_words_ids=[3]), "generation_config.json: bad_words_ids: "),
    (generation(eos_token_id={"id": 1}), "generation_config.json: eos_token_id: "),
]


@pytest.mark.parametrize(("prepare", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_what_cannot_be_built_is_refused_in_one_line(
    workplace: Workplace, no_model: None, monkeypatch: pytest.MonkeyPatch, prepare: Prepare, words: str
) -> None:
    """Soon, and without much memory. `.*` in the words stands for anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare(workplace)
    with frugal():
        message = workplace.build_refused()
    assert len(message.splitlines()) == 1
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), message), message


def test_no_key_takes_a_number_that_is_none(workplace: Workplace) -> None:
    for key in ("budget.ffn", "budget.floor", "compensation.ridge", "compose.fusion.lambda", "budget.parameters"):
        for value in (".nan", "1e400"):
            assert key in workplace.refused("validate", workplace.spec, "--set", f"{key}={value}")


def test_every_problem_of_spec_base_and_corpora_is_a_line_of_its_own(workplace: Workplace, no_model: None) -> None:
    workplace.data |= {"relevance": "impcat", "base": "smollm2-135m", "general": "genral"}
    message = workplace.build_refused()
    assert len(message.splitlines()) == 3
    assert all(word in message for word in ("'impcat'", "'smollm2-135m'", "'genral'"))
    assert workplace.run("validate", workplace.spec, code=2) == message


def test_a_spec_is_missing_or_a_plan_and_a_plan_is_a_spec(workplace: Workplace, no_model: None) -> None:
    workplace.spec.unlink()
    out = ("--out", workplace.folder / "out")
    for command, *options in (["validate"], ["profile"], ["build", *out], ["compose", *out], ["inspect"]):
        assert "tiny.yaml: no such file" in workplace.refused(command, workplace.spec, *options)
    plan = workplace.folder / "plan.json"
    plan.write_text('{"kind": "plan"}')
    assert "is a plan, not a spec; run: expertprune prune" in workplace.refused("validate", plan)
    workplace.write()
    assert "is a spec, not a plan" in workplace.refused("prune", workplace.spec, *out)


def test_an_evaluation_document_that_nearly_calibrates_another_corpus(workplace: Workplace, no_model: None) -> None:
    text = "the heart pumps blood und der Arzt reads numbers while a judge reads law and we sum w1 w2 w3 w4"
    for name, key, end in (("en", "path", ""), ("qa", "evaluation", " is")):
        with Path(workplace.source(name)[key]).open("a") as file:
            file.write(json.dumps({"text": text + end}) + "\n")
    message = workplace.build_refused()
    assert "corpus task/qa: 1 of 5 evaluation documents also calibrate the expert" in message
    assert text[:50] in message


def test_a_disk_without_room(workplace: Workplace, no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "free some, or name a folder on another disk with --store" in workplace.refused("validate", workplace.spec)
    assert "MiB are free" in workplace.build_refused()


def test_an_expert_outlives_an_evaluation_that_fails(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out is the user's to mend; anything else is a failure of ours."""
    workplace.data |= {"relevance": "magnitude", "compensation": "none"}
    workplace.write()
    refused = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
    for error, code, said in (
        (RuntimeError(refused), 2, "evaluate: memory ran out (4.00 GiB more were asked for); lower"),
        (KeyError("broken"), 1, "'broken'"),
    ):
        with monkeypatch.context() as patched:
            everywhere(patched, "expertprune.evaluation.reading.compare", Mock(side_effect=error))
            message = workplace.run("build", workplace.spec, "--out", workplace.out, "--overwrite", code=code)
        assert f"the evaluation failed: {said}" in message
        assert message.rstrip().endswith(f"run: expertprune evaluate {workplace.out}")
        assert "Not evaluated yet" in (workplace.out / "README.md").read_text()
    workplace.run("evaluate", workplace.out, code=0)
    assert "Not evaluated yet" not in (workplace.out / "README.md").read_text()


# --- plans and experts ----------------------------------------------------------------------------------------------


def test_a_corpus_that_changed_after_the_plan(
    workplace: Workplace, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expert's record would miss a document that calibrated it, and evaluating on that one would not be noticed."""
    plan = workplace.folder / "plan.json"
    workplace.run("compose", workplace.spec, "--out", plan, code=0)
    path = Path(workplace.source("medical")["path"])
    path.write_text(path.read_text().partition("\n")[2])
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    message = workplace.refused("prune", plan, "--out", workplace.out)
    assert re.search("corpus domain/medical.*has changed since the plan was made", message)


def test_evaluating_on_a_document_that_calibrated_the_expert(workplace: Workplace, warm: Path) -> None:
    """Also when the corpus has been rewritten since, so that only the expert's own record tells."""
    workplace.run("build", workplace.spec, "--out", workplace.out, "--set", "evaluate.enabled=false", code=0)
    source = workplace.source("medical")
    calibration, evaluation = Path(source["path"]), Path(source["evaluation"])
    first, *others = calibration.read_text().splitlines(keepends=True)
    evaluation.write_text(evaluation.read_text() + first)
    words = "corpus domain/medical: 1 of 5 evaluation documents also calibrate the expert"
    assert words in workplace.refused("evaluate", workplace.out)
    calibration.write_text("".join(others))
    assert words in workplace.refused("evaluate", workplace.out)


def test_a_stored_profile_that_is_damaged(workplace: Workplace, warm: Path) -> None:
    path = Path(call_json("profile", workplace.spec)["profiles"]["task/qa"]["path"])
    path.write_bytes(path.read_bytes()[:100])
    message = workplace.refused("compose", workplace.spec, "--out", workplace.folder / "plan.json")
    assert f"{path}: not a readable profile" in message
    assert "delete it and profile again" in message
    path.unlink()
    workplace.run("compose", workplace.spec, "--out", workplace.folder / "plan.json", code=0)
