"""Conversations: how they are read and rendered, and which of their tokens count."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertprune.corpora import templates
from expertprune.corpora.batches import CalibrationText, Tokens, corpus_text, encode, make_batches, rendered, windows
from expertprune.corpora.chat import Rendered, render
from expertprune.corpora.documents import Corpus, Document
from expertprune.corpora.messages import Conversation, read_conversation, read_exchange
from expertprune.errors import SpecError
from tests.corpora.test_loading import GERMAN, make_spec
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
# The thoughts of all answers but the last are left out.
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
# As Mistral's v0.3 does: roles alternate but for calls of tools, and the tools stand before the last question.
LAST_TOOLS = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% set turns = namespace(number=0) %}"
    "{% for m in messages %}{% if m.role != 'tool' and m.tool_calls is not defined %}"
    "{% if (m.role == 'user') != (turns.number % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set turns.number = turns.number + 1 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[TOOLS]' + tools[0].function.name if m == asked[-1] }}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}call {{ m.tool_calls[0].function.name }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SAID = ("the heart", "pumps blood", "a judge", "reads law")
TWO_TURNS = [{"role": role, "content": said} for role, said in zip((USER, ANSWER) * 2, SAID, strict=True)]


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Words of the tiny tokenizer, roles, and the two markers of ChatML as special tokens."""
    names = ["<s>", "</s>", "<unk>", *WORDS, "system", USER, ANSWER, "[INST]", "[/INST]", "deep", "think", "é"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
               "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]}  # fmt: skip
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def document(messages: list[dict[str, Any]]) -> Document:
    return Document.of(read_conversation(messages, None, "here"))


def answers_of(text: Rendered) -> list[str]:
    assert text.answers is not None
    return [text.text[start:end] for start, end in text.answers]


def tokens_of(document: Document, tokenizer: Any, max_tokens: int) -> list[Tokens]:
    return encode([rendered(document, tokenizer)], tokenizer, max_tokens)


# --- reading --------------------------------------------------------------------------------------------------------


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
    lines = [{"type": "text", "text": each} for each in ("the heart", "and lungs")]
    several = read_conversation([{"role": "user", "content": lines}, TWO_TURNS[1]], None, "here")
    assert several.prompt[0]["content"] == "the heart\nand lungs"


def call_of(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "sum", **function}}


@pytest.mark.parametrize("form", ["{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"])
def test_tool_calls_reach_the_template_and_count_as_an_answer(form: str) -> None:
    """With their arguments as a mapping, or, if the template joins them as text, as OpenAI's form has them."""
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    for arguments in ({"a": 1}, '{"a": 1}'):
        said = {"role": ANSWER, "content": None, "tool_calls": [call_of(arguments=arguments)]}
        read = read_conversation([TWO_TURNS[0], said, {"role": "tool", "content": "1", "name": "sum"}], tools, "here")
        answer = {"role": ANSWER, "content": "", "tool_calls": [call_of(arguments={"a": 1})]}
        assert (read.messages, read.tools) == ([TWO_TURNS[0], answer], tools)
    template = (
        "{{ tools[0].function.name }}{% for m in messages %} {{ m.content }}"
        "{% for c in m.tool_calls %}<|im_start|>{{ c.function.name }}" + form + "{% endfor %}{% endfor %}"
    )
    assert answers_of(render(Document.of(read), chat_tokenizer(template))) == ['<|im_start|>sum{"a": 1}']


def test_what_a_call_lacks_is_empty_as_vllm_has_it() -> None:
    """As `_postprocess_messages` and `_parse_chat_message_content` of `vllm/renderers/chat_utils.py` do."""
    expected = {"role": ANSWER, "content": "", "tool_calls": [call_of(arguments={})]}
    arguments: list[dict[str, Any]] = [{"arguments": each} for each in ("", None, "[1]", "{a: 1")]
    for given, content in itertools.product(({}, *arguments), ({"content": None}, {"content": ""}, {})):
        answer = {"role": ANSWER, **content, "tool_calls": [call_of(**given)]}
        assert read_conversation([TWO_TURNS[0], answer], None, "here").messages[1] == expected


