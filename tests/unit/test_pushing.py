"""Uploading to a hub, here a small server that speaks as much of the hub's protocol as a commit needs."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import CheckpointError, HubError
from rankwise.pushing import push


class Hub(ThreadingHTTPServer):
    """Takes commits; ``refusal`` is the status that it answers creating with instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.refusal = 0
        self.made: dict = {}
        self.files: dict[str, bytes] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Request(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            if self.server.refusal:
                return self.answer({"error": "no"}, self.server.refusal)
            self.server.made = json.loads(body)
            return self.answer({"url": f"{self.server.endpoint}/me/{self.server.made['name']}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        assert "/commit/" in path, path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.endpoint}/me/x/commit/1", "commitOid": "1", "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = rw.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rw.LoRA(rank=2, target_modules=["0"]))
    rw.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_all_of_the_adapter_arrives_and_nothing_else(hub, adapter):
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nOf me.\n")
    for name in ("optimizer.pt", "rng_state.pth", ".secret", "trainer_state.json"):
        (adapter / name).write_text("not for others")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "mine.txt").write_text("not for others")
    assert push(adapter, "me/x", private=True, endpoint=hub.endpoint) == f"{hub.endpoint}/me/x/commit/1"
    assert hub.made["visibility"] == "private"
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "rankwise.json")
    assert hub.files == {name: (adapter / name).read_bytes() for name in names}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses(hub, adapter, status):
    hub.refusal = status
    with pytest.raises(HubError, match=r"me/x: the hub at http.* did not take it .*hf auth login"):
        push(adapter, "me/x", endpoint=hub.endpoint)


def test_a_hub_that_is_not_there(monkeypatch, adapter):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="did not take it"):
        push(adapter, "me/x", endpoint="http://127.0.0.1:9")


def test_a_name_that_is_none(adapter):
    with pytest.raises(HubError, match="expected a repository's name such as user/adapter"):
        push(adapter, "a/b/c")


def test_nothing_broken_is_uploaded(hub, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"expected an adapter that can be loaded, found: BrokenFile"):
        push(adapter, "me/x", endpoint=hub.endpoint)
    assert hub.files == {}


def test_on_the_command_line(adapter):
    done = CliRunner().invoke(app, ["push", str(adapter), "me/x"], env={"COLUMNS": "300"})
    assert done.exit_code == 2  # the tests run offline
    assert "HubError: me/x: Cannot reach" in done.output
