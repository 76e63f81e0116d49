"""Conversations: how they are read and rendered, and which of their tokens count."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertprune.corpora import templates
from expertprune.corpora.batches import CalibrationText, Tokens, corpus_text, encode, make_batches, rendered, windows
from expertprune.corpora.chat import Rendered, render
from expertprune.corpora.documents import Corpus, CorpusName, Document
from expertprune.corpora.messages import Conversation, read_conversation, read_exchange
from expertprune.errors import SpecError
from tests.corpora.test_loading import make_spec
from tests.tiny import WORDS

USER, ANSWER = "user", "assistant"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# As reasoning models do: the thoughts of all answers but the last are left out.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>deep</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1 does: what opens an answer opens its thoughts, and no rendered answer has them.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or () %}"
    " call {{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' + eos_token }}"
    "{% endfor %}"
)
TWO_TURNS = [
    {"role": "user", "content": "the heart"},
    {"role": "assistant", "content": "pumps blood"},
    {"role": "user", "content": "a judge"},
    {"role": "assistant", "content": "reads law"},
]


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Words of the tiny tokenizer, roles, and the two markers of ChatML as special tokens."""
    names = ["<s>", "</s>", "<unk>", *WORDS, "system", USER, ANSWER, "[INST]", "[/INST]", "deep", "think", "é"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )
    made.chat_template = template
    return made


def document(messages: list[dict[str, Any]]) -> Document:
    return Document.of(read_conversation(messages, None, "here"))


def answers_of(text: Rendered) -> list[str]:
    assert text.answers is not None
    return [text.text[start:end] for start, end in text.answers]


# --- reading --------------------------------------------------------------------------------------------------------


def tokens_of(document: Document, tokenizer: Any, max_tokens: int) -> list[Tokens]:
    return encode([rendered(document, tokenizer)], tokenizer, max_tokens)


def test_every_form_of_a_conversation_is_read_as_the_same() -> None:
    expected = Conversation.of(TWO_TURNS)
    share_gpt = [{"from": {USER: "human", ANSWER: "gpt"}[m["role"]], "value": m["content"]} for m in TWO_TURNS]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TWO_TURNS]
    as_json = '[{"role": "user", "content": "the heart"}, {"role": "assistant", "content": "pumps blood"}]'
    unanswered = [*TWO_TURNS, {"role": "user", "content": "und der"}]
    for messages in (TWO_TURNS, share_gpt, parts, unanswered):
        assert read_conversation(messages, None, "here") == expected
    half = Conversation.of(TWO_TURNS[:2])
    assert read_conversation(as_json, None, "here") == read_exchange("the heart", "pumps blood", "here") == half
    assert read_exchange(TWO_TURNS[:3], TWO_TURNS[3:], "here") == expected
    assert expected.text == "the heart\n\npumps blood\n\na judge\n\nreads law"
    assert expected.prompt == TWO_TURNS[:1]


