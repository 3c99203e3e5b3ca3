"""What a chat template makes of a conversation: all of it, the answers told exactly, or an error with the place."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_chats
import trl
from hypothesis import given
from hypothesis import strategies as st
from tiny_chats import chat_tokenizer
from tiny_llama import tiny_tokenizer

from rankwise.errors import DataError
from rankwise.train.data.answers import answers
from rankwise.train.data.chat import ChatTemplate, Conversation

TWO = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "bye"},
]
SYSTEM = {"role": "system", "content": "Be kind."}


def learnt(template: str, messages: Sequence[dict[str, Any]], turns: str = "all", **options: Any) -> list[str]:
    """The pieces of text that are learnt."""
    conversation = Conversation(messages, **options)
    text, spans = answers(ChatTemplate(chat_tokenizer(template)), conversation, turns)
    return [text[start:end] for start, end in spans]


# --- answers ---------------------------------------------------------------------------------------------------------

ANSWERS = {
    "MISTRAL": ["hi<eos>", "bye<eos>"],
    "LLAMA_3": ["hi<|eot_id|>", "bye<|eot_id|>"],
    "GEMMA": ["hi<end_of_turn>\n", "bye<end_of_turn>\n"],
    "PHI_3": ["hi<|end|>\n", "bye<|end|>\n<eos>"],
    "CHATML": ["hi<|im_end|>\n", "bye<|im_end|>\n"],
    "THOUGHTFUL": ["hi<turn|>\n", "bye<turn|>\n"],
    "PLAIN": [" hi<eos>", " bye<eos>"],
    "LLAMA_2": [" hi <eos>", " bye <eos>"],
    "OLMO_2": ["hi<eos>", "bye<eos>"],
}


@pytest.mark.parametrize("family", ANSWERS)
def test_answers_are_found_in_unmarked_templates(family: str) -> None:
    template = getattr(tiny_chats, family)
    assert learnt(template, TWO) == ANSWERS[family]
    assert learnt(template, TWO, "last") == ANSWERS[family][1:]
    assert learnt(template, TWO[:3]) == [ANSWERS[family][0]]


# TRL's marks that are not of what a model is left to write: they begin before the end of its prompt (the role, a line's
# end, an opened thought), end before a space that a template puts after each answer, or are of another text.
MARKED_OTHERWISE = re.compile(r"llava_next|deepseek|gptoss|muse_glimmer|nemotron|qwen2_5$|qwen3_(5|6|8)|glm4moe")
PAIRS = sorted(
    path.stem
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if path.with_name(f"{path.stem}_training.jinja").is_file()
)


@pytest.mark.parametrize("family", [name for name in PAIRS if not MARKED_OTHERWISE.match(name)])
@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("system", [False, True])
def test_answers_are_those_that_marked_templates_mark(family: str, turns: str, system: bool, monkeypatch) -> None:
    """The families of which TRL carries a marked version, by whose marks ours are checked."""
    directory = Path(trl.__file__).parent / "chat_templates"
    messages = [SYSTEM, *TWO] if system else TWO
    if family == "qwen3" and turns == "all":
        messages = messages[:-2]  # its unmarked version renders an earlier answer otherwise
    if family == "gemma" and system:
        pytest.skip("it knows no system message")
    marked = learnt((directory / f"{family}_training.jinja").read_text(), messages, turns)
    monkeypatch.setattr(ChatTemplate, "render_marked", lambda self, conversation: None)
    found = learnt((directory / f"{family}.jinja").read_text(), messages, turns)
    assert "".join(found) == "".join(marked) != ""


def test_enough_families_are_compared() -> None:
    assert len([name for name in PAIRS if not MARKED_OTHERWISE.match(name)]) >= 12


@pytest.mark.parametrize("family", ["llama3_1", "llama3_2", "gemma4", "gemma4_v5"])
def test_templates_that_nobody_marked(family: str) -> None:
    """Called tools, and what they answer, between the user's question and the assistant's answer."""
    template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    tool = {"type": "function", "function": {"name": "clock", "description": "Tell the time.", "parameters": {}}}
    messages = [
        TWO[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "9"},
        TWO[3],
    ]
    first, last = learnt(template, messages, tools=[tool])
    if family.startswith("llama"):
        assert first == '{"name": "clock", "parameters": {"zone": "UTC"}}<|eot_id|>'
        assert last == "bye<|eot_id|>"
    else:
        assert first == '<|tool_call>call:clock{zone:<|"|>UTC<|"|>}<tool_call|><|tool_response>'
        assert last == "bye<turn|>\n"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1), min_size=2, max_size=6))
@pytest.mark.parametrize("family", ["MISTRAL", "CHATML", "PHI_3", "THOUGHTFUL"])
def test_any_answers_are_found(family: str, texts: list[str]) -> None:
    """In the families that leave a text as it is, an answer is its text and what ends it."""
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    ends = [piece.removeprefix(text) for piece, text in zip(ANSWERS[family], ("hi", "bye"), strict=True)]
    asked = texts[1::2]
    last = len(texts) % 2 == 0
    expected = [text + ends[last and index == len(asked) - 1] for index, text in enumerate(asked)]
    assert learnt(getattr(tiny_chats, family), messages) == expected


def test_marks_of_the_template_win() -> None:
    tokenizer = tiny_tokenizer()
    text, spans = answers(ChatTemplate(tokenizer), Conversation(TWO))
    assert [text[start:end] for start, end in spans] == ["hi<eos>", "bye<eos>"]
    text, spans = answers(ChatTemplate(tokenizer), Conversation(TWO), "last")
    assert [text[start:end] for start, end in spans] == ["bye<eos>"]


@pytest.mark.parametrize("template", [tiny_tokenizer().chat_template, tiny_chats.CHATML])
def test_an_answer_of_weight_0_is_not_learnt(template: str) -> None:
    weighed = [TWO[0], TWO[1] | {"weight": 0}, TWO[2], TWO[3] | {"weight": 1}]
    assert [piece[:3] for piece in learnt(template, weighed)] == ["bye"]
    with pytest.raises(DataError, match="expected an answer to learn"):
        learnt(template, [*TWO[:3], TWO[3] | {"weight": 0}], "last")


def test_an_answer_that_opens_a_conversation() -> None:
    assert learnt(tiny_chats.CHATML, TWO[1:]) == ["hi<|im_end|>\n", "bye<|im_end|>\n"]


def test_a_completion_is_learnt_whole() -> None:
    (rest,) = learnt(tiny_chats.CHATML, TWO, given=1)
    turns = ["hi<|im_end|>\n", "<|im_start|>user\nand now<|im_end|>\n", "<|im_start|>assistant\nbye<|im_end|>\n"]
    assert rest == "".join(turns)
    assert learnt(tiny_chats.THOUGHTFUL, TWO, given=3) == ["bye<turn|>\n"]


def test_an_answer_that_is_rendered_otherwise_later_is_refused() -> None:
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template renders this message otherwise.*last"):
        learnt(tiny_chats.FORGETFUL, TWO)
    assert learnt(tiny_chats.FORGETFUL, TWO, "last") == ["<think>\n\n</think>\n\nbye<|im_end|>\n"]


# --- nothing is left out ---------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLED = [
    TWO[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "9"},
    TWO[3],
]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_calls_are_rendered() -> None:
    template = ChatTemplate(chat_tokenizer(tiny_chats.CHATML))
    text, spans = answers(template, Conversation(CALLED, [TOOL]))
    assert text.startswith('<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "clock"')
    assert [text[start:end] for start, end in spans] == [
        '<tool_call>clock{"zone": "UTC"}</tool_call><|im_end|>\n',
        "bye<|im_end|>\n",
    ]


def test_a_template_for_tools_is_taken_where_there_are_tools() -> None:
    """And not the marked version that TRL has of the default one."""
    directory = Path(trl.__file__).parent / "chat_templates"
    tokenizer = chat_tokenizer(tiny_chats.CHATML)
    tokenizer.chat_template = {"default": (directory / "llama3.jinja").read_text(), "tool_use": tiny_chats.CHATML}
    text, spans = answers(ChatTemplate(tokenizer), Conversation(CALLED, [TOOL]))
    assert text.startswith("<|im_start|>system\n# Tools") and text[slice(*spans[-1])] == "bye<|im_end|>\n"
    text, spans = answers(ChatTemplate(tokenizer), Conversation(TWO))
    assert text.startswith("<bos><|start_header_id|>user") and text[slice(*spans[-1])] == "bye<|eot_id|>"


def test_a_marked_version_serves_where_the_template_itself_fails() -> None:
    """DeepSeek-V3's joins a call's arguments to its text, which an object cannot be."""
    template = (Path(trl.__file__).parent / "chat_templates" / "deepseekv3.jinja").read_text()
    tokenizer = chat_tokenizer(template)
    called = Conversation([CALLED[0], CALLED[1] | {"content": ""}, *CALLED[2:]])
    with pytest.raises(DataError, match="refuses this conversation"):
        ChatTemplate(tokenizer).render(called)
    text, spans = answers(ChatTemplate(tokenizer), called)
    assert '"zone": "UTC"' in text[slice(*spans[0])]


def test_template_options_are_given() -> None:
    template = "{{ '<think>' if deep else '' }}" + tiny_chats.CHATML
    text, _ = answers(ChatTemplate(chat_tokenizer(template)), Conversation(TWO, options={"deep": True}))
    assert text.startswith("<think><|im_start|>user")


LEFT_OUT = {
    "tools": (tiny_chats.LLAMA_3, Conversation(TWO, [TOOL]), "leaves out the tool clock"),
    "a call": (
        tiny_chats.CHATML.replace("m.tool_calls or []", "[]"),
        Conversation(CALLED),
        "leaves out the call of clock",
    ),
    "a system message": (
        tiny_chats.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        Conversation([SYSTEM, *TWO]),
        r"leaves out messages\[0\], of the role system",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(case: str) -> None:
    template, conversation, message = LEFT_OUT[case]
    with pytest.raises(DataError, match=message):
        answers(ChatTemplate(chat_tokenizer(template)), conversation)


def test_a_text_that_is_changed_is_not_left_out() -> None:
    upper = tiny_chats.CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert learnt(upper, TWO) == ["HI<|im_end|>\n", "BYE<|im_end|>\n"]


@pytest.mark.parametrize("template", [tiny_chats.CHATML, tiny_chats.LLAMA_3, tiny_chats.PLAIN, tiny_chats.PARTS])
def test_parts_are_put_together_where_a_template_knows_none(template: str) -> None:
    in_parts = [
        message
        | {
            "content": [
                {"type": "text", "text": message["content"][:1]},
                {"type": "text", "text": message["content"][1:]},
            ]
        }
        for message in TWO
    ]
    pieces = learnt(template, in_parts)
    assert [piece.strip().split("<")[0] for piece in pieces] == ["hi", "bye"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_template_that_raises_is_named_with_the_place() -> None:
    for template, messages, said in (
        (tiny_chats.GEMMA, [SYSTEM, *TWO], "System role not supported"),
        (tiny_chats.MISTRAL, TWO[1:], "roles must alternate"),
        ("{{ messages[9]['content'] }}", TWO, "UndefinedError"),
        ("{% for %}", TWO, "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", TWO, "ZeroDivisionError"),
    ):
        conversation = Conversation(messages, place="chats.jsonl, line 3")
        with pytest.raises(DataError, match=rf"chats\.jsonl, line 3: the chat template refuses.*{said}"):
            answers(ChatTemplate(chat_tokenizer(template)), conversation)


def test_a_tokenizer_without_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="expected a tokenizer with a chat_template, found none"):
        ChatTemplate(tokenizer)


def test_an_answer_of_nothing_is_refused() -> None:
    silent = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}"
    )
    with pytest.raises(DataError, match="expected an answer to learn"):
        learnt(silent, [TWO[0], {"role": "assistant", "content": ""}])


def test_spans_lie_in_order_and_apart() -> None:
    text, spans = answers(ChatTemplate(chat_tokenizer(tiny_chats.PHI_3)), Conversation(TWO * 2))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert text.endswith("<eos>")
