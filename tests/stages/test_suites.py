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
from expertprune.artifacts.changes import Changes
from expertprune.artifacts.expert import Expert
from expertprune.corpora.documents import Question
from expertprune.errors import SpecError
from expertprune.evaluation.harness import models, stored, tasks
from expertprune.evaluation.harness.sandbox import metric_code
from expertprune.evaluation.questions import answer_questions
from expertprune.evaluation.suites import TaskEntry, load_suite
from expertprune.files import read_json
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.reading import parse_spec
from expertprune.stages import suite_scores
from tests.calling import call
from tests.commands.test_hostile_files import poison
from tests.evaluation.test_evaluation import likelihoods
from tests.experts import about, write_sources
from tests.tiny import WORDS, as_run
from tests.vocabularies import save_worded, worded_spec

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
    generator = np.random.default_rng(5)
    found = []
    for _ in range(count):
        texts = [" ".join(generator.choice(WORDS, generator.integers(1, 5))) for _ in range(5)]
        found.append(Question(texts[0], tuple(texts[1:]), int(generator.integers(4))))
    return found


class Workplace:
    """A tiny expert, and suites to measure it with."""

    def __init__(self, folder: Path, spec: dict[str, Any], store: Path) -> None:
        self.folder, self.store = folder, store
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        self.expert = folder / "expert"
        expertprune.build(folder / "spec.yaml", self.expert, {"evaluate.enabled": False}, store=store)
        rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in some_questions()]
        self.data("questions.jsonl", rows)
        self.text("tasks/choose.yaml", CHOICE)

    def data(self, name: str, rows: list[dict[str, Any]]) -> None:
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

    def evaluation(self) -> dict[str, Any]:
        found: dict[str, Any] = about(self.expert)["evaluation"]
        return found

    def models(self) -> tuple[Any, Any]:
        base = Expert.load(self.expert).local_base(self.store).model
        base_model, expert = (load_model(Path(folder), torch.float32) for folder in (base, self.expert))
        return base_model, expert


@pytest.fixture
def workplace(tmp_path: Path, spec_data: dict[str, Any], store: Path) -> Workplace:
    return Workplace(tmp_path, spec_data, store)


def kept(numbers: dict[str, Any]) -> list[float]:
    return [numbers[key] for key in ("retention", "low", "high")]


