"""The report: its numbers are the JSON's, its HTML is valid, its text is escaped, and what is not there is said."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from click.testing import Result

from expertprune.files import to_json
from expertprune.reporting.page import PlacedNumber, charts, headline_rows, render, report
from tests.calling import call, call_json
from tests.experts import about, copied, measured
from tests.html import at, numbers, parsed, words

Build = tuple[Path, Path]
Page = tuple[dict[str, Any], str]
NAME = "<script>alert(1)</script>"


def run(*args: Any, code: int = 0) -> Result:
    return call("report", *args, code=code)


@pytest.fixture(scope="module")
def full(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The data and the page of an expert of which everything is known."""
    folder = measured(copied(tiny_build, tmp_path_factory.mktemp("full") / "e"))
    data = report(folder, store=tiny_build[1])
    page = (folder / "report.html").read_text()
    report(folder, store=tiny_build[1])
    assert (folder / "report.html").read_text() == page  # its own size, its own card: nothing of it goes in
    return data, page


@pytest.fixture(scope="module")
def pair(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The same with another expert beside it."""
    folder = tmp_path_factory.mktemp("pair")
    first = measured(copied(tiny_build, folder / "first"))
    data = report(first, [copied(tiny_build, folder / "second", evaluation=None)], store=tiny_build[1])
    return data, (first / "comparison.html").read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose pictures are empty, which is quicker."""
    monkeypatch.setattr(charts, "svg", lambda *_: "<svg></svg>")


@pytest.mark.parametrize("which", ["full", "pair"])
def test_every_number_on_the_page_is_that_of_the_json(which: str, request: pytest.FixtureRequest) -> None:
    data, text = request.getfixturevalue(which)
    data = json.loads(to_json(data))  # what --json prints
    found = numbers(parsed(text))
    assert len(found) > 60
    for pointer, (exact, written) in found.items():
        assert exact == at(data, pointer), pointer
        digits = re.sub(r"[,%×]| MB", "", written)
        scale = 100 if "%" in written else 1e-6 if "MB" in written else 1
        unit = 10.0 ** -len(digits.partition(".")[2])
        assert abs(float(digits) - exact * scale) <= unit / 2 * (1 + 1e-9), f"{pointer}: {exact} is written {written}"


def test_the_numbers_that_matter_are_on_the_page(full: Page) -> None:
    data, text = full
    expert = data["experts"][0]
    expected = {f"retention/{group}/{key}" for group in ("expert", "general") for key in ("retention", "low", "high")}
    expected |= {f"size/parameters/{key}" for key in ("base", "expert", "fraction")}
    expected |= {"speed/ratio", "throughput/limit", "throughput/of_limit"}
    keys = {"base", "expert", "retention", "ratio", "low", "high", "chance", "agreement", "gained", "lost"}
    for place, rows in (("metrics", expert["metrics"]), ("throughput/rows", expert["throughput"]["rows"])):
        for number, row in enumerate(rows):
            expected |= {f"{place}/{number}/{key}" for key in keys & row.keys() if row[key] is not None}
    for s, c in itertools.product((0, 1), range(4)):
        expected |= {f"relevance/{s}/corpora/{c}/by_layer/{layer}" for layer in range(3)}
        expected |= {f"relevance/{s}/overlap/matrix/{c}/{other}" for other in range(4)}
    expected |= {f"alignment/{value}/layers/{layer}" for value in (0, 1) for layer in range(3)}
    expected |= {f"structures/{s}/kept_by_layer/{layer}" for s in (0, 2) for layer in range(3)}
    expected |= {f"structures/{s}/kinds/{kind}/{key}" for s in (0, 2) for kind in range(3) for key in ("units", "kept")}
    assert {f"/experts/0/{place}" for place in expected} - set(numbers(parsed(text))) == set()


def test_no_number_gets_onto_the_page_without_its_place() -> None:
    template = jinja2.Environment(autoescape=True).from_string("{{ number }}")
    with pytest.raises(TypeError, match="/a: a number"):
        template.render(number=PlacedNumber(0.5, "/a"))


@pytest.mark.usefixtures("undrawn")
def test_the_headline_of_terminal_and_card_is_the_pages(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / "e"))
    printed = run(folder, "--store", tiny_build[1]).output
    card = (folder / "README.md").read_text()
    data = call_json("report", folder, "--store", tiny_build[1])
    assert (data["kind"], data["page"], data["lineup"]) == ("report", str(folder / "report.html"), None)
    assert render(data) == (folder / "report.html").read_text()
    expert = data["experts"][0]
    rows = dict(headline_rows(expert))
    kept, parameters = expert["retention"]["expert"], expert["size"]["parameters"]
    interval = f"{kept['retention']:.4f} ({kept['low']:.4f} to {kept['high']:.4f})"
    assert rows["expert retention"] == f"{interval}, bits per byte"
    for text in (interval, rows["general retention"].split(",")[0], "1.1250 (1.1000 to 1.1500)"):
        assert text in printed
        assert text in card
    assert rows["parameters"].startswith(f"{parameters['expert']:,} of {parameters['base']:,} (")
    assert str(folder / "report.html") in printed.replace("\n", "")


