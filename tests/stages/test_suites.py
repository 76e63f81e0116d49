"""Suites on a tiny expert: what is measured, stored, refused and left as it was."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

import expertprune
from expertprune.artifacts.changes import AnswerChange, Changes
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Document, Question
from expertprune.errors import SpecError, UsageError
from expertprune.evaluation.harness import models, stored, tasks
from expertprune.evaluation.harness.sandbox import metric_code
from expertprune.evaluation.suites import TaskEntry, load_suite
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.reading import parse_spec
from expertprune.stages import suite_scores
from expertprune.stages import suites as suite_stage
from tests.calling import call
from tests.commands.test_hostile_files import poison
from tests.evaluation.test_evaluation import likelihoods
from tests.experts import about, write_sources
from tests.tiny import WORDS, as_run
from tests.vocabularies import save_worded, worded_spec

Data = dict[str, Any]
Patch = pytest.MonkeyPatch

pytest.importorskip("lm_eval")

CHOOSE = {"file": "tasks/choose.yaml"}
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: ../questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: ../generate.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: right
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 3}
filter_list: [{name: first-word, filter: [{function: regex, regex_pattern: "(\\\\S+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def some_questions(count: int = 24) -> list[Question]:
    generator = np.random.default_rng(7)
    found = []
    for _ in range(count):
        texts = [" ".join(generator.choice(WORDS, generator.integers(1, 5))) for _ in range(5)]
        found.append(Question(texts[0], tuple(texts[1:]), int(generator.integers(4))))
    return found


class Workplace:
    """A copy of the tiny expert beside its corpora and its base, and suites to measure it with."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store, self.expert = folder, store, folder / "expert"
        rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in some_questions()]
        self.data("questions.jsonl", rows)
        self.text("tasks/choose.yaml", CHOICE)

    def data(self, name: str, rows: list[Data]) -> None:
        self.text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def text(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    def suite(self, name: str = "mine", **keys: Any) -> Path:
        return self.text(f"{name}.yaml", yaml.safe_dump({"name": name, **keys}))

    def run(self, *args: Any, code: int = 0) -> Result:
        return call("evaluate", self.expert, "--store", self.store, *args, code=code)

    def refused(self, *args: Any) -> str:
        """The message of a command that fails and leaves the folder as it was."""
        before = {path: path.read_bytes() for path in self.expert.iterdir()}
        message = self.run(*args, code=2).stderr
        assert {path: path.read_bytes() for path in self.expert.iterdir()} == before
        return message

    def evaluation(self) -> Data:
        found: Data = about(self.expert)["evaluation"]
        return found

    def answers(self, task: str) -> list[AnswerChange]:
        found = Changes.read(self.expert)
        assert found is not None
        assert {each.source for each in found.documents} == set(self.evaluation()["corpora"])
        return [each for each in found.answers if each.source == task]

    def models(self) -> list[Any]:
        return [load_model(folder, torch.float32) for folder in (self.folder / "llama", self.expert)]


@pytest.fixture
def workplace(tiny_build: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, store: Path) -> Workplace:
    """Its store knows nothing."""
    unwanted = shutil.ignore_patterns("store")
    folder = Path(shutil.copytree(tiny_build[0].parent, tmp_path / "workplace", ignore=unwanted))
    (folder / "llama").symlink_to(tiny_llama)
    return Workplace(folder, store)


def kept(numbers: Data) -> list[float]:
    return [numbers[key] for key in ("retention", "low", "high")]


def test_a_task_with_choices_is_scored_as_our_own_questions_are(workplace: Workplace) -> None:
    """The words are ASCII, so likelihood per character (theirs) and per byte (ours) rank alike."""
    before = workplace.evaluation()
    suite = workplace.suite(measures="task/qa", tasks=[CHOOSE])
    shown = json.loads(workplace.run("--suite", suite, "--json").stdout)
    assert shown == workplace.evaluation()
    tokenizer, models = load_tokenizer(workplace.expert), workplace.models()
    right, flipped = [], []
    for question in some_questions():
        picks, margins = [], []
        for model in models:
            each = likelihoods(as_run(model), tokenizer, question) / math.log(2)
            scores = each / [len(choice) for choice in question.choices]
            picks.append(int(scores.argmax()))
            margins.append(scores[question.answer] - np.delete(scores, question.answer).max())
        right.append([pick == question.answer for pick in picks])
        if picks[0] != picks[1]:
            texts = [question.choices[number] for number in (*picks, question.answer)]
            flipped.append(((question.prompt, *texts), margins[1] - margins[0]))
    base, expert = np.array(right, dtype=float).T
    gained, lost = (base < expert).sum(), (base > expert).sum()
    assert gained != lost
    entry = shown["tasks"]["choose"]
    assert entry.items() >= {"suite": "mine", "group": "expert", "backend": "hf", "examples": 24, "metric": "acc_norm",
                             "chance": 0.25, "gained": gained, "lost": lost}.items()  # fmt: skip
    assert (entry["base"], entry["expert"]) == pytest.approx((base.mean(), expert.mean()))
    assert entry["retention"] == pytest.approx((expert.mean() - 0.25) / (base.mean() - 0.25))
    assert {group: list(averages) for group, averages in shown["summary"].items()} == {"expert": ["accuracy"]}
    assert shown["settings"]["suites"] == {"mine": load_suite(suite).digest}
    workplace.run("--suite", workplace.suite(measures="task/qa", tasks=[{**CHOOSE, "few_shot": 2}]))
    asked_otherwise = workplace.evaluation()["tasks"]["choose"]
    assert asked_otherwise["examples"] == entry["examples"]
    assert asked_otherwise["digest"] != entry["digest"]
    workplace.run("--suite", workplace.suite(measures="task/qa", tasks=[CHOOSE]))
    assert workplace.evaluation()["tasks"]["choose"] == entry
    answers = workplace.answers("choose")
    flipped = sorted(flipped, key=lambda row: -abs(row[1]))[:20]
    assert [(each.prompt, each.base, each.expert, each.gold) for each in answers] == [row[0] for row in flipped]
    assert [each.change for each in answers] == pytest.approx([row[1] for row in flipped], abs=1e-5)
    assert shown["corpora"] == before["corpora"], "what was said of corpora stays"
    assert shown["settings"]["documents"] == before["settings"]["documents"]
    row = f"acc_norm (24 examples, +{gained} −{lost})"
    assert row in workplace.run("--suite", suite).stdout
    card = (workplace.expert / "README.md").read_text(encoding="utf-8")
    assert f"| choose | {row} | {entry['base']:.4f} | {entry['expert']:.4f} | {entry['retention']:.4f} |" in card


def test_generated_answers_are_extracted_matched_and_compared_with_the_bases(workplace: Workplace) -> None:
    tokenizer = load_tokenizer(workplace.expert)

    def answer(model: Any, prompt: str) -> str:
        """The first word of three greedy tokens, one forward pass for each."""
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        words = tokenizer.decode(ids[start:], skip_special_tokens=True).split()
        return words[0] if words else "[invalid]"

    prompts = [question.question for question in some_questions(12)]
    mine, theirs = (np.array([answer(model, prompt) for prompt in prompts]) for model in workplace.models())
    right = np.array([*mine[:6], *theirs[6:]])  # so that both have some right
    rows = [{"question": q, "right": str(r)} for q, r in zip(prompts, right, strict=True)]
    workplace.data("generate.jsonl", rows)
    workplace.text("tasks/say.yaml", GENERATE)
    workplace.run("--suite", workplace.suite(group="general", generation=[{"file": "tasks/say.yaml"}]))
    entry = workplace.evaluation()["generation"]["say"]
    base, expert = (mine == right).mean(), (theirs == right).mean()
    found = [entry[key] for key in ("base", "expert", "agreement", "retention")]
    assert found == pytest.approx([base, expert, (mine == theirs).mean(), expert / base])
    assert 0 <= entry["common"] <= 1
    assert (entry["chance"], entry["metric"], entry["group"]) == (None, "exact_match", "general")
    known = {each.prompt: (each.base, each.expert, each.gold, each.outcome) for each in workplace.answers("say")}
    assert known == {
        prompt: (a, b, r, "lost" if a == r else "gained" if b == r else "neither")
        for prompt, a, b, r in zip(prompts, mine, theirs, right, strict=True)
        if a != b
    }


def test_corpora_of_two_suites_in_one_process_and_in_shards(workplace: Workplace, tmp_path: Path) -> None:
    """The suites share a corpus, and one asks for alignment."""
    before = workplace.evaluation()["corpora"]
    reading = workplace.suite("reading", perplexity={"corpora": ["medical", "general"]}, alignment=True)
    choosing = workplace.suite("choosing", tasks=[CHOOSE], perplexity={"corpora": ["general"]})
    arguments = ["--suite", reading, "--suite", choosing]
    workplace.run(*arguments)
    found = workplace.evaluation()
    assert list(found["corpora"]) == ["domain/medical", "general/general"]
    for name, entry in found["corpora"].items():
        assert list(entry["metrics"]) == ["bits_per_byte", "kl"]
        assert entry["metrics"]["kl"] == pytest.approx(before[name]["metrics"]["kl"])
    assert list(found["alignment"]) == ["domain medical", "general general"]
    assert all(len(entry["layers"]) == 3 and 0 < entry["cosine"] < 1 for entry in found["alignment"].values())
    for group, name in (("expert", "domain/medical"), ("general", "general/general")):
        assert found["summary"][group]["bits"]["metrics"] == [f"{name} bits_per_byte"]
        measured = found["corpora"][name]["metrics"]["bits_per_byte"]
        assert kept(found["summary"][group]["bits"]) == pytest.approx(kept(measured))

    workplace.store = tmp_path / "another"
    assert "not done: suite" in workplace.run(*arguments, "--collect", code=1).stderr
    reports = [json.loads(workplace.run(*arguments, "--shard", f"{number}/2", "--json").stdout) for number in (2, 1)]
    assert [len(each["done_here"]) for each in reports] == [2, 0]
    workplace.run(*arguments, "--collect")
    assert workplace.evaluation() == found
    assert "give --suite or --task" in workplace.run("--collect", code=2).stderr


def test_an_expert_with_a_vocabulary_of_its_own_is_compared_by_the_byte(tmp_path: Path, store: Path) -> None:
    base = save_worded(tmp_path / "base")
    data = worded_spec(base, tmp_path / "spec", {"vocabulary": {"keep": 384}})
    folder = expertprune.build(parse_spec(data, "spec", tmp_path), tmp_path / "expert")
    suite = tmp_path / "mine.yaml"
    suite.write_text(yaml.safe_dump({"name": "mine", "perplexity": {"corpora": ["language/de"]}, "alignment": True}))
    before = about(folder)["evaluation"]["corpora"]["language/de"]["metrics"]
    found = expertprune.evaluate_suites(folder, [str(suite)]).document()
    assert list(found["corpora"]["language/de"]["metrics"]) == ["bits_per_byte"]
    numbers = found["corpora"]["language/de"]["metrics"]["bits_per_byte"]
    assert numbers == pytest.approx(before["bits_per_byte"])
    assert kept(found["summary"]["expert"]["bits"]) == pytest.approx(kept(numbers))
    assert found["alignment"] == {}  # other tokens have other states


def test_an_expert_without_a_layer_is_aligned_with_the_layers_of_its_base(tmp_path: Path, spec_data: Data) -> None:
    data = {**spec_data, "budget": {"layers": 1}, "compensation": "none", "evaluate": {"enabled": False}}
    folder = expertprune.build(parse_spec(data, "spec", tmp_path), tmp_path / "expert")
    suite = tmp_path / "mine.yaml"
    suite.write_text(yaml.safe_dump({"name": "mine", "perplexity": {"corpora": ["en"]}, "alignment": True}))
    (found,) = expertprune.evaluate_suites(folder, str(suite)).alignment.values()  # a single one needs no list
    (gone,) = Expert.load(folder).plan.gone
    # Without a repair, what lies before the layer that is gone is the base's own.
    assert [value == pytest.approx(1) for value in found.layers] == [number < gone for number in range(3)]


@pytest.mark.slow
def test_answers_are_stored_until_something_changes(workplace: Workplace, monkeypatch: Patch) -> None:
    asked: list[Path] = []
    load = suite_scores.run_folder
    monkeypatch.setattr(suite_scores, "run_folder", lambda folder, base: (asked.append(folder), load(folder, base))[1])

    def models_asked(*args: Any, **keys: Any) -> int:
        asked.clear()
        workplace.run("--suite", workplace.suite(tasks=[CHOOSE | keys]), *args)
        return len(asked)

    assert models_asked() == 2
    first = workplace.evaluation()
    assert models_asked() == 0
    assert workplace.evaluation() == first
    assert models_asked("--limit", "10") == 2
    assert models_asked(metric="acc") == 2
    for name, value in (("versions", {"torch": "another"}), ("code_digest", "another")):
        monkeypatch.setattr(stored, name, lambda *_, value=value: value)
        assert models_asked() == 2
    weights = next(workplace.expert.glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert models_asked() == 1
    assert asked == [workplace.expert], "the base's answers stay"
    for path in (workplace.store / "evaluations").iterdir():
        path.write_text("{")
    assert models_asked() == 2


def test_a_task_that_gets_another_name_is_asked_anew_of_both(workplace: Workplace) -> None:
    """The store knows the base's answers under the name of before, and those of an expert that is gone."""
    workplace.run("--suite", workplace.suite(tasks=[CHOOSE]))
    before = workplace.evaluation()["tasks"]["choose"]
    weights = next(workplace.expert.glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    workplace.text("tasks/choose.yaml", CHOICE.replace("task: choose", "task: renamed"))
    workplace.run("--suite", workplace.suite(tasks=[CHOOSE]))
    after = workplace.evaluation()["tasks"]
    assert list(after) == ["renamed"]
    assert (after["renamed"]["examples"], after["renamed"]["base"]) == (before["examples"], before["base"])


def test_what_is_stored_of_a_corpus_is_of_its_settings(workplace: Workplace) -> None:
    """The store has the bits, and then those of shorter texts."""
    for more, aligned in ({}, []), ({"alignment": True}, ["domain medical"]):
        workplace.run("--suite", workplace.suite(perplexity={"corpora": ["medical"]}, **more))
        assert list(workplace.evaluation()["alignment"]) == aligned
    workplace.run("--suite", workplace.suite(perplexity={"corpora": ["medical"]}), "--set", "evaluate.max_tokens=4")
    rows = workplace.evaluation()["corpora"]["domain/medical"]["per_document"]
    assert {row["tokens"] for row in rows} == {3}


def test_how_a_model_generates_and_its_trusted_code_are_part_of_what_is_stored(workplace: Workplace) -> None:
    base, trust = workplace.folder / "copy", {"base.trust_remote_code": True}
    shutil.copytree(workplace.folder / "llama", base)
    suite = workplace.suite(tasks=[CHOOSE])

    def measured(**overrides: Any) -> tuple[str, str]:
        """What names the scores of base and expert."""
        asked = suite_stage.SuiteRequest(
            workplace.expert, [str(suite)], (), "hf", None, base, workplace.store, overrides
        )
        found = asked.prepared()
        return found.of_base.model, found.of_expert.model

    first = measured()
    (base / "modeling_own.py").write_text("")
    assert measured() == first, "code that is not trusted does not run"
    trusted = measured(**trust)
    for number, (folder, file) in enumerate(((base, "modeling_own.py"), (workplace.expert, "modeling_expert.py"))):
        (folder / file).write_text("changed = True")
        changed = measured(**trust)
        assert [a != b for a, b in zip(trusted, changed, strict=True)] == [number == 0, number == 1]
        trusted = changed
    first = measured()
    (base / "generation_config.json").write_text('{"suppress_tokens": [2, 3]}')
    assert [a != b for a, b in zip(first, measured(), strict=True)] == [True, False]


def test_a_machine_without_a_gpu_prepares_what_runs_on_one(workplace: Workplace, monkeypatch: Patch) -> None:
    """As `--engine ray` does for the nodes of a cluster."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    suites = [str(workplace.suite(tasks=[CHOOSE]))]

    def prepared(device: str = "cuda", **overrides: Any) -> suite_scores.Measurement:
        asked = suite_stage.SuiteRequest(workplace.expert, suites, (), "hf", None, None, workplace.store, overrides)
        return asked.prepared(device=device, dtype="float32")

    there, here = prepared(), prepared("cpu")
    assert (there.base.device.type, there.base.dtype) == ("cuda", here.base.dtype)
    assert not set(there.keys) & set(here.keys), "base and expert are measured on one kind of device"
    with pytest.raises(UsageError, match="the base's layers are streamed"):
        prepared(**{"base.layers": "streamed"})


def test_with_vllm_each_model_has_a_server_of_its_own(
    workplace: Workplace, tiny_llama: Path, monkeypatch: Patch
) -> None:
    """A stand-in for the server, behind which the running model answers."""
    pytest.importorskip("tenacity")
    running: list[str] = []
    served: list[tuple[Path, str, list[str]]] = []

    @contextlib.contextmanager
    def server(folder: Path, *, model_name: str, arguments: list[str]) -> Iterator[SimpleNamespace]:
        assert running == []
        running.append(f"http://{model_name}")
        served.append((folder, model_name, arguments))
        yield SimpleNamespace(url=running[0], keys=["key", "other"])
        running.clear()

    def answer(folder: Path, url: str, name: str, tokenizer: Any, key: str) -> Any:
        assert (running, key) == ([url], "key")
        return models.running_model(load_model(folder, torch.float32), tokenizer)

    monkeypatch.setattr("expertprune.serving.server.Server", server)
    monkeypatch.setattr(models, "served_model", answer)
    suite = workplace.suite(tasks=[CHOOSE])
    found = []
    for backend in ("hf", "vllm"):
        workplace.run("--suite", suite, "--backend", backend)
        found.append(workplace.evaluation()["tasks"]["choose"])
    assert found[1] == {**found[0], "backend": "vllm"}
    arguments = ["--dtype=float32"]
    assert served == [(tiny_llama, "base", arguments), (workplace.expert, "expert", arguments)]
    assert running == []


def test_a_floor_that_is_not_held_is_named_and_exits_with_1(workplace: Workplace) -> None:
    kept = workplace.evaluation()["summary"]["expert"]["bits"]["retention"]
    alone = workplace.run("--fail-under", f"expert={kept + 0.01},general=0.01", "--json", code=1)
    assert f"below the floor: expert bits: retention {kept:.4f} is below {kept + 0.01:g}" in alone.stderr
    assert alone.stderr.count("below the floor") == 1
    assert json.loads(alone.stdout) == workplace.evaluation()
    tasks = [{**CHOOSE, "group": "general", "chance": 0.99}]
    suite = workplace.suite(perplexity={"corpora": ["medical", "domain/legal"]}, tasks=tasks)
    broken = workplace.run("--suite", suite, "--fail-under", "expert=0.01,general=5", code=1)
    found = workplace.evaluation()
    assert list(found["corpora"]) == ["domain/medical", "general/domain/legal"]  # the spec does not name law
    kept = found["summary"]["general"]["bits"]["retention"]
    assert f"below the floor: general bits: retention {kept:.4f} is below 5" in broken.stderr
    assert "below the floor: general accuracy: retention is undefined, and 5 is asked for" in broken.stderr
    assert (
        f"above the floor: expert bits: retention {found['summary']['expert']['bits']['retention']:.4f}, the mean"
        in (broken.stderr)
    )
    assert "--fail-under" in workplace.refused("--fail-under", "")
    settled = workplace.refused(
        "--set", "budget.ffn=0.9", "--set", "compose.rule=union", "--set", "evaluate.documents=1"
    )
    assert settled.count("the expert is built already") == 2
    assert "undefined" in broken.stdout
    assert "nan" not in broken.stdout.lower()
    assert found["tasks"]["choose"]["note"] in (workplace.expert / "README.md").read_text()


def test_what_is_wrong_is_said_with_its_name(workplace: Workplace, no_model: None, monkeypatch: Patch) -> None:
    other = workplace.suite("other", tasks=[CHOOSE])
    again = workplace.text("again.yaml", yaml.safe_dump({"name": "mine", "perplexity": {}}))
    for keys, arguments, message in (
        ({"tasks": [CHOOSE]}, ["--suite", "medcal"], "unknown suite 'medcal'; did you mean 'medical'?"),
        ({"tasks": [CHOOSE]}, ["--suite", "medcal", "--suite", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ({"tasks": [{**CHOOSE, "metric": "acc_nrm"}]}, [], "it has no metric 'acc_nrm'; did you mean 'acc_norm'?"),
        ({"tasks": [{**CHOOSE, "filter": "x"}]}, [], "task choose: it has no filter 'x'; valid: none"),
        ({"generation": [CHOOSE]}, [], "task choose: its output is multiple_choice: put it under 'tasks'"),
        ({"group": "general", "tasks": [CHOOSE]}, ["--fail-under", "expert=0.9"], "nothing that is measured counts as"),
        ({"perplexity": {"corpora": ["domain/medcal"]}}, [], "mine.yaml: perplexity.corpora: general: no corpus for"),
        ({"tasks": [CHOOSE]}, ["--suite", other], "suite other: task 'choose' is in suite mine already"),
        ({"perplexity": {}}, ["--suite", again], "suite mine: two files have this name; rename one"),
        ({"perplexity": {"corpora": []}}, [], "perplexity.corpora: "),
        ({"tasks": [CHOOSE]}, ["--base", "/nowhere/at/all"], "say where it is with --base"),
        ({"perplexity": {}}, ["--corpus", "medical"], "--corpus without --suite"),
        *[({"perplexity": {}}, ["--set", f"evaluate.{key}"], f"evaluate.{key.partition('=')[0]}: suites and tasks say")
          for key in ("corpora=medical", "others=de", "metrics=[kl]")],
        ({"perplexity": {}}, ["--set", "evaluate={metrics: [kl]}"], "evaluate.metrics: suites and tasks say"),
        *[({"perplexity": {}}, given, "--limit and --backend are of tasks, and these suites have none")
          for given in (["--limit", "3"], ["--backend", "vllm"], ["--limit", "3", "--shard", "1/1"])],
        *[({"perplexity": {}}, ["--fail-under", text], "--fail-under")
          for text in ("expert", "expert=x", "exprt=0.9", "expert=0", "expert=nan", "expert=inf", "expert=1,expert=0.1")],
    ):  # fmt: skip
        assert message in workplace.refused("--suite", workplace.suite(**keys), *arguments)
    assert "need --suite or --task" in workplace.refused("--limit", "3")
    for key in ("calibration.documents=1", "dimensions.domain=legal", "general=[]"):
        assert "the expert is built already" in workplace.refused("--set", key)
    assert "nothing is measured" in workplace.refused("--set", "evaluate.metrics=[questions]")
    assert "evaluate.corpora: " in workplace.refused("--set", "evaluate.corpora=[]")
    message = workplace.refused("--corpus", "medical", "--fail-under", "expert=0.9,general=0.9")
    assert "--fail-under: nothing that is measured counts as general" in message
    suite = workplace.suite(tasks=[CHOOSE])
    for missing, backend in (("lm_eval", "hf"), ("tenacity", "vllm")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            message = workplace.refused("--suite", suite, "--backend", backend)
        assert f"{missing} is not installed: pip install 'expertprune[eval]'" in message
    for data, message in (
        ("", "questions.jsonl: holds no example"),
        ("[1, 2", "task choose: its data cannot be loaded"),
    ):
        workplace.text("questions.jsonl", data)
        assert message in workplace.refused("--suite", suite)
    (workplace.folder / "questions.jsonl").unlink()
    assert "questions.jsonl: no such file" in workplace.refused("--suite", suite)
    shard = ("--suite", suite, "--shard", "1/2", "--fail-under", "general=0.5")
    assert "--fail-under: a shard knows only its own part" in workplace.refused(*shard)
    manager = SimpleNamespace(all_tasks=("hellaswag", "boolq"), task_index={})
    monkeypatch.setattr(tasks, "_manager", lambda everything: manager)
    assert "unknown task 'helaswag'; did you mean 'hellaswag'?" in workplace.refused("--task", "helaswag")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("{metric: f1}", "f1 is not a mean over examples, so base and expert cannot be paired; choose another task"),
        (
            "{metric: acc, aggregation: nanmean, higher_is_better: true}",
            "acc is not a mean over examples, so base and expert cannot be paired; choose another task",
        ),
        (
            "{metric: acc, aggregation: mean, higher_is_better: false}",
            "acc is a cost, and what a task keeps is counted in right answers; choose another task",
        ),
        ("{metric: mcc}, {metric: f1}", "mcc is not a mean over examples"),
    ],
)
def test_a_metric_that_pairs_no_examples_is_refused_before_a_model_runs(
    workplace: Workplace, no_model: None, metric: str, words: str
) -> None:
    workplace.text("tasks/choose.yaml", f"{CHOICE.partition('metric_list')[0]}metric_list: [{metric}]\n")
    assert words in workplace.refused("--suite", workplace.suite(tasks=[CHOOSE]))


def test_of_several_metrics_one_that_pairs_examples_is_taken(workplace: Workplace) -> None:
    head = CHOICE.partition("metric_list")[0]
    workplace.text("tasks/choose.yaml", f"{head}metric_list: [{{metric: mcc}}, {{metric: acc}}]\n")
    workplace.run("--suite", workplace.suite(tasks=[CHOOSE]))
    assert workplace.evaluation()["tasks"]["choose"]["metric"] == "acc"
    asked = workplace.suite(tasks=[{**CHOOSE, "metric": "mcc"}])
    assert "choose another metric, such as acc" in workplace.refused("--suite", asked)


def test_scores_are_measured_again_where_the_tasks_own_code_has_changed(workplace: Workplace) -> None:
    head = CHOICE.partition("metric_list")[0]
    listed = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    workplace.text("tasks/choose.yaml", f"{head}process_results: !function scoring.score\n{listed}")
    suite, found = workplace.suite(tasks=[CHOOSE]), []
    for value in (0.25, 0.75):
        workplace.text("tasks/scoring.py", f'def score(document, results):\n    return {{"acc": {value}}}\n')
        workplace.run("--suite", suite, "--trust-remote-code")
        found.append(workplace.evaluation()["tasks"]["choose"]["base"])
    assert found == [0.25, 0.75]


def test_what_has_two_names_counts_once(workplace: Workplace) -> None:
    suites = [workplace.suite(name, perplexity={"corpora": corpora})
              for name, corpora in (("a", ["language/de", "de"]), ("b", ["de"]))]  # fmt: skip
    workplace.run("--suite", suites[0], "--suite", suites[1], "--set", "evaluate.documents=2")
    (average,) = workplace.evaluation()["summary"]["general"].values()
    assert len(average["metrics"]) == 1
    entries = suite_stage._entries([], ["boolq", "boolq"])
    assert [entry.label for entry, _, _ in entries] == ["boolq"]


METRIC = "  - {metric: FILE, aggregation: mean, higher_is_better: true}\n"
METRICS = CHOICE[CHOICE.index("metric_list") :] + METRIC
FUNCTION = "process_docs: !function code.same\n"
# What a task says, what the file that it includes does, and whether it is run here where the command line allows it.
CODE = {
    "a function": (FUNCTION + CHOICE, "", True),
    "a metric": (CHOICE + METRIC, "", True),
    "a function of an included file": ("include: more.yaml\n" + CHOICE, FUNCTION, False),
    "a metric of an included file": ("include: more.yaml\n" + CHOICE.partition("metric_list")[0], METRICS, False),
    "a key": (CHOICE + "? !function code.same\n: 1\n", "", False),
    "a pair": (CHOICE + "metadata: !!pairs [x: !function code.same]\n", "", False),
    "a metric of its own library": (CHOICE + METRIC.replace("FILE", "FILE, hf_evaluate: true"), "", False),
}


@pytest.mark.parametrize("case", CODE)
def test_code_of_a_task_runs_only_if_allowed_now(
    workplace: Workplace, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    mark = workplace.folder / "was run"
    code = workplace.text("tasks/code.py", f"open({str(mark)!r}, 'w')\ndef same(data): return data\n")
    task, included, runs = CODE[case]
    workplace.text("tasks/choose.yaml", task.replace("FILE", str(code)))
    workplace.text("tasks/more.yaml", included.replace("FILE", str(code)))
    suite = workplace.suite(tasks=[CHOOSE])
    message = workplace.refused("--suite", suite)
    assert f"choose.yaml runs Python code: {code}; " in message
    assert "--trust-remote-code" in message
    assert not mark.exists()
    if runs:
        workplace.run("--suite", suite, "--trust-remote-code", "--limit", "2")
        assert mark.exists()
        assert f"task choose: runs Python code: {code}" in [record.getMessage() for record in caplog.records]


def test_pickled_examples_are_refused(workplace: Workplace) -> None:
    """They are code. Some versions of `datasets` that may be installed load them."""
    workplace.text("tasks/choose.yaml", CHOICE.replace("dataset_path: json", "dataset_path: pandas"))
    message = workplace.refused("--suite", workplace.suite(tasks=[CHOOSE]), "--trust-remote-code")
    assert "task choose: dataset_path: 'pandas' reads pickles, which can run any code" in message


def test_a_metric_that_a_task_of_the_library_asks_for_is_refused_too(tmp_path: Path) -> None:
    import evaluate

    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    with (
        pytest.raises(SpecError, match=r"task library: runs Python code: .*own\.py"),
        metric_code(TaskEntry(name="library"), trusted=False),
        contextlib.suppress(Exception),  # as the library does
    ):
        evaluate.load(str(tmp_path / "own.py"))
    assert not (tmp_path / "was run").exists()


def test_an_expert_of_damaged_numbers_is_an_error(workplace: Workplace) -> None:
    poison(workplace.expert, "model.norm.weight", None)
    workplace.text("tasks/say.yaml", GENERATE)
    workplace.data("generate.jsonl", [{"question": "the heart", "right": "pumps"}])
    for name, section, words in (
        ("choose", "tasks", "task choose: the expert gives likelihoods that are not finite"),
        ("say", "generation", "model.norm.weight holds values that are not finite"),
    ):
        suite = workplace.suite(**{section: [{"file": f"tasks/{name}.yaml"}]})
        assert words in workplace.refused("--suite", suite)


def test_what_calibrated_the_expert_or_an_ancestor_is_refused(workplace: Workplace, no_model: None) -> None:
    def ask(**changed: str) -> str:
        """A suite of four questions, of which the third has other fields; prompts are the questions alone."""
        words = ("amber", "basil", "cobalt", "dahlia")
        rows = [{"question": f"Which {word} is it?", "passage": "", "choices": words, "answer": 1} for word in words]
        rows[2] |= changed
        workplace.data("questions.jsonl", rows)
        return workplace.refused("--suite", workplace.suite(tasks=[CHOOSE]))

    leak = "task choose: 1 of 4 examples also calibrate the expert, or one that it is cut from (the first: "
    workplace.text("tasks/choose.yaml", CHOICE.replace("Question: ", "").replace("\\nAnswer:", ""))
    texts = [json.loads(line)["text"] for line in (workplace.folder / "medical.jsonl").read_text().splitlines()]
    text = max(texts, key=len)
    assert len(text) >= 60
    for place in ("question", "passage"):  # the prompt, and a field that it does not show
        assert leak + repr(text[:60]) in ask(**{place: text})
    evaluation = workplace.folder / "medical.evaluation.jsonl"
    whole = evaluation.read_text()
    workplace.data(evaluation.name, [{"text": text}])
    suite = workplace.suite(perplexity={})
    assert "corpus domain/medical: 1 of 1 evaluation documents also calibrate" in workplace.refused("--suite", suite)

    evaluation.write_text(whole)
    gone = "a text of an ancestor that lies nowhere any more, of which the expert has the digest"
    document = about(workplace.expert)
    document["corpora"]["domain/medical"]["documents"].append(Document(gone).digest)
    workplace.text("expert/expertprune.json", json.dumps(document))
    assert leak + repr(gone[:60]) in ask(question=gone)
    spec = yaml.safe_load((workplace.folder / "tiny.yaml").read_text())
    sources = write_sources(workplace.folder / "tasks", spec["corpora"]["sources"], seed=50)
    workplace.data("tasks/asked.jsonl", [{"question": gone, "choices": ["a", "b"], "answer": 0}])
    workplace.data("tasks/medical.evaluation.jsonl", [{"text": text}])
    sources["qa"]["questions"] = str(workplace.folder / "tasks" / "asked.jsonl")
    spec |= {"base": str(workplace.expert), "corpora": {"sources": sources}}
    with pytest.raises(SpecError) as error:
        expertprune.validate(parse_spec(spec, "spec", workplace.folder), store=workplace.store)
    documents, questions = sorted(error.value.problems)
    assert documents.startswith("corpus domain/medical: 1 of 1 evaluation documents also calibrate the expert, or one")
    assert questions.startswith("corpus task/qa: 1 of 1 questions also calibrate the expert, or one")
