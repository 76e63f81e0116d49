"""Sweeps of a tiny model: the numbers of `build`, pooled summaries, interruptions, refusals, the picture."""

from __future__ import annotations

import json
import shutil
import tempfile
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml
from click.testing import Result

import expertprune
from expertprune.artifacts.evaluation import Evaluation, Group, Measured
from expertprune.artifacts.expert import Expert
from expertprune.artifacts.sweep import Point, Sweep, SweptBase
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.messages import Conversation
from expertprune.engine.tasks import Local
from expertprune.errors import SpecError
from expertprune.evaluation.retention import pooled
from expertprune.progress import silent
from expertprune.pruning.unfinished import Unfinished
from expertprune.reporting.pictures import retention_curve
from expertprune.reporting.tables import sweep_rows
from expertprune.spec.schema import Budget, Evaluate
from expertprune.stages import points
from expertprune.stages.points import point_key
from expertprune.stages.sizes import of_size, sized_keys
from expertprune.stages.sweep import SWEEP_FILE, _begin
from tests.calling import call, call_json
from tests.experts import plain_spec
from tests.patching import everywhere, read_only
from tests.tiny import write_corpus

Data = dict[str, Any]
Patch = pytest.MonkeyPatch

BUDGETS = "0.5,0.25"  # not ascending
# The tiny model's parameters, and what goes with half and a quarter of 32 neurons: three vectors of 24 in three layers.
BEFORE = 2 * 64 * 24 + 24 + 3 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 32 * 24 + 2 * 24)
AFTER = {0.5: BEFORE - 3 * 16 * 3 * 24, 0.25: BEFORE - 3 * 8 * 3 * 24}
Calls = dict[str, list[Any]]


def run(*arguments: Any, code: int = 0) -> Result:
    return call("sweep", *arguments, code=code)


def run_json(*arguments: Any) -> Data:
    return call_json("sweep", *arguments)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saved(out: Path) -> Any:
    return json.loads((out / SWEEP_FILE).read_text())