@pytest.mark.usefixtures("undrawn")
def test_a_group_of_one_document_has_no_interval(tiny_build: Build, tmp_path: Path) -> None:
    evaluation = about(tiny_build[0])["evaluation"]
    general = evaluation["corpora"]["general/general"]
    general["per_document"] = general["per_document"][:1]
    general["metrics"] = {name: each | {"low": None, "high": None} for name, each in general["metrics"].items()}
    folder = copied(tiny_build, tmp_path / "e", evaluation=evaluation)
    data = call_json("report", folder, "--store", tiny_build[1])
    kept = data["experts"][0]["retention"]["general"]
    assert (kept["low"], kept["high"]) == (None, None)
    headline = dict(headline_rows(data["experts"][0]))["general retention"]
    assert headline == f"{kept['retention']:.4f} (no interval), bits per byte"
    page = words(parsed((folder / "report.html").read_text()))
    assert page.count("no interval") == 1 + len(general["metrics"])


@pytest.mark.parametrize("which", ["full", "pair"])
def test_the_page_stands_alone_and_can_be_read_without_seeing_it(which: str, request: pytest.FixtureRequest) -> None:
    root = parsed(request.getfixturevalue(which)[1])
    tags = [element.tag for element in root.iter() if isinstance(element.tag, str)]
    assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & set(tags)
    for element, (name, value) in ((e, attribute) for e in root.iter() for attribute in e.attrib.items()):
        assert not str(name).startswith("on")
        if name in ("src", "href", "{http://www.w3.org/1999/xlink}href", "action"):
            assert value == "data:," or value.startswith(("#", "https://arxiv.org/")[: 1 + (element.tag == "a")]), value
    assert not re.search(r"@import|url\((?!#)", "".join(root.find(".//style").itertext()))  # type: ignore[union-attr]
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    linked = {element.get("href", "")[1:] for element in root.iter() if element.get("href", "").startswith("#")}
    linked |= {value for element in root.iter() if (value := element.get("aria-labelledby"))}
    assert linked - set(ids) == set()
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(words(table.find("caption")) for table in root.iter("table"))  # type: ignore[arg-type]
    assert all(cell.get("scope") for cell in root.iter("th"))
    drawings = [element for element in root.iter() if str(element.tag).endswith("svg")]
    assert len(drawings) == (6 if which == "full" else 0)  # retention, kept and relevance of two structures, alignment
    assert all(len(drawing.get("aria-label", "")) > 40 and drawing.get("role") == "img" for drawing in drawings)
    assert root.get("lang") == "en"


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_from_the_paper(full: Page, dark: bool) -> None:
    """Contrast after WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    blocks = re.findall(r":root \{(.*?)\}", full[1], re.DOTALL)
    assert len(blocks) == 2
    hexadecimal = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", blocks[dark]))
    colours = {name: np.array(list(bytes.fromhex(digits))) / 255 for name, digits in hexadecimal.items()}

    def contrast(one: Any, other: Any) -> float:
        low, high = sorted(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
            for parts in (one, other)
        )
        return float((high + 0.05) / (low + 0.05))

    for paper in ("paper", "panel"):
        assert contrast(colours["ink"], colours[paper]) >= 7
        for name in ("muted", "accent", "loss", "gain"):
            assert contrast(colours[name], colours[paper]) >= 4.5, (name, paper)
    assert all(contrast(colours[f"series-{n}"], colours["paper"]) >= 3 for n in range(6))
    # ink stands on the cells of heat maps
    strongest = max(map(float, re.findall(r"fill: var\(--accent\); fill-opacity: ([\d.]+)", full[1])))
    mixed = strongest * colours["accent"] + (1 - strongest) * colours["paper"]
    assert contrast(mixed, colours["ink"]) >= 4.5


def test_no_text_of_a_user_becomes_a_part_of_the_page(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / 'it\'s "quoted" & <b>'))
    corpus = "language/\"><img src=x onerror=alert(2)> $x_1$ 'q'"
    text = json.dumps(about(folder)).replace("language/en", json.dumps(corpus)[1:-1])
    document = json.loads(text) | {"name": NAME}
    document["base"]["model"] = "</title><script>alert(3)</script>"
    document["criterion_paper"] = "javascript:alert(4)"
    hostile = "</pre><img src=x onerror=alert(5)>"
    answer = {"source": "task/qa", "group": "expert", "outcome": "lost", "gold": hostile, "change": -2.5}
    answer |= {"base_margin": 0.5, "expert_margin": -2.0, "prompt": hostile, "base": hostile, "expert": hostile}
    (folder / "changes.json").write_text(json.dumps({"answers": [answer]}))
    document["evaluation"]["tasks"] = {"</style>{{ 1 / 0 }}": document["evaluation"]["tasks"]["choices"]}
    (folder / "expertprune.json").write_text(json.dumps(document))
    report(folder, store=tiny_build[1])
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    root = parsed(page)
    assert words(root.find(".//h1")) == NAME  # type: ignore[arg-type]
    assert words(root.find(".//title")).startswith(NAME)  # type: ignore[arg-type]
    assert words(root.find(".//header/p/b")) == document["base"]["model"]  # type: ignore[arg-type]
    names = [words(cell) for cell in root.iter("th")]
    assert any(name.startswith(corpus) for name in names)
    assert any(name.startswith("</style>{{ 1 / 0 }}") for name in names)
    (shown,) = (each for each in root.iter("details") if each.get("class") == "change")
    assert words(shown).count(hostile) == 4
    assert "margin 0.500 to -2.000" in words(shown)
    assert not [a for a in root.iter("a") if not a.get("href", "").startswith(("#", "https://arxiv.org/"))]


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_there_is_a_line_with_its_command(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e", evaluation=None)
    printed = run(folder, "--store", tmp_path / "none").output
    assert printed.count("not evaluated") == 2
    assert "not measured" in printed
    root = parsed((folder / "report.html").read_text())
    lines = [words(p) for p in root.iter("p") if p.get("class") == "absent"]
    for command in (f"evaluate {folder}", f"evaluate {folder} --suite general", f"bench {folder}", "profile SPEC"):
        assert any(f"expertprune {command}" in line and line.endswith("fills this in.") for line in lines), command
    assert len(list(root.iter("figure"))) == 2  # what was kept of FFN neurons and of KV groups
    assert all(len(list(table.iter("td"))) > 0 for table in root.iter("table"))  # no empty frame
    assert "Not evaluated yet" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_an_expert_of_which_nothing_was_cut(tiny_build: Build, tmp_path: Path) -> None:
    plan = about(tiny_build[0])["plan"]
    for layer in plan["layers"]:
        layer |= {"why": {}, "kept": {"ffn": "0-31", "query_heads": "0-5", "kv_groups": "0-2"}}
    folder = copied(tiny_build, tmp_path / "e", plan=plan)
    data = report(folder, store=tiny_build[1])
    assert "Nothing was cut" in words(parsed((folder / "report.html").read_text()))
    assert data["experts"][0]["relevance"][0]["corpora"][0]["cut"] == 0


def test_experts_stand_side_by_side(pair: Page) -> None:
    data, text = pair
    root = parsed(text)
    assert words(root.find(".//h1")) == "2 experts side by side"  # type: ignore[arg-type]
    heads = [[words(cell) for cell in table.iter("th") if cell.get("scope") == "col"] for table in root.iter("table")]
    assert heads[0] == ["first", "second"]  # one name twice: told apart by their folders
    assert heads[1] == ["metric", "first", "second", "comparable"]
    assert len(data["lineup"]["rows"]) == len(data["experts"][0]["metrics"])
    assert "not measured" in words(root)


@pytest.mark.usefixtures("undrawn")
def test_another_base_is_said(tiny_build: Build, tmp_path: Path) -> None:
    base = about(tiny_build[0])["base"] | {"digest": "another", "model": "another", "tokenizer_digest": "another"}
    other = copied(tiny_build, tmp_path / "other", base=base)
    first, third = (copied(tiny_build, tmp_path / name) for name in ("first", "third"))
    page = tmp_path / "deep" / "side.html"
    printed = run(first, "--compare", other, third, "--out", page, "--store", tiny_build[1]).output
    assert all(name in printed for name in ("first", "other", "third"))
    assert "At a glance" in (third / "README.md").read_text()
    assert not (first / "comparison.html").exists()
    text = words(parsed(page.read_text()))
    assert "different bases" in text
    assert "no: different tokenizers" in text
    assert "numbers yes; retention relative to different bases" in text


@pytest.mark.usefixtures("undrawn")
def test_bad_input_exits_with_2_and_writes_nothing(
    tiny_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good, half = (copied(tiny_build, tmp_path / name) for name in ("good", "half"))
    max(half.glob("model-*.safetensors")).unlink()
    for folder in ("empty", "page.html"):
        Path(folder).mkdir()
    Path("file").write_text("")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    before = files()
    for arguments, said in (
        ("empty", "is no expert"),
        ("nowhere", "is no expert"),
        ("file", "file"),
        ("half", "safetensors"),
        ("good --compare half", "safetensors"),
        ("good --compare good", "the same expert twice"),
        ("good --out .", "--out"),
        ("good --out page.html", "it is a folder"),
        ("good --out report.pdf", "is an .html file"),
        ("good --out file/report.html", "cannot be written"),
    ):
        result = run(*arguments.split(), "--store", tiny_build[1], code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert said in result.stderr
    run(good, half, "--store", tiny_build[1], code=2)  # several without --compare
    assert files() == before
