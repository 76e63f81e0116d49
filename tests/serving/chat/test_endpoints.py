"""What endpoints are asked, what they say, and where two answers part."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from expertprune.errors import ServingError, UsageError
from expertprune.serving.chat import ChatSettings, Ended, connect
from expertprune.serving.chat.differences import first_difference
from tests.serving.fake_endpoint import fake_endpoint

CONVERSATION = [
    {"role": "user", "content": "Which organ pumps blood?"},
    {"role": "assistant", "content": "The heart."},
    {"role": "user", "content": "Where is it?"},
]
DIED = "the engine died"


@pytest.mark.parametrize("chats", [True, False])
def test_a_model_is_asked_by_messages_or_continues_the_text(chats: bool) -> None:
    with fake_endpoint(["In the chest."], chats=chats, key="secret") as fake:
        endpoint = connect(fake.url, key="secret")
        *pieces, end = endpoint.answer(CONVERSATION, ChatSettings(seed=3, temperature=0.5, max_tokens=9))
        assert endpoint.chats == chats
        ((path, asked),) = fake.asked
    assert pieces == ["In", " the", " chest."]
    assert isinstance(end, Ended)
    assert end.tokens == 3
    assert 0 < end.first <= end.seconds  # type: ignore[operator]
    assert end.speed == 3 / end.seconds
    assert asked.items() >= {"model": "model", "seed": 3, "temperature": 0.5, "max_tokens": 9}.items()
    if chats:
        assert (path, asked["messages"]) == ("/v1/chat/completions", CONVERSATION)
    else:
        prompt = "Which organ pumps blood?\n\nThe heart.\n\nWhere is it?"
        assert (path, asked["prompt"]) == ("/v1/completions", prompt)


def test_pieces_come_before_the_answer_is_whole() -> None:
    with fake_endpoint(["one two"]) as fake:
        fake.go_on.clear()
        pieces = connect(fake.url).answer(CONVERSATION, ChatSettings())
        assert next(pieces) == "one"
        assert not fake.go_on.is_set()
        threading.Timer(0.1, fake.go_on.set).start()
        assert next(pieces) == " two"


def test_an_answer_may_hold_what_ends_a_line_elsewhere() -> None:
    """U+2028, U+2029 and U+0085 stand as they are in JSON, and Python splits lines at them."""
    words = ["one\u2028two", " three\u2029\u0085four", " five\nsix\r\nseven"]
    with fake_endpoint(["".join(words)]) as fake:
        *pieces, end = connect(fake.url).answer(CONVERSATION, ChatSettings())
    assert pieces == words
    assert isinstance(end, Ended)


def test_what_fails_in_the_middle_of_an_answer_is_said_in_the_endpoints_words() -> None:
    with fake_endpoint(["refuse", "one two"]) as fake:
        endpoint = connect(fake.url)
        with pytest.raises(ServingError, match=r"too long \(HTTP 400\)"):
            list(endpoint.answer(CONVERSATION, ChatSettings()))
        events: list[tuple[Any, str]] = [
            ({"error": {"message": DIED, "type": "InternalServerError", "param": None, "code": 500}}, DIED),
            ({"error": DIED}, DIED),
            ({"error": {"type": "InternalServerError"}}, "InternalServerError"),
            ({"object": "error", "message": DIED}, DIED),
            (None, "no part of an answer: None"),
            ({"choices": [None]}, "no part of an answer: .*choices"),
            ({"usage": 3}, "no part of an answer: .*usage"),
        ]
        for event, said in events:
            fake.last_event = event
            pieces = endpoint.answer(CONVERSATION, ChatSettings())
            assert [next(pieces), next(pieces)] == ["one", " two"]
            with pytest.raises(ServingError, match=said):
                next(pieces)
        fake.last_event = {"error": None, "choices": []}  # no error is none
        *words, end = endpoint.answer(CONVERSATION, ChatSettings())
    assert words == ["one", " two"]
    assert isinstance(end, Ended)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9/"])
def test_no_proxy_of_the_environment_stands_before_this_machine(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, "" if name == "no_proxy" else proxy)
    with fake_endpoint(["one"]) as fake:
        assert next(connect(fake.url).answer(CONVERSATION, ChatSettings())) == "one"
    with pytest.raises(UsageError, match="nothing answers there"):
        connect("http://192.0.2.1/v1")


def test_one_of_several_models_is_named_by_the_address_or_by_the_expert() -> None:
    with fake_endpoint([], models=("a", "b")) as fake:
        assert connect(f"{fake.url}#b").model == "b"
        assert connect(f"{fake.url}/", model="b").model == "b"
        with pytest.raises(UsageError, match=rf"serves a, b: name one of them, such as {fake.url}#a"):
            connect(fake.url, model="c")
        with pytest.raises(UsageError, match="serves a, b"):
            connect(f"{fake.url}#c")


def test_what_is_no_endpoint_is_named() -> None:
    with fake_endpoint([], key="secret") as fake:
        with pytest.raises(UsageError, match=r"is no OpenAI-compatible endpoint: Unauthorized \(HTTP 401\)"):
            connect(fake.url, key="wrong")
        ended = fake.url
    with pytest.raises(UsageError, match="is no endpoint, such as http"):
        connect("localhost:8000")
    damaged = ("http://127.0.0.1:port/v1", "http://[::1/v1", "http://127.0.0.1:9\n/v1", f"http://{'a' * 64}.de/v1")
    for wrong in (ended, *damaged):
        with pytest.raises(UsageError, match="nothing answers there"):
            connect(wrong)


@pytest.mark.parametrize(
    ("mine", "other", "over", "word"),
    [
        ("The heart pumps blood", "The heart moves blood", True, "pumps"),
        ("The heart pumps blood", "The heart pulls blood", True, "pumps"),
        ("The heart", "The heart", True, None),
        ("The heart pumps", "The heart", True, "pumps"),
        ("The heart pumps", "The heart", False, None),  # it may still say so
        ("The hearts", "The heart", True, "hearts"),
        ("The heart", "The hearts", True, None),
        ("Heart", "", True, "Heart"),
        ("The  heart", "The heart", True, "heart"),
    ],
)
def test_the_first_word_that_differs(mine: str, other: str, over: bool, word: str | None) -> None:
    found = first_difference(mine, other, over)
    assert (None if found is None else mine[slice(*found)]) == word
