"""Token ids and labels, exactly: what stands before a text is there once, the answer and its end are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_chats
import torch
from tiny_chats import chat_tokenizer
from tiny_llama import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rankwise.errors import DataError
from rankwise.train.data.chat import Conversation
from rankwise.train.data.dataset import Data, load_data
from rankwise.train.data.preflight import check_form
from rankwise.train.data.tokens import IGNORED, labelled, prompt_ids, tokenised
from rankwise.train.model.generation import before_and_after
from rankwise.train.recipe import Recipe

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def load(tmp_path: Path):
    def load(*records: Any, **fields: Any) -> Data:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_data(Recipe(model="m", data=str(path), **fields))

    return load


def pieces(tokenizer: PreTrainedTokenizerFast, data: Data, turns: str = "all") -> list[tuple[str, str]]:
    """Of each sample, all of its text and what is learnt of it."""
    return [
        (tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != IGNORED]))
        for row in tokenised(data.train, tokenizer, turns)
    ]


# --- beside TRL, where that is right ---------------------------------------------------------------------------------

RECORDS = {
    "text": {"text": "One and one is two."},
    "pair": {"prompt": "One and one?\n", "completion": "Two."},
    "a merged boundary": {"prompt": "One and one is t", "completion": "wo."},
    "chat": {"messages": CHAT},
    "chat pair": {"prompt": CHAT[:3], "completion": CHAT[3:]},
    "emoji": {"messages": [CHAT[0], {"role": "assistant", "content": "🙂 ü"}]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_ids_and_labels_are_trls(name: str, load, smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    tokenizer = smollm2[1]
    ours = tokenised(load(RECORDS[name]).train, tokenizer)[0]
    config = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, assistant_only_loss="messages" in RECORDS[name])
    trainer = SFTTrainer(
        LlamaForCausalLM(config), args, train_dataset=Dataset.from_list([RECORDS[name]]), processing_class=tokenizer
    )
    theirs = trainer.train_dataset[0]
    assert (ours["input_ids"], ours["labels"]) == (theirs["input_ids"], theirs["labels"])


# --- once ------------------------------------------------------------------------------------------------------------


def test_bos_stands_before_a_text_once(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=True)
    data = load({"text": "hello"}, {"text": "<bos>hello"}, {"text": "hello<eos>"})
    ids = list(tokenised(data.train, tokenizer)["input_ids"])
    assert ids == [[tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"], 1]] * 3


def test_bos_and_eos_stand_around_a_pair_once(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=True)
    data = load({"prompt": "ab", "completion": "c"}, {"prompt": "<bos>ab", "completion": "c<eos>"})
    for sample in tokenised(data.train, tokenizer):
        letters = tokenizer("abc", add_special_tokens=False)["input_ids"]
        assert sample["input_ids"] == [tokenizer.bos_token_id, *letters, tokenizer.eos_token_id]
        assert sample["labels"] == [IGNORED] * 3 + [letters[2], tokenizer.eos_token_id]


def test_a_tokenizer_whose_bos_and_eos_are_one(load) -> None:
    """OPT's: what stands before a text must not be taken for what ends it."""
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=True)
    tokenizer.eos_token = "<bos>"
    (sample,) = tokenised(load({"text": "a"}).train, tokenizer)
    assert sample["input_ids"] == [tokenizer.bos_token_id, *tokenizer("a")["input_ids"][1:], tokenizer.bos_token_id]


def test_an_end_in_the_prompt_is_none_of_the_answer(load) -> None:
    tokenizer = tiny_tokenizer()
    (sample,) = tokenised(load({"prompt": "a<eos>", "completion": ""}).train, tokenizer)
    assert sample["labels"] == [IGNORED, IGNORED, tokenizer.eos_token_id]


