"""What a user can get wrong: each exits with 2 and says what to do, before a model is loaded, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from expertprune.files import places
from tests.calling import call
from tests.conftest import refuse_to_load
from tests.patching import everywhere
from tests.processes import server
from tests.tiny import save_tiny, tiny_model

Data = dict[str, Any]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("serve", "--patience"),
        ("chat", "--temperature"),
        ("profile", "--cpus-per-task"),
        ("profile", "--gpus-per-task"),
    ],
)
def test_no_option_takes_a_number_that_is_none(command: str, option: str, value: str) -> None:
    assert f"Invalid value for '{option}'" in call(command, f"{option}={value}", "nowhere", code=2).stderr


class Workplace:
    """A folder with a spec, where commands run and nothing may stay behind."""

    def __init__(self, folder: Path, data: Data, store: Path) -> None:
        self.folder, self.data, self.store = folder, data, store
        self.spec = folder / "tiny.yaml"
        self.out = folder / "expert"

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
        self.spec.write_text(yaml.safe_dump(self.data))

    def contents(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b""
            for path in self.folder.rglob("*")
        }

    def run(self, *arguments: Any, code: int) -> str:
        return call(*arguments, code=code).stderr

    def refused(self, *arguments: Any) -> str:
        """The message of a command that fails and changes nothing: neither here nor among the profiles."""
        before, profiles = self.contents(), self.profiles()
        message = self.run(*arguments, code=2)
        assert self.contents() == before
        assert self.profiles() == profiles
        assert re.search("^[Ee]rror: ", message, re.MULTILINE)
        return message

    def profiles(self) -> list[str]:
        return sorted(path.name for path in (self.store / "profiles").glob("*"))

    def build_refused(self) -> str:
        self.write()
        return self.refused("build", self.spec, "--out", self.out)


@pytest.fixture
def workplace(tmp_path: Path, spec_data: Data, store: Path) -> Workplace:
    place = Workplace(tmp_path, spec_data, store)
    place.write()
    return place


@pytest.fixture(scope="module", autouse=True)
def warm_server() -> None:
    """Started with the first test, so that it is ready when one needs it."""
    server()


# --- what a spec, its corpora and its base can hold -----------------------------------------------------------------

Prepare = Callable[[Workplace], Any]


def spec(**changes: Any) -> Prepare:
    return lambda place: place.data.update(changes)


def corpus(content: str | None) -> Prepare:
    """The file of the medical corpus; `None` where there is none."""

    def prepare(place: Workplace) -> None:
        path = place.folder / "mine.jsonl"
        place.source("medical")["path"] = str(path)
        if content is not None:
            path.write_text(content)

    return prepare


def model(damage: Callable[[Path], Any]) -> Prepare:
    return lambda place: damage(place.own_model())


def config(**changes: Any) -> Prepare:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(data))

    return model(damage)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")


def misspelt(workplace: Workplace) -> None:
    sources = workplace.data["corpora"]["sources"]
    sources["medicla"] = sources.pop("medical")


REFUSED: list[tuple[Prepare, str]] = [
    (spec(bugdet={"ffn": 0.2}), "tiny.yaml: unknown key 'bugdet'; did you mean 'budget'?"),
    (spec(relevance="impcat"), "relevance.criterion: unknown criterion 'impcat'; did you mean 'impact'?"),
    (spec(base="smollm2-135m"), "base.model: 'smollm2-135m'.*did you mean 'smollm2-135m-instruct'?"),
    (spec(base="./absent"), "base.model: .*absent: no such folder"),
    (spec(dimensions={"domain": "medcal"}), "dimensions.domain: no corpus for 'medcal'; did you mean 'medical'?"),
    (spec(general="genral"), "general: no corpus for 'genral'; did you mean 'general'?"),
    (spec(evaluate={"corpora": "finance"}), "evaluate.corpora: 'finance' is none of the spec's corpora: language/en"),
    (misspelt, "corpora.sources.medicla: no corpus has this name; did you mean 'medical'?"),
    (spec(general=[], budget={"retention": {"general": 0.9}}), "budget.retention.general: 'general' names no corpus"),
    (spec(dimensions={"language": [False]}), "put the name in quotes, such as 'no'"),
    (corpus(None), "corpora.sources.medical.path: .*mine.jsonl: no such file"),
    (corpus('{"text": "the heart"}\nnot json\n'), "mine.jsonl, line 2: not valid JSON"),
    (corpus(""), "corpora.sources.medical.path: .*mine.jsonl: holds no document to calibrate on"),
    (
        corpus('{"text": "heart"}\n{"text": "law"}\n'),
        "corpora.sources.medical: every document is shorter than two tokens",
    ),
    (spec(budget={"ffn": 0.99, "multiple_of": 4}), "the largest legal one is 0.875"),
    (config(num_key_value_heads=4), "num_attention_heads (6) is no multiple of num_key_value_heads (4)"),
    (config(model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM is no causal language model"),
    (config(model_type="lama", architectures=None), "model_type 'lama' is not supported; did you mean 'llama'?"),
    (config(quantization_config={"quant_method": "gptq"}), "quantized (gptq); of quantized models, FP8 in blocks"),
    (model(truncate), "truncated or corrupt"),
    (model(pickle_only), "only pytorch_model.bin, which could run code when read"),
    (model(lambda folder: (folder / "config.json").unlink()), "config.json: no such file"),
    (model(lambda folder: (folder / "tokenizer.json").write_text("{")), "tokenizer.json: not valid JSON"),
    (model(lambda folder: (folder / "tokenizer.json").write_text("{}")), "the tokenizer cannot be loaded"),
]


@pytest.mark.parametrize(("prepare", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_built_is_refused_in_one_line(
    workplace: Workplace, no_model: None, prepare: Prepare, words: str
) -> None:
    """`.*` in the words stands for anything."""
    prepare(workplace)
    message = workplace.build_refused()
    assert len(message.splitlines()) == 1
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), message), message
    assert workplace.run("validate", workplace.spec, code=2) == message


def test_every_problem_of_spec_base_and_corpora_is_a_line_of_its_own(workplace: Workplace, no_model: None) -> None:
    workplace.data |= {"relevance": "impcat", "base": "smollm2-135m", "general": "genral"}
    message = workplace.build_refused()
    assert len(message.splitlines()) == 3
    assert all(word in message for word in ("'impcat'", "'smollm2-135m'", "'genral'"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["tiny.yaml: no such file"]),
        ("name: [", ["tiny.yaml: not valid YAML"]),
        ("name: &a [*a]\n", ["aliases hold themselves"]),
        ("&a name: {b: &c {d: *c}}\n", ["aliases hold themselves"]),
        (
            "name: a\nbudget:\n  ffn: 0.5\n  floor: 0.2\n  ffn: 0.25\nname: b\n",
            ["tiny.yaml: budget.ffn: stands twice, in lines 3 and 5; keep one", "name: stands twice, in lines 1 and 6"],
        ),
    ],
    ids=["absent", "no YAML", "holds itself", "holds itself deeper", "twice"],
)
def test_a_spec_that_cannot_be_read(workplace: Workplace, content: str | None, words: list[str]) -> None:
    workplace.spec.unlink()
    if content is not None:
        workplace.spec.write_text(content)
    out = ("--out", workplace.folder / "out.json")
    for command, *options in (["validate"], ["profile"], ["build", *out], ["compose", *out], ["inspect"]):
        message = workplace.refused(command, workplace.spec, *options)
        assert all(each in message for each in words)


@pytest.mark.parametrize("near", [False, True], ids=["the same", "nearly the same"])
def test_an_evaluation_document_that_also_calibrates(workplace: Workplace, no_model: None, near: bool) -> None:
    """Also where it calibrates another corpus of the spec than the one it would evaluate."""
    text = "the heart pumps blood und der Arzt reads numbers while a judge reads law and we sum w1 w2 w3 w4"
    for name, key, end in (("en", "path", ""), ("qa", "evaluation", " is" if near else "")):
        with Path(workplace.source(name)[key]).open("a") as file:
            file.write(json.dumps({"text": text + end}) + "\n")
    message = workplace.build_refused()
    assert "corpus task/qa: 1 of 5 evaluation documents also calibrate the expert" in message
    assert text[:50] in message


# --- a budget of nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "method"), [({"ffn": 0}, "least_squares"), ({"parameters": 0.0}, "none")])
def test_a_budget_of_nothing_gives_the_base_back_byte_for_byte(
    workplace: Workplace, tiny_llama: Path, changes: Data, method: str
) -> None:
    workplace.data |= {"budget": changes, "compensation": method, "evaluate": {"enabled": False}}
    workplace.write()
    workplace.run("build", workplace.spec, "--out", workplace.out, code=0)
    base = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    expert = {path.name: path.read_bytes() for path in workplace.out.iterdir()}
    assert expert.keys() == base.keys() | {"expertprune.json", "README.md"}
    assert all(expert[name] == content for name, content in base.items())


# --- models ---------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite(workplace: Workplace) -> None:
    path = first_shard(workplace.own_model())
    save_file({name: torch.full_like(t, torch.inf) for name, t in load_file(path).items()}, path)
    assert "activations are not finite" in workplace.build_refused()


def test_a_hub_model_without_a_network(workplace: Workplace) -> None:
    workplace.data["base"] = "owner/model"
    workplace.write()
    before = workplace.contents()
    finished = server().run("build", workplace.spec, "--out", workplace.out)
    assert finished.code == 2
    assert "base.model: 'owner/model' is not in the local cache and the hub cannot be reached" in finished.stderr
    assert "smollm2-135m-instruct" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert workplace.contents() == before


# --- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=str)
def test_an_output_that_is_in_the_way(workplace: Workplace, no_model: None, options: list[str]) -> None:
    def refused(out: Path, command: str = "build") -> str:
        return workplace.refused(command, workplace.spec, "--out", out, *(options if command == "build" else []))

    (workplace.folder / "file").write_text("precious")
    assert "is a file" in refused(workplace.folder / "file")
    assert str(workplace.folder / "file") in refused(workplace.folder / "file" / "expert")
    assert str(workplace.folder / "file") in refused(workplace.folder / "file" / "plan.json", "compose")
    workplace.out.mkdir()
    (workplace.out / "thesis.txt").write_text("precious")
    words = "is no expert (it has no expertprune.json), so --overwrite does not touch it"
    words = words if options else "exists; choose another --out, or give --overwrite"
    assert words in refused(workplace.out)


def test_a_disk_without_room(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = workplace.folder / "plan.json"
    workplace.run("compose", workplace.spec, "--out", plan, code=0)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "MiB are free" in workplace.refused("prune", plan, "--out", workplace.out)
    assert "free some, or name a folder on another disk with --store" in workplace.refused("validate", workplace.spec)
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    message = workplace.build_refused()
    assert f"{workplace.out}: needs 0 MiB of disk, 0 MiB are free; free some, or choose a folder" in message


@pytest.mark.parametrize("stage", ["profile", "weights", "evaluation"])
def test_a_full_disk_is_a_message_leaves_nothing_and_the_next_run_succeeds(
    tiny_build: tuple[Path, Path], tmp_path: Path, stage: str
) -> None:
    """A file that may not grow to its size fails in the middle of a write, as on a full disk."""
    whole, filled, store = *tiny_build, tmp_path / "store"
    sizes = {
        "profile": min(path.stat().st_size for path in (filled / "profiles").iterdir()),
        "weights": max(path.stat().st_size for path in whole.glob("*.safetensors")),
        "evaluation": (whole / "expertprune.json").stat().st_size,
    }
    if stage != "profile":
        shutil.copytree(filled, store)
    assert sizes["evaluation"] > sizes["weights"]
    arguments = ("build", filled.with_name("tiny.yaml"), "--out", tmp_path / "out" / "expert", "--store", store)
    (tmp_path / "out").mkdir()
    finished = server().run(*arguments, file_limit=sizes[stage] - 1)
    assert finished.code == 2
    assert "no room left on the disk" in finished.stderr
    assert "Traceback" not in finished.stderr
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == (["expert"] if stage == "evaluation" else [])  # whole, and not evaluated yet
    stored = [path.name for path in sorted((store / "profiles").iterdir())]
    assert stored == ([] if stage == "profile" else [path.name for path in sorted((filled / "profiles").iterdir())])
    call(*(arguments if stage != "evaluation" else ("evaluate", tmp_path / "out" / "expert", "--store", store)))


# --- passes ---------------------------------------------------------------------------------------------------------


def test_a_build_that_does_not_fit_into_memory(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the model is loaded, with the setting that helps."""
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    available = 300_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    workplace.data["base"] = {"model": workplace.data["base"], "layers": "resident"}
    message = workplace.build_refused()
    assert "profile " in message
    assert "needs" in message
    assert "1 MiB free; set base.layers: streamed, or lower calibration.tokens_per_batch" in message
    available = 1000
    assert "base.layers: the weights take 1 MiB, and memory has 1 MiB free; set base.layers: streamed" in (
        workplace.build_refused()
    )