@dataclass(frozen=True)
class Whole:
    """An undisturbed sweep that kept its experts; not to be changed."""

    folder: Path
    found: Data

    @property
    def spec(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def points(self) -> list[Any]:
        found: list[Any] = self.found["points"]
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Whole:
    """With questions for one corpus."""
    folder = tmp_path_factory.mktemp("whole")
    pairs = [("heart", "law"), ("judge", "blood"), ("sum", "we"), ("numbers", "der"), ("Arzt", "is"), ("und", "a")]
    rows = [{"question": f"the {a} {b}", "choices": [a, b], "answer": i % 2} for i, (a, b) in enumerate(pairs)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = plain_spec(folder, tiny_llama)
    data["corpora"]["sources"]["qa"]["questions"] = str(folder / "questions.jsonl")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    out = ("--store", folder / "store", "--out", folder / "sweep", "--keep-experts", "--picture", folder / "curve.png")
    return Whole(folder, run_json(folder / "tiny.yaml", "--budgets", BUDGETS, *out))


@pytest.fixture
def calls(monkeypatch: Patch) -> Calls:
    """The first arguments of each call of a costly function, by its name."""
    calls: Calls = {}

    def note(path: str, noted: list[Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            noted.append(args[0])
            return original(*args, **kwargs)

        original = everywhere(monkeypatch, f"expertprune.{path}", call)

    for path in ("pruning.write.prune", "models.loading.load_model"):
        note(path, calls.setdefault(path.rpartition(".")[2], []))
    return calls


@pytest.fixture
def warm(whole: Whole, store: Path) -> Path:
    """This test's store, with the profiles of the whole sweep."""
    shutil.copytree(whole.folder / "store" / "profiles", store / "profiles")
    return store


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_each_point_is_what_build_gives_under_the_same_budget(whole: Whole, tmp_path: Path, warm: Path) -> None:
    assert whole.found["base"]["parameters"] == BEFORE
    assert [point["budget"] for point in whole.points] == [0.5, 0.25]
    for point in whole.points:
        value = point["budget"]
        folder = tmp_path / f"built-{value}"
        built = call_json("build", whole.spec, "--out", folder, "--set", f"budget.ffn={value}")
        assert point["parameters"] == built["parameters"] == {"before": BEFORE, "after": AFTER[value]}
        assert (point["fraction"], point["bytes"]) == (AFTER[value] / BEFORE, built["bytes"])
        for name, result in built["evaluation"]["corpora"].items():
            assert point["corpora"][name]["metrics"] == result["metrics"]
            assert point["corpora"][name]["documents"] == 4
        assert point["corpora"]["task/qa"]["questions"] == 6
        for group in get_args(Group):
            expected = pooled(Evaluation.from_document(built["evaluation"]), group)
            assert expected is not None
            assert point[group] == expected.model_dump(mode="json")
        for path in folder.iterdir():
            assert (whole.folder / "sweep" / f"tiny-{value}" / path.name).read_bytes() == path.read_bytes()
    assert names(whole.folder / "sweep") == {"sweep.json", "tiny-0.5", "tiny-0.25"}
    assert saved(whole.folder / "sweep") == {**whole.found, "earlier": []}
    assert (whole.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("budget", "changed"),
    [
        ({"ffn": 0.1, "kv_groups": 0.1}, {"ffn": 0.34, "kv_groups": 0.34}),
        ({"ffn": 0, "query_heads": 0.1}, {"query_heads": 0.34}),
        ({"parameters": 0.01, "kv_groups": 1}, {"parameters": 0.34}),
        ({"max_parameters": 1000}, {"max_parameters": None, "parameters": 0.34}),
        ({"retention": {"expert": 0.9}}, {"retention": None, "parameters": 0.34}),
        ({"layers": 1, "vocabulary": {"keep": 64}}, {"layers": 0.34}),
    ],
)
def test_the_value_replaces_what_the_spec_removes(budget: Data, changed: Data) -> None:
    given = Budget.model_validate({**budget, "multiple_of": 4})
    assert of_size(given, sized_keys(given), 0.34) == Budget.model_validate({**budget, "multiple_of": 4, **changed})


def test_what_is_finished_is_not_computed_again(
    whole: Whole, tmp_path: Path, warm: Path, temporary: Path, calls: Calls
) -> None:
    points, out = whole.points, tmp_path / "sweep"
    shutil.copytree(whole.folder / "store" / "sweeps", warm / "sweeps")
    text = run(whole.spec, "--budgets", BUDGETS, "--out", out).stdout
    assert saved(out)["points"] == points
    rows = [line.replace(" ", "") for line in text.splitlines() if line.startswith("│")]
    for row, point in zip(rows, points, strict=True):
        intervals = [
            f"{numbers['retention']:.4f}({numbers['low']:.4f}to{numbers['high']:.4f})"
            for numbers in (point["expert"], point["general"])
        ]
        after, accuracy = point["parameters"]["after"], point["corpora"]["task/qa"]["metrics"]["questions"]
        size = f"{after:,}│{100 * after / BEFORE:.1f}%│{point['bytes'] / 1e6:.1f}"
        assert row == f"│{point['budget']}│{size}│{'│'.join(intervals)}│{accuracy['expert']:.4f}│"
        assert f"(base {accuracy['base']:.4f})" in text
    assert run_json(whole.spec, "--budgets", "0.25", "--out", out)["points"] == points[1:]
    assert (calls["prune"], calls["load_model"]) == ([], []), "no model is loaded for what is known"
    assert run_json(whole.spec, "--budgets", "0.75,0.5,0.25", "--out", out)["points"][1:] == points
    assert len(calls["prune"]) == 1
    assert [each.name for each in calls["load_model"]] == ["llama"], "experts are measured while they are repaired"
    assert list(temporary.iterdir()) == []


def test_what_the_numbers_depend_on_is_computed_again(
    tmp_path: Path, spec_data: Data, calls: Calls, monkeypatch: Patch
) -> None:
    spec_data["evaluate"] = {"corpora": ["medical"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec_data))
    arguments = [tmp_path / "tiny.yaml", "--budgets", "0.5", "--out", tmp_path / "sweep"]
    found = run_json(*arguments)["points"]
    for change in ("evaluation", "path", "evaluate.documents=3", "compensation=none"):
        setting = ["--set", change] if "=" in change else []
        if not setting:
            write_corpus(Path(spec_data["corpora"]["sources"]["medical"][change]), sentences=4, seed=77 + len(found))
        found = run_json(*arguments, *setting)["points"] + found
        assert len(calls["prune"]) == len(found)
        assert found[0]["expert"] != found[1]["expert"]
    monkeypatch.setattr(points, "computed_by", lambda sources: "other code")
    found = run_json(*arguments)["points"] + found
    assert len(calls["prune"]) == len(found), "the code that prunes and measures"
    kept = saved(tmp_path / "sweep")
    assert kept["base"]["model"] == Path(spec_data["base"]).name
    assert kept["points"] == found[:1], "what was found stays"
    assert sorted(kept["earlier"], key=str) == sorted(found[1:], key=str)


def test_conversations_of_one_text_are_other_points() -> None:
    def key(document: Document) -> str:
        evaluated = [Corpus(CorpusName("domain", "medical"), (), (document,))]
        found = SimpleNamespace(base=SimpleNamespace(dtype="float32", templates_digest=""), evaluated=evaluated)
        return point_key(SimpleNamespace(document=dict), found)  # type: ignore[arg-type]

    def talk(*roles: str, **changes: Any) -> Document:
        messages = [{"role": role, "content": word} for role, word in zip(roles, ("heart", "blood"), strict=True)]
        return Document.of(Conversation.of(messages, **changes))

    documents = [talk("user", "assistant"), talk("system", "assistant"), talk("user", "assistant", verbatim=True)]
    documents.append(Document(documents[0].text))
    assert len({each.text for each in documents}) == 1
    assert len({key(each) for each in documents}) == 4


@pytest.mark.parametrize(
    ("keep", "place"), [(False, "pruning.write.prune"), (True, "evaluation.reading.compare"), (False, "repair")]
)
def test_an_interrupted_sweep_goes_on_where_it_was(
    whole: Whole, tmp_path: Path, warm: Path, temporary: Path, calls: Calls, keep: bool, place: str
) -> None:
    """It is interrupted in the second expert, the repair after its first finished weight."""
    out = tmp_path / "sweep"
    arguments = [whole.spec, "--budgets", BUDGETS, "--out", out, *["--keep-experts"] * keep]
    made: list[Any] = []

    def interrupted(*args: Any) -> Any:
        made.append(args[1] if place == "repair" else place)
        result = original(*args)
        if made.count(made[-1]) == 2:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patched:
        original: Any = Unfinished.put
        if place == "repair":
            patched.setattr(Unfinished, "put", interrupted)
        else:
            original = everywhere(patched, f"expertprune.{place}", interrupted)
        assert "interrupted" in run(*arguments, code=1).stderr
    assert names(out) == {"sweep.json", *["tiny-0.5", "tiny-0.25"] * keep}, "nothing half-written"
    assert list(temporary.iterdir()) == []
    assert saved(out)["points"] == whole.points[:1]
    # The second repair has the base's stream from the first; that of the next run does not, so its work is another's.
    assert len(list((warm / "repairs").glob("*"))) == (place == "repair")
    calls["prune"].clear()
    assert run_json(*arguments) == whole.found
    assert len(calls["prune"]) == (0 if keep else 1), "an expert that is whole is only measured"
    assert list((warm / "repairs").glob("*")) == []


def test_sweeps_into_one_folder_at_once_keep_the_points_of_each_other(whole: Whole, tmp_path: Path, warm: Path) -> None:
    shutil.copytree(whole.folder / "store" / "sweeps", warm / "sweeps")
    out = tmp_path / "sweep"
    both = [_begin(whole.spec, None, [value], out, False, warm, silent, Local()) for value in (0.5, 0.25)]
    for each in both:
        each.write()
    kept = saved(out)
    assert (kept["points"], kept["earlier"]) == (whole.points[1:], whole.points[:1])


def test_experts_that_are_gone_are_made_again(whole: Whole, tmp_path: Path, warm: Path, calls: Calls) -> None:
    shutil.copytree(whole.folder / "store" / "sweeps", warm / "sweeps")
    out = tmp_path / "sweep"
    arguments = [whole.spec, "--budgets", "0.5", "--out", out, "--keep-experts"]
    first = {**whole.found, "points": whole.points[:1]}
    assert run_json(*arguments) == first
    assert len(calls["prune"]) == 1
    assert json.loads((out / "tiny-0.5" / "expertprune.json").read_text())["evaluation"] is not None
    for record in (out / "sweep.json", *(warm / "sweeps").iterdir()):  # as if killed between the expert and its record
        record.unlink()
    assert run_json(*arguments) == first
    assert len(calls["prune"]) == 1
    shutil.rmtree(out / "tiny-0.5")
    assert run_json(*arguments) == first
    assert len(calls["prune"]) == 2
    weights = next((out / "tiny-0.5").glob("*.safetensors"))
    for file in (out / "tiny-0.5" / "config.json", weights):
        file.unlink()
        assert run_json(*arguments) == first
        assert file.is_file()


def test_an_expert_that_was_stopped_before_its_evaluation_is_evaluated_by_the_next_sweep(
    whole: Whole, tmp_path: Path, warm: Path, calls: Calls
) -> None:
    """Its point is in the store, from a sweep that kept no experts."""
    shutil.copytree(whole.folder / "store" / "sweeps", warm / "sweeps")
    arguments = [whole.spec, "--budgets", "0.5", "--out", tmp_path / "sweep", "--keep-experts"]
    with pytest.MonkeyPatch.context() as patched:

        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        patched.setattr(points, "record", interrupted)
        run(*arguments, code=1)
    place = tmp_path / "sweep" / "tiny-0.5"
    assert Expert.load(place).evaluation is None
    assert run_json(*arguments)["points"] == whole.points[:1]
    assert Expert.load(place).evaluation == Expert.load(whole.folder / "sweep" / "tiny-0.5").evaluation
    assert len(calls["prune"]) == 1


def test_the_evaluation_of_an_expert_is_not_written_into_another_one(whole: Whole, tmp_path: Path, warm: Path) -> None:
    """A build replaces the expert while the sweep measures it."""
    out = tmp_path / "sweep"
    place = Path(shutil.copytree(whole.folder / "sweep" / "tiny-0.5", out / "tiny-0.5"))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        result = measured(*args, **kwargs)
        shutil.rmtree(place)
        shutil.copytree(whole.folder / "sweep" / "tiny-0.25", place)
        return result

    with pytest.MonkeyPatch.context() as patched:
        measured: Any = everywhere(patched, "expertprune.stages.evaluate.measure_folder", replaced)
        error = run(whole.spec, "--budgets", "0.5", "--out", out, "--keep-experts", code=2).stderr
    assert "another expert took its place while it was measured" in error
    assert Expert.load(place).evaluation == Expert.load(whole.folder / "sweep" / "tiny-0.25").evaluation


def test_what_cannot_be_swept_is_refused_at_once(
    spec_file: Path, store: Path, no_model: None, monkeypatch: Patch
) -> None:
    folder = spec_file.parent
    monkeypatch.chdir(folder)
    contents = {"file": "x", "base/config.json": "{}", "text/sweep.json": "{", "theirs/tiny-0.5/mine.txt": "x",
                "locked/x": "", "wrong/sweep.json": '{"kind": "sweep", "schema": 1, "points": [{}]}'}  # fmt: skip
    for name, content in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    read_only(monkeypatch, Path("locked"))
    before = sorted(folder.rglob("*"))

    def refused(budgets: str, *args: str) -> str:
        result = run(spec_file, "--budgets", budgets, *args, code=2)
        assert result.stdout == ""
        return result.stderr

    for args, words in (
        (["--set", "budget={retention: {expert: 0.9}}"], "budget.retention: a spec with a retention floor"),
        (["--set", "budget={ffn: 0}"], "budget: it removes nothing"),
        (["--set", "evaluate.enabled=false"], "evaluate.enabled: "),
        (["--set", "evaluate.metrics=[kl]"], "evaluate.metrics: a sweep measures bits_per_byte"),
        (["--keep-experts"], "(--out)"),
        (["--picture", "curve.gif"], "curve.gif: a picture is a .png or .svg file"),
        (["--picture", "missing/curve.png"], "missing/curve.png: cannot be written: there is no folder"),
        (["--out", "file"], "is a file"),
        (["--out", "base"], "base: holds a model; choose another --out for the sweep"),
        (["--out", "locked/sweep"], "locked/sweep/sweep.json: cannot be written: Read-only file system"),
        (["--out", "text"], "sweep.json: not a sweep"),
        (["--out", "wrong"], "sweep.json: not a sweep"),
        (["--out", "theirs", "--keep-experts"], "tiny-0.5: exists, and is no expert of this spec and budget"),
    ):
        assert words in refused("0.25,0.5", *args)
    assert "'x', '': not a number" in refused("0.1,x,")
    for wrong, words in ((["0.1"], "'0.1' is"), ([True], "True is"), ([], "name at least one")):  # from Python
        with pytest.raises(SpecError, match=words):
            expertprune.sweep(spec_file, wrong)  # type: ignore[arg-type]
    lines = refused("0.25,1.5,0,-0.5,nan,0.01,0.25,0.97").splitlines()
    # 0.01 of 32 neurons rounds to none with widths that are multiples of 4; 0.97 leaves less than the floor of a tenth.
    expected = [*(f"{value} is not" for value in ("1.5", "0.0", "-0.5", "nan")), "0.25 is there twice",
                "0.01: budget.ffn: 0.01 removes nothing", "0.97: budget.ffn: 0.97 is too much"]  # fmt: skip
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith(f"error: budgets: {words}")
    assert sorted(folder.rglob("*")) == before
    assert {name: Path(name).read_text() for name in contents} == contents
    assert not (store / "profiles").exists()


def test_a_picture_names_its_curves_and_is_the_same_every_time(tmp_path: Path) -> None:
    """A group may have no interval, or not be there."""
    kept = Measured(examples=9, expert=1.0, retention=0.9, low=0.8, high=0.95)
    single, path = Measured(examples=1, expert=1.0, retention=0.8), tmp_path / "curve.svg"

    def drawn(expert: Measured, general: Measured | None, *budgets: float) -> set[str]:
        about = {"parameters": {"before": 100, "after": 90}, "bytes": 1, "corpora": {}}
        points = [Point(budget=budget, key=str(budget), fraction=1 - 0.6 * budget, expert=expert, general=general, **about)
                  for budget in budgets]  # fmt: skip
        base = SweptBase(model="tiny", digest="d", parameters=100)
        found = Sweep(name="tiny", base=base, settings=Evaluate(), points=points)
        assert ["no interval" in row[4] for row in sweep_rows(found)] == [expert is single] * len(budgets)
        path.unlink(missing_ok=True)
        retention_curve(found, path)
        root = xml.etree.ElementTree.parse(path).getroot()
        return {" ".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")}

    assert {"expert", "general", "base"} <= drawn(kept, kept, 0.5, 0.1)
    before = path.read_bytes()
    drawn(kept, kept, 0.1, 0.5)
    assert path.read_bytes() == before
    assert drawn(single, None, 0.5, 0.1) & {"expert", "general"} == {"expert"}