def test_a_chat_template_writes_bos_itself(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=True)
    (text, learnt), *_ = pieces(tokenizer, load({"messages": CHAT}))
    assert text.startswith("<bos><|start_header_id|>user") and text.count("<bos>") == 1
    assert learnt == "hi<|eot_id|>bye<|eot_id|>"
    assert pieces(tokenizer, load({"messages": CHAT}), "last")[0][1] == "bye<|eot_id|>"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompts_are_those_that_were_learnt(load, adds_bos: bool) -> None:
    """A prompt's tokens are the beginning of the sample's, for texts and chats."""
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=adds_bos)
    text, ids = prompt_ids(tokenizer, Conversation(CHAT[:3]))
    assert text.endswith("and now<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    (sample,) = tokenised(load({"prompt": CHAT[:3], "completion": CHAT[3:]}).train, tokenizer)
    assert sample["input_ids"][: len(ids)] == ids
    assert [token for token in sample["labels"] if token != IGNORED] == sample["input_ids"][len(ids) :]
    for prompt in ("say 3: ", "<bos>say 3: "):
        (sample,) = tokenised(load({"prompt": prompt, "completion": "3"}).train, tokenizer)
        assert sample["input_ids"][:-2] == prompt_ids(tokenizer, prompt)[1]
        assert sample["input_ids"].count(tokenizer.bos_token_id) == (adds_bos or "<bos>" in prompt)


def test_an_answer_is_generated_from_the_prompts_tokens(monkeypatch) -> None:
    tokenizer = chat_tokenizer(tiny_chats.LLAMA_3, adds_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, seen = LlamaForCausalLM(config), []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **options: seen.append(ids) or plain(ids, **options))
    monkeypatch.setattr("rankwise.disabled", lambda model: torch.no_grad())
    sample = before_and_after(model, tokenizer, Conversation(CHAT[:1]), max_new_tokens=2)
    assert sample.prompt.count("<bos>") == 1
    for ids in seen:
        assert ids.tolist() == [prompt_ids(tokenizer, Conversation(CHAT[:1]))[1]]
        assert ids.tolist()[0].count(tokenizer.bos_token_id) == 1


# --- which characters a token stands for -----------------------------------------------------------------------------


@pytest.fixture
def trimmed() -> PreTrainedTokenizerFast:
    """A tokenizer that leaves the space before a word out of the word's place, as RoBERTa's and Llama 3's do."""
    pieces = ["a", "b", "c", "Ġ", "Ċ", "Ġb", "Ġc", "<eos>"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("Ġ", "b"), ("Ġ", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize(
    ("span", "learnt"), [((0, 1), "a"), ((1, 2), "Ġb"), ((2, 3), "Ġb"), ((3, 4), "Ċ"), ((4, 5), "Ġc"), ((1, 4), "ĠbĊ")]
)
def test_spaces_belong_to_the_token_that_has_them(span: tuple[int, int], learnt: str, trimmed) -> None:
    places = trimmed("a b\n c", return_offsets_mapping=True)["offset_mapping"]
    assert places[1] == (2, 3)
    ids, labels = labelled(trimmed, "a b\n c", [span])
    assert trimmed.convert_ids_to_tokens(ids) == ["a", "Ġb", "Ċ", "Ġc"]
    assert "".join(trimmed.convert_ids_to_tokens([label for label in labels if label != IGNORED])) == learnt


def test_all_bytes_of_a_character_are_learnt() -> None:
    tokenizer = tiny_tokenizer()
    ids, labels = labelled(tokenizer, "a🙂b", [(1, 2)])
    assert len(ids) == 6
    assert [label != IGNORED for label in labels] == [False, True, True, True, True, False]


# --- nothing is dropped ----------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "default": None}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": None, "at": 9.25}}}


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_reach_the_model_as_they_were_written(load, as_json: bool) -> None:
    """Beside a sample with others: a column of objects would give each the fields of all."""
    tokenizer = chat_tokenizer(tiny_chats.CHATML)
    other = {"type": "function", "function": {"name": "add", "parameters": {"x": 1}}}
    call = CALL if not as_json else {"function": CALL["function"] | {"arguments": '{"zone": null, "at": 9.25}'}}
    called = [CHAT[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "9"}, CHAT[3]]
    samples = load(
        {"messages": called, "tools": json.dumps([TOOL]) if as_json else [TOOL]},
        {"messages": CHAT, "tools": [other]},
        {"messages": CHAT},
    )
    (text, learnt), (second, _), (third, _) = pieces(tokenizer, samples)
    assert f"# Tools\n{json.dumps(TOOL)}\n<|im_end|>" in text
    assert learnt == '<tool_call>clock{"zone": null, "at": 9.25}</tool_call><|im_end|>\nbye<|im_end|>\n'
    assert f"# Tools\n{json.dumps(other)}\n<|im_end|>" in second
    assert third.startswith("<|im_start|>user\nhello")


def test_template_options_reach_the_template(load) -> None:
    tokenizer = chat_tokenizer("{{ '<think>' if deep else '' }}" + tiny_chats.CHATML)
    data = load({"messages": CHAT, "chat_template_kwargs": {"deep": True}}, {"messages": CHAT})
    assert [text.startswith("<think>") for text, _ in pieces(tokenizer, data)] == [True, False]


def test_a_system_field_is_a_system_message(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.CHATML)
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    for record in ({"system": "Be kind.", "messages": CHAT[:2]}, {"system": "Be kind.", "conversations": turns}):
        ((text, learnt),) = pieces(tokenizer, load(record))
        assert text == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
            "<|im_start|>assistant\nhi<|im_end|>\n"
        )
        assert learnt == "hi<|im_end|>\n"


def test_sharegpts_calls(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.CHATML)
    turns = [
        {"from": "human", "value": "hello"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "nine"},
    ]
    ((text, learnt),) = pieces(tokenizer, load({"conversations": turns, "tools": json.dumps([TOOL])}))
    assert "<|im_start|>tool\n9<|im_end|>" in text
    assert learnt == '<tool_call>clock{"zone": "UTC"}</tool_call><|im_end|>\nnine<|im_end|>\n'


def test_openais_functions_before_there_were_tools(load) -> None:
    tokenizer = chat_tokenizer(tiny_chats.CHATML)
    called = {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    answered = {"role": "function", "name": "clock", "content": "9"}
    record = {"messages": [CHAT[0], called, answered, CHAT[3]], "functions": [TOOL["function"]]}
    ((text, learnt),) = pieces(tokenizer, load(record))
    assert f"# Tools\n{json.dumps(TOOL)}\n<|im_end|>" in text and "<|im_start|>tool\n9<|im_end|>" in text
    assert learnt == '<tool_call>clock{"zone": "UTC"}</tool_call><|im_end|>\nbye<|im_end|>\n'


def test_alpacas_system_and_history(load) -> None:
    record = {
        "instruction": "Add.",
        "input": "1 1",
        "output": "2",
        "system": "You count.",
        "history": [["Hi.", "Hello."]],
    }
    (row,) = load(record, record | {"system": "", "history": []}).train.select([0])
    assert row["prompt"] == (
        "You count.\n\n### Instruction:\nHi.\n\n### Response:\nHello.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    )
    assert row["completion"] == "2"


def test_fields_that_are_not_looked_at_are_named(load) -> None:
    assert load({"messages": CHAT, "tools": None, "id": 7, "source": "web"}).unread == ("id", "source")


# --- what cannot be tokenised ----------------------------------------------------------------------------------------


def test_a_refusal_names_the_file_and_line(load) -> None:
    data = load({"messages": CHAT}, {"messages": [{"role": "system", "content": "a"}, *CHAT]})
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: the chat template refuses .*System role not supported"):
        tokenised(data.train, chat_tokenizer(tiny_chats.GEMMA))


def test_a_tokenizer_without_an_end_is_refused(load) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="expected an eos_token"):
        check_form(load({"text": "a"}), tokenizer)