def test_an_expert_outlives_an_evaluation_that_fails(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out is the user's to mend; anything else is a failure of ours."""
    refused = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes."
    for error, code, said in (
        (RuntimeError(refused), 2, "evaluate: memory ran out (4.00 GiB more were asked for); lower"),
        (KeyError("broken"), 1, "'broken'"),
    ):
        with monkeypatch.context() as patched:
            everywhere(patched, "expertprune.evaluation.reading.compare", raising(error))
            message = workplace.run("build", workplace.spec, "--out", workplace.out, "--overwrite", code=code)
        assert f"the evaluation failed: {said}" in message
        assert message.rstrip().endswith(f"run: expertprune evaluate {workplace.out}")
        assert "Not evaluated yet" in (workplace.out / "README.md").read_text()
    workplace.run("evaluate", workplace.out, code=0)
    assert "Not evaluated yet" not in (workplace.out / "README.md").read_text()


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# --- plans and experts ----------------------------------------------------------------------------------------------


def test_a_corpus_that_changed_after_the_plan(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert's record would miss a document that calibrated it, and evaluating on that one would not be noticed."""
    plan = workplace.folder / "plan.json"
    workplace.run("compose", workplace.spec, "--out", plan, code=0)
    path = Path(workplace.source("medical")["path"])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    everywhere(monkeypatch, "expertprune.models.loading.load_model", refuse_to_load)
    message = workplace.refused("prune", plan, "--out", workplace.out)
    assert "corpus domain/medical" in message
    assert "has changed since the plan was made" in message


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ('{"kind": "plan", "schema": 99}', "a plan of schema 99")]
)
def test_a_plan_that_is_none(workplace: Workplace, content: str, words: str) -> None:
    plan = workplace.folder / "plan.json"
    plan.write_text(content)
    assert f"{plan}: {words}" in workplace.refused("prune", plan, "--out", workplace.out)