@pytest.mark.parametrize("given", [{"a": 1}, '{"a": 1}'], ids=["mapping", "OpenAI's text"])
@pytest.mark.parametrize("form", ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"])
def test_tool_calls_reach_the_template_and_count_as_an_answer(given: Any, form: str) -> None:
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
    asked = {"type": "function", "function": {"name": "sum", "arguments": given}}
    messages = [TWO_TURNS[0], {"role": ANSWER, "content": None, "tool_calls": [asked]},
                {"role": "tool", "content": "1", "name": "sum"}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    read = read_conversation(messages, tools, "here")
    assert (read.messages, read.tools) == (
        [messages[0], {"role": ANSWER, "content": "", "tool_calls": [call]}],
        tools,
    )
    template = (
        "{{ tools[0].function.name }}{% for m in messages %} {{ m.content }}"
        "{% for c in m.tool_calls %}<|im_start|>{{ c.function.name }}" + form + "{% endfor %}"
        "{% endfor %}"
    )
    assert answers_of(render(Document.of(read), chat_tokenizer(template))) == [' <|im_start|>sum{"a": 1}']


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "missing"])
@pytest.mark.parametrize(
    "given",
    [{"arguments": ""}, {"arguments": None}, {"arguments": "[1]"}, {"arguments": "{a: 1"}, {}],
    ids=["empty", "null", "a list", "not JSON", "missing"],
)
def test_what_a_call_lacks_is_empty_in_the_template_as_vllm_has_it(given: Any, content: Any) -> None:
    """As `_postprocess_messages` and `_parse_chat_message_content` of `vllm/renderers/chat_utils.py` do."""
    answer = {"role": ANSWER, **content, "tool_calls": [{"type": "function", "function": {"name": "sum", **given}}]}
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    read = read_conversation([TWO_TURNS[0], answer], None, "here")
    assert render(Document.of(read), chat_tokenizer(template)).text == "<|im_start|>the heart<|im_start|>sum{}"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (TWO_TURNS[:1], "a conversation without an answer: no message of role 'assistant' says anything"),
        ([TWO_TURNS[0], {"role": ANSWER, "content": " "}], "a conversation without an answer"),
        ([], "a conversation without an answer"),
        ("the heart", "messages must be a list of role and content, not str"),
        ([TWO_TURNS[0], "pumps blood"], "here, message 2: must be a mapping of role and content, not str"),
        ([{"speaker": "x", "content": "y"}], "message 1: has neither 'role' nor 'from'; its keys are speaker, content"),
        ([{"role": 3, "content": "y"}], "message 1: its role is 3, not a name"),
        ([{"role": "user"}], "message 1: has no content"),
        ([{"role": "user", "content": 5}], "message 1: its content is int, not text"),
        (
            [{"role": ANSWER, "content": None, "tool_calls": ["w"]}],
            "message 1: its tool_calls must be a list of mappings",
        ),
        ([{"role": ANSWER, "content": None, "tool_calls": {"a": 1}}], "its tool_calls must be a list of mappings"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: holds image; only text can be read"),
    ],
)
def test_what_is_no_conversation_is_named(messages: Any, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_conversation(messages, None, "here")
    assert problem in str(caught.value)


# --- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["pumps blood<|im_end|>", "reads law<|im_end|>"]),
        (MARKED, ["pumps blood<|im_end|>", "reads law<|im_end|>"]),
        (THINKING, ["pumps blood<|im_end|>", "<think>deep</think>reads law<|im_end|>"]),
        (ALTERNATING, ["pumps blood </s>", "reads law </s>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["pumps blood", "reads law"]),
        ("{% for m in messages %}{{ m.content | upper }}; {% endfor %}x", ["PUMPS BLOOD", "READS LAW"]),
    ],
    ids=["chatml", "marked", "thinking", "alternating", "no generation prompt", "in capitals"],
)  # fmt: skip
def test_answers_are_found_in_the_rendered_text(template: str, expected: list[str]) -> None:
    tokenizer = chat_tokenizer(template)
    text = render(document(TWO_TURNS), tokenizer)
    assert answers_of(text) == expected
    assert text.text == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)


def test_an_answer_whose_words_the_question_has_is_not_looked_for_there() -> None:
    asked = [{"role": USER, "content": "heart or blood"}, {"role": ANSWER, "content": "blood"}]
    text = render(document([*asked, *asked]), chat_tokenizer(OPENED))
    assert answers_of(text) == ["blood<|im_end|>"] * 2
    assert text.answers is not None
    assert [text.text[:start].count("heart or blood") for start, _ in text.answers] == [1, 2]


def test_calls_of_tools_count_with_and_without_words_beside_them() -> None:
    calls = [{"function": {"name": "sum", "arguments": {}}}]
    for content, said in (("reads law", "reads law call sum<|im_end|>"), (None, " call sum<|im_end|>")):
        turns = [
            {"role": USER, "content": "law"},
            {"role": ANSWER, "content": content, "tool_calls": calls},
            {"role": "tool", "content": "a judge"},
            {"role": ANSWER, "content": "a judge"},
        ]
        assert answers_of(render(document(turns), chat_tokenizer(OPENED))) == [said, "a judge<|im_end|>"]


@pytest.mark.parametrize("tools", [{"type": "function"}, '{"name": "w"}', 3])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(SpecError, match=r"here: tools must be a list, not (dict|str|int)"):
        read_conversation(TWO_TURNS, tools, "here")


def test_a_document_is_read_from_its_beginning_whatever_side_the_tokenizer_cuts() -> None:
    right, left = chat_tokenizer(CHATML), chat_tokenizer(CHATML)
    left.truncation_side = "left"
    assert tokens_of(document(TWO_TURNS), left, 9) == tokens_of(document(TWO_TURNS), right, 9)


def test_the_mask_is_that_of_transformers_where_the_template_marks_answers() -> None:
    tokenizer = chat_tokenizer(MARKED.replace("<|im_end|>\n{% endgeneration %}", "<|im_end|>{% endgeneration %}\n"))
    wanted = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (tokens,) = tokens_of(document(TWO_TURNS), tokenizer, 99)
    assert list(tokens.ids) == wanted["input_ids"]
    assert tokens.answers is not None
    assert [int(each) for each in tokens.answers] == wanted["assistant_masks"]
    assert sum(wanted["assistant_masks"]) == 6


