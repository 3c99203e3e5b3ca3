"""OpenAI's API, in process: answers, streams, errors in OpenAI's form, the key, the limits, loading and unloading."""

import asyncio
import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served import OPTIONS, alone, base_model, save_base_and_adapters, service_of, until
from tiny_llama import tiny_tokenizer

from rankwise.serve.api import make_app

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_base_and_adapters(path, 3)
    return path


@pytest.fixture(scope="module")
def service(folder):
    return service_of(folder)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        for name in ("a0", "a1"):
            body = {"lora_name": name, "lora_path": str(service.roots[0] / name)}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        yield client
    assert not service.engine.alive


def completion(client, **fields):
    return client.post("/v1/completions", json={"model": "a0", "prompt": "ab", "temperature": 0, **fields})


def chat(client, **fields):
    messages = [{"role": "user", "content": "hi"}]
    return client.post("/v1/chat/completions", json={"model": "a0", "messages": messages, "temperature": 0, **fields})


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def expected(folder, name: str | None, text: str, length: int) -> str:
    adapter = None if name is None else folder / "adapters" / name
    tokens = alone(base_model(folder), adapter, TOKENIZER(text)["input_ids"], length)
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_models_are_the_base_and_its_adapters(client):
    models = client.get("/v1/models").json()
    assert [(model["id"], model["parent"]) for model in models["data"]] == [
        ("base", None), ("a0", "base"), ("a1", "base"),
    ]  # fmt: skip


def test_a_completion_is_what_generate_says(client, folder):
    body = completion(client, max_tokens=12).json()
    assert body["object"] == "text_completion" and body["model"] == "a0"
    (choice,) = body["choices"]
    assert choice == {
        "index": 0, "text": expected(folder, "a0", "ab", 12), "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


def test_sixteen_tokens_are_openai_s_default(client):
    assert completion(client).json()["usage"]["completion_tokens"] == 16


def test_a_chat_goes_through_the_template(client, folder):
    body = chat(client, max_completion_tokens=9).json()
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected(folder, "a0", "<user>hi<assistant>", 9)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    same = chat(client, max_tokens=9, messages=[{"role": "user", "content": parts}])
    assert same.json()["choices"] == body["choices"]


@pytest.mark.parametrize("ask", [completion, chat])
def test_a_stream_is_the_whole_in_pieces(client, ask):
    whole = ask(client, max_tokens=20).json()
    streamed = events(ask(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    *chunks, last = streamed
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in streamed}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["text"] if ask is completion else choice["delta"]["content"] for choice in choices)
    (answer,) = whole["choices"]
    assert text == (answer["text"] if ask is completion else answer["message"]["content"])
    assert [choice["finish_reason"] for choice in choices] == [None] * 19 + ["length"]
    if ask is chat:
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * 19


def test_several_prompts_and_several_answers(client, folder):
    body = completion(client, prompt=["ab", "c"], max_tokens=4, n=2).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [text for text in (expected(folder, "a0", p, 4) for p in ("ab", "c")) for _ in range(2)]
    tokens = [TOKENIZER(text)["input_ids"] for text in ("ab", "c")]
    same = completion(client, prompt=tokens, max_tokens=4, n=2).json()
    assert same["choices"] == body["choices"]
    assert body["usage"]["completion_tokens"] == 16
    drawn = completion(client, temperature=2, seed=1, n=3, max_tokens=8).json()["choices"]
    assert len({choice["text"] for choice in drawn}) == 3
    assert completion(client, temperature=2, seed=1, n=3, max_tokens=8).json()["choices"] == drawn


def test_stop_and_logprobs(client):
    text = completion(client, max_tokens=12).json()["choices"][0]["text"]
    (choice,) = completion(client, max_tokens=12, stop=text[3]).json()["choices"]
    assert choice["text"] == text[: text.index(text[3])] and choice["finish_reason"] == "stop"
    (choice,) = completion(client, max_tokens=3, logprobs=2).json()["choices"]
    assert [len(part) for part in choice["logprobs"]["top_logprobs"]] == [2, 2, 2]
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])
    (choice,) = chat(client, max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 3 and all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)


