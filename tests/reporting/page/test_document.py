"""The report: its numbers are the JSON's, its HTML is valid, its text is escaped, and what is not there is said."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import html5lib.html5parser
import jinja2
import pytest
from click.testing import CliRunner, Result

from expertprune.cli import main
from expertprune.files import to_json
from expertprune.reporting.page import Number, charts, headline_rows, render, report
from tests.experts import about, copied, measured
from tests.html import at, numbers, parsed, words

Build = tuple[Path, Path]
NAME = "<script>alert(1)</script>"


def run(*args: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["report", *map(str, args)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def full(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The data and the page of an expert of which everything is known; and the same with another one."""
    folder = measured(copied(tiny_build, tmp_path_factory.mktemp("full") / "e"))
    data = report(folder, store=tiny_build[1])
    return data, (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def pair(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("pair")
    first = measured(copied(tiny_build, folder / "first"))
    second = copied(tiny_build, folder / "second", evaluation=None)
    data = report(first, [second], store=tiny_build[1])
    return data, (first / "comparison.html").read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose pictures are empty, which is quicker."""
    monkeypatch.setattr(charts, "svg", lambda *_: "<svg></svg>")


# --- numbers --------------------------------------------------------------------------------------------------------


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


def test_the_numbers_that_matter_are_on_the_page(full: tuple[dict[str, Any], str]) -> None:
    data, text = full
    expert = data["experts"][0]
    keys = ("retention", "low", "high")
    expected = {f"/experts/0/retention/{group}/{key}" for group in ("expert", "general") for key in keys}
    expected |= {f"/experts/0/size/parameters/{key}" for key in ("base", "expert", "fraction")}
    expected |= {"/experts/0/speed/ratio", "/experts/0/throughput/limit", "/experts/0/throughput/of_limit"}
    for number, row in enumerate(expert["metrics"]):
        keys = ("base", "expert", "retention", "low", "high", "chance", "agreement", "gained", "lost")
        expected |= {f"/experts/0/metrics/{number}/{key}" for key in keys if row[key] is not None}
    for number, row in enumerate(expert["throughput"]["rows"]):
        keys = ("base", "expert", "ratio", "low", "high")
        expected |= {f"/experts/0/throughput/rows/{number}/{key}" for key in keys if row[key] is not None}
    for s, c in itertools.product((0, 1), range(4)):
        expected |= {f"/experts/0/relevance/{s}/corpora/{c}/by_layer/{layer}" for layer in range(3)}
        expected |= {f"/experts/0/relevance/{s}/overlap/matrix/{c}/{other}" for other in range(4)}
    expected |= {f"/experts/0/alignment/{value}/layers/{layer}" for value in (0, 1) for layer in range(3)}
    expected |= {f"/experts/0/structures/{s}/kept_by_layer/{layer}" for s in (0, 2) for layer in range(3)}
    assert expected - set(numbers(parsed(text))) == set()


def test_no_number_gets_onto_the_page_without_its_place() -> None:
    template = jinja2.Environment(autoescape=True).from_string("{{ number }}")
    with pytest.raises(TypeError, match="/a: a number"):
        template.render(number=Number(0.5, "/a"))


@pytest.mark.usefixtures("undrawn")
def test_the_headline_of_terminal_and_card_is_the_pages(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / "e"))
    printed = run(folder, "--store", tiny_build[1]).output
    card = (folder / "README.md").read_text()
    data = json.loads(run(folder, "--store", tiny_build[1], "--json").stdout)
    rows = dict(headline_rows(data["experts"][0]))
    kept = data["experts"][0]["retention"]["expert"]
    assert rows["expert retention"] == (
        f"{kept['retention']:.4f} ({kept['low']:.4f} to {kept['high']:.4f}), bits per byte"
    )
    for text in (*(rows[f"{group} retention"] for group in ("expert", "general")), "1.1250 (1.1000 to 1.1500)"):
        assert text.split(",")[0] in printed
        assert text in card
    parameters = data["experts"][0]["size"]["parameters"]
    assert rows["parameters"].startswith(f"{parameters['expert']:,} of {parameters['base']:,} (")
    assert str(folder / "report.html") in printed.replace("\n", "")


@pytest.mark.usefixtures("undrawn")
def test_the_json_is_what_the_page_was_made_of(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / "e"))
    data = json.loads(run(folder, "--store", tiny_build[1], "--json").stdout)
    assert (data["kind"], data["page"], data["lineup"]) == ("report", str(folder / "report.html"), None)
    assert render(data) == (folder / "report.html").read_text()


# --- what a page is -------------------------------------------------------------------------------------------------


def test_the_parser_finds_what_is_not_valid() -> None:
    with pytest.raises(html5lib.html5parser.ParseError):
        parsed("<!DOCTYPE html><html><head><title>t</title></head><body><p><b>bold</p></body></html>")


@pytest.mark.parametrize("which", ["full", "pair"])
def test_the_page_stands_alone_and_can_be_read_without_seeing_it(which: str, request: pytest.FixtureRequest) -> None:
    root = parsed(request.getfixturevalue(which)[1])
    tags = [element.tag for element in root.iter() if isinstance(element.tag, str)]
    assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & set(tags)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not str(name).startswith("on")
            if name in ("src", "href", "{http://www.w3.org/1999/xlink}href", "action"):
                allowed = ("#", "data:,", "https://arxiv.org/") if element.tag == "a" or value == "data:," else ("#",)
                assert value.startswith(allowed), value
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


def test_pictures_take_the_pages_colours(full: tuple[dict[str, Any], str]) -> None:
    root = parsed(full[1])
    for drawing in (element for element in root.iter() if str(element.tag).endswith("svg")):
        text = "".join(value for element in drawing.iter() for key, value in element.attrib.items() if key == "style")
        assert not re.search(r"#[0-9a-f]{6}", text)
        assert "var(--" in text
        assert "font-family" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_the_paper(full: tuple[dict[str, Any], str], scheme: str) -> None:
    """Contrast after WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    style = "".join(parsed(full[1]).find(".//style").itertext())  # type: ignore[union-attr]
    found = re.findall(r":root \{(.*?)\}", style, re.S)
    blocks = [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block)) for block in found]
    assert len(blocks) == 2
    colours = blocks[scheme == "dark"]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for paper in ("--paper", "--panel"):
        assert contrast(colours["--ink"], colours[paper]) >= 7
        for name in ("--muted", "--accent", "--loss", "--gain"):
            assert contrast(colours[name], colours[paper]) >= 4.5, (name, paper)
    assert all(contrast(colours[f"--series-{n}"], colours["--paper"]) >= 3 for n in range(6))
    # ink stands on the cells of heat maps
    strongest = max(map(float, re.findall(r"fill: var\(--accent\); fill-opacity: ([\d.]+)", full[1])))
    pairs = [(int(colours["--accent"][i : i + 2], 16), int(colours["--paper"][i : i + 2], 16)) for i in (1, 3, 5)]
    mixed = [round(strongest * accent + (1 - strongest) * paper) for accent, paper in pairs]
    assert contrast("#" + "".join(f"{part:02x}" for part in mixed), colours["--ink"]) >= 4.5


