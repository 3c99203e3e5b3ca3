"""The server as a process: the real model and OpenAI's own client, the page in a real browser, a graceful stop."""

import os
import re
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
        done = chromium(f"{address}/?{urlencode(query)}", tmp_path, f"--window-size={width},900", "--dump-dom")
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        cards = re.findall(r"<article><h2>(.*?)</h2><pre>(.*?)</pre><small>(.*?)</small>", done.stdout, re.DOTALL)
        assert [name for name, _, _ in cards] == [base, "a1"]
        for (_, shown, note), adapter in zip(cards, (None, folder / "adapters/a1"), strict=True):
            asked = tokenizer("<user><b>hi</b><assistant>")["input_ids"]
            text = tokenizer.decode(alone(base_model(folder), adapter, asked, 12), skip_special_tokens=True)
            assert letters(shown) == letters(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
            assert re.match(r"\d+ tokens, the first after [\d.]+ s", note)
        width_shown = re.search(r'data-width="(\d+)"', done.stdout)
        assert int(width_shown[1]) <= width, "nothing is wider than the window"
        failed = chromium(f"{address}/?{urlencode({**query, 'prompt': 'x' * 300})}", tmp_path, "--dump-dom")
        assert "expected fewer than 128 tokens" in failed.stdout and 'class="failed"' in failed.stdout


def letters(text: str) -> str:
    """Without what a page's markup does not keep apart."""
    return re.sub(r"\s", "", text).replace("\x00", "�").replace("\xa0", "").replace("&nbsp;", "")


def chromium(url: str, scratch: Path, *options: str) -> subprocess.CompletedProcess:
    quiet = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--virtual-time-budget=20000", f"--user-data-dir={scratch / 'profile'}",
    )  # fmt: skip
    command = [CHROMIUM, *quiet, *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, cwd=scratch)