def test_a_rendered_text_does_not_depend_on_the_day() -> None:
    template = "{{ strftime_now('%Y') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert render(document(TWO_TURNS), chat_tokenizer(template)).text.startswith("2025 the heart")


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (None, TWO_TURNS, "the base has no chat template, so conversations cannot be rendered"),
        (ALTERNATING, [{"role": "system", "content": "law"}, *TWO_TURNS],
         "refuses a conversation of the roles system, user, assistant: System role not supported"),
        ("{{ messages[0].content", TWO_TURNS, "refuses a conversation"),
        ("{% for m in messages %}{{ m.role | upper }}{% endfor %}x", TWO_TURNS, "changes message 2"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_render_is_one_line(template: str | None, messages: Any, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        tokens_of(document(messages), chat_tokenizer(template), 99)
    (line,) = caught.value.problems
    assert problem in line
    assert "documents: raw" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.3 s"),
        ("{{ 9 ** (9 ** 9) }}", "did not end within 0.3 s"),  # one number, which Python computes without a pause
        ("{{ 'x' * 10 ** 11 }}", "needs more than 512 MiB"),
    ],
)
def test_a_template_without_an_end_is_stopped_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, template: str, problem: str
) -> None:
    monkeypatch.setattr(templates, "TIME_LIMIT", 0.3)
    before = time.monotonic()
    with pytest.raises(SpecError, match=re.escape(problem)):
        render(document(TWO_TURNS), chat_tokenizer(template))
    assert time.monotonic() - before < 10
    monkeypatch.undo()
    assert render(document(TWO_TURNS), chat_tokenizer("whole")).text == "whole"


# --- tokens, windows and batches ------------------------------------------------------------------------------------


def test_the_loss_counts_on_answers_and_their_bytes_are_those_of_their_text() -> None:
    tokenizer = chat_tokenizer(CHATML)
    talk = [TWO_TURNS[0], {"role": ANSWER, "content": "é blood"}]
    (tokens,) = tokens_of(document(talk), tokenizer, 99)
    words = tokenizer.convert_ids_to_tokens(list(tokens.ids))
    assert words == [
        "<|im_start|>",
        USER,
        "the",
        "heart",
        "<|im_end|>",
        "<|im_start|>",
        ANSWER,
        "é",
        "blood",
        "<|im_end|>",
    ]
    assert tokens.answers == (False,) * 7 + (True,) * 3
    assert tokens.predicted == 3
    assert tokens.size == len("é blood".encode())
    cut = tokens_of(document(talk), tokenizer, 8)[0]
    assert (cut.ids, cut.predicted, cut.size) == (tokens.ids[:8], 1, 2)


def test_a_batch_says_which_predictions_count_and_what_each_token_weighs() -> None:
    plain, talk = Tokens((5, 6, 7)), Tokens((1, 2, 3, 4), (False, False, True, True))
    nothing = Tokens((1, 2), (True, False))  # its only answer token is predicted by nothing
    (batch,) = make_batches([plain, nothing, talk], 99, prompt_weight=0.25)
    assert batch.documents == (0, 2)
    assert batch.targets.tolist() == [[True, True, False], [False, True, True]]
    assert batch.predicted == (2, 2)
    assert batch.weights.tolist() == [[1, 1, 1, 0], [0.25, 0.25, 1, 1]]
    (whole,) = make_batches([plain], 99, prompt_weight=0.25)
    assert whole.answers is None
    assert whole.weights.tolist() == [[1, 1, 1]]


def test_windows_are_spread_over_a_document_and_each_begins_as_a_text_does() -> None:
    long = Tokens(tuple(range(10, 31)))  # 21 tokens
    assert [each.ids for each in windows(long, 5, 1)] == [(10, 11, 12, 13, 14)]
    assert [each.ids[0] for each in windows(long, 5, 3)] == [10, 18, 26]  # 0, 8 and 16 = 21 - 5
    assert windows(long, 5, 3)[-1].ids[-1] == 30
    assert [each.ids for each in windows(long, 5, 2, bos=10)] == [(10, 11, 12, 13, 14), (10, 27, 28, 29, 30)]
    assert len(windows(long, 5, 99)) == 5
    assert windows(Tokens((1, 2, 3)), 5, 99) == [Tokens((1, 2, 3))]


def test_calibration_reads_windows_with_answers_and_names_a_corpus_without() -> None:
    tokenizer, talk = chat_tokenizer(CHATML), document(TWO_TURNS)

    def text(**calibration: Any) -> CalibrationText:
        return corpus_text(
            Corpus(CorpusName("domain", "law"), (talk,), ()), tokenizer, make_spec(calibration=calibration)
        )

    assert text().tokens == tokens_of(talk, tokenizer, 512)
    # 20 tokens; the windows begin at 0, 5, 10 and 15; the third, "<|im_start|> user a judge <|im_end|>", has no answer.
    assert [each.ids[0] for each in text(max_tokens=5, windows=4).tokens] == [text().tokens[0].ids[i] for i in (5, 15)]
    with pytest.raises(SpecError, match="no answer begins within the first 5 tokens"):
        text(max_tokens=5)
    assert text(prompt_weight=0.5).digest != text().digest == text(tokens_per_batch=7).digest
