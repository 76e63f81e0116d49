"""Sweeps of a tiny model: the numbers of `build`, pooled summaries, interruptions, refusals, the picture."""

from __future__ import annotations

import json
import shutil
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from click.testing import Result
from PIL import Image

import expertprune
from expertprune.artifacts.evaluation import Evaluation, Group, Measured
from expertprune.artifacts.sweep import Point, Sweep, SweptBase
from expertprune.errors import SpecError
from expertprune.evaluation.retention import pooled
from expertprune.pruning.unfinished import Unfinished
from expertprune.reporting.pictures import retention_curve
from expertprune.reporting.tables import sweep_rows
from expertprune.spec.schema import Evaluate
from expertprune.stages.sweep import SWEEP_FILE
from tests.calling import call, call_json
from tests.patching import everywhere, read_only
from tests.tiny import write_corpus

BUDGETS = "0.5,0.25"  # not ascending
# The tiny model's parameters, and what goes with half and a quarter of 32 neurons: three vectors of 24 in three layers.
BEFORE = 2 * 64 * 24 + 24 + 3 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 32 * 24 + 2 * 24)
AFTER = {0.5: BEFORE - 3 * 16 * 3 * 24, 0.25: BEFORE - 3 * 8 * 3 * 24}


@pytest.fixture
def spec_file(tmp_path: Path, spec_data: dict[str, Any]) -> Path:
    """With questions for one corpus."""
    pairs = [("heart", "law"), ("judge", "blood"), ("sum", "we"), ("numbers", "der"), ("Arzt", "is"), ("und", "a")]
    rows = [{"question": f"the {a} {b}", "choices": [a, b], "answer": i % 2} for i, (a, b) in enumerate(pairs)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec_data["corpora"]["sources"]["qa"]["questions"] = str(tmp_path / "questions.jsonl")
    return write_spec(tmp_path, spec_data)


def run(*arguments: Any, code: int = 0) -> Result:
    return call("sweep", *arguments, code=code)


def run_json(*arguments: Any) -> dict[str, Any]:
    return call_json("sweep", *arguments)


def build(spec: Path, out: Path, *arguments: Any) -> dict[str, Any]:
    return call_json("build", spec, "--out", out, *arguments)


def write_spec(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder / "tiny.yaml"


Calls = dict[str, list[Any]]


def counted(monkeypatch: pytest.MonkeyPatch) -> Calls:
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
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return counted(monkeypatch)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_each_point_is_what_build_gives_under_the_same_budget(
    tmp_path: Path, spec_file: Path, calls: Calls, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    streams = everywhere(monkeypatch, "expertprune.pruning.repair._passenger_streams",
                         lambda job: (found := streams(job), read.extend(found))[0])  # fmt: skip
    data = run_json(spec_file, "--budgets", BUDGETS)
    assert [point["budget"] for point in data["points"]] == [0.5, 0.25]
    base_name = Path(yaml.safe_load(spec_file.read_text())["base"]).name
    assert [folder.name for folder in calls["load_model"]] == [base_name], (
        "experts are measured while they are repaired"
    )
    assert read == ["passengers in the base", "passengers", "passengers"], "the base reads once"
    assert list(temporary.iterdir()) == []
    for point in data["points"]:
        value = point["budget"]
        built = build(spec_file, tmp_path / f"built-{value}", "--set", f"budget.ffn={value}")
        assert point["parameters"] == built["parameters"] == {"before": BEFORE, "after": AFTER[value]}
        assert point["fraction"] == AFTER[value] / BEFORE
        assert point["bytes"] == built["bytes"]
        for name, result in built["evaluation"]["corpora"].items():
            assert point["corpora"][name]["metrics"] == result["metrics"]
            assert point["corpora"][name]["documents"] == 4
        assert point["corpora"]["task/qa"]["questions"] == 6
        for group in get_args(Group):
            expected = pooled(Evaluation.from_document(built["evaluation"]), group)
            assert expected is not None
            assert point[group] == expected.model_dump(mode="json")
    assert data["base"]["parameters"] == BEFORE
    out = tmp_path / "sweep"
    kept = run_json(spec_file, "--budgets", BUDGETS, "--out", out, "--keep-experts", "--picture", out / "curve.png")
    assert kept["points"] == data["points"]
    assert {path.name for path in out.iterdir()} == {"sweep.json", "tiny-0.5", "tiny-0.25", "curve.png"}
    for path in (tmp_path / "built-0.5").iterdir():
        assert (out / "tiny-0.5" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((out / SWEEP_FILE).read_text()) == {**kept, "earlier": []}
    with Image.open(out / "curve.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 50, "something is drawn"
    assert list(temporary.iterdir()) == []
    half, quarter = (point["expert"] for point in data["points"])
    assert half["base"] == quarter["base"]
    assert half["expert"] != quarter["expert"]


@pytest.mark.parametrize(
    ("budget", "same"),
    [
        ({"ffn": 0.1, "kv_groups": 0.1}, ["budget.ffn=0.34", "budget.kv_groups=0.34"]),
        ({"ffn": 0, "query_heads": 0.1}, ["budget.query_heads=0.34"]),
        ({"parameters": 0.01, "kv_groups": 1}, ["budget.parameters=0.34"]),
        ({"max_parameters": 1000}, ["budget.max_parameters=null", "budget.parameters=0.34"]),
    ],
)
def test_the_value_replaces_what_the_spec_removes(
    tmp_path: Path, spec_data: dict[str, Any], tiny_llama: Path, budget: dict[str, Any], same: list[str]
) -> None:
    spec_data["budget"] = {**budget, "multiple_of": 4}
    spec_data["evaluate"] = {"corpora": ["medical"], "documents": 2, "metrics": ["bits_per_byte"]}
    spec = write_spec(tmp_path, spec_data)
    (point,) = expertprune.sweep(spec, [0.34]).points
    built = build(spec, tmp_path / "built", *(part for setting in same for part in ("--set", setting)))
    assert point.parameters == built["parameters"]
    assert point.parameters["after"] < BEFORE
    metrics = point.corpora["domain/medical"].model_dump(mode="json")["metrics"]
    assert metrics == built["evaluation"]["corpora"]["domain/medical"]["metrics"]
    assert point.general is None


def test_what_is_finished_is_not_computed_again_and_the_table_says_what_the_json_says(
    tmp_path: Path, spec_file: Path, calls: Calls
) -> None:
    data = run_json(spec_file, "--budgets", BUDGETS, "--out", tmp_path / "sweep")
    assert len(calls["prune"]) == 2
    text = run(spec_file, "--budgets", BUDGETS, "--out", tmp_path / "sweep").stdout
    assert len(calls["prune"]) == 2
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert "task/qa" in text
    expected = []
    for point in data["points"]:
        intervals = [
            f"{numbers['retention']:.4f} ({numbers['low']:.4f} to {numbers['high']:.4f})"
            for numbers in (point["expert"], point["general"])
        ]
        after = point["parameters"]["after"]
        size = [f"{after:,}", f"{100 * after / BEFORE:.1f}%", f"{point['bytes'] / 1e6:.1f}"]
        accuracy = point["corpora"]["task/qa"]["metrics"]["questions"]["expert"]
        expected.append([str(point["budget"]), *size, *intervals, f"{accuracy:.4f}"])
    assert rows == expected
    base = data["points"][0]["corpora"]["task/qa"]["metrics"]["questions"]["base"]
    assert f"(base {base:.4f})" in text
    calls["load_model"].clear()
    assert run_json(spec_file, "--budgets", "0.25", "--out", tmp_path / "sweep")["points"] == data["points"][1:]
    assert (len(calls["prune"]), calls["load_model"]) == (2, []), "no model is loaded for what is known"
    wider = run_json(spec_file, "--budgets", "0.75,0.5,0.25", "--out", tmp_path / "sweep")
    assert wider["points"][1:] == data["points"]
    assert len(calls["prune"]) == 3


@pytest.mark.parametrize("change", ["evaluation", "path", "evaluate.documents=3", "compensation=none"])
def test_a_change_that_the_numbers_depend_on_is_computed_again(
    tmp_path: Path, spec_file: Path, spec_data: dict[str, Any], calls: Calls, change: str
) -> None:
    out, settings = tmp_path / "sweep", []
    before = run_json(spec_file, "--budgets", "0.5", "--out", out)
    if "=" in change:
        settings = ["--set", change]
    else:
        write_corpus(Path(spec_data["corpora"]["sources"]["medical"][change]), sentences=4, seed=77)
    after = run_json(spec_file, "--budgets", "0.5", "--out", out, *settings)
    assert len(calls["prune"]) == 2
    assert after["points"][0]["expert"] != before["points"][0]["expert"]
    saved = json.loads((out / "sweep.json").read_text())
    assert (saved["points"], saved["earlier"]) == (after["points"], before["points"]), "what was found stays"


@pytest.mark.parametrize(("keep", "place"), [(False, "pruning.write.prune"), (True, "evaluation.reading.compare")])
def test_an_interrupted_sweep_goes_on_where_it_was(
    tmp_path: Path, spec_file: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, place: str
) -> None:
    undisturbed = ["--store", tmp_path / "other", *(["--out", tmp_path / "whole", "--keep-experts"] * keep)]
    whole = run_json(spec_file, "--budgets", "0.5,0.25", *undisturbed)
    out = tmp_path / "sweep"
    arguments = [spec_file, "--budgets", "0.5,0.25", "--out", out, *["--keep-experts"] * keep]
    made: list[str] = []

    def interrupted(*args: Any) -> Any:
        made.append(place)
        result = original(*args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        original = everywhere(patched, f"expertprune.{place}", interrupted)
        assert "interrupted" in run(*arguments, code=1).stderr
    whole_experts = ["tiny-0.5", "tiny-0.25"] * keep
    assert {path.name for path in out.iterdir()} == {"sweep.json", *whole_experts}, "nothing half-written"
    assert list(temporary.iterdir()) == []
    saved = json.loads((out / "sweep.json").read_text())
    assert saved["points"] == whole["points"][:1]
    calls = counted(monkeypatch)
    assert run_json(*arguments) == whole
    assert len(calls["prune"]) == (0 if keep else 1), "an expert that is whole is only measured"


def test_what_a_sweep_left_of_a_repair_goes_with_the_next(
    spec_file: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second repair of the first run has the base's stream from the first; that of the next run does not."""
    put, names = Unfinished.put, []

    def interrupted(unfinished: Unfinished, name: str, weight: Any) -> None:
        names.append(name)
        put(unfinished, name, weight)
        if names.count(name) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Unfinished, "put", interrupted)
        assert "interrupted" in run(spec_file, "--budgets", "0.5,0.25", code=1).stderr
    assert len(list((store / "repairs").iterdir())) == 1
    run(spec_file, "--budgets", "0.5,0.25")
    assert list((store / "repairs").iterdir()) == []


def test_experts_that_are_gone_or_were_not_kept_are_made_again(
    tmp_path: Path, spec_file: Path, store: Path, calls: Calls
) -> None:
    out = tmp_path / "sweep"
    first = run_json(spec_file, "--budgets", "0.5", "--out", out)
    assert run_json(spec_file, "--budgets", "0.5", "--out", out, "--keep-experts") == first
    assert len(calls["prune"]) == 2
    assert json.loads((out / "tiny-0.5" / "expertprune.json").read_text())["evaluation"] is not None
    run_json(spec_file, "--budgets", "0.5", "--out", out, "--keep-experts")
    assert len(calls["prune"]) == 2
    for record in (out / "sweep.json", *(store / "sweeps").iterdir()):  # as if killed between the expert and its record
        record.unlink()
    assert run_json(spec_file, "--budgets", "0.5", "--out", out, "--keep-experts") == first
    assert len(calls["prune"]) == 2
    shutil.rmtree(out / "tiny-0.5")
    assert run_json(spec_file, "--budgets", "0.5", "--out", out, "--keep-experts") == first
    assert len(calls["prune"]) == 3


@pytest.fixture
def refused(spec_file: Path, store: Path, no_model: None) -> Any:
    """Runs a sweep that must be refused before a model is loaded or anything is written; gives the messages."""

    def sweep(*args: Any) -> list[str]:
        before = sorted(spec_file.parent.rglob("*"))
        result = run(spec_file, *args, code=2)
        assert result.stdout == ""
        assert sorted(spec_file.parent.rglob("*")) == before
        assert not (store / "profiles").exists()
        return result.stderr.splitlines()

    return sweep


def test_all_illegal_budgets_are_reported_at_once(refused: Any, spec_file: Path) -> None:
    for wrong, said in ((["0.1"], "'0.1' is"), ([True], "True is"), ([], "name at least one")):  # from Python
        with pytest.raises(SpecError, match=said):
            expertprune.sweep(spec_file, wrong)  # type: ignore[arg-type]
    assert "'x', '': not a number" in "\n".join(refused("--budgets", "0.1,x,"))
    lines = refused("--budgets", "0.25,1.5,0,-0.5,nan,0.01,0.25,0.97")
    assert len(lines) == 7
    for line, value in zip(lines, ("1.5", "0.0", "-0.5", "nan"), strict=False):
        assert f"error: budgets: {value} is not" in line
    assert lines[4] == "error: budgets: 0.25 is there twice"
    # 0.01 of 32 neurons rounds to none with widths that are multiples of 4; 0.97 leaves less than the floor of a tenth.
    assert lines[5].startswith("error: budgets: 0.01: budget.ffn: 0.01 removes nothing")
    assert lines[6].startswith("error: budgets: 0.97: budget.ffn: 0.97 is too much")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "budget={retention: {expert: 0.9}}"], "budget.retention: a spec with a retention floor"),
        (["--set", "budget={ffn: 0}"], "budget: it removes nothing"),
        (["--set", "evaluate.enabled=false"], "evaluate.enabled: "),
        (["--set", "evaluate.metrics=[kl]"], "evaluate.metrics: a sweep measures bits_per_byte"),
        (["--keep-experts"], "(--out)"),
        (["--picture", "curve.gif"], "curve.gif: a picture is a .png or .svg file"),
        (["--picture", "missing/curve.png"], "missing/curve.png: cannot be written: there is no folder"),
        (["--out", "file/sweep"], "not a folder"),
        (["--out", "file"], "is a file"),
        (["--out", "locked/sweep"], "locked/sweep/sweep.json: cannot be written: Read-only file system"),
        (["--out", "text"], "sweep.json: not a sweep"),
        (["--out", "wrong"], "sweep.json: not a sweep"),
        (["--out", "theirs", "--keep-experts"], "tiny-0.5: exists, and is no expert of this spec and budget"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_work(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    contents = {"text/sweep.json": "{", "theirs/tiny-0.5/mine.txt": "x", "locked/x": "",
                "wrong/sweep.json": '{"kind": "sweep", "schema": 1, "points": [{}]}'}  # fmt: skip
    for name, content in contents.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(content)
    read_only(monkeypatch, Path("locked"))
    message = "\n".join(refused("--budgets", "0.25,0.5", *args))
    assert "rror: " in message
    assert words in message
    assert {name: Path(name).read_text() for name in contents} == contents


def point(budget: float, expert: float, general: float) -> Point:
    def kept(retention: float) -> Measured:
        return Measured(examples=9, expert=1.0, retention=retention, low=retention - 0.02, high=retention + 0.03)

    parameters = {"before": 100, "after": 90}
    return Point(budget=budget, key=str(budget), parameters=parameters, fraction=1 - 0.6 * budget, bytes=1, corpora={},
                 expert=kept(expert), general=kept(general))  # fmt: skip


def texts(path: Path) -> set[str]:
    root = xml.etree.ElementTree.parse(path).getroot()
    return {" ".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_an_svg_names_its_curves_and_is_the_same_every_time(tmp_path: Path) -> None:
    points = [point(0.5, 0.8, 0.6), point(0.1, 0.97, 0.95)]
    base = SweptBase(model="tiny", digest="d", parameters=100)
    found = Sweep(name="tiny", base=base, settings=Evaluate(), points=points)
    retention_curve(found, tmp_path / "a.svg")
    retention_curve(found.model_copy(update={"points": points[::-1]}), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert {"expert", "general", "base"} <= texts(tmp_path / "a.svg")
    alone = [each.model_copy(update={"general": None}) for each in points]
    retention_curve(found.model_copy(update={"points": alone}), tmp_path / "c.svg")
    assert "expert" in texts(tmp_path / "c.svg")
    assert "general" not in texts(tmp_path / "c.svg")


def test_a_group_without_an_interval_is_drawn_and_said(tmp_path: Path) -> None:
    points = [point(0.5, 0.8, 0.6), point(0.1, 0.97, 0.95)]
    single = [
        each.model_copy(update={"expert": Measured(examples=1, expert=1.0, retention=kept)})
        for each, kept in zip(points, (0.8, 0.97), strict=True)
    ]
    base = SweptBase(model="tiny", digest="d", parameters=100)
    found = Sweep(name="tiny", base=base, settings=Evaluate(), points=single)
    retention_curve(found, tmp_path / "a.svg")
    assert "expert" in texts(tmp_path / "a.svg")
    assert [row[4] for row in sweep_rows(found)] == ["0.8000 (no interval)", "0.9700 (no interval)"]