def test_a_task_with_choices_is_scored_as_our_own_questions_are(workplace: Workplace) -> None:
    """The words are ASCII, so likelihood per character (theirs) and per byte (ours) rank alike."""
    suite = workplace.suite(measures="task/qa", tasks=[CHOOSE])
    shown = json.loads(workplace.run("--suite", suite, "--json").stdout)
    assert shown == workplace.evaluation()
    tokenizer = load_tokenizer(workplace.expert)
    base, expert = (answer_questions(as_run(model), tokenizer, some_questions()) for model in workplace.models())
    entry = shown["tasks"]["choose"]
    assert base.tolist() != expert.tolist()
    assert (entry["base"], entry["expert"]) == pytest.approx((base.mean(), expert.mean()))
    assert entry["retention"] == (
        pytest.approx((expert.mean() - 0.25) / (base.mean() - 0.25)) if base.mean() > 0.25 else None
    )
    assert (entry["gained"], entry["lost"]) == ((base < expert).sum(), (base > expert).sum())
    assert entry.items() >= {"suite": "mine", "group": "expert", "backend": "hf", "examples": 24, "metric": "acc_norm",
                             "chance": 0.25}.items()  # fmt: skip
    assert {group: list(averages) for group, averages in shown["summary"].items()} == {"expert": ["accuracy"]}
    assert shown["settings"]["suites"] == {"mine": load_suite(suite).digest}
    found = []
    for question in some_questions():
        picks, margins = [], []
        for model in workplace.models():
            each = likelihoods(as_run(model), tokenizer, question) / math.log(2)
            scores = each / [len(choice) for choice in question.choices]
            picks.append(question.choices[int(scores.argmax())])
            margins.append(scores[question.answer] - np.delete(scores, question.answer).max())
        if picks[0] != picks[1]:
            found.append((question.prompt, *picks, question.choices[question.answer], margins[1] - margins[0]))
    found = sorted(found, key=lambda row: -abs(row[-1]))[:20]
    kept = Changes.read(workplace.expert)
    assert kept is not None
    assert [(each.prompt, each.base, each.expert, each.gold) for each in kept.answers] == [row[:4] for row in found]
    assert [each.change for each in kept.answers] == pytest.approx([row[4] for row in found], abs=1e-5)


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
    right = [*mine[:6].tolist(), *theirs[6:].tolist()]  # so that both have some right
    rows = [{"question": q, "right": r} for q, r in zip(prompts, right, strict=True)]
    workplace.data("generate.jsonl", rows)
    workplace.text("tasks/say.yaml", GENERATE)
    suite = workplace.suite(group="general", generation=[{"file": "tasks/say.yaml"}])
    workplace.run("--suite", suite)
    entry = workplace.evaluation()["generation"]["say"]
    base, expert = (float((answers == right).mean()) for answers in (mine, theirs))
    assert (entry["base"], entry["expert"], entry["agreement"]) == pytest.approx(
        (base, expert, (mine == theirs).mean())
    )
    assert 0 <= entry["common"] <= 1
    assert (entry["chance"], entry["metric"], entry["group"]) == (None, "exact_match", "general")
    assert entry["retention"] == pytest.approx(expert / base)
    kept = Changes.read(workplace.expert)
    assert kept is not None
    known = {each.prompt: (each.base, each.expert, each.gold, each.outcome) for each in kept.answers}
    assert known == {
        prompt: (a, b, r, "lost" if a == r else "gained" if b == r else "neither")
        for prompt, a, b, r in zip(prompts, mine, theirs, right, strict=True)
        if a != b
    }


def test_perplexity_and_alignment_of_the_named_corpora(workplace: Workplace) -> None:
    suite = workplace.suite(perplexity={"corpora": ["medical", "general"]}, alignment=True)
    workplace.run("--suite", suite)
    found = workplace.evaluation()
    assert list(found["corpora"]) == ["domain/medical", "general/general"]
    again = expertprune.evaluate(workplace.expert, ["medical", "general"], store=workplace.store).document()
    for name, entry in found["corpora"].items():
        assert list(entry["metrics"]) == ["bits_per_byte", "kl"]
        assert entry["metrics"]["kl"] == pytest.approx(again["corpora"][name]["metrics"]["kl"])
    assert list(found["alignment"]) == ["domain medical", "general general"]
    assert all(len(entry["layers"]) == 3 and 0 < entry["cosine"] < 1 for entry in found["alignment"].values())
    for group, name in (("expert", "domain/medical"), ("general", "general/general")):
        assert found["summary"][group]["bits"]["metrics"] == [f"{name} bits_per_byte"]
        assert kept(found["summary"][group]["bits"]) == pytest.approx(
            kept(found["corpora"][name]["metrics"]["bits_per_byte"])
        )


def test_tasks_alone_leave_what_was_said_of_corpora_and_appear_in_table_and_card(workplace: Workplace) -> None:
    before = expertprune.evaluate(workplace.expert, store=workplace.store).document()
    suite = workplace.suite(group="general", tasks=[{"file": "tasks/choose.yaml", "chance": 0}])
    table = workplace.run("--suite", suite).stdout
    after = workplace.evaluation()
    assert after["corpora"] == json.loads(json.dumps(before["corpora"]))
    documents = read_json(workplace.expert / "changes.json")["documents"]
    assert {each["source"] for each in documents} == set(after["corpora"])
    assert after["settings"]["documents"] == before["settings"]["documents"]
    entry = after["tasks"]["choose"]
    row = f"acc_norm (24 examples, +{entry['gained']} −{entry['lost']})"
    assert row in table
    assert f"| choose | {row} | {entry['base']:.4f} | {entry['expert']:.4f} | {entry['retention']:.4f} |" in (
        workplace.expert / "README.md"
    ).read_text(encoding="utf-8")


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