@pytest.fixture
def built(workplace: Workplace) -> Workplace:
    """With an expert that was not evaluated."""
    workplace.run("build", workplace.spec, "--out", workplace.out, "--set", "evaluate.enabled=false", code=0)
    return workplace


def test_evaluating_on_a_document_that_calibrated_the_expert(built: Workplace) -> None:
    """Also when the corpus has been rewritten since, so that only the expert's own record tells."""
    source = built.source("medical")
    calibration, evaluation = Path(source["path"]), Path(source["evaluation"])
    first, *others = calibration.read_text().splitlines(keepends=True)
    evaluation.write_text(evaluation.read_text() + first)
    words = "corpus domain/medical: 1 of 5 evaluation documents also calibrate the expert"
    assert words in built.refused("evaluate", built.out)
    calibration.write_text("".join(others))
    assert words in built.refused("evaluate", built.out)
    other = save_tiny(built.folder / "other", seed=1)
    assert f"{other}: is not the base of this expert" in built.refused("evaluate", built.out, "--base", other)


def test_a_folder_that_is_no_expert(workplace: Workplace) -> None:
    workplace.out.mkdir()
    contents = {
        None: "is no expert (it has no expertprune.json)",
        "{": "not valid JSON",
        '{"kind": "plan"}': "is not an expert's description",
        '{"kind": "expert"}': "expertprune.json",
    }
    for content, words in contents.items():
        if content is not None:
            (workplace.out / "expertprune.json").write_text(content)
        for command in ("evaluate", "inspect"):
            message = workplace.refused(command, workplace.out)
            assert str(workplace.out) in message
            assert words in message


def test_a_stored_profile_that_is_damaged(built: Workplace) -> None:
    path = sorted((built.store / "profiles").iterdir())[0]
    path.write_bytes(path.read_bytes()[:100])
    message = built.refused("compose", built.spec, "--out", built.folder / "plan.json")
    assert f"{path}: not a readable profile" in message
    assert "delete it and profile again" in message
    path.unlink()
    built.run("compose", built.spec, "--out", built.folder / "plan.json", code=0)


def test_plans_and_specs_are_told_apart(workplace: Workplace, no_model: None) -> None:
    plan = workplace.folder / "plan.json"
    plan.write_text('{"kind": "plan"}')
    assert "is a plan, not a spec; run: expertprune prune" in workplace.run("validate", plan, code=2)
    workplace.write()
    out = workplace.folder / "out"
    assert "is a spec, not a plan" in workplace.run("prune", workplace.spec, "--out", out, code=2)
