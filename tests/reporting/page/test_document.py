"""The report: its numbers are the JSON's, its HTML is valid, its text is escaped, and what is not there is said."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import expertprune
from expertprune.files import to_json
from expertprune.reporting.page import charts, headline_rows, render, report
from expertprune.units import pack_indices
from tests.calling import call, call_json
from tests.experts import about, copied, measured, plain_spec
from tests.html import Element, at, numbers, parsed, words
from tests.patching import read_only
from tests.tiny import save_tiny

Build = tuple[Path, Path]
Page = tuple[dict[str, Any], str]
NAME = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def full(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The data and the page of an expert of which everything is known."""
    folder = measured(copied(tiny_build, tmp_path_factory.mktemp("full") / "e"))
    data = report(folder, store=tiny_build[1])
    return data, (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def pair(tiny_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The same with an expert of another base beside it."""
    folder = tmp_path_factory.mktemp("pair")
    first = measured(copied(tiny_build, folder / "first"))
    base = about(tiny_build[0])["base"] | {"digest": "another", "model": "another", "tokenizer_digest": "another"}
    data = report(first, [copied(tiny_build, folder / "second", base=base)], store=tiny_build[1])
    assert all("At a glance" in (folder / name / "README.md").read_text() for name in ("first", "second"))
    return data, (first / "comparison.html").read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose pictures are empty, which is quicker."""
    monkeypatch.setattr(charts, "svg", lambda *_: "<svg></svg>")


def test_every_number_on_the_page_is_that_of_the_json(full: Page, pair: Page) -> None:
    for data, text in (full, pair):
        printed = json.loads(to_json(data))  # what --json prints
        found = numbers(parsed(text))
        assert len(found) > 60
        for pointer, (exact, written) in found.items():
            assert exact == at(printed, pointer), pointer
            digits = re.sub(r"[,%×]| MB", "", written)
            scale = 100 if "%" in written else 1e-6 if "MB" in written else 1
            unit = 10.0 ** -len(digits.partition(".")[2])
            assert abs(float(digits) - exact * scale) <= unit / 2 * (1 + 1e-9), (
                f"{pointer}: {exact} is written {written}"
            )


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
    for s, c, n in itertools.product((0, 1), range(4), range(3)):
        expected |= {f"relevance/{s}/corpora/{c}/by_layer/{n}", f"relevance/{s}/overlap/matrix/{c}/{n}"}
        expected |= {f"alignment/{s}/layers/{n}", f"structures/{2 * s}/kept_by_layer/{n}"}
        expected |= {f"structures/{2 * s}/kinds/{n}/{key}" for key in ("units", "kept")}
    assert {f"/experts/0/{place}" for place in expected} - set(numbers(parsed(text))) == set()


@pytest.mark.usefixtures("undrawn")
def test_the_headline_of_terminal_and_card_is_the_pages(tiny_build: Build, tmp_path: Path) -> None:
    """Of an expert with one general document, over which there is no interval."""
    evaluation = about(tiny_build[0])["evaluation"]
    general = evaluation["corpora"]["general/general"]
    general["per_document"] = general["per_document"][:1]
    general["metrics"] = {name: each | {"low": None, "high": None} for name, each in general["metrics"].items()}
    folder = measured(copied(tiny_build, tmp_path / "e", evaluation=evaluation))
    printed = call("report", folder, "--store", tiny_build[1]).output
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    data = call_json("report", folder, "--store", tiny_build[1])
    assert (data["kind"], data["page"], data["lineup"]) == ("report", str(folder / "report.html"), None)
    assert render(data) == page == (folder / "report.html").read_text()  # its own size, its own card: nothing goes in
    expert = data["experts"][0]
    rows = dict(headline_rows(expert))
    kept, parameters = expert["retention"]["expert"], expert["size"]["parameters"]
    interval = f"{kept['retention']:.4f} ({kept['low']:.4f} to {kept['high']:.4f})"
    alone = f"{expert['retention']['general']['retention']:.4f} (no interval)"
    assert rows["expert retention"] == f"{interval}, bits per byte"
    assert rows["general retention"] == f"{alone}, bits per byte"
    for text in (interval, alone, "1.1250 (1.1000 to 1.1500)"):
        assert text in printed
        assert text in card
    assert rows["parameters"].startswith(f"{parameters['expert']:,} of {parameters['base']:,} (")
    assert str(folder / "report.html") in printed.replace("\n", "")
    assert words(parsed(page)).count("no interval") == 1 + len(general["metrics"])


def test_the_page_stands_alone_and_can_be_read_without_seeing_it(full: Page, pair: Page) -> None:
    for root in (parsed(full[1]), parsed(pair[1])):
        elements = [element for element in root.iter() if isinstance(element.tag, str)]
        assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & {each.tag for each in elements}
        for element, (name, value) in ((e, attribute) for e in elements for attribute in e.attrib.items()):
            assert not str(name).startswith("on")
            if name in ("src", "href", "{http://www.w3.org/1999/xlink}href", "action"):
                assert value == "data:," or value.startswith(("#", "https://arxiv.org/")[: 1 + (element.tag == "a")])
        assert not re.search(r"@import|url\((?!#)", "".join(root.find(".//style").itertext()))  # type: ignore[union-attr]
        ids = [element.get("id") for element in elements if element.get("id")]
        assert len(ids) == len(set(ids))
        linked = {element.get("href", "")[1:] for element in elements if element.get("href", "").startswith("#")}
        assert linked | {value for element in elements if (value := element.get("aria-labelledby"))} <= set(ids)
        assert all(words(table.find("caption")) for table in root.iter("table"))  # type: ignore[arg-type]
        assert all(cell.get("scope") for cell in root.iter("th"))
        drawings = [element for element in elements if element.tag.endswith("svg")]
        assert all(len(drawing.get("aria-label", "")) > 40 and drawing.get("role") == "img" for drawing in drawings)


def test_no_text_of_a_user_becomes_a_part_of_the_page(tiny_build: Build, tmp_path: Path) -> None:
    folder = measured(copied(tiny_build, tmp_path / 'it\'s "quoted" & <b>'))
    corpus = "language/\"><img src=x onerror=alert(2)> $x_1$ 'q'"
    text = json.dumps(about(folder)).replace("language/en", json.dumps(corpus)[1:-1])
    document = json.loads(text) | {"name": NAME}
    document["base"]["model"] = "</title><script>alert(3)</script>"
    document["criterion_paper"] = "javascript:alert(4)"
    hostile = document["corpora"]["task/qa"]["generated"] = "</pre><img src=x onerror=alert(5)>"
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
    places = (".//h1", ".//title", ".//header/p/b")
    heading, title, base = (words(root.find(place)) for place in places)  # type: ignore[arg-type]
    assert (heading, title[: len(NAME)], base) == (NAME, NAME, document["base"]["model"])
    names = [words(cell) for cell in root.iter("th")]
    assert all(any(name.startswith(text) for name in names) for text in (corpus, "</style>{{ 1 / 0 }}"))
    assert any(name.endswith(f"generated {hostile}") for name in names)
    (shown,) = (each for each in root.iter("details") if each.get("class") == "change")
    assert words(shown).count(hostile) == 4
    assert "margin 0.500 to -2.000" in words(shown)
    assert not [a for a in root.iter("a") if not a.get("href", "").startswith(("#", "https://arxiv.org/"))]


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_there_is_a_line_with_its_command(tiny_build: Build, tmp_path: Path) -> None:
    """Of an expert that was not evaluated, and of which nothing was cut."""
    plan = about(tiny_build[0])["plan"]
    for layer in plan["layers"]:
        layer |= {"why": {}, "kept": {"ffn": "0-31", "query_heads": "0-5", "kv_groups": "0-2"}}
    folder = copied(tiny_build, tmp_path / "e", evaluation=None, plan=plan)
    printed = call("report", folder, "--store", tmp_path / "none").output
    assert printed.count("not evaluated") == 2
    assert "not measured" in printed
    root = parsed((folder / "report.html").read_text())
    lines = [words(p) for p in root.iter("p") if p.get("class") == "absent"]
    for command in (f"evaluate {folder}", f"evaluate {folder} --suite general", f"bench {folder}", "profile SPEC"):
        assert any(f"expertprune {command}" in line and line.endswith("fills this in.") for line in lines), command
    assert "Nothing was cut" in words(root)
    assert all(len(list(table.iter("td"))) > 0 for table in root.iter("table"))  # no empty frame
    assert "Not evaluated yet" in (folder / "README.md").read_text()


def table(root: Element, caption: str) -> Element:
    (found,) = (each for each in root.iter("table") if words(each[0]).startswith(caption))
    return found


@pytest.mark.usefixtures("undrawn")
def test_an_expert_of_one_corpus_with_a_smaller_vocabulary_alone(tiny_build: Build, tmp_path: Path) -> None:
    plan = about(tiny_build[0])["plan"]
    for layer in plan["layers"]:
        layer |= {"why": {}, "kept": {"ffn": "0-31", "query_heads": "0-5", "kv_groups": "0-2"}}
    rows = {"of": 64, "rows": 48, "tokens": 48, "kept": pack_indices(range(48), 64)}
    plan["vocabulary"] = {**rows, "padding": [], "tokenizer": "t", "why": None}
    folder = copied(tiny_build, tmp_path / "rows", plan=plan)
    report(folder, store=tiny_build[1])
    root = parsed((folder / "report.html").read_text())
    assert "No unit of a layer was cut. 48 of 64 vocabulary rows stayed." in words(root)
    assert not re.search("Nothing was cut|that were cut|these were cut|the cut FFN neurons", words(root))
    assert "cut" not in [words(cell) for cell in table(root, "Jaccard index of the irrelevant FFN neurons").iter("th")]
    corpora = {name: each for name, each in about(folder)["corpora"].items() if name == "language/en"}
    plan["profiles"] = {"language/en": plan["profiles"]["language/en"]}
    one = copied(tiny_build, tmp_path / "one", plan=plan, corpora=corpora)
    report(one, store=tiny_build[1])
    text = words(parsed((one / "report.html").read_text()))
    assert "One corpus calibrated this expert, so there is nothing to agree on." in text
    assert "No structure" not in text


def test_units_of_layers_that_lose_none_stand_beside_the_others(full: Page) -> None:
    """Of layers of widths of their own: the sentence, the table and the picture add up."""
    data, page = full
    (ffn,) = (each for each in data["experts"][0]["structures"] if each["structure"] == "ffn")
    (uncut,) = (entry for entry in ffn["protected"] if entry["source"] == "not cut")
    assert 0 < uncut["units"] == sum(of for of, kept in zip(ffn["of"], ffn["kept_by_layer"], strict=True) if of == kept)
    assert sum(entry["units"] for entry in ffn["protected"]) == ffn["kept"]
    root = parsed(page)
    assert f", not cut {uncut['units']} (in layers that lose none)." in words(root)
    heads = [words(cell) for cell in table(root, "FFN neurons of each layer").iter("th") if cell.get("scope") == "col"]
    assert heads[-1] == "not cut"
    (drawing,) = (each for each in root.iter() if str(each.tag).endswith("svg")
                  and each.get("aria-label", "").startswith("Kept FFN neurons"))  # fmt: skip
    assert "not cut" in words(drawing)


@pytest.mark.usefixtures("undrawn")
def test_routed_experts_have_their_own_criterion(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral")
    spec = plain_spec(tmp_path, base) | {"budget": {"experts": 2, "ffn": 0.25, "multiple_of": 8}}
    spec |= {"relevance": {"criterion": "impact", "experts": "reap"}, "evaluate": {"enabled": False}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    folder = expertprune.build(tmp_path / "spec.yaml", tmp_path / "expert", store=tmp_path / "store")
    report(folder, store=tmp_path / "store")
    text, card = words(parsed((folder / "report.html").read_text())), (folder / "README.md").read_text()
    assert "Relevance (impact) of the FFN neurons" in text
    assert "Relevance (reap) of the MoE experts" in text
    assert "whole routed experts by reap (https://arxiv.org/abs/2510.13999)" in text
    assert "whole routed experts by `reap` (https://arxiv.org/abs/2510.13999)" in " ".join(card.split())
    assert "| ffn in each routed expert | 24 | 32 |" in card.splitlines()
    assert re.search(r"24 of 32 in each\s", call("inspect", folder).output)


def test_experts_stand_side_by_side(pair: Page) -> None:
    data, page = pair
    root = parsed(page)
    heads = [[words(cell) for cell in table.iter("th") if cell.get("scope") == "col"] for table in root.iter("table")]
    assert heads[0] == ["first", "second"]  # one name twice: told apart by their folders
    assert heads[1] == ["metric", "first", "second", "comparable"]
    assert len(data["lineup"]["rows"]) == len(data["experts"][0]["metrics"])
    text = words(root)
    for said in ("2 experts side by side", "not measured", "different bases", "no: different tokenizers",
                 "numbers yes; retention relative to different bases"):  # fmt: skip
        assert said in text
    verdicts = {
        words(row[0]).partition(" ")[0]: words(row[-1]) for row in table(root, "Metrics of each expert").iter("tr")
    }
    assert verdicts["choices"] == "one expert only"  # the other was not measured on it


@pytest.mark.usefixtures("undrawn")
def test_a_card_that_cannot_be_written_stays_and_is_named(
    tiny_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [copied(tiny_build, tmp_path / name) for name in ("first", "second")]
    cards = [folder / "README.md" for folder in folders]
    before = cards[0].read_text()
    read_only(monkeypatch, folders[0])
    call("report", folders[0], "--compare", folders[1], "--out", tmp_path / "page.html", "--store", tiny_build[1])
    assert (tmp_path / "page.html").exists()
    assert [before in card.read_text() for card in cards] == [True, False]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith(f"{cards[0]}: cannot be written: ")


def test_bad_input_exits_with_2_and_writes_nothing(
    tiny_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, half = (copied(tiny_build, tmp_path / name) for name in ("good", "half"))
    max(half.glob("model-*.safetensors")).unlink()
    Path("page.html").mkdir()
    Path("file").write_text("")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    before = files()
    for arguments, said in (
        ("nowhere", "is no expert"),
        ("file", "file"),
        ("good --compare half", "safetensors"),
        ("good --compare good", "the same expert twice"),
        ("good half", "rror"),  # several without --compare
        ("good --out page.html", "it is a folder"),
        ("good --out report.pdf", "is an .html file"),
        ("good --out file/report.html", "cannot be written"),
    ):
        result = call("report", *arguments.split(), "--store", tiny_build[1], code=2)
        assert (result.stdout, said in result.stderr) == ("", True), arguments
    assert files() == before