LONG = "x" * OPTIONS.max_length


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"model": "a0"}, 400, "prompt: Field required"),
        ("completions", {"prompt": "x"}, 400, "model: Field required"),
        ("completions", {"model": "a9", "prompt": "x"}, 404, "'a9'; did you mean"),
        ("completions", {"model": "a0", "prompt": ""}, 400, "found none"),
        ("completions", {"model": "a0", "prompt": []}, 400, "expected 1 to 8 answers"),
        ("completions", {"model": "a0", "prompt": ["x"] * 9}, 400, "9 prompts"),
        ("completions", {"model": "a0", "prompt": [5, 99999]}, 400, "expected tokens from 0 to"),
        ("completions", {"model": "a0", "prompt": [-1]}, 400, "expected tokens from 0 to"),
        ("completions", {"model": "a0", "prompt": LONG}, 400, "--max-length"),
        ("completions", {"model": "a0", "prompt": "x", "max_tokens": 101}, 400, "expected at most 100"),
        ("completions", {"model": "a0", "prompt": "x" * 100, "max_tokens": 21}, 400, "expected at most 20"),
        ("completions", {"model": "a0", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"model": "a0", "prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"model": "a0", "prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ("completions", {"model": "a0", "prompt": "x", "top_p": 0}, 400, "top_p"),
        ("completions", {"model": "a0", "prompt": "x", "stop": [""]}, 400, "stop"),
        ("completions", {"model": "a0", "prompt": "x", "seed": 2**70}, 400, "seed"),
        ("completions", {"model": "a0", "prompt": "x", "echo": True}, 400, "echo is not done here"),
        ("completions", {"model": "a0", "prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ("completions", {"model": "a0", "prompt": "x", "tempreature": 0.5}, 400, "tempreature is not known"),
        ("completions", {"model": "a0", "prompt": "\ud800"}, 400, "surrogate"),
        ("completions", {"model": "\ud800", "prompt": "x"}, 400, "surrogate"),
        ("completions", [], 400, "the request"),
        ("chat/completions", {"model": "a0", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "a0", "messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ("chat/completions", {"model": "a0", "messages": [{"role": "user"}]}, 400, "content"),
        (
            "chat/completions",
            {"model": "a0", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
            400,
            "tools is not done here",
        ),
        ("load_lora_adapter", {"lora_name": "x"}, 400, "lora_path"),
        ("unload_lora_adapter", {"lora_name": "a9"}, 404, "'a9'"),
        ("unload_lora_adapter", {"lora_name": "base"}, 400, "base model"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_errors_have_openai_s_form(client, service, path, body, status, message):
    response = client.post(
        f"/v1/{path}", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert message in response.json()["error"]["message"]
    assert is_idle(service)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}", b""])
def test_what_is_no_json_is_said(client, content):
    content = content[: OPTIONS.max_body]
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "message" in response.json()["error"]


def test_values_that_ask_for_nothing_are_taken(client):
    fields = {"presence_penalty": 0, "best_of": 1, "logit_bias": {}, "user": "me", "stop": None, "echo": False}
    assert completion(client, **fields).status_code == 200
    assert chat(client, tools=[], response_format={"type": "text"}, store=True, max_tokens=2).status_code == 200


def is_idle(service) -> bool:
    return until(lambda: not service.engine.running and not service.engine.waiting)


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_request_is_refused(client, chunked):
    content = json.dumps({"model": "a0", "prompt": "x" * OPTIONS.max_body}).encode()
    body = (content[start : start + 1000] for start in range(0, len(content), 1000)) if chunked else content
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and str(OPTIONS.max_body) in response.json()["error"]["message"]


def test_adapters_are_loaded_and_unloaded_under_way(client, folder):
    def load(name, path):
        return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    assert load("new", folder / "adapters/a2").status_code == 200
    answer = completion(client, model="new", max_tokens=6).json()["choices"][0]["text"]
    assert answer == expected(folder, "a2", "ab", 6)
    assert load("new", folder / "adapters/a2").status_code == 400
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert completion(client, model="new").status_code == 404
    outside = load("out", folder / "base")
    assert outside.status_code == 400 and "--load-from-anywhere" in outside.json()["error"]["message"]
    nowhere = load("none", folder / "adapters/none")
    assert nowhere.status_code == 400 and nowhere.json()["error"]["code"] == "BrokenFile"


def test_an_adapter_that_fails_on_its_turn_is_an_error_with_a_status(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    shutil.copytree(folder / "base", tmp_path / "base")
    service = service_of(tmp_path, max_adapters=1)
    with TestClient(make_app(service)) as client:
        for name in ("a0", "a1"):
            path = str(tmp_path / "adapters" / name)
            client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        (tmp_path / "adapters/a0/adapter_model.safetensors").write_bytes(b"")  # no longer in memory
        for stream in (False, True):
            response = completion(client, stream=stream)
            assert response.status_code == 400 and response.json()["error"]["code"] == "BrokenFile"
        assert completion(client, model="a1").status_code == 200
        assert 'rankwise_requests_total{model="a0",outcome="error"} 2.0' in client.get("/metrics").text


def test_an_error_in_a_stream_is_an_event(client, monkeypatch):
    def broken(*_):
        raise MemoryError("full")

    monkeypatch.setattr("rankwise.serve.engine.step", broken)
    text = completion(client, stream=True).text
    assert text.count("data: ") == 2 and "full" in json.loads(text.split("data: ")[-1])["error"]["message"]


def test_the_queue_has_an_end(folder):
    service = service_of(folder, max_batch=1, max_waiting=1)
    app = make_app(service)
    with TestClient(app) as client:
        with client.stream("POST", "/v1/completions", json={"model": "base", "prompt": "a"}):
            answers = [completion(client, model="base", n=1, prompt=["a"], max_tokens=1).status_code]
        service.engine.max_waiting = 0
        refused = completion(client, model="base")
        assert answers == [200] and refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_the_key_guards_what_is_below_v1(folder):
    with TestClient(make_app(service_of(folder, api_key="secret"))) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "é"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            response = client.get("/v1/models", headers=encoded)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
        assert "default-src 'none'" in client.get("/").headers["Content-Security-Policy"]


def test_metrics_are_by_model(client, service):
    before = sample(client, 'rankwise_tokens_total{kind="answer",model="a1"}')
    completion(client, model="a1", max_tokens=7)
    assert is_idle(service)
    assert sample(client, 'rankwise_tokens_total{kind="answer",model="a1"}') == before + 7
    assert sample(client, 'rankwise_time_to_first_token_seconds_count{model="a1"}') >= 1
    assert sample(client, 'rankwise_adapter_loaded_bytes{model="a1"}') == service.engine.store.adapters["a1"].size > 0
    assert "a9" not in client.get("/metrics").text, "names that nobody serves are no labels"


def sample(client, name: str) -> float:
    lines = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines())
    return next((float(value) for label, _, value in lines if label == name), 0.0)


class Vanishing:
    """An ASGI client that goes away once it has got so many messages."""

    def __init__(self, body: dict, after: int) -> None:
        self.body, self.after = json.dumps(body).encode(), after
        self.got: list[dict] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.got.append(message)
        if len(self.got) >= self.after:
            self.gone.set()

    async def ask(self, app, seconds: float = 0) -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
            "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        asyncio.get_running_loop().call_later(seconds or 99, self.gone.set)
        await app(scope, self.receive, self.send)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_row(folder, stream):
    service = service_of(folder, max_length=None, max_tokens=127)
    app = make_app(service)
    body = {"model": "base", "prompt": "a", "max_tokens": 120, "stream": stream}
    clients = [Vanishing(body, after=3) for _ in range(10)]

    async def all_ask() -> None:
        await asyncio.wait_for(asyncio.gather(*(client.ask(app, 0 if stream else 0.05) for client in clients)), 30)

    asyncio.run(all_ask())
    value = service.metrics.registry.get_sample_value
    assert until(lambda: value("rankwise_requests_total", {"model": "base", "outcome": "cancelled"}) == 10)
    assert is_idle(service)
    assert (value("rankwise_tokens_total", {"model": "base", "kind": "answer"}) or 0) < 10 * 120
    service.engine.close()