def test_thoughts_are_kept_under_every_name_that_templates_or_vllm_have_for_them() -> None:
    for thoughts, expected in (
        ({"reasoning_content": "deep"}, {"reasoning_content": "deep"}),
        ({"thinking": "deep"}, {"thinking": "deep"}),
        ({"reasoning": "deep"}, {"reasoning_content": "deep"}),
        ({"reasoning": "other", "reasoning_content": "deep"}, {"reasoning_content": "deep"}),
        ({"reasoning": None, "thinking": ""}, {}),
    ):
        read = read_conversation([TWO_TURNS[0], {**TWO_TURNS[1], **thoughts}], None, "here")
        assert read == Conversation.of([TWO_TURNS[0], {**TWO_TURNS[1], **expected}])


def test_what_is_no_conversation_is_named() -> None:
    for messages, problem in (
        (TWO_TURNS[:1], "a conversation without an answer: no message of role 'assistant' says anything"),
        ([TWO_TURNS[0], {"role": ANSWER, "content": " "}], "a conversation without an answer"),
        (
            [TWO_TURNS[0], {"role": "Assistant", "content": "a"}, TWO_TURNS[0]],
            "says anything; its roles: 'user', 'Assistant'",
        ),
        ("the heart", "messages must be a list of role and content, not str"),
        ([TWO_TURNS[0], "pumps blood"], "here, message 2: must be a mapping of role and content, not str"),
        ([{"speaker": "x", "content": "y"}], "message 1: has neither 'role' nor 'from'; its keys are speaker, content"),
        ([{"role": 3, "content": "y"}], "message 1: its role is 3, not a name"),
        ([{"role": "user"}], "message 1: has no content"),
        ([{"role": "user", "content": 5}], "message 1: its content is int, not text"),
        ([{"role": ANSWER, "tool_calls": ["w"]}], "message 1: its tool_calls must be a list of mappings"),
        (
            [{"role": ANSWER, "content": "", "function_call": {"name": "sum"}}, {"role": ANSWER, "content": "a"}],
            "message 1: holds function_call, which chat templates do not read; write it as tool_calls",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: holds image; only text can be read"),
    ):
        with pytest.raises(SpecError) as caught:
            read_conversation(messages, None, "here")
        assert problem in str(caught.value)
    for tools in ({"type": "function"}, '{"name": "w"}', 3):
        with pytest.raises(SpecError, match=r"here: tools must be a list, not (dict|str|int)"):
            read_conversation(TWO_TURNS, tools, "here")


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
)
def test_answers_are_found_in_the_rendered_text(template: str, expected: list[str]) -> None:
    tokenizer = chat_tokenizer(template)
    text = render(document(TWO_TURNS), tokenizer)
    assert answers_of(text) == expected
    assert text.text == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    dated = chat_tokenizer("{{ strftime_now('%Y') }}" + template)
    assert render(document(TWO_TURNS), dated).text == "2025" + text.text  # whatever the day


def test_an_answer_whose_words_the_question_has_is_not_looked_for_there() -> None:
    asked = [{"role": USER, "content": "heart or blood"}, {"role": ANSWER, "content": "blood"}]
    text = render(document([*asked, *asked]), chat_tokenizer(OPENED))
    assert answers_of(text) == ["blood<|im_end|>"] * 2
    assert text.answers is not None
    assert [text.text[:start].count("heart or blood") for start, _ in text.answers] == [1, 2]