def test_answers_are_stored_and_used_until_something_changes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    load = suite_scores.run_folder
    monkeypatch.setattr(suite_scores, "run_folder", lambda folder, base: (asked.append(folder), load(folder, base))[1])
    suite = workplace.suite(tasks=[CHOOSE])

    def models_asked(*args: Any) -> int:
        asked.clear()
        workplace.run("--suite", suite, *args)
        return len(asked)

    assert models_asked() == 2
    first = workplace.evaluation()
    assert models_asked() == 0
    assert workplace.evaluation() == first
    assert models_asked("--limit", "10") == 2
    workplace.suite(tasks=[{"file": "tasks/choose.yaml", "metric": "acc"}])
    assert models_asked() == 2
    monkeypatch.setattr(stored, "versions", lambda: {"torch": "another"})
    assert models_asked() == 2
    assert models_asked() == 0
    weights = next(workplace.expert.glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert models_asked() == 1
    assert asked == [workplace.expert], "the base's answers stay"
    for path in (workplace.store / "evaluations").iterdir():
        path.write_text("{")
    assert models_asked() == 2


def test_suites_in_shards_give_what_one_process_gives(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two suites that share a corpus, one of them with alignment."""
    reading = workplace.suite("reading", perplexity={"corpora": ["general", "qa"]}, alignment=True)
    choosing = workplace.suite("choosing", tasks=[CHOOSE], perplexity={"corpora": ["general", "medical"]})
    arguments = ["--suite", reading, "--suite", choosing]
    workplace.run(*arguments)
    expected = workplace.evaluation()
    workplace.store = shutil.copytree(workplace.store, tmp_path_factory.mktemp("other") / "store")
    shutil.rmtree(workplace.store / "evaluations")
    assert "not done: suite" in workplace.run(*arguments, "--collect", code=1).stderr
    reports = [json.loads(workplace.run(*arguments, "--shard", f"{number}/2", "--json").stdout) for number in (2, 1)]
    assert [len(each["done_here"]) for each in reports] == [2, 0]
    workplace.run(*arguments, "--collect")
    assert workplace.evaluation() == expected
    assert "give --suite or --task" in workplace.run("--collect", code=2).stderr


def test_with_vllm_each_model_has_a_server_of_its_own_in_turn(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the server, behind which the running model answers."""
    pytest.importorskip("tenacity")
    running: list[str] = []
    served: list[tuple[str, str, list[str]]] = []

    @contextlib.contextmanager
    def server(folder: Path, *, model_name: str, arguments: list[str]) -> Iterator[SimpleNamespace]:
        assert running == []
        running.append(f"http://{model_name}")
        served.append((str(folder), model_name, arguments))
        yield SimpleNamespace(url=running[0])
        running.clear()

    def answer(folder: Path, url: str, name: str, tokenizer: Any) -> Any:
        assert running == [url]
        return models.running_model(load_model(folder, torch.float32), tokenizer)

    monkeypatch.setattr("expertprune.serving.server.Server", server)
    monkeypatch.setattr(models, "served_model", answer)
    suite = workplace.suite(tasks=[CHOOSE])
    workplace.run("--suite", suite)
    expected = workplace.evaluation()["tasks"]["choose"]
    workplace.run("--suite", suite, "--backend", "vllm")
    assert workplace.evaluation()["tasks"]["choose"] == {**expected, "backend": "vllm"}
    base = Expert.load(workplace.expert).local_base(workplace.store).model
    places = ((base, "base"), (str(workplace.expert), "expert"))
    assert served == [(folder, name, ["--dtype=float32"]) for folder, name in places]
    assert running == []


def test_a_floor_that_is_not_held_is_named_and_exits_with_1(workplace: Workplace) -> None:
    suite = workplace.suite(
        perplexity={"corpora": ["medical", "domain/legal"]}, tasks=[{**CHOOSE, "group": "general", "chance": 0.99}]
    )
    held = workplace.run("--suite", suite, "--fail-under", "expert=0.01")
    assert "below the floor" not in held.output
    broken = workplace.run("--suite", suite, "--fail-under", "expert=0.01,general=5", code=1)
    found = workplace.evaluation()
    assert list(found["corpora"]) == ["domain/medical", "general/domain/legal"]  # the spec does not name law
    kept = found["summary"]["general"]["bits"]["retention"]
    assert f"below the floor: general bits: retention {kept:.4f} is below 5" in broken.stderr
    assert "below the floor: general accuracy: retention is undefined, and 5 is asked for" in broken.stderr
    assert "expert bits" not in broken.stderr
    assert "undefined" in broken.stdout
    assert "nan" not in broken.stdout.lower()
    assert found["tasks"]["choose"]["note"] in (workplace.expert / "README.md").read_text()


def test_a_floor_holds_without_a_suite_too(workplace: Workplace) -> None:
    shown = json.loads(workplace.run("--json").stdout)
    assert shown == workplace.evaluation()
    text = {name: result["metrics"]["bits_per_byte"] for name, result in shown["corpora"].items()}
    for group, names in (("expert", [n for n in text if n != "general/general"]), ("general", ["general/general"])):
        average = shown["summary"][group]["bits"]
        assert average["metrics"] == [f"{name} bits_per_byte" for name in names]
        assert average["retention"] == pytest.approx(sum(text[name]["retention"] for name in names) / len(names))
    kept = shown["summary"]["expert"]["bits"]["retention"]
    held = workplace.run("--fail-under", f"expert={kept - 0.01}")
    assert "below the floor" not in held.output
    broken = workplace.run("--fail-under", f"expert={kept + 0.01},general=0.01", code=1)
    assert broken.stderr.count("below the floor") == 1
    assert f"below the floor: expert bits: retention {kept:.4f} is below {kept + 0.01:g}" in broken.stderr


def test_what_a_task_needs_and_what_is_not_there(
    workplace: Workplace, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = workplace.suite(tasks=[CHOOSE])
    assert "need --suite or --task" in workplace.refused("--limit", "3")
    message = workplace.refused("--corpus", "medical", "--fail-under", "expert=0.9,general=0.9")
    assert "--fail-under: nothing that is measured counts as general" in message
    for missing, backend in (("lm_eval", "hf"), ("lm_eval", "vllm"), ("tenacity", "vllm")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            message = workplace.refused("--suite", suite, "--backend", backend)
        assert f"{missing} is not installed: pip install 'expertprune[eval]'" in message
    for data, message in (
        ("", "questions.jsonl: holds no example"),
        ("[1, 2", "task choose: its data cannot be loaded"),
        (None, "questions.jsonl: no such file"),
    ):
        path = workplace.text("questions.jsonl", data or "")
        if data is None:
            path.unlink()
        assert message in workplace.refused("--suite", suite)
    manager = SimpleNamespace(all_tasks=("hellaswag", "boolq"), task_index={})
    monkeypatch.setattr(tasks, "_manager", lambda everything: manager)
    assert "unknown task 'helaswag'; did you mean 'hellaswag'?" in workplace.refused("--task", "helaswag")


@pytest.mark.parametrize(
    ("suite", "arguments", "messages"),
    [
        ({"tasks": [CHOOSE]}, ["--suite", "medcal", "--suite", "nowhere.yaml"],
         ["unknown suite 'medcal'; did you mean 'medical'?", "nowhere.yaml: no such file"]),
        ({"tasks": [{**CHOOSE, "metric": "acc_nrm"}]}, [],
         ["task choose: it has no metric 'acc_nrm'; did you mean 'acc_norm'?"]),
        ({"tasks": [{**CHOOSE, "filter": "x"}]}, [], ["task choose: it has no filter 'x'; valid: none"]),
        ({"generation": [CHOOSE]}, [],
         ["task choose: its output is multiple_choice: put it under 'tasks', not under 'generation'"]),
        ({"group": "general", "tasks": [CHOOSE]}, ["--fail-under", "expert=0.9"],
         ["nothing that is measured counts as expert"]),
        ({"perplexity": {"corpora": ["domain/medcal"]}}, [],
         ["perplexity.corpora: general: no corpus for 'domain/medcal'"]),
        ({"tasks": [CHOOSE]}, ["--suite", "OTHER"], ["suite other: task 'choose' is in suite mine already"]),
        ({"tasks": [CHOOSE]}, ["--base", "/nowhere/at/all"], ["say where it is with --base"]),
        ({"perplexity": {}}, ["--corpus", "medical"], ["--corpus without --suite"]),
        *[({"perplexity": {}}, ["--fail-under", text], ["--fail-under"])
          for text in ("expert", "expert=x", "exprt=0.9", "expert=0", "expert=nan", "expert=inf")],
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_name(
    workplace: Workplace, no_model: None, suite: dict[str, Any], arguments: list[str], messages: list[str]
) -> None:
    other = workplace.suite("other", tasks=[CHOOSE])
    arguments = [str(other) if argument == "OTHER" else argument for argument in arguments]
    found = workplace.refused("--suite", workplace.suite(**suite), *arguments)
    assert all(message in found for message in messages), found


def calibration_text(folder: Path) -> str:
    """The longest document of the corpus on medicine."""
    return max((str(json.loads(line)["text"]) for line in (folder / "medical.jsonl").read_text().splitlines()), key=len)


def ask(workplace: Workplace, **changed: str) -> Path:
    """A suite of four questions, of which the third has other fields; prompts are the questions alone."""
    words = ("amber", "basil", "cobalt", "dahlia")
    rows = [{"question": f"Which {word} is it?", "passage": "", "choices": words, "answer": 1} for word in words]
    rows[2] |= changed
    workplace.data("questions.jsonl", rows)
    plain = CHOICE.replace("Question: ", "").replace("\\nAnswer:", "")
    workplace.text("tasks/choose.yaml", plain)
    return workplace.suite(tasks=[CHOOSE])


METRIC = "  - {metric: FILE, aggregation: mean, higher_is_better: true}\n"
CODE = {  # what a task says, and what the file that it includes does
    "a function": ("process_docs: !function code.same\n" + CHOICE, ""),
    "a function of an included file": ("include: more.yaml\n" + CHOICE, "process_docs: !function code.same\n"),
    "a metric": (CHOICE + METRIC, ""),
    "a metric of an included file": (
        "include: more.yaml\n" + CHOICE.partition("metric_list")[0],
        CHOICE[CHOICE.index("metric_list") :] + METRIC,
    ),
}
ASKS = {  # where else a file could hide that would be run
    "a key": CHOICE + "? !function code.same\n: 1\n",
    "a pair": CHOICE + "metadata: !!pairs [x: !function code.same]\n",
    "a metric of its own library": CHOICE + METRIC.replace("FILE", "FILE, hf_evaluate: true"),
}


@pytest.mark.parametrize("case", [*CODE, *ASKS])
def test_code_of_a_task_runs_only_if_this_command_line_says_so(
    workplace: Workplace, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    mark = workplace.folder / "was run"
    code = workplace.text("tasks/code.py", f"open({str(mark)!r}, 'w')\ndef same(data): return data\n")
    task, included = CODE.get(case, (ASKS.get(case, ""), ""))
    workplace.text("tasks/choose.yaml", task.replace("FILE", str(code)))
    workplace.text("tasks/more.yaml", included.replace("FILE", str(code)))
    suite = workplace.suite(tasks=[CHOOSE])
    message = workplace.refused("--suite", suite)
    assert f"choose.yaml runs Python code: {code}; " in message
    assert "--trust-remote-code" in message
    assert not mark.exists()
    if case in CODE:
        workplace.run("--suite", suite, "--trust-remote-code")
        assert mark.exists()
        assert f"task choose: runs Python code: {code}" in [record.getMessage() for record in caplog.records]


def test_a_metric_that_a_task_of_the_library_asks_for_is_refused_too(tmp_path: Path) -> None:
    import evaluate

    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    entry = TaskEntry(name="library")
    with (
        pytest.raises(SpecError, match=r"task library: runs Python code: .*own\.py"),
        metric_code(entry, trusted=False),
        contextlib.suppress(Exception),  # as the library does
    ):
        evaluate.load(str(tmp_path / "own.py"))
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [("tasks", "task choose: the expert gives likelihoods that are not finite"),
     ("generation", "model.norm.weight holds values that are not finite")],
)  # fmt: skip
def test_an_expert_of_damaged_numbers_is_an_error(workplace: Workplace, section: str, words: str) -> None:
    poison(workplace.expert, "model.norm.weight", None)
    workplace.text("tasks/say.yaml", GENERATE)
    workplace.data("generate.jsonl", [{"question": "the heart", "right": "pumps"}])
    suite = workplace.suite(**{section: [CHOOSE if section == "tasks" else {"file": "tasks/say.yaml"}]})
    assert words in workplace.refused("--suite", suite)


def test_templates_of_a_task_have_no_access_to_python(workplace: Workplace) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    workplace.text("tasks/choose.yaml", CHOICE.replace("{{question}}", escape))
    assert "task choose: " in workplace.refused("--suite", workplace.suite(tasks=[CHOOSE]))


LEAK = "task choose: 1 of 4 examples also calibrate the expert, or one that it is cut from (the first: "


def test_what_calibrated_the_expert_is_refused(workplace: Workplace, no_model: None) -> None:
    text = calibration_text(workplace.folder)
    assert len(text) >= 60
    for place in ("question", "passage"):  # the prompt, and a field that it does not show
        assert LEAK + repr(text[:60]) in workplace.refused("--suite", ask(workplace, **{place: text}))
    evaluation = workplace.folder / "medical.evaluation.jsonl"
    evaluation.write_text(json.dumps({"text": text}) + "\n" + evaluation.read_text())
    suite = workplace.suite(perplexity={})
    assert "corpus domain/medical: 1 of 5 evaluation documents also calibrate" in workplace.refused("--suite", suite)


def test_what_calibrated_an_ancestor_is_refused(workplace: Workplace, spec_data: dict[str, Any], store: Path) -> None:
    """An expert is cut from the expert, on other text; the text of the first is gone, and its digests are not."""
    text, folder = calibration_text(workplace.folder), workplace.folder / "second"
    folder.mkdir()
    sources = write_sources(folder, spec_data["corpora"]["sources"], seed=50)
    data = {**spec_data, "name": "second", "base": str(workplace.expert), "corpora": {"sources": sources}}
    spec = parse_spec({**data, "evaluate": {"enabled": False}}, "spec", folder)
    workplace.expert = expertprune.build(spec, folder / "expert", store=store)
    (workplace.folder / "medical.jsonl").unlink()
    assert LEAK + repr(text[:60]) in workplace.refused("--suite", ask(workplace, question=text))

    evaluation = folder / "medical.evaluation.jsonl"
    evaluation.write_text(json.dumps({"text": text}) + "\n" + evaluation.read_text())
    (folder / "asked.jsonl").write_text(json.dumps({"question": text, "choices": ["a", "b"], "answer": 0}) + "\n")
    sources["qa"]["questions"] = str(folder / "asked.jsonl")
    with pytest.raises(SpecError) as error:
        expertprune.validate(parse_spec(data, "spec", folder), store=store)
    documents, questions = sorted(error.value.problems)
    assert documents.startswith("corpus domain/medical: 1 of 5 evaluation documents also calibrate the expert, or one")
    assert questions.startswith("corpus task/qa: 1 of 1 questions also calibrate the expert, or one")
