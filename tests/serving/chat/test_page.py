"""The page in a real browser, and what its server refuses."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from expertprune.errors import UsageError
from expertprune.serving.chat import ChatSettings, Page, running
from tests.browsers import CHROMIUM, browser
from tests.serving.fake_endpoint import FakeEndpoint, fake_endpoint

__all__ = ["browser"]
HOSTILE = "<img src=x onerror=alert(1)>"


@contextlib.contextmanager
def served(base: FakeEndpoint, expert: FakeEndpoint) -> Iterator[Page]:
    with Page(running(base.url, expert.url), 0, ChatSettings(seed=7, max_tokens=5)) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield page
        page.shutdown()


def say(tab: Any, text: str) -> None:
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_both_answer_the_same_prompt_and_the_first_difference_is_marked(browser: Any) -> None:
    with (
        fake_endpoint(["The heart pumps blood.", f"It beats. {HOSTILE}"], models=("dense",)) as base,
        fake_endpoint(["The heart moves blood.", f"It beats. {HOSTILE}"], models=("cut",), chats=False) as expert,
        served(base, expert) as page,
        contextlib.closing(browser.new_page()) as tab,
    ):
        console: list[str] = []
        tab.on("console", lambda message: console.append(message.text))
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.goto(page.url)
        assert tab.title() == "cut beside its base"
        assert [tab.locator("h2").nth(i).inner_text() for i in (0, 1)] == ["Base: dense", "Expert: cut"]
        base.go_on.clear()
        say(tab, "Which organ pumps blood?")
        answers = {role: tab.locator(f"[data-role={role}]") for role in ("base", "expert")}
        answers["expert"].get_by_text("tokens/s").wait_for()
        assert answers["expert"].locator("mark").inner_text() == "moves"
        assert answers["base"].locator(".text").inner_text() == "The heart pumps"  # it is still at it
        assert answers["base"].locator(".about").inner_text() == ""
        assert tab.locator("#send").is_disabled()
        base.go_on.set()
        answers["base"].get_by_text("4 tokens").wait_for()
        assert answers["base"].locator("mark").inner_text() == "pumps"
        assert answers["base"].locator(".text").inner_text() == "The heart pumps blood."
        tab.fill("#seed", "8")
        tab.fill("#prompt", HOSTILE)
        tab.click("#send")
        for role in answers:
            tab.locator(f"[data-role={role}]").nth(1).get_by_text("tokens/s").wait_for()
        assert tab.locator("mark").count() == 2  # the same answers twice
        assert tab.locator(".text").nth(2).inner_text() == f"It beats. {HOSTILE}"
        assert tab.locator("img").count() == 0
        for width in (390, 1280):
            tab.set_viewport_size({"width": width, "height": 844})
            assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        tab.click("#new")
        assert tab.locator(".answer").count() == 0
    assert console == []
    first = {"role": "user", "content": "Which organ pumps blood?"}
    history = [first, {"role": "assistant", "content": "The heart pumps blood."}, {"role": "user", "content": HOSTILE}]
    heard = [(asked["messages"], asked["seed"], asked["max_tokens"]) for _, asked in base.asked]
    assert heard == [([first], 7, 5), (history, 8, 5)]
    texts = [first["content"], "The heart moves blood.", HOSTILE]
    assert [asked["prompt"] for _, asked in expert.asked] == [texts[0], "\n\n".join(texts)]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_what_fails_or_is_stopped_is_said_beside_the_other(browser: Any) -> None:
    with (
        fake_endpoint(["one two three", "again"]) as base,
        fake_endpoint(["refuse", "again"]) as expert,
        served(base, expert) as page,
        contextlib.closing(browser.new_page()) as tab,
    ):
        tab.goto(page.url)
        base.go_on.clear()
        say(tab, "Count.")
        tab.locator("[data-role=expert]").get_by_text("too long").wait_for()
        tab.locator("[data-role=base]").get_by_text("one two").wait_for()
        tab.click("#stop")
        tab.locator("[data-role=base]").get_by_text("stopped").wait_for()
        base.go_on.set()
        say(tab, "Again.")
        for role in ("base", "expert"):
            tab.locator(f"[data-role={role}]").nth(1).get_by_text("tokens/s").wait_for()
    said = [[message["content"] for message in endpoint.asked[1][1]["messages"]] for endpoint in (base, expert)]
    assert said == [["Count.", "one two", "Again."], ["Again."]]  # what failed is not part of the conversation


def test_other_pages_and_damaged_requests_are_refused() -> None:
    with fake_endpoint(["hello"]) as fake, served(fake, fake) as page:
        messages = [{"role": "user", "content": "Hi"}]
        good = json.dumps({"messages": messages, "seed": 0, "temperature": 0, "max_tokens": 3})
        json_type = {"Content-Type": "application/json"}
        own = f"127.0.0.1:{page.server_port}"

        def status(method: str, path: str, body: str | None = None, **headers: str) -> int:
            connection = http.client.HTTPConnection(own)
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            return connection.getresponse().status

        refused = [
            status("GET", "/", Host="evil.example"),
            status("GET", "/", Host=own, Origin="https://evil.example"),
            status("POST", "/base", good, Host="evil.example:80", **json_type),
            status("POST", "/base", good, Origin="null", **json_type),
        ]
        assert refused == [403] * 4
        assert status("GET", "/etc/passwd") == status("POST", "/other", good, **json_type) == 404
        bad = ["", "{", "[]", good.replace("user", "system"), good.replace("3}", "0}"), good[:-1] + ', "url": "x"}']
        assert [status("POST", "/base", body, **json_type) for body in bad] == [400] * len(bad)
        assert status("POST", "/base", good, Content_Type="text/plain") == 400  # what a form of another page can send
        for length in ("", "²", "-1", "9" * 5000):
            assert status("POST", "/base", Content_Length=length, **json_type) == 400
        assert fake.asked == []
        assert status("POST", "/base", good, **json_type) == 200
        with pytest.raises(UsageError, match="is not free"):
            Page([], page.server_port, ChatSettings())