@pytest.mark.parametrize(
    "template", [CHATML, THINKING, f"{CHATML}{{% if not add_generation_prompt %}}</s>{{% endif %}}"]
)
def test_an_earlier_answer_that_says_nothing_is_its_end_alone(template: str) -> None:
    nothing = {"role": ANSWER, "content": ""}
    for talk in ([TWO_TURNS[0], nothing, *TWO_TURNS[2:]], [*TWO_TURNS[:2], TWO_TURNS[2], nothing, *TWO_TURNS]):
        text = render(document(talk), chat_tokenizer(template))
        said = [each.partition("<|im_end|>")[0].rpartition("</think>")[2] for each in answers_of(text)]
        assert said == [each["content"] for each in talk if each["role"] == ANSWER]
        assert all("<|im_end|>" in each for each in answers_of(text))


def test_calls_of_tools_count_with_and_without_words_beside_them() -> None:
    calls = [{"function": {"name": "sum", "arguments": {}}}]
    for content, said in (("reads law", "reads law call sum<|im_end|>"), (None, " call sum<|im_end|>")):
        turns = [{"role": USER, "content": "law"}, {"role": ANSWER, "content": content, "tool_calls": calls},
                 {"role": "tool", "content": "a judge"}, {"role": ANSWER, "content": "a judge"}]  # fmt: skip
        assert answers_of(render(document(turns), chat_tokenizer(OPENED))) == [said, "a judge<|im_end|>"]


@pytest.mark.parametrize(("template", "asked"), [(CHATML, "sum a judge"), (MARKED, "a judge")])
@pytest.mark.parametrize("content", [None, "reads law"])
def test_a_template_that_leaves_calls_of_tools_out_is_an_error(template: str, asked: str, content: str | None) -> None:
    """Of the call its end alone would be an answer, even where the user says the name of the tool."""
    turns = [{"role": USER, "content": asked}, {"role": ANSWER, "content": content, "tool_calls": [call_of()]},
             {"role": "tool", "content": "law"}, {"role": ANSWER, "content": "the heart"}]  # fmt: skip
    with pytest.raises(SpecError, match=r"leaves out the call of 'sum' in message 2.*documents: raw"):
        rendered(document(turns), chat_tokenizer(template))


@pytest.mark.parametrize("question", ["", "the heart pumps blood"])
def test_calls_of_tools_are_found_where_the_template_shifts_the_tools(question: str) -> None:
    tools, calls = [call_of()], [call_of(arguments={})]
    turns: list[dict[str, Any]] = []
    for repeated in (1, 2, 3):
        turns += [{"role": USER, "content": f"{question}{repeated}"},
                  {"role": ANSWER, "content": None, "tool_calls": calls},
                  {"role": "tool", "content": "call sum</s>"}, {"role": ANSWER, "content": "law"}]  # fmt: skip
        text = render(Document.of(read_conversation(turns, tools, "here")), chat_tokenizer(LAST_TOOLS))
        assert answers_of(text) == ["call sum</s>", "law</s>"] * repeated
        assert text.answers is not None
        assert [text.text[:start].endswith(("[/INST]", " ")) for start, _ in text.answers] == [True, True] * repeated


def test_answers_begin_behind_their_role_where_nothing_opens_them() -> None:
    """Whatever they hold: letters of the role, white space, or nothing but what ends them."""
    talk = [*({"role": role, "content": said} for said in ("s", "  law\n") for role in (USER, ANSWER)),
            {"role": ANSWER, "content": ""}, {"role": ANSWER, "content": "an"}]  # fmt: skip
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    expected = ["s<|im_end|>", "  law\n<|im_end|>", "<|im_end|>", "an<|im_end|>"]
    assert answers_of(render(document(talk), chat_tokenizer(template))) == expected
    silent = chat_tokenizer("{% for m in messages if m.content %}" + template.partition("%}")[2])
    text = render(document(talk), silent)
    assert answers_of(text) == [*expected[:2], "", expected[3]]
    assert text.answers is not None
    assert all(start <= end for start, end in text.answers)


