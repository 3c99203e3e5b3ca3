"""`rankwise chat` as it is piped, what becomes of `--engine vllm`, and what the commands refuse."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from served import alone, base_model, save_base_and_adapters, service_of
from tiny_llama import tiny_tokenizer
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.errors import RequestError, ServingError, UnsupportedAdapter
from rankwise.serve.chat import Chat
from rankwise.serve.options import ServerOptions
from rankwise.serve.prompts import length_limit
from rankwise.serve.sampling import Sampling
from rankwise.serve.server import listen
from rankwise.serve.vllm import run_vllm, vllm_command, vllm_environment

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_base_and_adapters(path, 2)
    return path


@pytest.fixture
def talk(folder):
    """What a chat with a0 and a1 prints for some lines."""
    service = service_of(folder)
    for name in ("a0", "a1"):
        service.engine.call(lambda name=name: service.engine.store.add(name, folder / "adapters" / name)).result(60)

    def printed(*lines: str, system: str | None = None) -> str:
        output = io.StringIO()
        console = Console(file=output, width=500, markup=False)
        Chat(service, "a0", Sampling(max_tokens=6), console, system).run(iter(lines))
        return output.getvalue()

    yield printed
    service.engine.close()


@pytest.fixture
def says(folder):
    def answer(name: str | None, text: str) -> str:
        path = None if name is None else folder / "adapters" / name
        return TOKENIZER.decode(alone(base_model(folder), path, TOKENIZER(text)["input_ids"], 6), True)

    return answer


def test_a_line_is_answered_and_remembered(talk, says):
    first = says("a0", "<user>hi<assistant>")
    second = says("a0", f"<user>hi<assistant>{first}<eos><user>and?<assistant>")
    assert talk("hi", "", "and?") == f"{first}\n{second}\n"


def test_who_answers_is_chosen(talk, says):
    first = says("a1", "<user>hi<assistant>")
    assert talk("/adapter a1", "hi") == f"{first}\n"
    assert talk("/base", "hi") == f"{says(None, '<user>hi<assistant>')}\n"
    after = says(None, f"<user>hi<assistant>{first}<eos><user>hi<assistant>")
    assert talk("/adapter a1", "hi", "/base", "hi").splitlines()[-1] == after
    assert "UnknownModel" in talk("/adapter a7")


def test_beside_the_base(talk, says):
    text = "<user>hi<assistant>"
    assert talk("/beside", "hi") == f"[base]\n{says(None, text)}\n[a0]\n{says('a0', text)}\n"
    assert talk("/beside", "/base", "hi") == f"{says(None, text)}\n"


def test_the_system_message_and_a_new_start(talk, says):
    expected = says("a0", "<system>be brief<user>hi<assistant>")
    assert talk("hi", system="be brief") == f"{expected}\n"
    assert talk("hi", "/system be brief", "hi").splitlines()[-1] == expected
    assert talk("hi", "/reset", "hi").splitlines() == [says("a0", "<user>hi<assistant>")] * 2


def test_mistakes_are_said_and_the_chat_goes_on(talk, says):
    output = talk("/adaptr a1", "x" * 200, "hi", "/help", "/quit", "never")
    assert "did you mean '/adapter'?" in output and "--max-length" in output and "/reset" in output
    assert says("a0", "<user>hi<assistant>") in output and "never" not in output


def test_chat_is_piped_through_the_command(folder):
    arguments = ["chat", str(folder / "adapters"), "--base", str(folder / "base"), "--max-tokens", "3"]
    result = CliRunner().invoke(app, arguments, input="hi\n/adapter a1\nhi\n", env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["chat", str(folder / "nowhere")])
    assert result.exit_code == 2 and "no such directory" in " ".join(result.output.split())


def test_vllm_s_command_line():
    options = ServerOptions(
        host="0.0.0.0", port=9, api_key="k", max_length=2048, max_adapters=3, load_from_anywhere=True
    )
    adapters = {name: Path(f"/a/{name}") for name in ("x", "y", "z", "u")}
    command = vllm_command("/models/m", "m", adapters, [8, 65, 2], options)
    assert command[:3] == ["vllm", "serve", "/models/m"]
    for flag, value in (("--max-lora-rank", "128"), ("--max-loras", "3"), ("--max-model-len", "2048"), ("--port", "9")):
        assert command[command.index(flag) + 1] == value
    assert command[-5:] == ["--lora-modules", "x=/a/x", "y=/a/y", "z=/a/z", "u=/a/u"]
    assert "k" not in command, "a key does not belong into the list of processes"
    assert vllm_environment(options) == {"VLLM_API_KEY": "k", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    assert vllm_environment(ServerOptions()) == {}


def test_vllm_is_started_where_it_is_there(folder, tmp_path, monkeypatch):
    adapters = {"a0": folder / "adapters/a0"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServingError, match="pip install vllm"):
        run_vllm("m", "m", adapters, ServerOptions())
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    run_vllm("m", "m", adapters, ServerOptions(api_key="k"))
    ((program, command, environment),) = started
    assert program == "vllm" and "--lora-modules" in command and environment["VLLM_API_KEY"] == "k"


def test_what_vllm_would_misread_is_refused(folder, tmp_path):
    from served import save_adapter

    save_adapter(base_model(folder), tmp_path / "dora", 0, variant="dora")
    with pytest.raises(UnsupportedAdapter, match="DoRA"):
        run_vllm("m", "m", {"dora": tmp_path / "dora"}, ServerOptions())


def test_an_address_that_is_taken_is_said_before_a_model_is_loaded(folder):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(folder / "base"), "--port", port], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and "ServingError" in result.output and "--port" in result.output


def test_no_longer_than_the_model_knows_places_for(folder):
    model = base_model(folder)
    assert length_limit(model, None) == 128 and length_limit(model, 100) == 100
    with pytest.raises(RequestError, match="128"):
        length_limit(model, 129)