# --- hostile text ---------------------------------------------------------------------------------------------------


def test_no_text_of_a_user_becomes_a_part_of_the_page(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / 'it\'s "quoted" & <b>'))
    corpus = "language/\"><img src=x onerror=alert(2)> $x_1$ 'q'"
    text = json.dumps(about(folder)).replace("language/en", json.dumps(corpus)[1:-1])
    document = json.loads(text) | {"name": NAME}
    document["base"]["model"] = "</title><script>alert(3)</script>"
    document["criterion_paper"] = "javascript:alert(4)"
    document["evaluation"]["tasks"] = {"</style>{{ 1 / 0 }}": document["evaluation"]["tasks"]["choices"]}
    (folder / "expertprune.json").write_text(json.dumps(document))
    data = report(folder, store=tiny_build[1])
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
    assert not [a for a in root.iter("a") if not a.get("href", "").startswith(("#", "https://arxiv.org/"))]
    assert data["experts"][0]["name"] == NAME


# --- what is not there ----------------------------------------------------------------------------------------------


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
    figures = [words(figure.find("figcaption")) for figure in root.iter("figure")]  # type: ignore[arg-type]
    assert figures == [
        "FFN neurons by layer: kept, by the dimension that protected them, and cut.",
        "KV groups by layer: kept, by the dimension that protected them, and cut.",
    ]
    assert all(len(list(table.iter("td"))) > 0 for table in root.iter("table"))  # no empty frame
    assert "Not evaluated yet" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_an_expert_of_which_nothing_was_cut(tiny_build: Build, tmp_path: Path) -> None:
    document = about(tiny_build[0])
    for layer in document["plan"]["layers"]:
        layer |= {"why": {}, "kept": {"ffn": "0-31", "query_heads": "0-5", "kv_groups": "0-2"}}
    folder = copied(tiny_build, tmp_path / "e", plan=document["plan"])
    data = report(folder, store=tiny_build[1])
    text = words(parsed((folder / "report.html").read_text()))
    assert "Nothing was cut" in text
    assert data["experts"][0]["relevance"][0]["corpora"][0]["cut"] == 0


# --- several experts ------------------------------------------------------------------------------------------------


def test_experts_stand_side_by_side(pair: tuple[dict[str, Any], str]) -> None:
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


# --- bad input ------------------------------------------------------------------------------------------------------


def untouched(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("undrawn")
def test_bad_input_exits_with_2_and_writes_nothing(tiny_build: Build, tmp_path: Path) -> None:
    good = copied(tiny_build, tmp_path / "good")
    half = copied(tiny_build, tmp_path / "half")
    max(half.glob("model-*.safetensors")).unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "page.html").mkdir()
    (tmp_path / "file").write_text("")
    before = untouched(good)
    store = ("--store", tiny_build[1])
    for args, said in (
        ((empty,), "is no expert"),
        ((tmp_path / "nowhere",), "is no expert"),
        ((tmp_path / "file",), "file"),
        ((half,), "safetensors"),
        ((good, "--compare", half), "safetensors"),
        ((good, "--compare", good), "the same expert twice"),
        ((good, "--out", tmp_path), "--out"),
        ((good, "--out", tmp_path / "page.html"), "it is a folder"),
        ((good, "--out", tmp_path / "report.pdf"), "is an .html file"),
        ((good, "--out", tmp_path / "file" / "report.html"), "cannot be written"),
    ):
        result = run(*args, *store, code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert said in result.stderr
    run(good, half, *store, code=2)  # several without --compare
    assert untouched(good) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "good", "half", "page.html"]


def test_a_report_may_be_written_again(tiny_build: Build, tmp_path: Path) -> None:
    folder = copied(tiny_build, tmp_path / "e")
    pages = []
    for _ in range(2):
        run(folder, "--store", tiny_build[1])
        pages.append((folder / "report.html").read_bytes())
    assert pages[0] == pages[1]  # its own size, its own card: nothing of it goes in
    again = about(folder)
    assert again == about(tiny_build[0])
    shutil.rmtree(folder)
