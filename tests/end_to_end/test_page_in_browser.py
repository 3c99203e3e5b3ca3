"""The page in a real browser: it renders in light and dark, on a desktop and a phone, without a console error."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rankwise.train import recipe as recipes
from rankwise.train.run import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None and os.environ.get("RANKWISE_NEEDS_BROWSER"):
    pytest.fail("expected chromium on the PATH, found none", pytrace=False)
pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")]

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"


def chromium(page: Path, scratch: Path, *options: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, *QUIET, f"--user-data-dir={scratch / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console_messages(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    data = out / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}: ", "completion": "{i} is said"}}\n' for i in range(24)))
    recipe = recipes.parse(
        {
            "model": str(tiny), "data": str(data), "eval_split": 8, "rank": 4, "max_steps": 3, "eval_steps": 1,
            "logging_steps": 1, "per_device_train_batch_size": 4, "alignment_steps": 1, "output_dir": str(out / "run"),
        }
    )  # fmt: skip
    return run.train(recipe, Console(quiet=True)).page


def pixels(png: Path) -> torch.Tensor:
    from matplotlib.image import imread

    return torch.from_numpy(imread(png)[..., :3].copy())


@pytest.mark.parametrize("size", ["1280,900", "500,900"], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_renders_without_a_console_error(page: Path, tmp_path: Path, size: str, dark: bool):
    shot = tmp_path / "shot.png"
    options = [f"--window-size={size}", f"--screenshot={shot}", *([DARK] if dark else [])]
    done = chromium(page, tmp_path, *options)
    assert console_messages(done) == []
    seen = pixels(shot)
    background = seen[2, 2].mean()
    assert (background < 0.2) if dark else (background > 0.9)
    assert seen.std() > 0.03, "the page is blank"


def test_nothing_but_a_figure_or_a_table_is_wider_than_a_phone(page: Path, tmp_path: Path):
    probe = tmp_path / "probe.html"
    script = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    probe.write_text(page.read_text().replace("</body>", script))
    dom = chromium(probe, tmp_path, "--window-size=500,900", "--dump-dom").stdout
    wide, window = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert wide <= window


def test_a_console_error_would_be_seen(tmp_path: Path):
    broken = tmp_path / "broken.html"
    broken.write_text("<p>x</p><script>console.error('boom')</script>")
    assert "boom" in console_messages(chromium(broken, tmp_path, "--dump-dom"))[0]