def test_the_mask_is_that_of_transformers_where_the_template_marks_answers() -> None:
    tokenizer = chat_tokenizer(MARKED.replace("<|im_end|>\n{% endgeneration %}", "<|im_end|>{% endgeneration %}\n"))
    wanted = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (tokens,) = tokens_of(document(TWO_TURNS), tokenizer, 99)
    assert list(tokens.ids) == wanted["input_ids"]
    assert tokens.answers is not None
    assert [int(each) for each in tokens.answers] == wanted["assistant_masks"]
    assert sum(wanted["assistant_masks"]) == 6


def test_a_template_that_cannot_render_is_one_line() -> None:
    for template, messages, problem in (
        (ALTERNATING, [{"role": "system", "content": "law"}, *TWO_TURNS],
         "refuses a conversation of the roles system, user, assistant: System role not supported"),
        ("{{ messages.__class__.__mro__ }}", TWO_TURNS, "unsafe"),
        ("{% for m in messages %}{{ m.role | upper }}{% endfor %}x", TWO_TURNS, "changes message 2"),
    ):  # fmt: skip
        with pytest.raises(SpecError) as caught:
            tokens_of(document(messages), chat_tokenizer(template), 99)
        (line,) = caught.value.problems
        assert problem in line
        assert "documents: raw" in line


def test_a_template_without_an_end_is_stopped_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number that Python computes without a pause, and a text without an end."""
    monkeypatch.setattr(templates, "TIME_LIMIT", 0.3)
    before = time.monotonic()
    for template, problem in (("{{ 'x' * 10 ** 11 }}", "needs more than 512 MiB"),
                              ("{{ 9 ** (9 ** 9) }}", "did not end within 0.3 s")):  # fmt: skip
        with pytest.raises(SpecError, match=re.escape(problem)):
            render(document(TWO_TURNS), chat_tokenizer(template))
    assert time.monotonic() - before < 20
    monkeypatch.undo()
    assert render(document(TWO_TURNS), chat_tokenizer("whole")).text == "whole"


# --- tokens, windows and batches ------------------------------------------------------------------------------------


def test_the_loss_counts_on_answers_and_their_bytes_are_those_of_their_text() -> None:
    tokenizer = chat_tokenizer(CHATML)
    talk = [TWO_TURNS[0], {"role": ANSWER, "content": "é blood"}]
    (tokens,) = tokens_of(document(talk), tokenizer, 99)
    asked = ["<|im_start|>", USER, "the", "heart", "<|im_end|>", "<|im_start|>", ANSWER]
    assert tokenizer.convert_ids_to_tokens(list(tokens.ids)) == [*asked, "é", "blood", "<|im_end|>"]
    assert tokens.answers == (False,) * 7 + (True,) * 3
    assert tokens.predicted == 3
    assert tokens.size == len("é blood".encode())
    tokenizer.truncation_side = "left"  # a document is read from its beginning all the same
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
        return corpus_text(Corpus(GERMAN, (talk,), ()), tokenizer, make_spec(calibration=calibration))

    assert text().tokens == tokens_of(talk, tokenizer, 512)
    # 20 tokens; the windows begin at 0, 5, 10 and 15; the third, "<|im_start|> user a judge <|im_end|>", has no answer.
    assert [each.ids[0] for each in text(max_tokens=5, windows=4).tokens] == [text().tokens[0].ids[i] for i in (5, 15)]
    with pytest.raises(SpecError, match="no answer begins within the first 5 tokens"):
        text(max_tokens=5)
    assert text(prompt_weight=0.5).digest != text().digest == text(tokens_per_batch=7).digest


def test_text_whose_answers_are_marked_otherwise_is_another() -> None:
    """A template may get its marks later; the tokens stay the same, and the profile of before is of another loss."""
    without_end = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    corpus = Corpus(GERMAN, (document(TWO_TURNS),), ())
    first, second = (corpus_text(corpus, chat_tokenizer(each), make_spec()) for each in (MARKED, without_end))
    assert [each.ids for each in first.tokens] == [each.ids for each in second.tokens]
    assert [each.predicted for each in first.tokens] == [each.predicted + 2 for each in second.tokens]
    assert first.digest != second.digest
