"""The server as a process: the real model and OpenAI's own client, the page in a real browser, a graceful stop."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from served import alone, base_model, save_adapter, save_base_and_adapters, until
from tiny_llama import tiny_tokenizer

pytestmark = pytest.mark.end_to_end
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`rankwise serve` with these arguments on a free port, and its address."""
    command = [sys.executable, "-m", "rankwise", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "RANKWISE_API_KEY": ""}
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)

        def address() -> re.Match | None:
            return re.search(r"Serving on (http://\S+)", Path(log.name).read_text())

        try:
            until(lambda: bool(address()) or server.poll() is not None, seconds=300)
            assert address(), Path(log.name).read_text()
            yield server, address()[1]
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_base_and_adapters(path, 2)
    return path


def test_openai_s_client_gets_what_generate_says(smollm2, tmp_path: Path):
    model, tokenizer = smollm2
    for seed in range(2):
        save_adapter(model, tmp_path / f"adapters/a{seed}", seed, size=0.02)
    prompts = ["The capital of France is", "Once upon a time", "def add(a, b):"]
    expected = {
        (name, prompt): tokenizer.decode(
            alone(model, None if name is None else tmp_path / "adapters" / name, tokenizer(prompt)["input_ids"], 12),
            skip_special_tokens=True,
        )
        for name in (None, "a0", "a1")
        for prompt in prompts
    }
    assert len(set(expected.values())) > 6
    adapters = str(tmp_path / "adapters")
    with served("smollm2-135m", "--adapters", adapters, "--dtype", "float32", "--api-key", "k") as (_, address):
        client = OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)
        names = [model.id for model in client.models.list()]
        assert names == ["smollm2-135m", "a0", "a1"]
        streams = {
            key: client.completions.create(
                model=key[0] or names[0], prompt=key[1], max_tokens=12, temperature=0, stream=True
            )
            for key in expected
        }
        for key, stream in streams.items():  # all nine under way together
            assert "".join(chunk.choices[0].text for chunk in stream) == expected[key]
        chat = client.chat.completions.create(
            model="a1", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0
        )
        assert chat.choices[0].message.content and chat.usage.completion_tokens <= 8
        for error, ask in (
            (NotFoundError, {"model": "a9", "prompt": "x"}),
            (BadRequestError, {"model": "a0", "prompt": "x " * 9000}),
            (BadRequestError, {"model": "a0", "prompt": "x", "temperature": -1}),
        ):
            with pytest.raises(error) as caught:
                client.completions.create(**ask)
            assert caught.value.body["message"] and caught.value.code
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_stop_finishes_what_is_under_way(folder: Path):
    base = str(folder / "base")
    with served(base, "--adapters", str(folder / "adapters")) as (server, address):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="a0", prompt="ab", max_tokens=100, temperature=0, stream=True)
        text = next(stream).choices[0].text
        server.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        tokenizer = tiny_tokenizer()
        tokens = alone(base_model(folder), folder / "adapters/a0", tokenizer("ab")["input_ids"], 100)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert server.wait(60) == -signal.SIGTERM


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 400], ids=["desktop", "phone"])
def test_the_page_shows_answers_side_by_side(folder: Path, tmp_path: Path, width: int):
    base = str(folder / "base")
    tokenizer = tiny_tokenizer()
    with served(base, "--adapters", str(folder / "adapters")) as (_, address):
        query = {"models": f"{base},a1", "prompt": "<b>hi</b>", "max_tokens": 12, "ask": 1}
        dom, complaints = shown(f"{address}/?{urlencode(query)}", tmp_path, width)
        assert complaints == []
        cards = re.findall(r"<article><h2>(.*?)</h2><pre>(.*?)</pre><small>(.*?)</small>", dom, re.DOTALL)
        assert [name for name, _, _ in cards] == [base, "a1"]
        for (_, answer, note), adapter in zip(cards, (None, folder / "adapters/a1"), strict=True):
            asked = tokenizer("<user><b>hi</b><assistant>")["input_ids"]
            text = tokenizer.decode(alone(base_model(folder), adapter, asked, 12), skip_special_tokens=True)
            assert letters(answer) == letters(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
            assert re.match(r"\d+ tokens, the first after [\d.]+ s", note)
        assert int(re.search(r'data-width="(\d+)"', dom)[1]) <= width, "something is wider than the window"
        dom, _ = shown(f"{address}/?{urlencode({**query, 'prompt': 'x' * 300})}", tmp_path, width)
        assert "expected fewer than 128 tokens" in dom and 'class="failed"' in dom


def letters(text: str) -> str:
    """Without what a page's markup does not keep apart."""
    return re.sub(r"\s", "", text).replace("\x00", "�").replace("\xa0", "").replace("&nbsp;", "")


def shown(url: str, scratch: Path, width: int) -> tuple[str, list[dict]]:
    """The page once all have answered, and what its console complains of."""
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-pipe",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},900",
    )  # fmt: skip
    with DevTools([CHROMIUM, *options]) as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Log.enable")
        browser.call("Runtime.enable")
        browser.call("Page.navigate", url=url)
        assert until(lambda: browser.value("document.body && document.body.dataset.width"), seconds=120)
        return browser.value("document.documentElement.outerHTML"), browser.logged


class DevTools:
    """A browser that is driven through the two pipes that it reads and writes as files 3 and 4."""

    def __init__(self, command: list[str]) -> None:
        (theirs, ours), (back, answers) = os.pipe(), os.pipe()
        shell = f"exec {shlex.join(command)} 3<&{theirs} 4>&{answers}"
        self.process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(theirs, answers), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self.requests, self.answers = os.fdopen(ours, "wb"), os.fdopen(back, "rb")
        self.session: str | None = None
        self.logged: list[dict] = []
        self.number = 0

    def __enter__(self) -> "DevTools":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()

    def call(self, method: str, **parameters: object) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.requests.write(json.dumps(message).encode() + b"\0")
        self.requests.flush()
        while (answer := self._read()).get("id") != self.number:
            if answer.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.logged.append(answer["params"])
        return answer["result"]

    def value(self, expression: str) -> object:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def _read(self) -> dict:
        text = b""
        while (letter := self.answers.read(1)) != b"\0":
            assert letter, "the browser has ended"
            text += letter
        return json.loads(text)
